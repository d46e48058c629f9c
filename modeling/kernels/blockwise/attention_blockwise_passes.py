"""The two passes of the blockwise backend, forward and backward, over blocks of scores.

A block of scores is made, used and forgotten, and made again in the backward pass. Sums run in a fixed order: two
backward passes agree to the bit.

Shapes: L queries, S keys, H heads, G key/value heads, R = H / G, D head dim, n sequences of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention_direct import softmax_, softmax_backward_
from .attention_blocks import BlockDropout, BlockwiseSettings
from .attention_buckets import Bucket, BucketPlan


@contextmanager
def _bfloat16_products(wanted: bool) -> Iterator[None]:
    """Let float32 matrix products whose operands came from bfloat16 use the CPU's bfloat16 units."""
    if not wanted:
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # an attribute that torch sets at import
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def exact_products(q: Tensor, plan: BucketPlan) -> Any:
    """Take products as exact as the inputs' dtype deserves, from the units that are fastest for these sizes.

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
    """Return some rows of `[n * G, R * L, D]` as `[n * G, R * rows, D]`; a view where possible."""
    if rows == (0, x.shape[1] // repeats):
        return x
    return x.unflatten(1, (repeats, -1))[:, :, rows[0] : rows[1]].flatten(1, 2)


def _make_scores(
    settings: BlockwiseSettings,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    bucket: Bucket,
    rows: tuple[int, int],
    keys: tuple[int, int],
) -> Tensor | None:
    """Fill `out` `[n * G, R * rows, keys]` with scores, biased and masked; return tanh if there is a softcap."""
    torch.baddbmm(out, q, k.transpose(1, 2), beta=0, alpha=settings.scale / (settings.softcap or 1.0), out=out)
    tanh = None
    if settings.softcap is not None:
        tanh = out.tanh_().clone()
        out.mul_(settings.softcap)
    settings.add_biases(out.view(-1, settings.heads, rows[1] - rows[0], keys[1] - keys[0]), bucket, rows, keys)
    return tanh


def _softmax(settings: BlockwiseSettings, scores: Tensor, bucket: Bucket) -> Tensor:
    """Turn scores into weights in place; rows without a key get zeros."""
    if not settings.may_be_empty(bucket):
        return softmax_(scores)
    empty = scores.amax(-1, keepdim=True) == -torch.inf
    return softmax_(scores.masked_fill_(empty, 0)).masked_fill_(empty, 0)


def forward(settings: BlockwiseSettings, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return `out` of q's shape, and the log of the softmax's denominator `[..., H, 1]` where somebody needs it."""
    plan, dtype = settings.plan, torch.promote_types(q.dtype, torch.float32)
    out, slots = plan.q.begin(q, v.shape[-1], q.dtype)
    lse = lse_slots = None
    if settings.return_lse or settings.needs_online_softmax():
        lse, lse_slots = plan.q.begin(q, 1, dtype, -torch.inf)
    dropout, work, repeats = settings.dropout(), _Work(q, dtype), settings.heads // settings.groups
    for bucket in plan.buckets:
        q_all = bucket.q.take(q, settings.groups, dtype)
        k_all, v_all = bucket.k.take(k, settings.groups, dtype), bucket.k.take(v, settings.groups, dtype)
        out_all = bucket.q.window(out, slots)
        lse_all = None if lse is None else bucket.q.window(lse, lse_slots)
        if settings.leaves_gaps(bucket):
            out_all.zero_()
            if lse_all is not None:
                lse_all.fill_(-torch.inf)
        for first, last, blocks in settings.blocks(bucket):
            rows = (first, last)
            total, lse_rows = _attend_rows(settings, _rows_of(q_all, repeats, rows), k_all, v_all, bucket, rows, blocks,
                                           lse is not None, dropout, work)  # fmt: skip
            out_all[:, :, first:last] = total.view(-1, settings.heads, last - first, v.shape[-1])
            if lse_all is not None and lse_rows is not None:
                lse_all[:, :, first:last] = lse_rows.view(-1, settings.heads, last - first, 1)
    return plan.q.finish(out, slots, q), None if lse is None else plan.q.finish(lse, lse_slots, q)


def _attend_rows(
    settings: BlockwiseSettings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bucket: Bucket,
    rows: tuple[int, int],
    blocks: list[tuple[int, int]],
    wants_lse: bool,
    dropout: BlockDropout | None,
    work: _Work,
) -> tuple[Tensor, Tensor | None]:
    """Let some rows `[n * G, R * rows, D]` attend to all their keys: their output, and lse."""
    total: Any = None
    lse = None
    highest = denominator = q  # of the blocks so far
    for keys in blocks:
        scores = work("scores", len(q), q.shape[1], keys[1] - keys[0])
        _make_scores(settings, scores, q, k[:, slice(*keys)], bucket, rows, keys)
        if len(blocks) == 1:
            lse = scores.logsumexp(-1, keepdim=True) if wants_lse else None
            weights = _softmax(settings, scores, bucket)
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
            view = weights.view(-1, settings.heads, rows[1] - rows[0], keys[1] - keys[0])
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
    settings: BlockwiseSettings,
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
    """Return the gradients of q, k, v, the diagonals and the dense bias (flash attention 2; Dao 2023, algorithm 2)."""
    plan, groups, dtype = settings.plan, settings.groups, torch.promote_types(q.dtype, torch.float32)
    sides = ((plan.q, q), (plan.kv, k), (plan.kv, v))
    made = [side.begin(x, x.shape[-1], x.dtype) for side, x in sides]
    sums = _BiasGradients(
        torch.zeros_like(settings.diagonals) if wants_diagonals and settings.diagonals is not None else None,
        torch.zeros_like(settings.dense, dtype=dtype) if wants_dense and settings.dense is not None else None,
    )
    dropout, work = settings.dropout(), _Work(q, dtype)
    by_query = {"q": q, "do": d_out, "o": out if lse is not None else None, "l": lse, "dl": d_lse}
    for bucket in plan.buckets:
        queries = {name: bucket.q.take(x, groups, dtype) for name, x in by_query.items() if x is not None}
        if bucket.q.padding is not None:
            by_row = queries["do"].view(bucket.q.count, settings.heads, bucket.q.length, -1)
            by_row.masked_fill_(bucket.q.padding[:, None, :, None], 0)
        keys_and_values = (bucket.k.take(k, groups, dtype), bucket.k.take(v, groups, dtype))
        dq = bucket.q.window(*made[0])
        dk, dv = _bucket_gradients(settings, queries, *keys_and_values, bucket, dq, sums, dropout, work)
        for gradient, block in ((made[1], dk), (made[2], dv)):
            places = bucket.k.window(*gradient)
            places.copy_(block.view(places.shape))
    dq, dk, dv = (side.finish(*parts, x) for (side, x), parts in zip(sides, made, strict=True))
    return dq, dk, dv, sums.diagonals, sums.dense


@dataclass
class _BiasGradients:
    """The sums of the biases' gradients over all blocks; None where nobody asks for one."""

    diagonals: Tensor | None
    dense: Tensor | None

    def add(
        self,
        settings: BlockwiseSettings,
        d_scores: Tensor,
        bucket: Bucket,
        rows: tuple[int, int],
        keys: tuple[int, int],
    ) -> None:
        """Add the gradient of a block's biased scores, `[n, H, rows, keys]`."""
        if self.diagonals is not None:
            where = settings.diagonal_range(bucket, rows, keys)
            self.diagonals[:, where] += _sum_diagonals(d_scores.sum(0), self.diagonals.shape[0])
        if self.dense is not None:
            settings.add_dense_gradient(self.dense, d_scores, bucket, rows, keys)


def _bucket_gradients(
    settings: BlockwiseSettings,
    queries: dict[str, Tensor],
    k: Tensor,
    v: Tensor,
    bucket: Bucket,
    dq: Tensor,
    sums: _BiasGradients,
    dropout: BlockDropout | None,
    work: _Work,
) -> tuple[Tensor, Tensor]:
    """Fill `dq` `[n, H, L, D]` of one bucket, and return dk and dv `[n * G, S, D]`."""
    blocks_of_rows = list(settings.blocks(bucket))
    # With one block, dk and dv are written once, so there is nothing to clear and to add to.
    fresh = len(blocks_of_rows) == 1 and blocks_of_rows[0][2] == [(0, bucket.k.length)]
    dk, dv = work("dk", *k.shape), work("dv", *v.shape)
    if not fresh:
        dk.zero_()
        dv.zero_()
    if settings.leaves_gaps(bucket):
        dq.zero_()
    factor = 1.0 if dropout is None else 1 / (1 - dropout.probability)
    for first, last, blocks in blocks_of_rows:
        rows = (first, last)
        piece = {name: _rows_of(x, settings.heads // settings.groups, rows) for name, x in queries.items()}
        dq_rows: Any = None
        for keys in blocks:
            part = slice(*keys)
            d_scores, kept, tanh = _score_gradients(
                settings, piece, k[:, part], v[:, part], bucket, rows, keys, len(blocks) == 1, dropout, work
            )
            _add_product(dv[:, part], kept.transpose(1, 2), piece["do"], factor, fresh)
            sums.add(settings, d_scores.view(-1, settings.heads, last - first, keys[1] - keys[0]), bucket, rows, keys)
            if tanh is not None:
                d_scores.addcmul_(d_scores, tanh.square_(), value=-1)
            _add_product(dk[:, part], d_scores.transpose(1, 2), piece["q"], settings.scale, fresh)
            if dq_rows is None:
                dq_rows = torch.baddbmm(k.new_empty(()), d_scores, k[:, part], beta=0, alpha=settings.scale)
            else:
                dq_rows.baddbmm_(d_scores, k[:, part], alpha=settings.scale)
        dq[:, :, first:last] = dq_rows.view(-1, settings.heads, last - first, k.shape[-1])
    return dk, dv


def _score_gradients(
    settings: BlockwiseSettings,
    piece: dict[str, Tensor],
    k: Tensor,
    v: Tensor,
    bucket: Bucket,
    rows: tuple[int, int],
    keys: tuple[int, int],
    alone: bool,
    dropout: BlockDropout | None,
    work: _Work,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make a block again: the gradient of its biased scores, its weights after dropout, tanh of the softcap.

    `alone`: the block holds all keys of its rows. All are `[n * G, R * rows, keys]`.
    """
    weights = work("scores", len(k), piece["q"].shape[1], keys[1] - keys[0])
    tanh = _make_scores(settings, weights, piece["q"], k, bucket, rows, keys)
    if alone:
        weights = _softmax(settings, weights, bucket)
    else:  # an empty row's -inf becomes +inf, so that its weights are 0
        weights.sub_(piece["l"].masked_fill(piece["l"] == -torch.inf, torch.inf)).exp_()
    d_weights = work("gradients", *weights.shape)
    factor = 1.0 if dropout is None else 1 / (1 - dropout.probability)
    torch.baddbmm(d_weights, piece["do"], v.transpose(1, 2), beta=0, alpha=factor, out=d_weights)
    kept = weights
    if dropout is not None:
        shape = (-1, settings.heads, rows[1] - rows[0], keys[1] - keys[0])
        mask = dropout.keep(weights.view(shape), bucket, rows, keys)
        d_weights.view(shape).mul_(mask)
        kept = weights.view(shape).mul(mask).view_as(weights)
    if alone:
        softmax_backward_(d_weights, weights)
    else:
        d_weights.sub_((piece["do"] * piece["o"]).sum(-1, keepdim=True)).mul_(weights)
    if "dl" in piece:
        d_weights.addcmul_(weights, piece["dl"].masked_fill(piece["l"] == -torch.inf, 0))
    return d_weights, kept, tanh


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
