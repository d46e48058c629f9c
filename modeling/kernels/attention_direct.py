"""Attention of a few queries without gradients, as a decoding step asks for it: two products and a softmax.

PyTorch's fused kernels take twice to eight times as long for a single query (`benchmarks/generate.py`), and scores of a
few queries take no more memory than the keys. `attention()` asks `is_direct` once per call, before its other checks: a
decoding step would spend as long on them as on the attention itself.

Shapes: B batch, L queries, S keys, H heads, G key/value heads, D head dim; n = B * G, R = H / G * L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_layouts import Layout, query_positions, visible
from .attention_settings import AttentionSettings, Window

MAX_DIRECT_QUERIES = 16
MIN_SOFTMAX_COLUMNS = 16  #: PyTorch's softmax takes shorter rows number by number: a CPU's widest register holds 16
MAX_UPCAST_ELEMENTS = 1 << 18  #: keys up to this size: products in half precision are slower than copies in float32
_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def is_direct(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_layout: Layout, settings: AttentionSettings
) -> bool:
    """Return whether this is sound attention of few queries on a CPU, without gradients, dropout or lse.

    What is refused here is no error yet: `attention()` looks closer and says what is wrong.
    """
    if settings.dropout_p > 0 or settings.return_lse or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
        or (settings.bias is not None and settings.bias.weight.requires_grad)
    ):  # fmt: skip
        return False
    return _is_short(q, q_layout, kv_layout) and _is_sound(q, k, v, q_layout, kv_layout)


def _is_short(q: Tensor, q_layout: Layout, kv_layout: Layout) -> bool:
    """Return whether both layouts are padded and the queries few, on a CPU."""
    if q_layout.cu_seqlens is not None or kv_layout.cu_seqlens is not None:
        return False
    return q_layout.length <= MAX_DIRECT_QUERIES and q.is_cpu and q.dtype in _DTYPES


def _is_sound(q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, kv_layout: Layout) -> bool:
    """Return whether the tensors agree with each other and with their padded layouts."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4 or 0 in q_shape or k_shape[2] == 0:
        return False
    batch, length, heads, dim = q_shape
    if (batch, dim) != (k_shape[0], k_shape[3]) or k_shape[:3] != v_shape[:3] or heads % k_shape[2]:
        return False
    if (q_layout.batch, q_layout.length) != (batch, length) or (kv_layout.batch, kv_layout.length) != k_shape[:2]:
        return False
    same_device = k.is_cpu and v.is_cpu and q_layout.lengths.is_cpu and kv_layout.lengths.is_cpu
    return same_device and k.dtype == q.dtype == v.dtype


def softmax_(scores: Tensor) -> Tensor:
    """Compute the softmax over the last dimension, in place."""
    if scores.shape[-1] >= MIN_SOFTMAX_COLUMNS:
        return torch.softmax(scores, -1, out=scores)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))


def softmax_backward_(gradient: Tensor, weights: Tensor) -> Tensor:
    """Turn the gradient of the weights into that of the scores, in place."""
    if weights.shape[-1] >= MIN_SOFTMAX_COLUMNS:
        return torch.ops.aten._softmax_backward_data.out(gradient, weights, -1, weights.dtype, grad_input=gradient)
    return gradient.sub_((gradient * weights).sum(-1, keepdim=True)).mul_(weights)


def direct_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    settings: AttentionSettings,
) -> Tensor:
    """Compute `softmax(softcap(scale * q k^T) + bias) v` for `[B, L, H, D]`, `[B, S, G, D]`; softmax in float32."""
    causal, window, bias, softcap, scale, *_ = settings
    batch, length, heads, dim = q.shape
    keys, groups = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    if not kv_layout.finite:
        k, v = kv_layout.clean(k), kv_layout.clean(v)
    if keys == 0:
        return q.new_zeros(batch, length, heads, v.shape[-1])
    dtype = wide if k.numel() <= MAX_UPCAST_ELEMENTS else q.dtype
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
    window: Window | None,
    dtype: torch.dtype,
    heads: int,
    groups: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Build a mask of 0 and -inf `[n, R, S]`, and which rows give zeros `[B | 1, 1, L | 1, 1]`; None for nothing."""
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
