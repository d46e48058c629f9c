"""The blockwise backend: exact attention in plain PyTorch, with every feature, in memory linear in the lengths.

Sequences of similar lengths share batched matrix products, whatever the layout (`attention_buckets`). A block of scores
is made, used and forgotten, and made again in the hand-written backward pass (`attention_blockwise_passes`). Rows see
their keys in one block where they are few, and else in several by online softmax (Milakov & Gimelshein 2018; Dao et al.
2022, algorithm 1). What causality, window or lengths leave empty is skipped (`attention_blocks`). Sums run in a fixed
order: two backward passes agree to the bit.

Scores are float32 also for half-precision inputs (float64 for float64). Products of bfloat16 inputs are taken from
bfloat16 units where the CPU has them, into float32: scores are exact to float32.

Shapes: B sequences, L queries, S keys, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention_biases import Bias
from ..attention_layouts import Layout
from ..attention_settings import AttentionSettings
from .attention_blocks import BlockwiseSettings, block_settings
from .attention_blockwise_ops import attention_blockwise_op
from .attention_blockwise_passes import backward, exact_products, forward


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    settings: AttentionSettings,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention block by block; see `attention` for the arguments."""
    bias, device, reach = settings.bias, q.device, q_layout.length + kv_layout.length
    dense = bias.dense(q_layout.lengths, q_layout.lengths) if bias is not None and bias.kind == "dense" else None
    biased = bias is not None and dense is None
    ahead = torch.arange(-reach, reach + 1, device=device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    diagonals = _diagonals(bias if biased else None, ahead, settings, dtype)
    seed, bits = _dropout_seed(settings, device)
    causal, window, _, softcap, scale, dropout_p, _, return_lse = settings
    if torch.compiler.is_compiling():
        left, right = (-1 if side is None else side for side in window or (None, None))
        places = (q_layout.mask, q_layout.cu_seqlens, kv_layout.mask, kv_layout.cu_seqlens)
        numbers = (causal, left, right, softcap, scale, dropout_p, seed, biased)
        out, lse = attention_blockwise_op(q, k, v, diagonals, dense, *places, *numbers)
        return out, lse.transpose(-1, -2) if return_lse else None
    asked = AttentionSettings(causal, window, None, softcap, scale, dropout_p, seed, return_lse)
    blocks = block_settings(q, k, q_layout, kv_layout, asked, bits, reach, biased)
    out, lse = _BlockwiseAttention.apply(q, k, v, diagonals, dense, blocks)
    return out, None if lse is None else lse.transpose(-1, -2)


def _dropout_seed(settings: AttentionSettings, device: torch.device) -> tuple[Tensor | None, int | None]:
    """Return the seed of counter-based dropout, or bits for torch's generator where no seed was given on a CPU."""
    seed = settings.seed
    if settings.dropout_p > 0 and seed is None:
        seed = torch.randint(1 << 62, (), device=device)
        if device.type == "cpu" and not torch.compiler.is_compiling():
            return None, int(seed)
    return (None if seed is None else torch.as_tensor(seed, dtype=torch.int64, device=device)), None


def _diagonals(bias: Bias | None, ahead: Tensor, settings: AttentionSettings, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to a score by `key - position`, `[H | 1, len(ahead)]`; None: nothing."""
    left, right = settings.reach
    line = None if bias is None else bias.by_distance(ahead).to(dtype)
    if left is None and right is None:
        return line
    line = torch.zeros(1, len(ahead), dtype=dtype, device=ahead.device) if line is None else line
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if left is not None:
        hidden = hidden | (ahead < -left)
    if right is not None:
        hidden = hidden | (ahead > right)
    return line.masked_fill(hidden, -torch.inf)


class _NotTwice(torch.autograd.Function):
    """Pass gradients on, and refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(
            "attention's backward pass cannot be differentiated again; use attention(backend='reference')"
        )


def _refuse_second(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    if not torch.is_grad_enabled():
        return gradients
    return tuple(g if g is None else _NotTwice.apply(g.requires_grad_()) for g in gradients)


class _BlockwiseAttention(torch.autograd.Function):
    """Offer `forward` and `backward` to autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        diagonals: Tensor | None,
        dense: Tensor | None,
        settings: BlockwiseSettings,
    ) -> tuple[Tensor, Tensor | None]:
        settings = replace(settings, diagonals=diagonals, dense=dense)
        with torch.autocast(q.device.type, enabled=False), exact_products(q, settings.plan):
            out, lse = forward(settings, q, k, v)
        ctx.save_for_backward(q, k, v, diagonals, dense, None if lse is None else out, lse)
        ctx.settings = replace(settings, diagonals=None, dense=None)
        return out, lse[..., 0] if settings.return_lse and lse is not None else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, diagonals, dense, out, lse = ctx.saved_tensors
        settings = replace(ctx.settings, diagonals=diagonals, dense=dense)
        d_lse = None if grads[1] is None else grads[1].unsqueeze(-1)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False), exact_products(q, settings.plan):
            gradients = backward(settings, q, k, v, out, lse, grads[0], d_lse, *ctx.needs_input_grad[3:5])
        return (*_refuse_second(gradients), None)
