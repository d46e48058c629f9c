"""Attention of a few queries without gradients, as a decoding step asks for it: two products and a softmax.

PyTorch's fused kernels take twice to eight times as long for a single query (`benchmarks/generate.py`), and scores of a
few queries are no more memory than the keys. The blockwise backend comes here by itself.

Shapes: B batch, L queries, S keys, H heads, G key/value heads, D head dim; n = B * G, R = H / G * L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_biases import Bias
from .attention_layouts import Layout, query_positions, visible

FEW = 16  #: queries
LANES = 16  #: numbers in a CPU's widest register; rows that are shorter PyTorch's softmax takes number by number
SMALL = 1 << 18  #: elements of the keys up to which half-precision products are slower than copies in float32


def is_direct(q: Tensor, q_layout: Layout, kv_layout: Layout, plain: bool) -> bool:
    """Whether there are few queries in padded layouts; `plain`: nobody wants gradients, dropout or lse."""
    packed = q_layout.is_packed or kv_layout.is_packed
    return plain and not packed and q_layout.length <= FEW and q.device.type == "cpu" and q.numel() > 0


def softmax_(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, in place."""
    if scores.shape[-1] >= LANES:
        return torch.softmax(scores, -1, out=scores)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))


def softmax_backward_(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the scores from that of the weights, in place."""
    if weights.shape[-1] >= LANES:
        return torch.ops.aten._softmax_backward_data.out(gradient, weights, -1, weights.dtype, grad_input=gradient)
    return gradient.sub_((gradient * weights).sum(-1, keepdim=True)).mul_(weights)


def direct_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    bias: Bias | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Compute `softmax(softcap(scale * q k^T) + bias) v` for `[B, L, H, D]`, `[B, S, G, D]`; softmax in float32."""
    batch, length, heads, dim = q.shape
    keys, groups = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    if not kv_layout.finite:
        k, v = kv_layout.clean(k), kv_layout.clean(v)
    if keys == 0:
        return q.new_zeros(batch, length, heads, v.shape[-1])
    dtype = wide if k.numel() <= SMALL else q.dtype
    rows = heads // groups * length
    q_nRD = q.transpose(1, 2).to(dtype).reshape(batch * groups, rows, dim)
    k_nSD, v_nSD = (x.transpose(1, 2).to(dtype).reshape(batch * groups, keys, -1) for x in (k, v))
    key = ("direct", id(kv_layout), causal, window, wide, heads)
    mask_nRS, empty, _ = q_layout.once(
        key, lambda: (*_mask(q_layout, kv_layout, causal, window, wide, heads, groups), kv_layout)
    )
    if dtype == wide and mask_nRS is not None and softcap is None:
        scores_nRS = torch.baddbmm(mask_nRS, q_nRD, k_nSD.transpose(1, 2), alpha=scale)
    else:
        scores_nRS = torch.bmm(q_nRD * scale, k_nSD.transpose(1, 2)).to(wide)
        if softcap is not None:
            scores_nRS = softcap * torch.tanh(scores_nRS / softcap)
        scores_nRS = scores_nRS if mask_nRS is None else scores_nRS + mask_nRS
    if bias is not None:
        bias = bias.narrow(None, length, keys)
        scores_BHLS = scores_nRS.view(batch, heads, length, keys)
        scores_BHLS = scores_BHLS + bias.dense(query_positions(q_layout, kv_layout, causal), kv_layout.positions)
        if bias.kind == "dense":  # it may forbid all that the mask allows
            nothing = ~(scores_BHLS > -torch.inf).any(-1, keepdim=True)
            empty = nothing if empty is None else empty | nothing
        scores_nRS = scores_BHLS.view(batch * groups, rows, keys)
    out_nRD = torch.bmm(softmax_(scores_nRS).to(dtype), v_nSD)
    out_BHLD = out_nRD.to(q.dtype).view(batch, heads, length, -1)
    if empty is not None:
        out_BHLD = out_BHLD.masked_fill(empty, 0)
    return out_BHLD.transpose(1, 2)


def _mask(
    q_layout: Layout,
    kv_layout: Layout,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    dtype: torch.dtype,
    heads: int,
    groups: int,
) -> tuple[Tensor | None, Tensor | None]:
    """0 and -inf `[n, R, S]`, and which rows give zeros `[B | 1, 1, L | 1, 1]`; None where nothing does."""
    keep = visible(q_layout, kv_layout, causal, window)
    mask = empty = None
    if keep is not None and not bool(keep.all()):
        mask = torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, -torch.inf)
        mask = mask.expand(q_layout.batch, heads, q_layout.length, -1)
        mask = mask.reshape(q_layout.batch * groups, -1, kv_layout.length)
        empty = ~keep.any(-1, keepdim=True)
    if q_layout.mask is not None and not bool(q_layout.mask.all()):
        padding = ~q_layout.mask[:, None, :, None]
        empty = padding if empty is None else empty | padding
    return mask, empty if empty is not None and bool(empty.any()) else None
