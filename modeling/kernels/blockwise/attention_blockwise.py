"""The blockwise backend: exact attention in plain PyTorch, with every feature, in memory linear in the lengths.

Sequences of similar lengths share batched matrix products, whatever the layout; a block of scores is made, used and
forgotten, and made again in the hand-written backward pass. Rows see their keys in one block where they are few, and
else in several by online softmax (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1). What causality, window or
lengths leave empty is skipped. Sums run in a fixed order: two backward passes agree to the bit.

Scores are float32 also for half-precision inputs (float64 for float64). Products of bfloat16 inputs are taken from
bfloat16 units where the CPU has them, into float32: scores are exact to float32.

Shapes: B sequences, L queries, S keys, H heads, G key/value heads, R = H / G, D head dim, n sequences of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention_biases import Bias
from ..attention_direct import direct_attention, is_direct, softmax_, softmax_backward_
from ..attention_layouts import Layout
from ..attention_reference import keep_tile
from .attention_buckets import Bucket, Limits, Plan, make_plan


@dataclass(frozen=True)
class Call:
    """One call's settings, and the tensors that its blocks read.

    Attributes:
        diagonals: `[H | 1, 2 * reach + 1]`, what is added to a score by `key - position + reach`: positional bias, and
            -inf where causality or window forbid.
        dense: `[B | 1, H | 1, L | 1, S | 1]`.
        bits: seed of torch's generator for dropout that need not be counter-based.
    """

    plan: Plan
    heads: int
    groups: int
    left: int | None
    right: int | None
    softcap: float | None
    scale: float
    dropout_p: float
    seed: Tensor | None
    bits: int | None
    return_lse: bool
    reach: int
    biased: bool  #: `diagonals` holds more than the mask
    diagonals: Tensor | None = None
    dense: Tensor | None = None

    def blocks(self, bucket: Bucket) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Give (first row, last row + 1, the blocks of keys these rows see), in a fixed order; no empty ones."""
        width = min(bucket.k.length, Limits.keys)
        rows = max(Limits.rows, Limits.elements // (len(bucket.members) * self.heads * width))
        for first in range(0, bucket.q.length, rows):
            last = min(first + rows, bucket.q.length)
            low, high = 0, bucket.k.length
            if self.left is not None:
                low = max(low, first + bucket.shift - self.left)
            if self.right is not None:
                high = min(high, last + bucket.shift + self.right)
            if low < high:
                starts = range(low, high, Limits.keys)
                yield first, last, [(start, min(start + Limits.keys, high)) for start in starts]

    def several(self) -> bool:
        """Whether some rows see their keys in more than one block."""
        return any(len(keys) > 1 for bucket in self.plan.buckets for *_, keys in self.blocks(bucket))

    def leaves_gaps(self, bucket: Bucket) -> bool:
        """Whether `blocks` skips rows that see no key."""
        return bucket.ragged and (self.left, self.right) != (None, None)

    def masked(self, bucket: Bucket, rows: tuple[int, int], keys: tuple[int, int]) -> bool:
        """Whether causality or window forbid some key of a block to some row."""
        late = self.left is not None and keys[0] < rows[1] - 1 + bucket.shift - self.left
        return late or (self.right is not None and keys[1] - 1 > rows[0] + bucket.shift + self.right)

    def may_be_empty(self, bucket: Bucket) -> bool:
        """Whether a row (padding included) may see no key at all."""
        narrow = self.left is not None and bucket.q.padding is not None
        return self.dense is not None or narrow or (bucket.ragged and (self.left, self.right) != (None, None))

    def diagonal_range(self, bucket: Bucket, rows: tuple[int, int], keys: tuple[int, int]) -> slice:
        """Which diagonals a block reads."""
        first = keys[0] - (rows[1] - 1 + bucket.shift) + self.reach
        return slice(first, first + (rows[1] - rows[0]) + (keys[1] - keys[0]) - 1)

    def add_biases(self, scores: Tensor, bucket: Bucket, rows: tuple[int, int], keys: tuple[int, int]) -> None:
        """Add bias and mask to scores `[n, H, rows, keys]`."""
        if self.diagonals is not None and (self.biased or self.masked(bucket, rows, keys)):
            line = self.diagonals[:, self.diagonal_range(bucket, rows, keys)]
            scores.add_(line.unfold(1, keys[1] - keys[0], 1).flip(1))
        if self.dense is not None:
            scores.add_(self._dense_block(self.dense, bucket, rows, keys))
        if bucket.key_padding is not None:
            scores.add_(bucket.key_padding[..., keys[0] : keys[1]])

    def _dense_block(self, dense: Tensor, bucket: Bucket, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        """The dense bias of a block, `[n | 1, H | 1, rows | 1, keys | 1]`."""
        if dense.shape[0] > 1:
            dense = dense[bucket.members]
        for dim, (first, last), columns in ((2, rows, self.plan.q_columns), (3, keys, self.plan.k_columns)):
            if dense.shape[dim] == 1:
                continue
            if columns is None:
                dense = dense.narrow(dim, first, last - first)
                continue
            index = columns[bucket.members, first:last]  # each sequence's own places
            index = index[:, None, :, None] if dim == 2 else index[:, None, None, :]
            dense = torch.take_along_dim(dense.expand(len(index), -1, -1, -1), index, dim)
        return dense

    def add_dense_gradient(
        self, total: Tensor, gradient: Tensor, bucket: Bucket, rows: tuple[int, int], keys: tuple[int, int]
    ) -> None:
        """Add the gradient of a block's scores `[n, H, rows, keys]` to the dense bias's."""
        for dim in (1, 2, 3):
            if total.shape[dim] == 1:
                gradient = gradient.sum(dim, keepdim=True)
        if total.shape[0] == 1 and self.plan.q_columns is None and self.plan.k_columns is None:
            gradient, members = gradient.sum(0, keepdim=True), [0]
        else:
            members = bucket.members
        for i, member in enumerate(members):
            part = total[member if total.shape[0] > 1 else 0]
            where: list[Any] = []
            for dim, (first, last), columns in ((1, rows, self.plan.q_columns), (2, keys, self.plan.k_columns)):
                if part.shape[dim] == 1:
                    where.append(slice(None))
                else:
                    where.append(slice(first, last) if columns is None else columns[member, first:last])
            if isinstance(where[0], Tensor) and isinstance(where[1], Tensor):
                where[0] = where[0][:, None]
            part[:, where[0], where[1]] += gradient[i]

    def dropout(self) -> _Dropout | None:
        """Give the masks of this call's blocks, in the order of `blocks`."""
        return _Dropout(self) if self.dropout_p > 0 else None


class _Dropout:
    """Which weights of each block survive, as 0 and 1 in the scores' dtype."""

    def __init__(self, call: Call):
        self.call = call
        self.probability = call.dropout_p
        if call.bits is not None:
            self.threshold = round(call.dropout_p * (1 << 16)) - (1 << 15)
            self.probability = (self.threshold + (1 << 15)) / (1 << 16)
            self.generator = torch.Generator().manual_seed(call.bits)

    def keep(self, like: Tensor, bucket: Bucket, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        """Give the mask of a block of scores `[n, H, rows, keys]`."""
        if self.call.bits is not None:
            # Sixteen random bits decide on a weight: a tenth of the cost of bernoulli_.
            bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(
                -(1 << 63), None, generator=self.generator
            )
            kept = torch.empty(like.shape, dtype=like.dtype)
            torch.ge(bits.view(torch.int16)[: like.numel()].view(like.shape), self.threshold, out=kept)
            return kept.to(like.device)
        device, members = like.device, torch.tensor(bucket.members, device=like.device)
        lines, columns = torch.arange(*rows, device=device), torch.arange(*keys, device=device)
        kept = keep_tile(self.call.seed, members, self.call.heads, lines[None], columns[None], self.probability)
        return kept.to(like.dtype)


@contextmanager
def _bfloat16_products(wanted: bool) -> Iterator[None]:
    """Let float32 matrix products whose operands came from bfloat16 use the CPU's bfloat16 units."""
    if not wanted:
        yield
        return
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def exact_products(q: Tensor, plan: Plan) -> Any:
    """Products as exact as the inputs' dtype deserves, from the units that are fastest for these sizes.

    Short sequences stay with float32: every new shape costs the bfloat16 units about a millisecond of preparation.
    """
    large = any(bucket.q.length * bucket.k.length >= 1 << 12 for bucket in plan.buckets)
    return _bfloat16_products(large and q.device.type == "cpu" and q.dtype == torch.bfloat16)


class _Work:
    """Memory for blocks, taken once for a pass."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.like, self.dtype = like, dtype
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = self.like.new_empty(size, dtype=self.dtype)
        return buffer[:size].view(shape)


def _rows_of(x: Tensor, repeats: int, rows: tuple[int, int]) -> Tensor:
    """Give some rows of `[n * G, R * L, D]` as `[n * G, R * rows, D]`; a view where possible."""
    if rows == (0, x.shape[1] // repeats):
        return x
    return x.unflatten(1, (repeats, -1))[:, :, rows[0] : rows[1]].flatten(1, 2)


def _make_scores(
    call: Call, out: Tensor, q: Tensor, k: Tensor, bucket: Bucket, rows: tuple[int, int], keys: tuple[int, int]
) -> Tensor | None:
    """Fill `out` `[n * G, R * rows, keys]` with scores, biased and masked; give tanh if there is a softcap."""
    torch.baddbmm(out, q, k.transpose(1, 2), beta=0, alpha=call.scale / (call.softcap or 1.0), out=out)
    bent = None
    if call.softcap is not None:
        bent = out.tanh_().clone()
        out.mul_(call.softcap)
    call.add_biases(out.view(-1, call.heads, rows[1] - rows[0], keys[1] - keys[0]), bucket, rows, keys)
    return bent


def _softmax(call: Call, scores: Tensor, bucket: Bucket) -> Tensor:
    """Turn scores into weights in place; rows without a key get zeros."""
    if not call.may_be_empty(bucket):
        return softmax_(scores)
    empty = scores.amax(-1, keepdim=True) == -torch.inf
    return softmax_(scores.masked_fill_(empty, 0)).masked_fill_(empty, 0)


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Give `out` of q's shape, and the log of the softmax's denominator `[..., H, 1]` where somebody needs it."""
    plan, dtype = call.plan, torch.promote_types(q.dtype, torch.float32)
    out, slots = plan.q.begin(q, v.shape[-1], q.dtype)
    lse = lse_slots = None
    if call.return_lse or call.several():
        lse, lse_slots = plan.q.begin(q, 1, dtype, -torch.inf)
    dropout, work, repeats = call.dropout(), _Work(q, dtype), call.heads // call.groups
    for bucket in plan.buckets:
        q_all = bucket.q.take(q, call.groups, dtype)
        k_all, v_all = bucket.k.take(k, call.groups, dtype), bucket.k.take(v, call.groups, dtype)
        out_all = bucket.q.window(out, slots)
        lse_all = None if lse is None else bucket.q.window(lse, lse_slots)
        if call.leaves_gaps(bucket):
            out_all.zero_()
            if lse_all is not None:
                lse_all.fill_(-torch.inf)
        for first, last, blocks in call.blocks(bucket):
            rows = (first, last)
            total, lse_rows = _attend_rows(call, _rows_of(q_all, repeats, rows), k_all, v_all, bucket, rows, blocks,
                                           lse is not None, dropout, work)  # fmt: skip
            out_all[:, :, first:last] = total.view(-1, call.heads, last - first, v.shape[-1])
            if lse_all is not None and lse_rows is not None:
                lse_all[:, :, first:last] = lse_rows.view(-1, call.heads, last - first, 1)
    return plan.q.finish(out, slots, q), None if lse is None else plan.q.finish(lse, lse_slots, q)


def _attend_rows(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bucket: Bucket,
    rows: tuple[int, int],
    blocks: list[tuple[int, int]],
    wants_lse: bool,
    dropout: _Dropout | None,
    work: _Work,
) -> tuple[Tensor, Tensor | None]:
    """Let some rows `[n * G, R * rows, D]` attend to all their keys: their output, and lse."""
    total: Any = None
    lse = None
    highest = denominator = q  # of the blocks so far
    for keys in blocks:
        scores = work("scores", len(q), q.shape[1], keys[1] - keys[0])
        _make_scores(call, scores, q, k[:, slice(*keys)], bucket, rows, keys)
        if len(blocks) == 1:
            lse = scores.logsumexp(-1, keepdim=True) if wants_lse else None
            weights = _softmax(call, scores, bucket)
        else:
            high = scores.amax(-1, keepdim=True)
            high = high if total is None else torch.maximum(high, highest)
            safe = high.masked_fill(high == -torch.inf, 0)
            weights = scores.sub_(safe).exp_()
            mass = weights.sum(-1, keepdim=True)
            if total is not None:
                shrink = (highest - safe).exp_()
                mass, total = mass + denominator * shrink, total.mul_(shrink)
            highest, denominator = high, mass
        scale = 1.0
        if dropout is not None:
            view = weights.view(-1, call.heads, rows[1] - rows[0], keys[1] - keys[0])
            view.mul_(dropout.keep(view, bucket, rows, keys))
            scale = 1 / (1 - dropout.probability)
        if total is None:
            total = torch.baddbmm(q.new_empty(()), weights, v[:, slice(*keys)], beta=0, alpha=scale)
        else:
            total.baddbmm_(weights, v[:, slice(*keys)], alpha=scale)
    if len(blocks) > 1:
        total = total.div_(denominator.masked_fill(denominator == 0, 1))
        lse = highest + denominator.log()
    return total, lse


def backward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    d_out: Tensor,
    d_lse: Tensor | None,
    wants_diagonals: bool,
    wants_dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Give the gradients of q, k, v, the diagonals and the dense bias (flash attention 2; Dao 2023, algorithm 2)."""
    plan, dtype, repeats = call.plan, torch.promote_types(q.dtype, torch.float32), call.heads // call.groups
    sides = ((plan.q, q), (plan.kv, k), (plan.kv, v))
    made = [side.begin(x, x.shape[-1], x.dtype) for side, x in sides]
    d_diagonals = torch.zeros_like(call.diagonals) if wants_diagonals and call.diagonals is not None else None
    d_dense = torch.zeros_like(call.dense, dtype=dtype) if wants_dense and call.dense is not None else None
    dropout, work = call.dropout(), _Work(q, dtype)
    factor = 1.0 if dropout is None else 1 / (1 - dropout.probability)
    for bucket in plan.buckets:
        wide = {"q": q, "do": d_out, "o": out if lse is not None else None, "l": lse, "dl": d_lse}
        queries = {name: bucket.q.take(x, call.groups, dtype) for name, x in wide.items() if x is not None}
        k_all, v_all = bucket.k.take(k, call.groups, dtype), bucket.k.take(v, call.groups, dtype)
        if bucket.q.padding is not None:
            by_row = queries["do"].view(bucket.q.count, call.heads, bucket.q.length, -1)
            by_row.masked_fill_(bucket.q.padding[:, None, :, None], 0)
        blocks_of_rows = list(call.blocks(bucket))
        once = len(blocks_of_rows) == 1 and blocks_of_rows[0][2] == [(0, bucket.k.length)]
        dq = bucket.q.window(*made[0])
        dk, dv = work("dk", *k_all.shape), work("dv", *v_all.shape)
        if not once:
            dk.zero_()
            dv.zero_()
        if call.leaves_gaps(bucket):
            dq.zero_()
        for first, last, blocks in blocks_of_rows:
            rows = (first, last)
            piece = {name: _rows_of(x, repeats, rows) for name, x in queries.items()}
            dq_rows: Any = None
            for keys in blocks:
                part = slice(*keys)
                d_scores, kept, bent = _score_gradients(
                    call, piece, k_all[:, part], v_all[:, part], bucket, rows, keys, len(blocks) == 1, dropout, work
                )
                _add_product(dv[:, part], kept.transpose(1, 2), piece["do"], factor, once)
                view = d_scores.view(-1, call.heads, last - first, keys[1] - keys[0])
                if d_diagonals is not None:
                    where = call.diagonal_range(bucket, rows, keys)
                    d_diagonals[:, where] += _sum_diagonals(view.sum(0), d_diagonals.shape[0])
                if d_dense is not None:
                    call.add_dense_gradient(d_dense, view, bucket, rows, keys)
                if bent is not None:
                    d_scores.addcmul_(d_scores, bent.square_(), value=-1)
                _add_product(dk[:, part], d_scores.transpose(1, 2), piece["q"], call.scale, once)
                if dq_rows is None:
                    dq_rows = torch.baddbmm(k_all.new_empty(()), d_scores, k_all[:, part], beta=0, alpha=call.scale)
                else:
                    dq_rows.baddbmm_(d_scores, k_all[:, part], alpha=call.scale)
            dq[:, :, first:last] = dq_rows.view(-1, call.heads, last - first, q.shape[-1])
        for gradient, block in ((made[1], dk), (made[2], dv)):
            places = bucket.k.window(*gradient)
            places.copy_(block.view(places.shape))
    dq, dk, dv = (side.finish(*parts, x) for (side, x), parts in zip(sides, made, strict=True))
    return dq, dk, dv, d_diagonals, d_dense


def _score_gradients(
    call: Call,
    piece: dict[str, Tensor],
    k: Tensor,
    v: Tensor,
    bucket: Bucket,
    rows: tuple[int, int],
    keys: tuple[int, int],
    alone: bool,
    dropout: _Dropout | None,
    work: _Work,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make a block again: the gradient of its biased scores, its weights after dropout, tanh of the softcap.

    `alone`: the block holds all keys of its rows. All are `[n * G, R * rows, keys]`.
    """
    weights = work("scores", len(k), piece["q"].shape[1], keys[1] - keys[0])
    bent = _make_scores(call, weights, piece["q"], k, bucket, rows, keys)
    if alone:
        weights = _softmax(call, weights, bucket)
    else:  # an empty row's -inf becomes +inf, so that its weights are 0
        weights.sub_(piece["l"].masked_fill(piece["l"] == -torch.inf, torch.inf)).exp_()
    d_weights = work("gradients", *weights.shape)
    factor = 1.0 if dropout is None else 1 / (1 - dropout.probability)
    torch.baddbmm(d_weights, piece["do"], v.transpose(1, 2), beta=0, alpha=factor, out=d_weights)
    kept = weights
    if dropout is not None:
        shape = (-1, call.heads, rows[1] - rows[0], keys[1] - keys[0])
        mask = dropout.keep(weights.view(shape), bucket, rows, keys)
        d_weights.view(shape).mul_(mask)
        kept = weights.view(shape).mul(mask).view_as(weights)
    if alone:
        softmax_backward_(d_weights, weights)
    else:
        d_weights.sub_((piece["do"] * piece["o"]).sum(-1, keepdim=True)).mul_(weights)
    if "dl" in piece:
        d_weights.addcmul_(weights, piece["dl"].masked_fill(piece["l"] == -torch.inf, 0))
    return d_weights, kept, bent


def _sum_diagonals(x: Tensor, heads: int) -> Tensor:
    """Sum `[H, rows, keys]` along its diagonals to `[H | 1, rows + keys - 1]`, the lowest left first."""
    if heads == 1:
        x = x.sum(0, keepdim=True)
    count, rows, keys = x.shape
    skewed = torch.nn.functional.pad(x.flip(1), (0, rows)).flatten(1)[:, : rows * (rows + keys - 1)]
    return skewed.view(count, rows, rows + keys - 1).sum(1)


def _add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float, fresh: bool) -> None:
    """Add `alpha * a @ b`, or write it where nothing stands yet."""
    torch.baddbmm(total, a, b, beta=0 if fresh else 1, alpha=alpha, out=total)


class _NotTwice(torch.autograd.Function):
    """Pass gradients on, and refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
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
    """`forward` and `backward` for autograd."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, diagonals: Tensor | None, dense: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        call = replace(call, diagonals=diagonals, dense=dense)
        with torch.autocast(q.device.type, enabled=False), exact_products(q, call.plan):
            out, lse = forward(call, q, k, v)
        ctx.save_for_backward(q, k, v, diagonals, dense, None if lse is None else out, lse)
        ctx.call = replace(call, diagonals=None, dense=None)
        return out, lse[..., 0] if call.return_lse and lse is not None else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, diagonals, dense, out, lse = ctx.saved_tensors
        call = replace(ctx.call, diagonals=diagonals, dense=dense)
        d_lse = None if grads[1] is None else grads[1].unsqueeze(-1)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False), exact_products(q, call.plan):
            gradients = backward(call, q, k, v, out, lse, grads[0], d_lse, *ctx.needs_input_grad[3:5])
        return (*_refuse_second(gradients), None)


def make_call(
    q: Tensor,
    k: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    causal: bool,
    window: tuple[int | None, int | None],
    softcap: float | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bits: int | None,
    return_lse: bool,
    reach: int,
    biased: bool,
) -> Call:
    """Settle what one call needs; the layouts' plan is made once."""
    heads, groups = q.shape[-2], k.shape[-2]
    key = ("blockwise", id(kv_layout), heads, groups, causal)
    plan, _ = q_layout.once(key, lambda: (make_plan(q_layout, kv_layout, heads, groups, causal), kv_layout))
    left, right = window
    right = 0 if causal else right
    return Call(
        plan, heads, groups, left, right, softcap, scale, dropout_p, seed, bits, return_lse, reach, biased
    )  # fmt: skip


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    bias: Bias | None,
    softcap: float | None,
    scale: float,
    dropout_p: float,
    seed: int | Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention block by block; see `attention` for the arguments."""
    leaves = (q, k, v) if bias is None else (q, k, v, bias.weight)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    if is_direct(q, q_layout, kv_layout, not (trains or return_lse or dropout_p > 0 or torch.compiler.is_compiling())):
        return direct_attention(q, k, v, q_layout, kv_layout, causal, window, bias, softcap, scale), None
    reach, device = q_layout.length + kv_layout.length, q.device
    dense = bias.dense(q_layout.lengths, q_layout.lengths) if bias is not None and bias.kind == "dense" else None
    biased = bias is not None and dense is None
    ahead = torch.arange(-reach, reach + 1, device=device)
    diagonals = _diagonals(bias if biased else None, ahead, causal, window, torch.promote_types(q.dtype, torch.float32))
    bits = None
    if dropout_p > 0 and seed is None:
        seed = torch.randint(1 << 62, (), device=device)
        if device.type == "cpu" and not torch.compiler.is_compiling():
            bits, seed = int(seed), None
    seed = None if seed is None else torch.as_tensor(seed, dtype=torch.int64, device=device)
    settings = (softcap, scale, dropout_p, seed)
    if torch.compiler.is_compiling():
        left, right = (-1 if side is None else side for side in window or (None, None))
        places = (q_layout.mask, q_layout.cu_seqlens, kv_layout.mask, kv_layout.cu_seqlens)
        from .attention_blockwise_ops import attention_blockwise_op

        out, lse = attention_blockwise_op(q, k, v, diagonals, dense, *places, causal, left, right, *settings, biased)
        return out, lse.transpose(-1, -2) if return_lse else None
    call = make_call(
        q, k, q_layout, kv_layout, causal, window or (None, None), *settings, bits, return_lse, reach, biased
    )
    out, lse = _BlockwiseAttention.apply(q, k, v, diagonals, dense, call)
    return out, None if lse is None else lse.transpose(-1, -2)


def _diagonals(
    bias: Bias | None,
    ahead: Tensor,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """What is added to a score by `key - position`, `[H | 1, len(ahead)]`; None: nothing."""
    left, right = window or (None, None)
    right = 0 if causal else right
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
