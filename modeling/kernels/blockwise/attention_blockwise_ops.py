"""The blockwise backend as `torch.library` operators, for graphs that are compiled or exported.

All that the operators read are tensors and numbers: layouts come as masks or `cu_seqlens`, open windows as -1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..attention_layouts import Layout
from ..attention_settings import AttentionSettings
from .attention_blocks import BlockwiseSettings, block_settings
from .attention_blockwise_passes import backward, exact_products, forward


def _layout_of(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    if cu_seqlens is not None:
        return Layout.packed(cu_seqlens)
    return Layout.full(x.shape[0], x.shape[1], x.device) if mask is None else Layout.padded(mask)


def _settings_of(
    q: Tensor,
    k: Tensor,
    diagonals: Tensor | None,
    q_mask: Tensor | None,
    q_cu: Tensor | None,
    kv_mask: Tensor | None,
    kv_cu: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    biased: bool,
) -> BlockwiseSettings:
    window = (None if left < 0 else left, None if right < 0 else right)
    layouts = (_layout_of(q, q_mask, q_cu), _layout_of(k, kv_mask, kv_cu))
    reach = 0 if diagonals is None else diagonals.shape[1] // 2
    asked = AttentionSettings(causal, window, None, softcap, scale, dropout_p, seed, return_lse=True)
    return block_settings(q, k, *layouts, asked, None, reach, biased)


@torch.library.custom_op("urform::attention_blockwise", mutates_args=())
def attention_blockwise_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonals: Tensor | None,
    dense: Tensor | None,
    q_mask: Tensor | None,
    q_cu: Tensor | None,
    kv_mask: Tensor | None,
    kv_cu: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    biased: bool,
) -> tuple[Tensor, Tensor]:
    """Compute blockwise attention with layouts as tensors and open windows as -1; also return lse, `[..., H]`."""
    places = (q_mask, q_cu, kv_mask, kv_cu)
    settings = _settings_of(q, k, diagonals, *places, causal, left, right, softcap, scale, dropout_p, seed, biased)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False), exact_products(q, settings.plan):
        out, lse = forward(replace(settings, diagonals=diagonals, dense=dense), q, k, v)  # the settings ask for lse
        return out, cast(Tensor, lse)[..., 0]


@torch.library.custom_op("urform::attention_blockwise_backward", mutates_args=())
def _backward_op(
    d_out: Tensor,
    d_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonals: Tensor | None,
    dense: Tensor | None,
    q_mask: Tensor | None,
    q_cu: Tensor | None,
    kv_mask: Tensor | None,
    kv_cu: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    places = (q_mask, q_cu, kv_mask, kv_cu)
    settings = _settings_of(q, k, diagonals, *places, causal, left, right, softcap, scale, dropout_p, seed, biased)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False), exact_products(q, settings.plan):
        settings, d_lse = replace(settings, diagonals=diagonals, dense=dense), d_lse.unsqueeze(-1)
        wanted = (biased, dense is not None)
        *grads, d_diagonals, d_dense = backward(settings, q, k, v, out, lse.unsqueeze(-1), d_out, d_lse, *wanted)
    extra = (x if x is not None else q.new_empty(0) for x in (d_diagonals, d_dense))
    return (*grads, *extra)  # type: ignore[return-value]


@attention_blockwise_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:-1], v.shape[-1]), lse


@_backward_op.register_fake
def _(
    d_out: Tensor,
    d_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diagonals: Tensor | None,
    dense: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_diagonals = q.new_empty(0) if diagonals is None or not rest[-1] else torch.empty_like(diagonals)
    d_dense = q.new_empty(0) if dense is None else torch.empty_like(dense, dtype=lse.dtype)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_diagonals, d_dense


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:9], inputs[15])
    ctx.settings = (*inputs[9:15], inputs[16])


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors, seed = ctx.saved_tensors
    *settings, biased = ctx.settings
    dq, dk, dv, d_diagonals, d_dense = _backward_op(d_out, d_lse, out, lse, *tensors, *settings, seed, biased)
    wanted = ctx.needs_input_grad
    last = (d_diagonals if wanted[3] and biased else None, d_dense.to(tensors[4].dtype) if wanted[4] else None)
    return (dq, dk, dv, *last, *(None for _ in wanted[5:]))


attention_blockwise_op.register_autograd(_differentiate, setup_context=_save_for_backward)
