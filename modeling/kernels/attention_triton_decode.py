"""Attention of few queries over a long cache, in Triton: the keys are split over programs, then the parts are combined.

With one query per sequence a program per (sequence, head) leaves most of a GPU idle. Here a program takes one key/value
head of one sequence, all query heads that share it and all their queries (so that the tile of rows is filled and each
key is read once), and one of `splits` stretches of the keys; a second kernel adds the parts in a fixed order, weighted
by their log-sum-exps ("Flash-Decoding", Dao et al. 2023; the sum itself: Dao et al. 2022, "FlashAttention", section
3.1). No gradient: this is generation.

Nothing is specialised on lengths, strides or the number of splits, and no value is read from the device.

Shapes: B sequences, N packed queries, M packed keys, S columns of a cache, H query heads, G key/value heads, D head
dim, R reach of a table of biases. In kernels: BM rows (queries x heads of the group), BN keys, BD and BV head dims
rounded up to a power of two; prefixes `p_` pointer, `b_` block, `o_` offset, `m_` mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the capability table says that the backend is absent
    triton = None

MAX_SPLITS = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

if triton is not None:
    _RUNTIME = [
        "cu_q", "k_starts", "k_ends", "kv_heads", "queries", "row_blocks", "scale", "softcap", "left", "right", "reach",
        "stride_qn", "stride_qh", "stride_kb", "stride_kn", "stride_kg", "stride_vb", "stride_vn", "stride_vg",
        "stride_dense_b", "stride_dense_h", "stride_dense_l", "stride_dense_s",
    ]  # fmt: skip

    @triton.jit(do_not_specialize=_RUNTIME)
    def decode_kernel(
        q, k, v, out, lse, cu_q, k_starts, k_ends, slopes, lut, dense,
        kv_heads, queries, row_blocks, scale, softcap, left, right, reach,
        stride_qn, stride_qh, stride_kb, stride_kn, stride_kg, stride_vb, stride_vn, stride_vg,
        stride_dense_b, stride_dense_h, stride_dense_l, stride_dense_s,
        GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
        BV: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr,
        SOFTCAP: tl.constexpr, CACHE: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """Attend one stretch of one sequence's keys: grid (B * G * row_blocks, splits)."""
        pid = tl.program_id(0)
        split = tl.program_id(1)
        splits = tl.num_programs(1)
        rows = pid % row_blocks
        g = (pid // row_blocks) % kv_heads
        b = pid // (row_blocks * kv_heads)
        heads = kv_heads * GROUP
        q_start = tl.load(cu_q + b).to(tl.int64)
        length = (tl.load(cu_q + b + 1) - q_start).to(tl.int32)
        if rows * BM >= length * GROUP:
            return
        k_start = tl.load(k_starts + b).to(tl.int64)
        size = (tl.load(k_ends + b) - k_start).to(tl.int32)
        shift = 0
        if CAUSAL:
            shift = size - length

        o_r = rows * BM + tl.arange(0, BM)  # [BM]
        o_l = o_r // GROUP
        o_h = g * GROUP + o_r % GROUP
        m_r = o_l < length
        position = o_l + shift

        # the keys that any row of the block sees, and this program's share of them
        first = (rows * BM) // GROUP + shift
        last = tl.minimum((rows * BM + BM - 1) // GROUP, length - 1) + shift
        lo = 0
        hi = size
        if LEFT:
            lo = tl.maximum(lo, first - left)
        if RIGHT:
            hi = tl.minimum(hi, last + right + 1)
        share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), splits), BN) * BN
        lo += split * share
        hi = tl.minimum(hi, lo + share)

        o_d = tl.arange(0, BD)
        o_v = tl.arange(0, BV)
        # strides count eighths of a row: the compiler thus knows that rows start at multiples of 16 bytes
        p_q = q + (q_start + o_l[:, None]) * (stride_qn.to(tl.int64) * 8) + o_h[:, None] * (stride_qh.to(tl.int64) * 8)
        b_q = tl.load(p_q + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)  # [BM, BD]
        if UPCAST:
            b_q = b_q.to(tl.float32)
        p_k = k + b * (stride_kb.to(tl.int64) * 8) + g * (stride_kg.to(tl.int64) * 8)
        p_v = v + b * (stride_vb.to(tl.int64) * 8) + g * (stride_vg.to(tl.int64) * 8)

        b_m = tl.full([BM], -float("inf"), tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_o = tl.zeros([BM, BV], tl.float32)
        for start in tl.range(lo, hi, BN):
            o_n = start + tl.arange(0, BN)
            m_n = o_n < hi
            o_row = k_start + o_n
            b_k = tl.load(
                p_k + o_row[:, None] * (stride_kn.to(tl.int64) * 8) + o_d[None, :],
                mask=m_n[:, None] & (o_d < D)[None, :],
                other=0.0,
            )  # [BN, BD]
            b_v = tl.load(
                p_v + o_row[:, None] * (stride_vn.to(tl.int64) * 8) + o_v[None, :],
                mask=m_n[:, None] & (o_v < DV)[None, :],
                other=0.0,
            )  # [BN, BV]
            if UPCAST:
                b_k = b_k.to(tl.float32)
                b_v = b_v.to(tl.float32)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BM, BN]
            ahead = o_n[None, :] - position[:, None]
            if SOFTCAP:
                b_e = tl.exp2(tl.abs(b_s) * (-2 * 1.4426950408889634 / softcap))
                b_t = softcap * (1 - b_e) / (1 + b_e)
                b_s = tl.where(b_s < 0, -b_t, b_t)
            if BIAS == "alibi":
                b_s -= tl.load(slopes + o_h)[:, None] * tl.abs(ahead).to(tl.float32)
            if BIAS == "lut":
                o_t = tl.minimum(tl.maximum(ahead, -reach), reach) + reach
                b_s += tl.load(lut + o_h[:, None] * (2 * reach + 1) + o_t)
            if BIAS == "dense":
                p_b = dense + b * stride_dense_b.to(tl.int64) + o_h[:, None] * stride_dense_h.to(tl.int64)
                o_column = o_n + k_start if CACHE else o_n
                p_b += o_l[:, None] * stride_dense_l.to(tl.int64) + o_column[None, :] * stride_dense_s.to(tl.int64)
                b_s += tl.load(p_b, mask=m_r[:, None] & m_n[None, :], other=0.0).to(tl.float32)
            seen = m_n[None, :]
            if LEFT:
                seen = seen & (ahead >= -left)
            if RIGHT:
                seen = seen & (ahead <= right)
            b_s = tl.where(seen, b_s * 1.4426950408889634, -float("inf"))
            b_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)  # a row without keys so far: no -inf - -inf
            b_p = tl.exp2(b_s - b_ref[:, None])
            b_scale = tl.exp2(b_m - b_ref)
            b_sum = b_sum * b_scale + tl.sum(b_p, 1)
            b_o = b_o * b_scale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
            b_m = b_new

        b_o = b_o / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
        b_lse = tl.where(b_sum > 0, b_m * 0.6931471805599453 + tl.log(b_sum), -float("inf"))
        o_q = q_start + o_l
        p_o = out + ((split * queries.to(tl.int64) + o_q) * heads + o_h)[:, None] * DV + o_v[None, :]
        tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_r[:, None] & (o_v < DV)[None, :])
        tl.store(lse + (split * heads + o_h) * queries.to(tl.int64) + o_q, b_lse, mask=m_r)

    @triton.jit(do_not_specialize=["splits", "queries", "heads"])
    def combine_kernel(
        parts, lses, out, lse, splits, queries, heads, DV: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr
    ):  # fmt: skip
        """Add the parts of one row (query, head), in the order of the splits: grid (N * H,)."""
        row = tl.program_id(0).to(tl.int64)
        rows = queries.to(tl.int64) * heads
        p_lse = (row % heads) * queries + row // heads  # lse is [H, N]
        o_v = tl.arange(0, BV)
        b_m = -float("inf")
        b_sum = 0.0
        b_o = tl.zeros([BV], tl.float32)
        for start in range(0, splits, BS):
            o_s = start + tl.arange(0, BS)
            m_s = o_s < splits
            b_l = tl.load(lses + o_s * rows + p_lse, mask=m_s, other=-float("inf")) * 1.4426950408889634  # [BS]
            b_part = tl.load(
                parts + (o_s[:, None] * rows + row) * DV + o_v[None, :],
                mask=m_s[:, None] & (o_v < DV)[None, :],
                other=0.0,
            )  # [BS, BV]
            b_new = tl.maximum(b_m, tl.max(b_l, 0))
            b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_w = tl.exp2(b_l - b_ref)
            b_scale = tl.exp2(b_m - b_ref)
            b_sum = b_sum * b_scale + tl.sum(b_w, 0)
            b_o = b_o * b_scale + tl.sum(b_part * b_w[:, None], 0)
            b_m = b_new
        b_o = b_o / tl.where(b_sum > 0, b_sum, 1.0)
        tl.store(out + row * DV + o_v, b_o.to(out.dtype.element_ty), mask=o_v < DV)
        tl.store(lse + p_lse, tl.where(b_sum > 0, b_m * 0.6931471805599453 + tl.log(b_sum), -float("inf")))

    INTERPRETED = not isinstance(decode_kernel, triton.JITFunction)  # its bfloat16 products are wrong: upcast there


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
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend few queries per sequence (1 to about 16) to long keys, packed or in a cache.

    Args:
        q_NHD: packed queries `[N, H, D]`, float16, bfloat16 or float32; D a multiple of 8 from 16 to 256.
        k: packed keys `[M, G, D]`, or a cache `[B, S, G, D]` (any strides, e.g. a transposed view).
        v: as k; its head dim may differ.
        cu_q: integer `[B + 1]`, starts of the sequences' queries and their total N.
        cu_k: packed: integer `[B + 1]` likewise. Cache: integer `[2, B]`, for each sequence the first of its columns
            and the one after its last.
        max_q: upper bound on the queries of a sequence.
        max_k: upper bound on its keys; decides about the number of splits only.
        causal: the last query meets the last key, and no query looks ahead.
        window: `(left, right)`, None unbounded.
        slopes: float32 `[H]`: add `-slope * |position - key|` (ALiBi).
        lut: float32 `[H, 2R + 1]`: add `lut[head, clip(key - position, -R, R) + R]` (T5, relative).
        dense: `[B | 1, H | 1, L | 1, S | 1]` to add; rows and columns count inside the sequences, in a cache the
            columns are the cache's. At most one of the three biases.
        softcap: bound of the scores, or None.
        scale: factor of the scores.
        splits: stretches of keys for each sequence; None: enough to fill the device.

    Returns:
        out `[N, H, Dv]` of q's dtype, 0 in rows without keys, and lse float32 `[H, N]`, -inf there.

    Raises:
        ValueError: Triton is missing, or shapes, dtypes or head dims are outside of the above.
    """
    left, right = window or (None, None)
    right = 0 if causal else right
    return torch.ops.urform.attention_triton_decode(
        q_NHD, k, v, cu_q, cu_k, max_q, max_k, causal, left, right, slopes, lut, dense, softcap, scale, splits
    )


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
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, cu_q, cu_k, slopes, lut, dense)
    cache = k.dim() == 4
    queries, heads, dim = q.shape
    kv_heads, v_dim = v.shape[-2:]
    group, batch = heads // kv_heads, cu_q.shape[0] - 1
    starts, ends = (cu_k[0], cu_k[1]) if cache else (cu_k[:-1], cu_k[1:])
    q, k, v = (_rows_of_eight(x) for x in (q, k, v))
    launch = decode_launch(q.dtype, dim, v_dim, group * max_q)
    row_blocks = -(-group * max_q // launch["BM"])
    programs = batch * kv_heads * row_blocks
    if splits is None:
        seen = max_k if left is None or right is None else min(max_k, left + right + max_q)
        splits = _splits(programs, seen, launch["BN"], q.device)
    out = q.new_empty(queries, heads, v_dim)
    lse = q.new_empty(heads, queries, dtype=torch.float32)
    if programs == 0 or out.numel() == 0:
        return out, lse
    parts, lses = out, lse
    if splits > 1:
        parts = out.new_empty(splits, *out.shape, dtype=torch.float32)
        lses = lse.new_empty(splits, *lse.shape)
    bias = "alibi" if slopes is not None else "lut" if lut is not None else "dense" if dense is not None else "none"
    dense_strides = (0, 0, 0, 0) if dense is None else _broadcast_strides(dense)
    decode_kernel[(programs, splits)](
        q, k, v, parts, lses, cu_q, starts, ends, slopes, lut, dense,
        kv_heads, queries, row_blocks, scale, softcap or 0.0, left or 0, right or 0,
        0 if lut is None else lut.shape[1] // 2,
        *(stride // 8 for stride in q.stride()[:2]),
        *(stride // 8 for x in (k, v) for stride in (x.stride()[:3] if cache else (0, *x.stride()[:2]))),
        *dense_strides,
        GROUP=group, D=dim, DV=v_dim, CAUSAL=causal, LEFT=left is not None, RIGHT=right is not None, BIAS=bias,
        SOFTCAP=softcap is not None, CACHE=cache, UPCAST=q.dtype == torch.bfloat16 and INTERPRETED, **launch,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(queries * heads,)](
            parts, lses, out, lse, splits, queries, heads, DV=v_dim, BV=launch["BV"], BS=16, num_warps=4
        )
    return out, lse


@_decode.register_fake
def _decode_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *_: object
) -> tuple[Tensor, Tensor]:
    queries, heads, _dim = q.shape
    return q.new_empty(queries, heads, v.shape[-1]), q.new_empty(heads, queries, dtype=torch.float32)


def _refuse_backward(context: object, *grads: Tensor) -> None:
    raise NotImplementedError("urform::attention_triton_decode has no gradient; train with attention(backend='triton')")


_decode.register_autograd(_refuse_backward)


def decode_launch(dtype: torch.dtype, dim: int, v_dim: int, rows: int) -> dict[str, int]:
    """Give block sizes, warps and stages: 32 KB of keys and values at a time, which fits every chip twice.

    Args:
        dtype: of q, k and v.
        dim: head dim of q and k.
        v_dim: head dim of v.
        rows: rows to serve for a sequence and key/value head, group * max_q.
    """
    width, v_width = (max(16, 1 << (d - 1).bit_length()) for d in (dim, v_dim))
    keys = 32768 // ((width + v_width) * dtype.itemsize)
    return {
        "BM": min(max(16, 1 << (rows - 1).bit_length()), 64 if max(width, v_width) <= 128 else 32),
        "BN": min(max(16, 1 << (keys.bit_length() - 1)), 128),
        "BD": width,
        "BV": v_width,
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


def _rows_of_eight(x: Tensor) -> Tensor:
    """Copy unless rows are dense and start at multiples of 8 elements, as the kernel assumes."""
    *outer, last = zip(x.shape, x.stride(), strict=True)
    fits = last[1] == 1 and all(stride % 8 == 0 for size, stride in outer if size > 1)
    return x if fits else x.contiguous()


def _broadcast_strides(x: Tensor) -> tuple[int, ...]:
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, slopes: Tensor | None, lut: Tensor | None,
    dense: Tensor | None,
) -> None:  # fmt: skip
    """Refuse by name what would read out of bounds or be silently wrong."""
    if triton is None:
        raise ValueError("decode_attention() needs Triton, which is not installed; pip install urform[triton]")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; make them one of float16, bfloat16, float32")
    if q.dim() != 3 or k.dim() not in (3, 4) or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k, v have shapes {shapes}; give [N, H, D] and [M, G, D] or a cache [B, S, G, D]")
    for name, dim in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if dim % 8 or not 16 <= dim <= 256:
            raise ValueError(f"head dim {dim} of {name} must be a multiple of 8 from 16 to 256; pad it with zeros")
    heads, kv_heads, batch = q.shape[1], k.shape[-2], cu_q.shape[0] - 1
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which must be a multiple of the {kv_heads} of k")
    wanted = (2, batch) if k.dim() == 4 else (batch + 1,)
    if tuple(cu_k.shape) != wanted:
        raise ValueError(f"cu_k has shape {tuple(cu_k.shape)}; for {batch} sequences it must be {list(wanted)}")
    if sum(bias is not None for bias in (slopes, lut, dense)) > 1:
        raise ValueError("slopes, lut and dense exclude each other; add them up in a dense bias")
    if slopes is not None and (slopes.dtype != torch.float32 or slopes.shape != (heads,)):
        raise ValueError(f"slopes are {slopes.dtype} of shape {tuple(slopes.shape)}; give float32 [{heads}]")
    if lut is not None and (lut.dtype != torch.float32 or lut.shape[:-1] != (heads,) or lut.shape[-1] % 2 == 0):
        raise ValueError(f"lut is {lut.dtype} of shape {tuple(lut.shape)}; give float32 [{heads}, 2R + 1]")
    if dense is not None and dense.dim() != 4:
        raise ValueError(f"dense has shape {tuple(dense.shape)}; give [B | 1, H | 1, L | 1, S | 1]")
