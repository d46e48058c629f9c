# mypy: disable-error-code="no-untyped-def"
"""Attention of few queries over a long cache, in Triton: the keys are split over programs, then the parts are combined.

With one query per sequence a program per (sequence, head) leaves most of a GPU idle. Here a program takes one key/value
head of one sequence, all query heads that share it and all their queries (so that the tile of rows is filled and each
key is read once), and one of `splits` stretches of the keys; a second kernel adds the parts in a fixed order, weighted
by their log-sum-exps ("Flash-Decoding", Dao et al. 2023; the sum itself: Milakov & Gimelshein 2018, algorithm 3). No
gradient: this is generation.

Nothing is specialised on lengths, strides or the number of splits, and no value is read from the device.

Shapes: B sequences, L queries and S keys of a sequence, N packed queries, M packed keys, H query heads, G key/value
heads, D head dim, R reach of a table of biases. Inside the kernels M are rows of a tile (queries x heads of a group,
the heads fastest), N keys of a tile, DV the head dim of v.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .attention_triton_kernels import (
    ALIBI,
    DENSE,
    LN2,
    NO_BIAS,
    TABLE,
    BiasRows,
    Dropout,
    Scoring,
    Sequence,
    add_keys,
    exponential,
    load_rows,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs the package triton (3.6 or newer); install urform[triton]") from error

MAX_SPLITS = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit(
    do_not_specialize=[
        "StartsQ", "EndsQ", "StartsK", "EndsK", "slots_k", "stride_qn", "stride_qh", "stride_kb", "stride_kn",
        "stride_kh", "stride_vb", "stride_vn", "stride_vh", "stride_bias_batch", "stride_bias_head", "stride_bias_row",
        "stride_bias_column", "tokens_q", "tiles", "kv_heads", "left", "right", "reach",
    ]
)  # fmt: skip
def decode_split(
    Q, K, V, Out, Lse, StartsQ, EndsQ, StartsK, EndsK, Bias, MapQ, MapK, slots_k,
    stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_column,
    tokens_q, tiles, kv_heads, left, right, reach, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    CACHE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend one stretch of one sequence's keys; the grid is (B * G * tiles, splits)."""
    program = tl.program_id(0)
    tile = program % tiles
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    sequence = (program // tiles // kv_heads).to(tl.int64)
    split = tl.program_id(1)
    start_q = tl.load(StartsQ + sequence).to(tl.int64)
    length_q = (tl.load(EndsQ + sequence) - start_q).to(tl.int32)
    if tile * BLOCK_M >= length_q * GROUP:
        return
    start_k = tl.load(StartsK + sequence).to(tl.int64)
    length_k = (tl.load(EndsK + sequence) - start_k).to(tl.int32)
    shift = length_k * 0
    if CAUSAL:
        shift = length_k - length_q
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = offs_m // GROUP
    heads = kv_head * GROUP + offs_m % GROUP
    first_row = tile * BLOCK_M // GROUP
    last_row = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, length_q - 1)
    low = 0
    high = length_k
    if HAS_LEFT:
        low = tl.maximum(first_row + shift - left, 0)
    if HAS_RIGHT:
        high = tl.minimum(high, last_row + shift + right + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(1)), BLOCK_N) * BLOCK_N
    low += split * share
    high = tl.minimum(high, low + share)

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    Q += start_q * stride_qn * UNIT + heads[:, None] * stride_qh * UNIT
    K += sequence * stride_kb * UNIT + kv_head * stride_kh * UNIT
    V += sequence * stride_vb * UNIT + kv_head * stride_vh * UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    if MapK is not None:
        MapK += sequence * slots_k
    if BIAS != NO_BIAS:
        Bias += sequence * stride_bias_batch + heads[:, None] * stride_bias_head
        if CACHE and MapK is None:  # the columns of a dense bias are the cache's
            Bias += start_k * stride_bias_column
    q = load_rows(Q, rows, length_q, stride_qn * UNIT, offs_d, HEAD_DIM, BLOCK_D, UPCAST)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    seq = Sequence(start_q, start_k, length_q, high, shift)
    dropout = Dropout(rows, 0, 0)  # there is none
    for first in range(low, high, BLOCK_N):
        if MapK is None:
            at = start_k + first
            k = load_rows(K + at * stride_kn, offs_n, high - first, stride_kn, offs_d, HEAD_DIM, BLOCK_D, UPCAST)
            v = load_rows(V + at * stride_vn, offs_n, high - first, stride_vn, offs_dv, HEAD_DIM_V, BLOCK_DV, UPCAST)
        else:
            slots = tl.load(MapK + start_k + first + offs_n, mask=offs_n < high - first, other=-1).to(tl.int64)
            k = load_rows(K, slots, slots_k, stride_kn, offs_d, HEAD_DIM, BLOCK_D, UPCAST)
            v = load_rows(V, slots, slots_k, stride_vn, offs_dv, HEAD_DIM_V, BLOCK_DV, UPCAST)
        acc, total, top = add_keys(
            acc, total, top, q, k, v, rows[:, None], (first + offs_n)[None, :], first_row, first, seq,
            Scoring(left, right, scale, softcap),
            BiasRows(Bias, MapQ, MapK, reach, stride_bias_row, stride_bias_column), dropout,
            BLOCK_M // GROUP + 2, BLOCK_N, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, False, EXACT,
        )  # fmt: skip

    attends = total > 0
    safe_total = tl.where(attends, total, 1.0)
    top = top if EXACT else top * LN2
    lse = tl.where(attends, top + tl.log2(safe_total) * LN2, float("-inf"))
    stored = rows < length_q
    tokens = split.to(tl.int64) * tokens_q + start_q + rows
    Out += (tokens * kv_heads * GROUP + heads)[:, None] * HEAD_DIM_V + offs_dv[None, :]
    out_mask = stored[:, None] & (offs_dv < HEAD_DIM_V)[None, :]
    tl.store(Out, (acc / safe_total[:, None]).to(Out.dtype.element_ty), out_mask)
    tl.store(Lse + (split * kv_heads * GROUP + heads) * tokens_q + start_q + rows, lse, stored)


@triton.jit(do_not_specialize=["splits", "tokens_q", "heads"])
def decode_combine(
    Parts, Lses, Out, Lse, splits, tokens_q, heads,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Add the parts `[splits, N, H, DV]` of one row (query, head), in the order of the splits; the grid is (N * H,)."""
    row = tl.program_id(0).to(tl.int64)
    rows = heads * tokens_q.to(tl.int64)
    lse_at = row % heads * tokens_q + row // heads  # Lse is [H, N]
    offs_dv = tl.arange(0, BLOCK_DV)
    inside = offs_dv < HEAD_DIM_V
    acc = tl.zeros([BLOCK_DV], tl.float32)
    total = 0.0
    top = float("-inf")
    for first in range(0, splits, BLOCK_S):
        parts = first + tl.arange(0, BLOCK_S)
        scores = tl.load(Lses + parts * rows + lse_at, mask=parts < splits, other=float("-inf"))
        pointers = Parts + (parts[:, None] * rows + row) * HEAD_DIM_V + offs_dv[None, :]
        part = tl.load(pointers, mask=(scores > float("-inf"))[:, None] & inside[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(scores, 0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = exponential(scores - finite_top, True)
        shrink = exponential(top - finite_top, True)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        top = new_top
    safe_total = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, top + tl.log2(safe_total) * LN2, float("-inf"))
    tl.store(Out + row * HEAD_DIM_V + offs_dv, (acc / safe_total).to(Out.dtype.element_ty), inside)
    tl.store(Lse + lse_at, lse)


INTERPRETED = not isinstance(decode_split, triton.JITFunction)


def decode_attention(
    q_NHD: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    slopes: Tensor | None = None,
    lut: Tensor | None = None,
    dense: Tensor | None = None,
    softcap: float | None = None,
    scale: float,
    map_q: Tensor | None = None,
    map_k: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend few queries per sequence (1 to about 16) to long keys, packed or in a cache.

    Args:
        q_NHD: packed queries `[N, H, D]`, float16, bfloat16 or float32; D up to 256.
        k: packed keys `[M, G, D]`, or a cache `[B, S, G, D]` (any strides, e.g. a transposed view).
        v: as k; its head dim may differ.
        cu_q: integer `[B + 1]`, starts of the sequences' queries and their total; or `[2, B]`, for each sequence its
            first row and the one after its last (rows of no sequence give 0).
        cu_k: likewise for the keys; for a cache `[2, B]`, the columns of each sequence.
        max_q: upper bound on the queries of a sequence.
        max_k: upper bound on its keys; decides about the number of splits only.
        causal: the last query meets the last key, and no query looks ahead.
        window: `(left, right)`, None unbounded.
        slopes: `[H]`: add `-slope * |position - key|` (ALiBi).
        lut: `[H, 2R + 1]`: add `lut[head, clip(key - position, -R, R) + R]` (T5, relative).
        dense: `[B | 1, H | 1, L | 1, S | 1]` to add; rows and columns count inside the sequences, in a cache the
            columns are the cache's. At most one of the three biases.
        softcap: bound of the scores, or None.
        scale: factor of the scores.
        map_q: integer `[N]`, row of a dense bias that a query has; None: its rank in its sequence.
        map_k: integer `[B, S]`, for a cache with padding anywhere: the columns of each sequence's keys in their order,
            which `cu_k` then counts. The cache is read through it, not copied.
        splits: stretches of keys for each sequence; None: enough to fill the device.

    Returns:
        out `[N, H, Dv]` of q's dtype, 0 in rows without keys, and lse float32 `[H, N]`, -inf there.

    Raises:
        ValueError: shapes, dtypes or head dims are outside of the above.
    """
    left, right = window or (None, None)
    right = 0 if causal else right
    return torch.ops.urform.attention_triton_decode(
        q_NHD, k, v, cu_q, cu_k, max_q, max_k, causal, left, right, slopes, lut, dense, softcap, scale, map_q, map_k,
        splits,
    )  # fmt: skip


@torch.library.custom_op("urform::attention_triton_decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    left: int | None,
    right: int | None,
    slopes: Tensor | None,
    lut: Tensor | None,
    dense: Tensor | None,
    softcap: float | None,
    scale: float,
    map_q: Tensor | None,
    map_k: Tensor | None,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    _check_tensors(q, k, v)
    _check_sequences(q, k, cu_q, cu_k, map_q, map_k)
    _check_bias(q.shape[1], slopes, lut, dense)
    queries, heads, dim = q.shape
    kv_heads, v_dim = v.shape[-2:]
    rows = heads // kv_heads * max_q
    launch = decode_launch(q.dtype, dim, v_dim, rows)
    tiles = -(-rows // launch["BLOCK_M"])
    programs = _sequences(cu_q) * kv_heads * tiles
    if splits is None:
        seen = max_k if left is None or right is None else min(max_k, left + right + max_q)
        splits = _splits(programs, seen, launch["BLOCK_N"], q.device)
    out, lse, parts, lses = _buffers(q, v_dim, splits, gaps=cu_q.dim() == 2)
    if programs == 0 or out.numel() == 0:
        return out.to(q.dtype), lse
    arguments = {
        "tiles": tiles,
        **_tensors_and_strides(q, k, v, cu_q, cu_k, map_q, map_k),
        **_bounds_of_scores(causal, left, right, softcap, scale),
        **_bias(slopes, lut, dense, cache=k.dim() == 4),
    }
    with torch.get_device_module(q.device).device(q.device) if q.is_cuda else contextlib.nullcontext():
        decode_split[(programs, splits)](Out=parts, Lse=lses, UPCAST=_upcasts(q), **arguments, **launch)
        if splits > 1:
            decode_combine[(queries * heads,)](
                parts, lses, out, lse, splits, queries, heads, HEAD_DIM_V=v_dim, BLOCK_DV=launch["BLOCK_DV"], BLOCK_S=16
            )
    return out.to(q.dtype), lse


def _upcasts(q: Tensor) -> bool:
    """Return whether to compute in float32: the interpreter multiplies bfloat16 wrongly, and cuts it off."""
    return INTERPRETED and q.dtype == torch.bfloat16


def _buffers(q: Tensor, v_dim: int, splits: int, gaps: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make out and lse, and what the parts of the keys give; `gaps`: rows of no sequence, which get 0 and -inf."""
    queries, heads, _ = q.shape
    out = q.new_empty(queries, heads, v_dim, dtype=torch.float32 if _upcasts(q) else q.dtype)
    lse = q.new_empty(heads, queries, dtype=torch.float32)
    if gaps:
        out.zero_()
        lse.fill_(-torch.inf)
    if splits == 1:
        return out, lse, out, lse
    parts = out.new_empty(splits, *out.shape, dtype=torch.float32)
    lses = lse.new_empty(splits, *lse.shape)
    if gaps:
        lses.fill_(-torch.inf)
    return out, lse, parts, lses


def _tensors_and_strides(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, map_q: Tensor | None, map_k: Tensor | None
) -> dict[str, Any]:
    """Name what the kernel reads, and its strides in units."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    names = ("qn", "qh", "kb", "kn", "kh", "vb", "vn", "vh")
    strides = (*_strides(q), *_kv_strides(k), *_kv_strides(v))
    unit = 1 if any(stride % 8 for stride in strides) else 8
    (starts_q, ends_q), (starts_k, ends_k) = _bounds(cu_q), _bounds(cu_k)
    map_q, map_k = (None if rows is None else rows.contiguous() for rows in (map_q, map_k))
    return {
        "Q": q, "K": k, "V": v, "StartsQ": starts_q, "EndsQ": ends_q, "StartsK": starts_k, "EndsK": ends_k,
        "MapQ": map_q, "MapK": map_k, "slots_k": k.shape[1] if k.dim() == 4 else 0,
        **{f"stride_{name}": stride // unit for name, stride in zip(names, strides, strict=True)},
        "tokens_q": q.shape[0], "kv_heads": k.shape[-2], "UNIT": unit, "GROUP": q.shape[1] // k.shape[-2],
        "HEAD_DIM": q.shape[2], "HEAD_DIM_V": v.shape[-1],
    }  # fmt: skip


def _bounds_of_scores(
    causal: bool, left: int | None, right: int | None, softcap: float | None, scale: float
) -> dict[str, Any]:
    """Name what bounds the scores: causality, window, softcap."""
    return {
        "CAUSAL": causal, "HAS_LEFT": left is not None, "HAS_RIGHT": right is not None, "left": left or 0,
        "right": right or 0, "SOFTCAP": softcap is not None, "softcap": softcap or 1.0, "scale": scale,
    }  # fmt: skip


@_decode.register_fake
def _decode_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *_: object
) -> tuple[Tensor, Tensor]:
    queries, heads, _dim = q.shape
    return q.new_empty(queries, heads, v.shape[-1]), q.new_empty(heads, queries, dtype=torch.float32)


def _refuse_backward(context: object, *grads: Tensor) -> None:
    raise NotImplementedError("urform::attention_triton_decode has no gradient; train with attention(backend='triton')")


def _refuse_vmap(*_: object, **__: object) -> None:
    raise RuntimeError(
        "urform::attention_triton_decode does not go under torch.func.vmap; its sequences already are a batch: fold "
        "yours into them"
    )


_decode.register_autograd(_refuse_backward)
_decode.register_vmap(_refuse_vmap)


def decode_launch(dtype: torch.dtype, dim: int, v_dim: int, rows: int) -> dict[str, int]:
    """Give block sizes, warps and stages: 32 KB of keys and values at a time, which fits every chip, and 4096 scores.

    Args:
        dtype: of q, k and v.
        dim: head dim of q and k.
        v_dim: head dim of v.
        rows: rows to serve for a sequence and key/value head, group * max_q.
    """
    width, v_width = (max(16, 1 << (d - 1).bit_length()) for d in (dim, v_dim))
    block_m = min(max(16, 1 << (rows - 1).bit_length()), 64 if max(width, v_width) <= 128 else 32)
    keys = min(32768 // ((width + v_width) * dtype.itemsize), 4096 // block_m)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": min(max(16, 1 << (keys.bit_length() - 1)), 128),
        "BLOCK_D": width,
        "BLOCK_DV": v_width,
        "num_warps": 4,
        "num_stages": 2,
    }


def _splits(programs: int, keys: int, block: int, device: torch.device) -> int:
    """Cut the keys so that the device has about two programs per multiprocessor, each with at least a block of keys."""
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        processors = 32
    return max(1, min(-(-keys // block), 2 * processors // max(programs, 1), MAX_SPLITS))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of all but the last dimension; 0 where there is one element, whose stride PyTorch may make up."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True))


def _kv_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of sequence, token and head; packed tokens have none of the first."""
    return (0,) * (4 - x.dim()) + _strides(x)


def _sequences(cu: Tensor) -> int:
    return cu.shape[-1] - (cu.dim() == 1)


def _bounds(cu: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and ends of the sequences, from `[B + 1]` or `[2, B]`."""
    return (cu[:-1], cu[1:]) if cu.dim() == 1 else (cu[0].contiguous(), cu[1].contiguous())


def _bias(slopes: Tensor | None, lut: Tensor | None, dense: Tensor | None, cache: bool) -> dict[str, Any]:
    """Name the kernel's bias: tensor, kind, and strides of sequence, head, row and column."""
    bias, kind, strides = None, NO_BIAS.value, (0, 0, 0, 0)
    if slopes is not None:
        bias, kind, strides = slopes.contiguous(), ALIBI.value, (0, 1, 0, 0)
    elif lut is not None:
        bias, kind, strides = lut.contiguous(), TABLE.value, (0, lut.shape[1], 0, 0)
    elif dense is not None:
        bias, kind, strides = dense, DENSE.value, _strides(dense[..., None])  # type: ignore[assignment]
    names = ("batch", "head", "row", "column")
    return {
        "Bias": bias,
        "BIAS": kind,
        "CACHE": cache and dense is not None,
        "reach": 0 if lut is None else lut.shape[1] // 2,
        **{f"stride_bias_{name}": stride for name, stride in zip(names, strides, strict=True)},
    }


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check q, k and v; raise ValueError for what would read out of bounds or be silently wrong."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; make them one of float16, bfloat16, float32")
    if q.dim() != 3 or k.dim() not in (3, 4) or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k, v have shapes {shapes}; give [N, H, D] and [M, G, D] or a cache [B, S, G, D]")
    for name, dim in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if not 1 <= dim <= 256:
            raise ValueError(f"head dim {dim} of {name} is not served; it must be from 1 to 256")
    heads, kv_heads = q.shape[1], k.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which must be a multiple of the {kv_heads} of k")


def _check_sequences(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, map_q: Tensor | None, map_k: Tensor | None
) -> None:
    """Check where the sequences are; raise ValueError where the tensors cannot hold them."""
    for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
        if cu.dim() not in (1, 2) or (cu.dim() == 2 and cu.shape[0] != 2) or _sequences(cu) != _sequences(cu_q):
            raise ValueError(
                f"{name} has shape {tuple(cu.shape)}; give [B + 1] or [2, B] with the same B on both sides"
            )
    if k.dim() == 4 and (cu_k.dim() != 2 or k.shape[0] != cu_k.shape[1]):
        raise ValueError(f"cu_k has shape {tuple(cu_k.shape)}; for a cache {tuple(k.shape)} give [2, {k.shape[0]}]")
    if map_q is not None and map_q.shape != q.shape[:1]:
        raise ValueError(f"map_q has shape {tuple(map_q.shape)}; give [{q.shape[0]}], one row for each query")
    if map_k is not None and (k.dim() != 4 or map_k.shape != k.shape[:2]):
        raise ValueError(f"map_k has shape {tuple(map_k.shape)} and k {tuple(k.shape)}; it is for a cache, [B, S]")


def _check_bias(heads: int, slopes: Tensor | None, lut: Tensor | None, dense: Tensor | None) -> None:
    """Check the one bias there may be; raise ValueError where its shape does not fit."""
    if sum(bias is not None for bias in (slopes, lut, dense)) > 1:
        raise ValueError("slopes, lut and dense exclude each other; add them up in a dense bias")
    if slopes is not None and slopes.shape != (heads,):
        raise ValueError(f"slopes have shape {tuple(slopes.shape)}; give [{heads}]")
    if lut is not None and (lut.dim() != 2 or lut.shape[0] != heads or lut.shape[1] % 2 == 0):
        raise ValueError(f"lut has shape {tuple(lut.shape)}; give [{heads}, 2R + 1]")
    if dense is not None and dense.dim() != 4:
        raise ValueError(f"dense has shape {tuple(dense.shape)}; give [B | 1, H | 1, L | 1, S | 1]")
