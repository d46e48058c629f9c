# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels of attention's backward pass: deterministic, in separate passes, without atomics.

After FlashAttention-2 (Dao 2023): probabilities are recomputed from the log-sum-exp. In the order of the file: `Delta`
of the rows; dq (with what a bias wants from every tile); dk and dv; sums along diagonals, for tables of biases.

Conventions and names are those of `attention_triton_kernels`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .attention_triton_kernels import (
    ALIBI,
    DENSE,
    LOG2E,
    NO_BIAS,
    TABLE,
    BiasRows,
    Dropout,
    KeyRows,
    Scoring,
    Sequence,
    dense_places,
    dropout_row_keys,
    dropout_survives,
    exponential,
    jit,
    key_range,
    load_rows,
    load_sequence,
    query_range,
    score_tile,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs the package triton (3.6 or newer); install urform[triton]") from error


@jit
def attention_delta(
    Out, Grad, GradLse, Lse, Delta, stride_on, stride_oh, stride_gn, stride_gh, tokens_q, tiles,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute `Delta` `[H, tokens_q]`: the product of `Out` and its gradient `Grad`, less the gradient of `Lse`.

    Then dS = P * (dP - Delta) (Dao et al. 2022, appendix B.2), with d lse / dS = P taken in. 0 where Lse is -inf.
    """
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    offs_dv = tl.arange(0, BLOCK_DV)
    tokens = (program % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tokens < tokens_q
    out = load_rows(
        Out + head * stride_oh * UNIT, tokens, tokens_q, stride_on * UNIT, offs_dv, HEAD_DIM_V, BLOCK_DV, True
    )
    grad = load_rows(
        Grad + head * stride_gh * UNIT, tokens, tokens_q, stride_gn * UNIT, offs_dv, HEAD_DIM_V, BLOCK_DV, True
    )
    delta = tl.sum(out * grad, 1)
    if GradLse is not None:
        delta -= tl.load(GradLse + head * tokens_q + tokens, mask=inside, other=0.0)
    lse = tl.load(Lse + head * tokens_q + tokens, mask=inside, other=0.0)
    tl.store(Delta + head * tokens_q + tokens, tl.where(lse == float("-inf"), 0.0, delta), inside)


@triton.jit
def load_row_sums(Top, Total, rows, length):
    """Load what turns scores of rows into probabilities: `Top` is the log-sum-exp where there is no `Total`.

    Returns:
        what to subtract from the scores, +inf (which makes probabilities 0) for rows without keys or beyond `length`,
        and what to multiply with (a dummy without `Total`).
    """
    inside = rows < length
    top = tl.load(Top + rows, mask=inside, other=float("inf"))
    factor = top
    if Total is not None:
        factor = 1 / tl.load(Total + rows, mask=inside, other=1.0)
    else:
        top = tl.where(top == float("-inf"), float("inf"), top * LOG2E)
    return top, factor


@triton.jit
def probabilities(scores, top, factor, EXACT: tl.constexpr):
    """Recompute probabilities from scores and `load_row_sums`, broadcast against each other."""
    p = exponential(scores - top, EXACT)
    if EXACT:
        p = p * factor
    return p


class QueryRows(NamedTuple):
    """A tile of queries and what the backward pass knows of its rows."""

    q: Any
    grad: Any
    top: Any
    factor: Any
    delta: Any
    rows: Any
    first_row: Any


@triton.jit
def _row_tile(
    first, queries, keys, seq, scoring, bias, dropout,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Compute what a tile of queries and the keys from `first` on have in common.

    Returns:
        k, the columns, probabilities (before dropout), their gradient, and the derivative of the softcap.
    """
    offs_n = tl.arange(0, BLOCK_N)
    at = tl.cast(first, tl.int64)
    remaining = seq.length_k - first
    k = load_rows(  # [BLOCK_N, BLOCK_D]
        keys.K + at * keys.stride_k, offs_n, remaining, keys.stride_k, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D
    )
    v = load_rows(  # [BLOCK_N, BLOCK_DV]
        keys.V + at * keys.stride_v, offs_n, remaining, keys.stride_v, tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV
    )
    columns = (first + offs_n)[None, :]
    scores, slope = score_tile(  # [BLOCK_M, BLOCK_N]
        tl.dot(queries.q, tl.trans(k), input_precision="ieee"), queries.rows, columns, queries.first_row, first, seq,
        scoring, bias, BLOCK_M, BLOCK_N, MASKED, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, EXACT,
    )  # fmt: skip
    p = probabilities(scores, queries.top[:, None], queries.factor[:, None], EXACT)
    dp = tl.dot(queries.grad, tl.trans(v), input_precision="ieee")
    if DROPOUT:
        survives = dropout_survives(dropout.row_keys, columns, dropout.threshold)
        dp = tl.where(survives, dp * dropout.keep_scale, 0.0)
    return k, columns, p, dp, slope


@triton.jit
def _add_bias_gradient(below, above, ds, rows, columns, seq, bias, Ds, ds_columns, BIAS: tl.constexpr):
    """Add a tile's dS to the rows' sums for slopes and tables, or store it for a dense bias."""
    ahead = columns - rows - seq.shift
    if BIAS == ALIBI:
        below += tl.sum(ds * -tl.abs(ahead).to(tl.float32), 1)
    elif BIAS == TABLE:
        below += tl.sum(tl.where(ahead <= -bias.reach, ds, 0.0), 1)
        above += tl.sum(tl.where((ahead >= bias.reach) & (ahead > -bias.reach), ds, 0.0), 1)
    else:
        row_at, row_inside = dense_places(bias.MapQ, rows, seq.start_q, seq.length_q)
        column_at, column_inside = dense_places(bias.MapK, columns, seq.start_k, seq.length_k)
        tl.store(Ds + row_at * ds_columns + column_at, ds, row_inside & column_inside)
    return below, above


@triton.jit
def _dq_tiles(
    dq, below, above, low, high, queries, keys, seq, scoring, bias, dropout, Ds, ds_columns,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr,
    DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add to dq, and to the rows' sums for the bias, what the keys from `low` to `high` give."""
    for first in range(low, high, BLOCK_N):
        k, columns, p, dp, slope = _row_tile(
            first, queries, keys, seq, scoring, bias, dropout, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M,
            BLOCK_N, MASKED, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, DROPOUT, EXACT,
        )  # fmt: skip
        ds = p * (dp - queries.delta[:, None])  # [BLOCK_M, BLOCK_N]
        if BIAS_GRAD:
            below, above = _add_bias_gradient(
                below, above, ds, queries.rows, columns, seq, bias, Ds, ds_columns, BIAS
            )  # fmt: skip
        if SOFTCAP:
            ds = ds * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
    return dq, below, above


@jit
def attention_backward_dq(
    Q, K, V, Grad, GradLse, Top, Total, Delta, dQ, Ds, Sums, StartsQ, LengthsQ, StartsK, LengthsK,
    Bias, MapQ, MapK, Seed,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh, stride_on, stride_oh,
    stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_column, ds_rows, ds_columns,
    tokens_q, tiles, heads, batch, left, right, reach, threshold, scale, softcap, keep_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
):  # fmt: skip
    """Compute `dQ` (strides `stride_on`, `stride_oh`); a program has one (sequence, head, row tile).

    With `BIAS_GRAD`, what the bias's gradient needs of every visited tile: for ALIBI, `Sums[0]` gets each program's
    sum of -distance * dS; for TABLE, `Sums[0]` and `Sums[1]` get the sums of dS over the keys that lie at least
    `reach` behind and ahead (`attention_backward_diagonals` does the rest); for DENSE, `Ds` gets dS.
    `Sums` is `[2, H, B, tiles]`, `Ds` is `[B, H, ds_rows, ds_columns]`.

    Where one tile has all keys of the rows, `Delta` is first replaced by the sum of P * dP itself: the product with a
    rounded `Out` would not cancel where few keys leave nothing but rounding (with one key dS is 0).
    """
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = program // tiles % heads
    sequence = program // tiles // heads
    seq = load_sequence(StartsQ, LengthsQ, StartsK, LengthsK, sequence, CAUSAL)
    slots_q = (tl.load(StartsQ + sequence + 1).to(tl.int64) - seq.start_q).to(tl.int32)
    first_row = tile * BLOCK_M
    if first_row >= slots_q:
        return
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    DROPOUT: tl.constexpr = Seed is not None

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    local_rows = first_row + offs_m
    rows = local_rows[:, None]
    first_token = seq.start_q + first_row
    length_q = seq.length_q
    head_64 = head.to(tl.int64)
    kv_head = (head // GROUP).to(tl.int64)
    Q += first_token * stride_qn * UNIT + head_64 * stride_qh * UNIT
    Grad += first_token * stride_gn * UNIT + head_64 * stride_gh * UNIT
    K += seq.start_k * stride_kn * UNIT + kv_head * stride_kh * UNIT
    V += seq.start_k * stride_vn * UNIT + kv_head * stride_vh * UNIT
    if BIAS != NO_BIAS:
        Bias += sequence.to(tl.int64) * stride_bias_batch + head_64 * stride_bias_head
    if BIAS_GRAD and BIAS == DENSE:
        Ds += (sequence.to(tl.int64) * heads + head) * ds_rows * ds_columns
    row_keys = rows
    if DROPOUT:
        row_keys = dropout_row_keys(Seed, sequence, head, rows)
    length_k = tl.where(first_row < length_q, seq.length_k, 0)
    remaining = length_q - first_row
    q = load_rows(Q, offs_m, remaining, stride_qn * UNIT, offs_d, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    grad = load_rows(  # [BLOCK_M, BLOCK_DV]
        Grad, offs_m, remaining, stride_gn * UNIT, tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV
    )
    row_at = head_64 * tokens_q + first_token
    top, factor = load_row_sums(Top + row_at, None if Total is None else Total + row_at, offs_m, remaining)  # [BLOCK_M]
    delta = tl.load(Delta + row_at + offs_m, mask=offs_m < remaining, other=0.0)  # [BLOCK_M]

    keys = KeyRows(K, V, stride_kn * UNIT, stride_vn * UNIT)
    own = Sequence(seq.start_q, seq.start_k, length_q, length_k, seq.shift)
    scoring = Scoring(left, right, scale, softcap)
    bias = BiasRows(Bias, MapQ, MapK, reach, stride_bias_row, stride_bias_column)
    dropout = Dropout(row_keys, threshold, keep_scale)
    last_row = tl.minimum(first_row + BLOCK_M, length_q) - 1
    low, full, high = key_range(first_row, last_row, seq.shift, length_k, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    if (high > low) & (high - low <= BLOCK_N):
        _, _, p, dp, _ = _row_tile(
            low, QueryRows(q, grad, top, factor, delta, rows, first_row), keys, own, scoring, bias, dropout, HEAD_DIM,
            HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, DROPOUT, EXACT,
        )  # fmt: skip
        delta = tl.sum(p * dp, 1)
        if GradLse is not None:
            delta -= tl.load(GradLse + row_at + offs_m, mask=offs_m < remaining, other=0.0)
        delta = tl.where(top == float("inf"), 0.0, delta)
        tl.store(Delta + row_at + offs_m, delta, offs_m < remaining)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    below = tl.zeros([BLOCK_M], tl.float32)
    above = tl.zeros([BLOCK_M], tl.float32)
    SPLIT: tl.constexpr = not (HAS_LEFT or DROPOUT or BIAS == DENSE)
    for part in tl.static_range(0, 2 if SPLIT else 1):
        dq, below, above = _dq_tiles(
            dq, below, above, low if part == 0 else full, full if SPLIT and part == 0 else high,
            QueryRows(q, grad, top, factor, delta, rows, first_row), keys, own, scoring, bias, dropout, Ds, ds_columns,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, part == 1 or not SPLIT, HAS_LEFT, HAS_RIGHT,
            SOFTCAP, BIAS, BIAS_GRAD, DROPOUT, EXACT,
        )  # fmt: skip

    dq = tl.where(rows < length_q, dq * scale, 0.0)
    dQ += first_token * stride_on * UNIT + head_64 * stride_oh * UNIT
    out_mask = (local_rows < slots_q)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(dQ + offs_m[:, None] * (stride_on * UNIT) + offs_d[None, :], dq.to(dQ.dtype.element_ty), out_mask)
    if BIAS_GRAD and BIAS != DENSE:
        at = (head_64 * batch + sequence) * tiles + tile
        tl.store(Sums + at, tl.sum(below, 0))
        tl.store(Sums + heads.to(tl.int64) * batch * tiles + at, tl.sum(above, 0))


class RowPointers(NamedTuple):
    """The first query of a sequence and head, its gradient, its place among the rows' sums, and strides of tokens."""

    Q: Any
    Grad: Any
    Top: Any
    Total: Any
    Delta: Any
    row_at: Any
    stride_q: Any
    stride_g: Any


@triton.jit
def _dkdv_tiles(
    dk, dv, low, high, k, v, queries, columns, first_column, Seed, sequence, head, seq, scoring, bias, threshold,
    keep_scale, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what one head's query rows from `low` to `high` give; tiles are transposed, `[N, M]`."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_m = tl.arange(0, BLOCK_M)
    for first in range(low, high, BLOCK_M):
        at = tl.cast(first, tl.int64)
        remaining = seq.length_q - first
        q = load_rows(  # [BLOCK_M, BLOCK_D]
            queries.Q + at * queries.stride_q, offs_m, remaining, queries.stride_q, offs_d, HEAD_DIM, BLOCK_D
        )
        grad = load_rows(  # [BLOCK_M, BLOCK_DV]
            queries.Grad + at * queries.stride_g, offs_m, remaining, queries.stride_g, offs_dv, HEAD_DIM_V, BLOCK_DV
        )
        at += queries.row_at
        top, factor = load_row_sums(  # [BLOCK_M]
            queries.Top + at, None if queries.Total is None else queries.Total + at, offs_m, remaining
        )
        delta = tl.load(queries.Delta + at + offs_m, mask=offs_m < remaining, other=0.0)  # [BLOCK_M]
        rows = (first + offs_m)[None, :]
        scores, slope = score_tile(  # [BLOCK_N, BLOCK_M]
            tl.dot(k, tl.trans(q), input_precision="ieee"), rows, columns, first, first_column, seq, scoring, bias,
            BLOCK_M, BLOCK_N, MASKED, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, EXACT,
        )  # fmt: skip
        p = probabilities(scores, top[None, :], factor[None, :], EXACT)
        kept = p
        if Seed is not None:
            survives = dropout_survives(dropout_row_keys(Seed, sequence, head, rows), columns, threshold)
            kept = tl.where(survives, p * keep_scale, 0.0)
        dv = tl.dot(kept.to(grad.dtype), grad, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        if Seed is not None:
            dp = tl.where(survives, dp * keep_scale, 0.0)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@jit
def attention_backward_dkdv(
    Q, K, V, Grad, Top, Total, Delta, dK, dV, StartsQ, LengthsQ, StartsK, LengthsK, Bias, MapQ, MapK, Seed,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh,
    stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_column,
    tokens_q, tiles, heads, left, right, reach, threshold, scale, softcap, keep_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Compute `dK` and `dV` (contiguous); a program has one (sequence, key head, key tile) and loops over its group.

    `heads` counts key heads here, and `tiles` tiles of keys.
    """
    program = tl.program_id(0)
    tile = program % tiles
    kv_head = program // tiles % heads
    sequence = program // tiles // heads
    seq = load_sequence(StartsQ, LengthsQ, StartsK, LengthsK, sequence, CAUSAL)
    slots_k = (tl.load(StartsK + sequence + 1).to(tl.int64) - seq.start_k).to(tl.int32)
    first_column = tile * BLOCK_N
    if first_column >= slots_k:
        return
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    local_columns = first_column + offs_n
    columns = local_columns[:, None]
    first_token = seq.start_k + first_column
    length_k = seq.length_k
    K += first_token * stride_kn * UNIT + kv_head.to(tl.int64) * stride_kh * UNIT
    V += first_token * stride_vn * UNIT + kv_head.to(tl.int64) * stride_vh * UNIT
    remaining = length_k - first_column
    k = load_rows(K, offs_n, remaining, stride_kn * UNIT, offs_d, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(V, offs_n, remaining, stride_vn * UNIT, offs_dv, HEAD_DIM_V, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    length_q = tl.where(first_column < length_k, seq.length_q, 0)  # a tile of padding visits no query
    own = Sequence(seq.start_q, seq.start_k, length_q, length_k, seq.shift)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    last_column = tl.minimum(first_column + BLOCK_N, length_k) - 1
    low, full, high = query_range(
        first_column, last_column, seq.shift, length_q, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M
    )
    MASKS: tl.constexpr = HAS_LEFT or HAS_RIGHT  # keys beyond the sequence need none here: they are not stored
    SPLIT: tl.constexpr = HAS_RIGHT and not (HAS_LEFT or Seed is not None or BIAS == DENSE)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_64 = head.to(tl.int64)
        own_bias = Bias
        if BIAS != NO_BIAS:
            own_bias = Bias + (sequence.to(tl.int64) * stride_bias_batch + head_64 * stride_bias_head)
        for part in tl.static_range(0, 2 if SPLIT else 1):
            dk, dv = _dkdv_tiles(
                dk, dv, low if part == 0 else full, tl.minimum(full, high) if SPLIT and part == 0 else high, k, v,
                RowPointers(
                    Q + (seq.start_q * stride_qn + head_64 * stride_qh) * UNIT,
                    Grad + (seq.start_q * stride_gn + head_64 * stride_gh) * UNIT,
                    Top, Total, Delta, head_64 * tokens_q + seq.start_q, stride_qn * UNIT, stride_gn * UNIT,
                ),
                columns, first_column, Seed, sequence, head, own, Scoring(left, right, scale, softcap),
                BiasRows(own_bias, MapQ, MapK, reach, stride_bias_row, stride_bias_column), threshold, keep_scale,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASKS and part == 0, HAS_LEFT, HAS_RIGHT,
                SOFTCAP, BIAS, EXACT,
            )  # fmt: skip

    real = columns < length_k
    stored = (local_columns < slots_k)[:, None]
    kv_heads = heads.to(tl.int64)
    dK += (first_token * kv_heads + kv_head) * HEAD_DIM
    dV += (first_token * kv_heads + kv_head) * HEAD_DIM_V
    dk = tl.where(real, dk * scale, 0.0).to(dK.dtype.element_ty)
    dv = tl.where(real, dv, 0.0).to(dV.dtype.element_ty)
    tl.store(dK + offs_n[:, None] * kv_heads * HEAD_DIM + offs_d[None, :], dk,
             stored & (offs_d < HEAD_DIM)[None, :])  # fmt: skip
    tl.store(dV + offs_n[:, None] * kv_heads * HEAD_DIM_V + offs_dv[None, :], dv,
             stored & (offs_dv < HEAD_DIM_V)[None, :])  # fmt: skip


@triton.jit
def _ds_tile(
    queries, keys, first_column, seq, scoring, bias, dropout,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Compute dS of a square tile that may begin before the first key or end after the last."""
    columns = first_column + tl.arange(0, BLOCK)
    tokens = columns.to(tl.int64)
    k = load_rows(  # [BLOCK, BLOCK_D]
        keys.K, tokens, seq.length_k, keys.stride_k, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D
    )
    v = load_rows(  # [BLOCK, BLOCK_DV]
        keys.V, tokens, seq.length_k, keys.stride_v, tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV
    )
    scores, _ = score_tile(  # [BLOCK, BLOCK]
        tl.dot(queries.q, tl.trans(k), input_precision="ieee"), queries.rows, columns[None, :], queries.first_row,
        first_column, seq, scoring, bias, BLOCK, BLOCK, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, TABLE, EXACT,
    )  # fmt: skip
    dp = tl.dot(queries.grad, tl.trans(v), input_precision="ieee")
    if DROPOUT:
        survives = dropout_survives(dropout.row_keys, columns[None, :], dropout.threshold)
        dp = tl.where(survives, dp * dropout.keep_scale, 0.0)
    p = probabilities(scores, queries.top[:, None], queries.factor[:, None], EXACT)
    return p * (dp - queries.delta[:, None])


@jit
def attention_backward_diagonals(
    Q, K, V, Grad, Top, Total, Delta, Sums, StartsQ, LengthsQ, StartsK, LengthsK, Bias, Seed,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh,
    tokens_q, tiles, heads, batch, left, right, reach, threshold, low_diagonal, diagonals, splits,
    scale, softcap, keep_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Sum dS along diagonals (equal key minus query position): the gradient of a TABLE between its clipped ends.

    A program owns `BLOCK` diagonals of a head in a share of the row tiles, and writes `Sums` `[splits, H, diagonals]`.
    The diagonals of a tile of rows cross two square tiles of keys; a cyclic shift of each row by its number turns
    them into columns.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(diagonals, BLOCK)
    block = program % blocks
    head = program // blocks % heads
    split = program // blocks // heads
    head_64 = head.to(tl.int64)
    kv_head = (head // GROUP).to(tl.int64)
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    DROPOUT: tl.constexpr = Seed is not None
    offs = tl.arange(0, BLOCK)
    turn = (offs[:, None] + offs[None, :]) % BLOCK
    first_tile = offs[None, :] >= offs[:, None]
    Bias += head_64 * (2 * reach + 1)

    sums = tl.zeros([BLOCK], tl.float32)
    for item in range(split, batch * tiles, splits):
        sequence = item // tiles
        first_row = item % tiles * BLOCK
        seq = load_sequence(StartsQ, LengthsQ, StartsK, LengthsK, sequence, CAUSAL)
        first_column = first_row + seq.shift + low_diagonal + block * BLOCK
        if (first_row < seq.length_q) & (first_column < seq.length_k) & (first_column + 2 * BLOCK > 0):
            first_token = seq.start_q + first_row
            remaining = seq.length_q - first_row
            rows = first_row + offs[:, None]
            row_keys = rows
            if DROPOUT:
                row_keys = dropout_row_keys(Seed, sequence, head, rows)
            q = load_rows(  # [BLOCK, BLOCK_D]
                Q + (first_token * stride_qn + head_64 * stride_qh) * UNIT, offs, remaining, stride_qn * UNIT,
                tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            grad = load_rows(  # [BLOCK, BLOCK_DV]
                Grad + (first_token * stride_gn + head_64 * stride_gh) * UNIT, offs, remaining, stride_gn * UNIT,
                tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV,
            )  # fmt: skip
            row_at = head_64 * tokens_q + first_token
            top, factor = load_row_sums(Top + row_at, None if Total is None else Total + row_at, offs, remaining)
            delta = tl.load(Delta + row_at + offs, mask=offs < remaining, other=0.0)  # [BLOCK]
            queries = QueryRows(q, grad, top, factor, delta, rows, first_row)
            keys = KeyRows(
                K + (seq.start_k * stride_kn + kv_head * stride_kh) * UNIT,
                V + (seq.start_k * stride_vn + kv_head * stride_vh) * UNIT, stride_kn * UNIT, stride_vn * UNIT,
            )  # fmt: skip
            scoring = Scoring(left, right, scale, softcap)
            bias = BiasRows(Bias, None, None, reach, 0, 0)
            dropout = Dropout(row_keys, threshold, keep_scale)
            near = _ds_tile(
                queries, keys, first_column, seq, scoring, bias, dropout, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                BLOCK, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, EXACT,
            )  # fmt: skip
            far = _ds_tile(
                queries, keys, first_column + BLOCK, seq, scoring, bias, dropout, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
                BLOCK_DV, BLOCK, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, EXACT,
            )  # fmt: skip
            sums += tl.sum(tl.gather(tl.where(first_tile, near, far), turn, 1), 0)
    at = block * BLOCK + offs
    tl.store(Sums + (split.to(tl.int64) * heads + head) * diagonals + at, sums, at < diagonals)
