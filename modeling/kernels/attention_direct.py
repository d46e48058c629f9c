"""Attention of a few queries without gradients, as a decoding step asks for it: two products and a softmax.

PyTorch's fused kernels take twice to eight times as long for a single query (`benchmarks/generate.py`), and scores of a
few queries are no more memory than the keys. The blockwise backend comes here by itself.

Shapes: B batch, L queries, S keys, H heads, G key/value heads, R = H / G, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_biases import Bias
from .attention_layouts import Layout, query_positions, visible

FEW = 16  #: queries
SMALL = 1 << 19  #: elements of the keys up to which half-precision products are slower than copies in float32


def is_direct(q: Tensor, q_layout: Layout, kv_layout: Layout, plain: bool) -> bool:
    """Whether there are few queries in padded layouts; `plain`: nobody wants gradients, dropout or lse."""
    packed = q_layout.is_packed or kv_layout.is_packed
    return plain and not packed and q_layout.length <= FEW and q.device.type == "cpu" and q.numel() > 0


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
    batch, length, heads, _ = q.shape
    groups = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    if not kv_layout.finite:
        k, v = kv_layout.clean(k), kv_layout.clean(v)
    if k.shape[1] == 0:
        return q.new_zeros(batch, length, heads, v.shape[-1])
    dtype = wide if k.numel() <= SMALL else q.dtype
    q_BHLD, k_BGSD, v_BGSD = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    q_BHLD = q_BHLD * scale
    scores_BHLS = torch.matmul(q_BHLD.reshape(batch, groups, -1, q.shape[-1]), k_BGSD.transpose(2, 3))
    scores_BHLS = scores_BHLS.to(wide).view(batch, heads, length, -1)
    if softcap is not None:
        scores_BHLS = softcap * torch.tanh(scores_BHLS / softcap)
    key = ("direct", id(kv_layout), causal, window, wide)
    mask, empty, _ = q_layout.once(key, lambda: (*_mask(q_layout, kv_layout, causal, window, wide), kv_layout))
    if bias is not None:
        bias = bias.narrow(None, length, k.shape[1])
        scores_BHLS = scores_BHLS + bias.dense(query_positions(q_layout, kv_layout, causal), kv_layout.positions)
    if mask is not None:
        scores_BHLS = scores_BHLS + mask
    if bias is not None and bias.kind == "dense":  # it may forbid all that the mask allows
        nothing = ~(scores_BHLS > -torch.inf).any(-1, keepdim=True)
        empty = nothing if empty is None else empty | nothing
    weights_BHLS = torch.softmax(scores_BHLS, -1).to(dtype)
    out_BHLD = torch.matmul(weights_BHLS.view(batch, groups, -1, k.shape[1]), v_BGSD)
    out_BHLD = out_BHLD.view(batch, heads, length, -1)
    if empty is not None:
        out_BHLD = out_BHLD.masked_fill(empty, 0)
    return out_BHLD.transpose(1, 2).to(q.dtype)


def _mask(
    q_layout: Layout,
    kv_layout: Layout,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """0 and -inf `[B | 1, 1, L | 1, S]`, and which rows give zeros `[B | 1, 1, L | 1, 1]`; None where nothing does."""
    keep = visible(q_layout, kv_layout, causal, window)
    mask = empty = None
    if keep is not None:
        mask = torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, -torch.inf)
        mask = mask if bool((~keep).any()) else None
        empty = ~keep.any(-1, keepdim=True)
    if q_layout.mask is not None:
        padding = ~q_layout.mask[:, None, :, None]
        empty = padding if empty is None else empty | padding
    return mask, empty if empty is not None and bool(empty.any()) else None
