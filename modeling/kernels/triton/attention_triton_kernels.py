# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of attention, forward, and device functions that the backward and decode kernels share with it.

After FlashAttention-2 (Dao 2023): online softmax over tiles of keys. Masks, biases and dropout are computed in
registers from the tokens' ranks inside their sequences, so nothing of size L x S is read or written (a `DenseBias`
apart, which is that size itself).

Sequences: sequence b owns the rows `starts[b]` to `starts[b + 1]` of the token tensors, and its real tokens are the
first `lengths[b]` of them; the rest is padding, which is never read and whose results are zeros. Scores are kept in
units of log 2, for `exp2`; in float32 (`EXACT`) they are converted only after the maximum is subtracted, where rounding
costs least. Programs are numbered in one dimension: tile fastest, then head, then sequence.

Pointers are in CamelCase; `Bias` is, by `BIAS`: slopes `[H]` (ALIBI), a table by clipped distance `[H, 2 * reach + 1]`
(TABLE), or a tensor with four strides (DENSE). Strides of tokens and heads are in units of `UNIT` elements, which tells
the compiler of their alignment while their values stay unspecialised: one compilation serves all lengths.

Named tuples group what device functions share. Triton 3.6 and 3.7 build them inside kernels only: as arguments of a
kernel they would be specialised on every value (`do_not_specialize` does not reach into them), and a constexpr in one
becomes a runtime value when it is passed on. So kernels take plain arguments, and constexprs stay outside.

Shapes: M query rows of a tile, N key rows of a tile, D head dim, DV head dim of v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs the package triton (3.6 or newer); install urform[triton]") from error

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_BIAS = tl.constexpr(0)
ALIBI = tl.constexpr(1)
TABLE = tl.constexpr(2)
DENSE = tl.constexpr(3)
GOLDEN = tl.constexpr(0x9E3779B9 - (1 << 32))
MIX_A = tl.constexpr(0x85EBCA6B - (1 << 32))
MIX_B = tl.constexpr(0xC2B2AE35 - (1 << 32))

#: What changes with lengths or windows: integers, and pointers whose alignment does. No compilation depends on them.
UNSPECIALIZED = [
    "stride_qn", "stride_qh", "stride_kn", "stride_kh", "stride_vn", "stride_vh", "stride_on", "stride_oh",
    "stride_gn", "stride_gh", "stride_bias_batch", "stride_bias_head", "stride_bias_row", "stride_bias_column",
    "tokens_q", "tiles", "heads", "batch", "left", "right", "reach", "threshold", "ds_rows", "ds_columns",
    "low_diagonal", "diagonals", "splits", "StartsQ", "LengthsQ", "StartsK", "LengthsK", "MapQ", "MapK", "Seed",
    "Top", "Total", "GradLse",
]  # fmt: skip


def jit(function):
    """Compile without specialising on the arguments above."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in UNSPECIALIZED if name in names])


@triton.jit
def mix32(x):
    """Scramble int32: `attention_reference.mix32`."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX_A
    x = (x ^ ((x >> 13) & 0x7FFFF)) * MIX_B
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def dropout_row_keys(Seed, sequence, head, rows):
    """Hash (seed, sequence, head, row): the part of `attention_reference.dropout_keep` that a row shares."""
    seed = tl.load(Seed)
    key = mix32(mix32(seed.to(tl.int32)) ^ (seed >> 32).to(tl.int32))
    return mix32(mix32(mix32(key ^ sequence) ^ head) ^ rows)


@triton.jit
def dropout_survives(row_keys, columns, threshold):
    """Say which weights survive dropout; `row_keys` and `columns` broadcast against each other."""
    return ((mix32(row_keys ^ (columns * GOLDEN)) >> 8) & 0xFFFFFF) >= threshold


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """Hyperbolic tangent from exp2; `EXACT` adds the series around 0, where `1 - exp` has lost its digits."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    t = (1 - e) / (1 + e)
    t = tl.where(x < 0, -t, t)
    if EXACT:
        y = x * x
        series = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
        t = tl.where(y < 0.0625, series, t)
    return t


@triton.jit
def load_rows(X, rows, length, stride, offs_d, SIZE: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr = False):
    """Load `[rows, BLOCK]` of a token tensor, zeros beyond `length` rows and `SIZE` columns."""
    inside = (rows >= 0) & (rows < length)
    pointers = X + rows[:, None] * stride + offs_d[None, :]
    if SIZE == BLOCK:
        x = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        x = tl.load(pointers, mask=inside[:, None] & (offs_d < SIZE)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


class Sequence(NamedTuple):
    """Where one sequence is: first rows of its queries and keys, their numbers, and the position of row 0."""

    start_q: Any
    start_k: Any
    length_q: Any
    length_k: Any
    shift: Any


class Scoring(NamedTuple):
    """The numbers that turn products into scores; `left` and `right` bound the window."""

    left: Any
    right: Any
    scale: Any
    softcap: Any


class BiasRows(NamedTuple):
    """The bias of one sequence and head.

    `Bias` points to the head's slope, the head's row of the table, or the (sequence, head) plane of the tensor. `MapQ`
    holds the padded column of each query token, from `start_q` on (None: its rank); `MapK` that of each key.
    """

    Bias: Any
    MapQ: Any
    MapK: Any
    reach: Any
    stride_row: Any
    stride_column: Any


class KeyRows(NamedTuple):
    """The first key and value of a sequence and head, and the strides of tokens."""

    K: Any
    V: Any
    stride_k: Any
    stride_v: Any


class Dropout(NamedTuple):
    """What decides which weights of some rows survive; dummies without dropout."""

    row_keys: Any
    threshold: Any
    keep_scale: Any


@triton.jit
def load_sequence(StartsQ, LengthsQ, StartsK, LengthsK, sequence, CAUSAL: tl.constexpr):
    """Load where a sequence is: how every kernel begins."""
    start_q = tl.load(StartsQ + sequence).to(tl.int64)
    start_k = tl.load(StartsK + sequence).to(tl.int64)
    length_q = tl.load(LengthsQ + sequence).to(tl.int32)
    length_k = tl.load(LengthsK + sequence).to(tl.int32)
    shift = length_k * 0
    if CAUSAL:
        shift = length_k - length_q
    return Sequence(start_q, start_k, length_q, length_k, shift)


@triton.jit
def bias_tile(bias, seq, ahead, lowest, highest, rows, columns, BIAS: tl.constexpr):
    """Give the bias of a tile; `rows` and `columns` broadcast against each other.

    Args:
        bias: `BiasRows`; seq: `Sequence`.
        ahead: key position minus query position, of the tile's shape.
        lowest: least `ahead` of the tile, a scalar; `highest`: the greatest.
    """
    if BIAS == ALIBI:
        values = tl.load(bias.Bias).to(tl.float32) * -tl.abs(ahead).to(tl.float32)
    elif BIAS == TABLE:
        if (highest <= -bias.reach) | (lowest >= bias.reach):  # the whole tile has one value
            one = tl.load(bias.Bias + tl.where(highest <= -bias.reach, 0, 2 * bias.reach)).to(tl.float32)
            values = tl.zeros(ahead.shape, tl.float32) + one
        else:
            clipped = tl.minimum(tl.maximum(ahead, -bias.reach), bias.reach)
            values = tl.load(bias.Bias + bias.reach + clipped).to(tl.float32)
    else:
        row_at, row_inside = dense_places(bias.MapQ, rows, seq.start_q, seq.length_q)
        column_at, column_inside = dense_places(bias.MapK, columns, seq.start_k, seq.length_k)
        offsets = row_at * bias.stride_row + column_at * bias.stride_column
        values = tl.load(bias.Bias + offsets, mask=row_inside & column_inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def dense_places(Map, ranks, start, length):
    """Give the rows (or columns) of a dense bias that some tokens of a sequence have, and which tokens there are."""
    inside = (ranks >= 0) & (ranks < length)
    places = ranks.to(tl.int64)
    if Map is not None:
        places = tl.load(Map + start + ranks, mask=inside, other=0).to(tl.int64)
    return places, inside


@triton.jit
def score_tile(
    qk, rows, columns, first_row, first_column, seq, scoring, bias,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Turn products of queries and keys into scores: scale, softcap, bias, mask.

    Args:
        qk: the products, `[M, N]` with `rows` `[M, 1]` and `columns` `[1, N]`, or all of them transposed.
        first_row: least of `rows`, a scalar; `ROWS` is their number; `first_column` and `COLUMNS` likewise.
        seq: `Sequence`; scoring: `Scoring`; bias: `BiasRows`.
        MASKED: False promises that every column is a visible key of every row.
        EXACT: scores as they are, instead of in units of log 2.

    Returns:
        the scores, and the derivative of the softcap (a dummy without one).
    """
    UNIT_OF_SCORE: tl.constexpr = 1.0 if EXACT else LOG2E
    ahead = columns - rows - seq.shift
    slope = qk
    if SOFTCAP:
        t = tanh(qk * (scoring.scale / scoring.softcap), EXACT)
        slope = 1 - t * t
        scores = t * (scoring.softcap * UNIT_OF_SCORE)
    else:
        scores = qk * (scoring.scale * UNIT_OF_SCORE)
    if BIAS != NO_BIAS:
        lowest = first_column - first_row - seq.shift - (ROWS - 1)
        highest = first_column - first_row - seq.shift + (COLUMNS - 1)
        scores += bias_tile(bias, seq, ahead, lowest, highest, rows, columns, BIAS) * UNIT_OF_SCORE
    if MASKED:
        visible = (columns >= 0) & (columns < seq.length_k) & (rows < seq.length_q)
        if HAS_LEFT:
            visible = visible & (ahead >= -scoring.left)
        if HAS_RIGHT:
            visible = visible & (ahead <= scoring.right)
        scores = tl.where(visible, scores, float("-inf"))
    return scores, slope


@triton.jit
def key_range(
    first_row, last_row, shift, length_k, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Give the keys that rows `first_row..last_row` may see, in steps of `BLOCK`.

    Returns:
        `(low, full, high)`: tiles from `low` to `high` are to be visited, and those before `full` need no mask unless
        there is a left bound.
    """
    low = first_row * 0
    full = length_k
    high = length_k
    if HAS_LEFT:
        low = tl.maximum(first_row + shift - left, 0) // BLOCK * BLOCK
    if HAS_RIGHT:
        full = tl.minimum(length_k, first_row + shift + right + 1)
        high = tl.minimum(length_k, last_row + shift + right + 1)
    return low, tl.maximum(tl.maximum(full, 0) // BLOCK * BLOCK, low), tl.maximum(high, low)


@triton.jit
def query_range(
    first_column, last_column, shift, length_q, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Give the query rows that may see keys `first_column..last_column`: `key_range` seen from the keys.

    Returns:
        `(low, full, high)`: tiles from `full` on need no mask unless there is a left bound (rows beyond the sequence
        have probability 0).
    """
    low = first_column * 0
    full = low
    high = length_q
    if HAS_RIGHT:
        low = tl.maximum(first_column - right - shift, 0) // BLOCK * BLOCK
        full = tl.maximum(last_column - right - shift + BLOCK - 1, 0) // BLOCK * BLOCK
    if HAS_LEFT:
        high = tl.minimum(length_q, last_column + left - shift + 1)
    return low, tl.maximum(full, low), tl.maximum(high, low)


@triton.jit
def exponential(x, NATURAL: tl.constexpr):
    """2 to the power of x; e to it if `NATURAL`."""
    if NATURAL:
        x = x * LOG2E
    return tl.exp2(x)


@triton.jit
def add_keys(
    acc, total, top, q, k, v, rows, columns, first_row, first_column, seq, scoring, bias, dropout,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the online softmax (Milakov & Gimelshein 2018, algorithm 3)."""
    scores, _ = score_tile(  # [BLOCK_M, BLOCK_N]
        tl.dot(q, tl.trans(k), input_precision="ieee"), rows, columns, first_row, first_column, seq, scoring, bias,
        BLOCK_M, BLOCK_N, MASKED, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, EXACT,
    )  # fmt: skip
    new_top = tl.maximum(top, tl.max(scores, 1))  # [BLOCK_M]
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = exponential(scores - finite_top[:, None], EXACT)
    shrink = exponential(top - finite_top, EXACT)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(dropout_survives(dropout.row_keys, columns, dropout.threshold), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")  # [BLOCK_M, BLOCK_DV]
    return acc, total, new_top


@triton.jit
def _forward_tiles(
    acc, total, top, low, high, q, keys, rows, first_row, seq, scoring, bias, dropout,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Take the keys from `low` to `high` into the online softmax."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_n = tl.arange(0, BLOCK_N)
    for first in range(low, high, BLOCK_N):
        at = tl.cast(first, tl.int64)
        remaining = seq.length_k - first
        k = load_rows(  # [BLOCK_N, BLOCK_D]
            keys.K + at * keys.stride_k, offs_n, remaining, keys.stride_k, offs_d, HEAD_DIM, BLOCK_D
        )
        v = load_rows(  # [BLOCK_N, BLOCK_DV]
            keys.V + at * keys.stride_v, offs_n, remaining, keys.stride_v, offs_dv, HEAD_DIM_V, BLOCK_DV
        )
        acc, total, top = add_keys(
            acc, total, top, q, k, v, rows, (first + offs_n)[None, :], first_row, first, seq, scoring, bias, dropout,
            BLOCK_M, BLOCK_N, MASKED, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, DROPOUT, EXACT,
        )  # fmt: skip
    return acc, total, top


@jit
def attention_forward(
    Q, K, V, Out, Lse, Top, Total, StartsQ, LengthsQ, StartsK, LengthsK, Bias, MapQ, MapK, Seed,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_column,
    tokens_q, tiles, heads, left, right, reach, threshold, scale, softcap, keep_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Compute `Out` `[tokens_q, H, DV]` and `Lse` `[H, tokens_q]`; a program has one (sequence, head, row tile).

    In float32 also its parts, the rows' greatest scores `Top` and the sums `Total`, from which the backward pass
    recomputes probabilities without the rounding of their logarithm.
    """
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # the longest rows of a causal sequence come first
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
    offs_dv = tl.arange(0, BLOCK_DV)
    local_rows = first_row + offs_m
    rows = local_rows[:, None]
    first_token = seq.start_q + first_row
    length_q = seq.length_q
    Q += first_token * stride_qn * UNIT + head.to(tl.int64) * stride_qh * UNIT
    K += seq.start_k * stride_kn * UNIT + (head // GROUP).to(tl.int64) * stride_kh * UNIT
    V += seq.start_k * stride_vn * UNIT + (head // GROUP).to(tl.int64) * stride_vh * UNIT
    if BIAS != NO_BIAS:
        Bias += sequence.to(tl.int64) * stride_bias_batch + head.to(tl.int64) * stride_bias_head
    row_keys = rows
    if DROPOUT:
        row_keys = dropout_row_keys(Seed, sequence, head, rows)
    length_k = tl.where(first_row < length_q, seq.length_k, 0)  # a tile of padding visits no key and writes its zeros
    q = load_rows(  # [BLOCK_M, BLOCK_D]
        Q, offs_m, length_q - first_row, stride_qn * UNIT, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D
    )

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    last_row = tl.minimum(first_row + BLOCK_M, length_q) - 1
    low, full, high = key_range(first_row, last_row, seq.shift, length_k, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    # A second copy of the loop, without masks, where that is most of the work; else it would only cost compile time.
    SPLIT: tl.constexpr = not (HAS_LEFT or DROPOUT or BIAS == DENSE)
    for part in tl.static_range(0, 2 if SPLIT else 1):
        acc, total, top = _forward_tiles(
            acc, total, top, low if part == 0 else full, full if SPLIT and part == 0 else high, q,
            KeyRows(K, V, stride_kn * UNIT, stride_vn * UNIT), rows, first_row,
            Sequence(seq.start_q, seq.start_k, length_q, length_k, seq.shift), Scoring(left, right, scale, softcap),
            BiasRows(Bias, MapQ, MapK, reach, stride_bias_row, stride_bias_column),
            Dropout(row_keys, threshold, keep_scale), HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
            part == 1 or not SPLIT, HAS_LEFT, HAS_RIGHT, SOFTCAP, BIAS, DROPOUT, EXACT,
        )  # fmt: skip

    attends = (total > 0) & (local_rows < length_q)
    safe_total = tl.where(attends, total, 1.0)
    out = tl.where(attends[:, None], acc * (keep_scale / safe_total)[:, None], 0.0)
    stored = local_rows < slots_q
    row_at = head.to(tl.int64) * tokens_q + first_token + offs_m
    if EXACT:
        lse = tl.where(attends, top + tl.log2(safe_total) * LN2, float("-inf"))
        tl.store(Top + row_at, tl.where(attends, top, float("inf")), stored)
        tl.store(Total + row_at, safe_total, stored)
    else:
        lse = tl.where(attends, (top + tl.log2(safe_total)) * LN2, float("-inf"))
    tl.store(Lse + row_at, lse, stored)
    Out += first_token * stride_on * UNIT + head.to(tl.int64) * stride_oh * UNIT
    out_mask = stored[:, None] & (offs_dv < HEAD_DIM_V)[None, :]
    tl.store(Out + offs_m[:, None] * (stride_on * UNIT) + offs_dv[None, :], out.to(Out.dtype.element_ty), out_mask)
