# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels of attention's backward pass: deterministic, in separate passes, without atomics.

After FlashAttention-2 (Dao 2023): probabilities are recomputed from the log-sum-exp. In the order of the file: `Delta`
of the rows; dq (with what a bias wants from every tile); dk and dv; sums along diagonals, for tables of biases.

Conventions and names are those of `attention_triton_kernels`.
"""

from __future__ import annotations

from .attention_triton_kernels import (
    ALIBI,
    DENSE,
    LOG2E,
    NO_BIAS,
    TABLE,
    dropout_row_keys,
    dropout_survives,
    exponential,
    jit,
    key_range,
    load_rows,
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


@triton.jit
def _row_tile(
    first, q, grad, top, factor, K, V, rows, first_row, row_keys, length_q, length_k, shift, left, right, scale,
    softcap, Bias, start_q, start_k, reach, MapQ, MapK, stride_bias_row, stride_bias_column, threshold, keep_scale,
    stride_kn, stride_vn, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Compute what a tile of queries and the keys from `first` on have in common.

    Returns:
        k, the columns, probabilities (before dropout), their gradient, and the derivative of the softcap.
    """
    offs_n = tl.arange(0, BLOCK_N)
    at = tl.cast(first, tl.int64)
    remaining = length_k - first
    k = load_rows(K + at * stride_kn, offs_n, remaining, stride_kn, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D)
    v = load_rows(V + at * stride_vn, offs_n, remaining, stride_vn, tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV)
    columns = (first + offs_n)[None, :]
    scores, slope = score_tile(
        tl.dot(q, tl.trans(k), input_precision="ieee"), rows, columns, first_row, first, length_q, length_k, shift,
        left, right, scale, softcap, Bias, start_q, start_k, reach, MapQ, MapK, stride_bias_row,
        stride_bias_column, BLOCK_M, BLOCK_N, MASKED, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, EXACT, EXACT,
    )  # fmt: skip
    p = probabilities(scores, top[:, None], factor[:, None], EXACT)
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    if DROPOUT:
        dp = tl.where(dropout_survives(row_keys, columns, threshold), dp * keep_scale, 0.0)
    return k, columns, p, dp, slope


@triton.jit
def _dq_tiles(
    dq, below, above, low, high, q, grad, top, factor, delta, K, V, Ds, rows, first_row, row_keys, length_q, length_k,
    shift, left, right, scale, softcap, Bias, start_q, start_k, reach, MapQ, MapK, stride_bias_row, stride_bias_column,
    ds_columns, threshold, keep_scale, stride_kn, stride_vn, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    BIAS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add to dq, and to the rows' sums for the bias, what the keys from `low` to `high` give."""
    for first in range(low, high, BLOCK_N):
        k, columns, p, dp, slope = _row_tile(
            first, q, grad, top, factor, K, V, rows, first_row, row_keys, length_q, length_k, shift, left, right,
            scale, softcap, Bias, start_q, start_k, reach, MapQ, MapK, stride_bias_row, stride_bias_column, threshold,
            keep_scale, stride_kn, stride_vn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASKED,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, DROPOUT, EXACT,
        )  # fmt: skip
        ds = p * (dp - delta[:, None])
        if BIAS_GRAD:
            ahead = columns - rows - shift
            if BIAS == ALIBI:
                below += tl.sum(ds * -tl.abs(ahead).to(tl.float32), 1)
            elif BIAS == TABLE:
                below += tl.sum(tl.where(ahead <= -reach, ds, 0.0), 1)
                above += tl.sum(tl.where((ahead >= reach) & (ahead > -reach), ds, 0.0), 1)
            else:
                inside = (rows < length_q) & (columns < length_k)
                row_at = rows.to(tl.int64)
                column_at = columns.to(tl.int64)
                if MapQ is not None:
                    row_at = tl.load(MapQ + start_q + rows, mask=rows < length_q, other=0).to(tl.int64)
                if MapK is not None:
                    column_at = tl.load(MapK + start_k + columns, mask=columns < length_k, other=0).to(tl.int64)
                tl.store(Ds + row_at * ds_columns + column_at, ds, inside)
        if SOFTCAP:
            ds = ds * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
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
    start_q = tl.load(StartsQ + sequence).to(tl.int64)
    slots_q = (tl.load(StartsQ + sequence + 1).to(tl.int64) - start_q).to(tl.int32)
    first_row = tile * BLOCK_M
    if first_row >= slots_q:
        return
    start_k = tl.load(StartsK + sequence).to(tl.int64)
    length_q = tl.load(LengthsQ + sequence).to(tl.int32)
    length_k = tl.load(LengthsK + sequence).to(tl.int32)
    shift = 0
    if CAUSAL:
        shift = length_k - length_q
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    DROPOUT: tl.constexpr = Seed is not None

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    local_rows = first_row + offs_m
    rows = local_rows[:, None]
    first_token = start_q + first_row
    head_64 = head.to(tl.int64)
    kv_head = (head // GROUP).to(tl.int64)
    Q += first_token * stride_qn * UNIT + head_64 * stride_qh * UNIT
    Grad += first_token * stride_gn * UNIT + head_64 * stride_gh * UNIT
    K += start_k * stride_kn * UNIT + kv_head * stride_kh * UNIT
    V += start_k * stride_vn * UNIT + kv_head * stride_vh * UNIT
    if BIAS != NO_BIAS:
        Bias += sequence.to(tl.int64) * stride_bias_batch + head_64 * stride_bias_head
    if BIAS_GRAD and BIAS == DENSE:
        Ds += (sequence.to(tl.int64) * heads + head) * ds_rows * ds_columns
    row_keys = rows
    if DROPOUT:
        row_keys = dropout_row_keys(Seed, sequence, head, rows)
    length_k = tl.where(first_row < length_q, length_k, 0)
    remaining = length_q - first_row
    q = load_rows(Q, offs_m, remaining, stride_qn * UNIT, offs_d, HEAD_DIM, BLOCK_D)
    grad = load_rows(Grad, offs_m, remaining, stride_gn * UNIT, tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV)
    row_at = head_64 * tokens_q + first_token
    top, factor = load_row_sums(Top + row_at, None if Total is None else Total + row_at, offs_m, remaining)
    delta = tl.load(Delta + row_at + offs_m, mask=offs_m < remaining, other=0.0)

    last_row = tl.minimum(first_row + BLOCK_M, length_q) - 1
    low, full, high = key_range(first_row, last_row, shift, length_k, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    if (high > low) & (high - low <= BLOCK_N):
        _, _, p, dp, _ = _row_tile(
            low, q, grad, top, factor, K, V, rows, first_row, row_keys, length_q, length_k, shift, left, right,
            scale, softcap, Bias, start_q, start_k, reach, MapQ, MapK, stride_bias_row, stride_bias_column, threshold,
            keep_scale, stride_kn * UNIT, stride_vn * UNIT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
            True, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, DROPOUT, EXACT,
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
            q, grad, top, factor, delta, K, V, Ds, rows, first_row, row_keys, length_q, length_k, shift, left, right,
            scale, softcap, Bias, start_q, start_k, reach, MapQ, MapK, stride_bias_row, stride_bias_column, ds_columns,
            threshold, keep_scale, stride_kn * UNIT, stride_vn * UNIT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
            BLOCK_M, BLOCK_N, part == 1 or not SPLIT, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, BIAS_GRAD, DROPOUT, EXACT,
        )  # fmt: skip

    dq = tl.where(rows < length_q, dq * scale, 0.0)
    dQ += first_token * stride_on * UNIT + head_64 * stride_oh * UNIT
    out_mask = (local_rows < slots_q)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(dQ + offs_m[:, None] * (stride_on * UNIT) + offs_d[None, :], dq.to(dQ.dtype.element_ty), out_mask)
    if BIAS_GRAD and BIAS != DENSE:
        at = (head_64 * batch + sequence) * tiles + tile
        tl.store(Sums + at, tl.sum(below, 0))
        tl.store(Sums + heads.to(tl.int64) * batch * tiles + at, tl.sum(above, 0))


@triton.jit
def _dkdv_tiles(
    dk, dv, low, high, k, v, Q, Grad, Top, Total, Delta, row_at, columns, first_column, Seed, sequence, head,
    length_q, length_k, shift, left, right, scale, softcap, Bias, start_q, start_k, reach, MapQ, MapK, stride_bias_row,
    stride_bias_column, threshold, keep_scale, stride_qn, stride_gn, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what one head's query rows from `low` to `high` give; tiles are transposed, `[N, M]`."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_m = tl.arange(0, BLOCK_M)
    for first in range(low, high, BLOCK_M):
        at = tl.cast(first, tl.int64)
        q = load_rows(Q + at * stride_qn, offs_m, length_q - first, stride_qn, offs_d, HEAD_DIM, BLOCK_D)
        grad = load_rows(Grad + at * stride_gn, offs_m, length_q - first, stride_gn, offs_dv, HEAD_DIM_V, BLOCK_DV)
        at += row_at
        top, factor = load_row_sums(Top + at, None if Total is None else Total + at, offs_m, length_q - first)
        delta = tl.load(Delta + at + offs_m, mask=offs_m < length_q - first, other=0.0)
        rows = (first + offs_m)[None, :]
        scores, slope = score_tile(
            tl.dot(k, tl.trans(q), input_precision="ieee"), rows, columns, first, first_column, length_q, length_k,
            shift, left, right, scale, softcap, Bias, start_q, start_k, reach, MapQ, MapK, stride_bias_row,
            stride_bias_column, BLOCK_M, BLOCK_N, MASKED, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, EXACT, EXACT,
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
    start_k = tl.load(StartsK + sequence).to(tl.int64)
    slots_k = (tl.load(StartsK + sequence + 1).to(tl.int64) - start_k).to(tl.int32)
    first_column = tile * BLOCK_N
    if first_column >= slots_k:
        return
    start_q = tl.load(StartsQ + sequence).to(tl.int64)
    length_q = tl.load(LengthsQ + sequence).to(tl.int32)
    length_k = tl.load(LengthsK + sequence).to(tl.int32)
    shift = 0
    if CAUSAL:
        shift = length_k - length_q
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    local_columns = first_column + offs_n
    columns = local_columns[:, None]
    first_token = start_k + first_column
    K += first_token * stride_kn * UNIT + kv_head.to(tl.int64) * stride_kh * UNIT
    V += first_token * stride_vn * UNIT + kv_head.to(tl.int64) * stride_vh * UNIT
    remaining = length_k - first_column
    k = load_rows(K, offs_n, remaining, stride_kn * UNIT, offs_d, HEAD_DIM, BLOCK_D)
    v = load_rows(V, offs_n, remaining, stride_vn * UNIT, offs_dv, HEAD_DIM_V, BLOCK_DV)
    length_q = tl.where(first_column < length_k, length_q, 0)  # a tile of padding visits no query

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    last_column = tl.minimum(first_column + BLOCK_N, length_k) - 1
    low, full, high = query_range(first_column, last_column, shift, length_q, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M)
    MASKS: tl.constexpr = HAS_LEFT or HAS_RIGHT  # keys beyond the sequence need none here: they are not stored
    SPLIT: tl.constexpr = HAS_RIGHT and not (HAS_LEFT or Seed is not None or BIAS == DENSE)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_64 = head.to(tl.int64)
        bias = Bias
        if BIAS != NO_BIAS:
            bias = Bias + (sequence.to(tl.int64) * stride_bias_batch + head_64 * stride_bias_head)
        for part in tl.static_range(0, 2 if SPLIT else 1):
            dk, dv = _dkdv_tiles(
                dk, dv, low if part == 0 else full, tl.minimum(full, high) if SPLIT and part == 0 else high,
                k, v, Q + (start_q * stride_qn + head_64 * stride_qh) * UNIT,
                Grad + (start_q * stride_gn + head_64 * stride_gh) * UNIT, Top, Total, Delta,
                head_64 * tokens_q + start_q, columns, first_column, Seed, sequence, head, length_q, length_k,
                shift, left, right, scale, softcap, bias, start_q, start_k, reach, MapQ, MapK, stride_bias_row,
                stride_bias_column, threshold, keep_scale, stride_qn * UNIT, stride_gn * UNIT, HEAD_DIM, HEAD_DIM_V,
                BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASKS and part == 0, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, EXACT,
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
    q, grad, top, factor, delta, K, V, first_column, rows, first_row, row_keys, length_q, length_k, shift, left,
    right, scale, softcap, Bias, start_q, start_k, reach, threshold, keep_scale, stride_kn, stride_vn,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Compute dS of a square tile that may begin before the first key or end behind the last."""
    columns = first_column + tl.arange(0, BLOCK)
    tokens = columns.to(tl.int64)
    k = load_rows(K, tokens, length_k, stride_kn, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D)
    v = load_rows(V, tokens, length_k, stride_vn, tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV)
    scores, _ = score_tile(
        tl.dot(q, tl.trans(k), input_precision="ieee"), rows, columns[None, :], first_row, first_column, length_q,
        length_k, shift, left, right, scale, softcap, Bias, start_q, start_k, reach, None, None, 0, 0, BLOCK, BLOCK,
        True, HAS_LEFT, HAS_RIGHT, SOFTCAP, TABLE, EXACT, EXACT,
    )  # fmt: skip
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    if DROPOUT:
        dp = tl.where(dropout_survives(row_keys, columns[None, :], threshold), dp * keep_scale, 0.0)
    return probabilities(scores, top[:, None], factor[:, None], EXACT) * (dp - delta[:, None])


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
        start_q = tl.load(StartsQ + sequence).to(tl.int64)
        start_k = tl.load(StartsK + sequence).to(tl.int64)
        length_q = tl.load(LengthsQ + sequence).to(tl.int32)
        length_k = tl.load(LengthsK + sequence).to(tl.int32)
        shift = 0
        if CAUSAL:
            shift = length_k - length_q
        first_column = first_row + shift + low_diagonal + block * BLOCK
        if (first_row < length_q) & (first_column < length_k) & (first_column + 2 * BLOCK > 0):
            first_token = start_q + first_row
            remaining = length_q - first_row
            rows = first_row + offs[:, None]
            row_keys = rows
            if DROPOUT:
                row_keys = dropout_row_keys(Seed, sequence, head, rows)
            q = load_rows(
                Q + (first_token * stride_qn + head_64 * stride_qh) * UNIT, offs, remaining, stride_qn * UNIT,
                tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            grad = load_rows(
                Grad + (first_token * stride_gn + head_64 * stride_gh) * UNIT, offs, remaining, stride_gn * UNIT,
                tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV,
            )  # fmt: skip
            row_at = head_64 * tokens_q + first_token
            top, factor = load_row_sums(Top + row_at, None if Total is None else Total + row_at, offs, remaining)
            delta = tl.load(Delta + row_at + offs, mask=offs < remaining, other=0.0)
            k_head = K + (start_k * stride_kn + kv_head * stride_kh) * UNIT
            v_head = V + (start_k * stride_vn + kv_head * stride_vh) * UNIT
            near = _ds_tile(
                q, grad, top, factor, delta, k_head, v_head, first_column, rows, first_row, row_keys, length_q,
                length_k, shift, left, right, scale, softcap, Bias, start_q, start_k, reach, threshold, keep_scale,
                stride_kn * UNIT, stride_vn * UNIT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK, HAS_LEFT,
                HAS_RIGHT, SOFTCAP, DROPOUT, EXACT,
            )  # fmt: skip
            far = _ds_tile(
                q, grad, top, factor, delta, k_head, v_head, first_column + BLOCK, rows, first_row, row_keys, length_q,
                length_k, shift, left, right, scale, softcap, Bias, start_q, start_k, reach, threshold, keep_scale,
                stride_kn * UNIT, stride_vn * UNIT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK, HAS_LEFT,
                HAS_RIGHT, SOFTCAP, DROPOUT, EXACT,
            )  # fmt: skip
            sums += tl.sum(tl.gather(tl.where(first_tile, near, far), turn, 1), 0)
    at = block * BLOCK + offs
    tl.store(Sums + (split.to(tl.int64) * heads + head) * diagonals + at, sums, at < diagonals)
