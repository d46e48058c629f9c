"""The blocks of scores of one blockwise call: which there are, what is added to them, which weights dropout keeps.

Shapes: B sequences, L queries, S keys, H heads, n sequences of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..attention_layouts import Layout
from ..attention_reference import keep_tile
from ..attention_settings import AttentionSettings
from .attention_buckets import Bucket, BucketPlan, Limits, make_bucket_plan


@dataclass(frozen=True)
class BlockwiseSettings:
    """One settings's settings, and the tensors that its blocks read.

    Attributes:
        diagonals: `[H | 1, 2 * reach + 1]`, what is added to a score by `key - position + reach`: positional bias, and
            -inf where causality or window forbid.
        dense: `[B | 1, H | 1, L | 1, S | 1]`.
        bits: seed of torch's generator for dropout that need not be counter-based.
    """

    plan: BucketPlan
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
        """Yield (first row, last row + 1, the blocks of keys these rows see), in a fixed order; no empty ones."""
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

    def needs_online_softmax(self) -> bool:
        """Return whether some rows see their keys in more than one block."""
        return any(len(keys) > 1 for bucket in self.plan.buckets for *_, keys in self.blocks(bucket))

    def leaves_gaps(self, bucket: Bucket) -> bool:
        """Return whether `blocks` skips rows that see no key."""
        return bucket.ragged and (self.left, self.right) != (None, None)

    def masked(self, bucket: Bucket, rows: tuple[int, int], keys: tuple[int, int]) -> bool:
        """Return whether causality or window forbid some key of a block to some row."""
        late = self.left is not None and keys[0] < rows[1] - 1 + bucket.shift - self.left
        return late or (self.right is not None and keys[1] - 1 > rows[0] + bucket.shift + self.right)

    def may_be_empty(self, bucket: Bucket) -> bool:
        """Return whether a row (padding included) may see no key at all."""
        narrow = self.left is not None and bucket.q.padding is not None
        return self.dense is not None or narrow or (bucket.ragged and (self.left, self.right) != (None, None))

    def diagonal_range(self, bucket: Bucket, rows: tuple[int, int], keys: tuple[int, int]) -> slice:
        """Return which diagonals a block reads."""
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
        """Return the dense bias of a block, `[n | 1, H | 1, rows | 1, keys | 1]`."""
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

    def dropout(self) -> BlockDropout | None:
        """Return the masks of this settings's blocks, in the order of `blocks`."""
        return BlockDropout(self) if self.dropout_p > 0 else None


class BlockDropout:
    """Which weights of each block survive, as 0 and 1 in the scores' dtype."""

    def __init__(self, settings: BlockwiseSettings):
        self.settings = settings
        self.probability = settings.dropout_p
        if settings.bits is not None:
            self.threshold = round(settings.dropout_p * (1 << 16)) - (1 << 15)
            self.probability = (self.threshold + (1 << 15)) / (1 << 16)
            self.generator = torch.Generator().manual_seed(settings.bits)

    def keep(self, like: Tensor, bucket: Bucket, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        """Return the mask of a block of scores `[n, H, rows, keys]`."""
        if self.settings.bits is not None:
            # Sixteen random bits decide on a weight: a tenth of the cost of bernoulli_.
            bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(
                -(1 << 63), None, generator=self.generator
            )
            kept = torch.empty(like.shape, dtype=like.dtype)
            torch.ge(bits.view(torch.int16)[: like.numel()].view(like.shape), self.threshold, out=kept)
            return kept.to(like.device)
        device, members = like.device, torch.tensor(bucket.members, device=like.device)
        lines, columns = torch.arange(*rows, device=device), torch.arange(*keys, device=device)
        seed = cast(Tensor, self.settings.seed)  # it or `bits` is set
        kept = keep_tile(seed, members, self.settings.heads, lines[None], columns[None], self.probability)
        return kept.to(like.dtype)


def block_settings(
    q: Tensor,
    k: Tensor,
    q_layout: Layout,
    kv_layout: Layout,
    settings: AttentionSettings,
    bits: int | None,
    reach: int,
    biased: bool,
) -> BlockwiseSettings:
    """Build the settings that the blocks of one call read; buckets are made once for a pair of layouts.

    Args:
        settings: with the seed as a tensor, if there is one; its bias is not read here.
        bits: seed of torch's generator for dropout that need not be counter-based.
        reach: the index of distance 0 in the diagonals.
        biased: the diagonals hold more than the mask.
    """
    heads, groups = q.shape[-2], k.shape[-2]
    key = ("blockwise", id(kv_layout), heads, groups, settings.causal)
    plan, _ = q_layout.once(
        key, lambda: (make_bucket_plan(q_layout, kv_layout, heads, groups, settings.causal), kv_layout)
    )
    seed = settings.seed
    return BlockwiseSettings(
        plan, heads, groups, *settings.reach, settings.softcap, settings.scale, settings.dropout_p,
        seed if isinstance(seed, Tensor) else None, bits, settings.return_lse, reach, biased,
    )  # fmt: skip
