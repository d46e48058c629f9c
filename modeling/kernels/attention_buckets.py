"""Buckets: sequences of similar lengths side by side, so that batched matrix products serve any layout.

Shapes: B sequences, L queries, S keys, H heads, G key/value heads, D head dim, n sequences of a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_layouts import Layout

BLOCK_ELEMENTS = 1 << 20  #: scores of a block: they and their gradient fit a CPU's last cache
BLOCK_KEYS = 1024  #: keys of a block; rows that see more of them need online softmax
MIN_ROWS = 16  #: queries of a block, at least


@dataclass(frozen=True)
class Slots:
    """Where the rows of one side stand in a grid of buckets, each `[n, heads, length]`, and how to get there and back.

    Attributes:
        there: int64 `[slots]`, the row of the flat `[tokens * heads, D]` tensor that each slot copies.
        back: int64 `[tokens * heads]`, the slot of each row; padding reads slot number `slots`, which holds zeros.
    """

    there: Tensor
    back: Tensor

    def spread(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy `[..., heads, D]` to `[slots, D]`."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.there).to(dtype)

    def gather(self, slots: Tensor, like: Tensor, keep_dtype: bool = False) -> Tensor:
        """Copy `[slots + 1, D]` to the shape of `like`, but for its last dimension, and to its dtype."""
        slots = slots if keep_dtype else slots.to(like.dtype)
        return slots.index_select(0, self.back).view(*like.shape[:-1], slots.shape[-1])


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar lengths: their numbers, padded sizes, slots, and what of them is padding.

    Attributes:
        members: numbers of the sequences.
        length: L, queries of the longest; `size`: S, keys of the longest.
        shift: position of the first query.
        q_at: first slot of the queries, in rows of one head; `k_at`: of the keys.
        key_padding: `[n, 1, 1, S]`, 0 at keys and -inf behind a sequence's last; None: all have S keys.
        row_padding: bool `[n, 1, L, 1]`, True behind a sequence's last query; None: all have L queries.
        ragged: whether a sequence has other queries than keys, so that masks may leave a row without a key.
    """

    members: list[int]
    length: int
    size: int
    shift: int
    q_at: int
    k_at: int
    key_padding: Tensor | None
    row_padding: Tensor | None
    ragged: bool


@dataclass(frozen=True)
class Plan:
    """All buckets of a pair of layouts, and the slots of both sides."""

    buckets: list[Bucket]
    q: Slots
    kv: Slots
    q_columns: Tensor | None  #: int64 `[B, L]`, padded coordinates of the real tokens; None: they stand at the left
    k_columns: Tensor | None


def _token_rows(layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Where each sequence's tokens begin `[B]`, and the flat index they begin in (None: the tensor's own rows)."""
    device = layout.lengths.device
    if layout.cu_seqlens is not None:
        return layout.cu_seqlens[:-1], None
    if layout.mask is None or layout.known_sizes is not None:
        return torch.arange(layout.batch, device=device) * layout.length, None
    return layout.lengths.cumsum(0) - layout.lengths, layout.mask.flatten().nonzero()[:, 0]


def _columns(layout: Layout) -> Tensor | None:
    """Padded coordinates of the real tokens `[B, L]`, in order; None where they are 0, 1, 2 and so on."""
    if layout.mask is None or layout.known_sizes is not None:
        return None
    order = torch.sort(~layout.mask, dim=-1, stable=True).indices
    at_left = layout.mask[:, 1:] <= layout.mask[:, :-1]
    return None if bool(at_left.all()) else order


def _round_up(size: int) -> int:
    """Round up to a multiple of about a third of the size (at least 8): sequences of one bucket are about as long."""
    step = max(8, 1 << max((size - 1).bit_length() - 2, 0))
    return -(-size // step) * step


def _tokens(layout: Layout) -> int:
    """Rows of a flat tensor of this layout."""
    return sum(layout.sizes) if layout.is_packed else layout.batch * layout.length


def make_plan(q_layout: Layout, kv_layout: Layout, heads: int, groups: int, aligned: bool) -> Plan:
    """Sort sequences into buckets by their lengths; `aligned`: and by the position of their first query."""
    q_sizes, k_sizes = q_layout.sizes, kv_layout.sizes
    buckets: dict[tuple[int, int, int], list[int]] = {}
    for i, (q_size, k_size) in enumerate(zip(q_sizes, k_sizes, strict=True)):
        if q_size > 0 and k_size > 0:
            shift = k_size - q_size if aligned else 0
            buckets.setdefault((shift, _round_up(max(q_size, k_size)), _round_up(q_size) if shift else 0), []).append(i)

    device = q_layout.lengths.device
    made: list[Bucket] = []
    sides = {"q": (q_layout, heads), "k": (kv_layout, groups)}
    starts = {name: _token_rows(layout) for name, (layout, _) in sides.items()}
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {"q": [], "k": []}
    at = {"q": 0, "k": 0}
    for (shift, _, _), sequences in buckets.items():
        length, size = max(q_sizes[i] for i in sequences), max(k_sizes[i] for i in sequences)
        cells = heads * min(length, MIN_ROWS) * min(size, BLOCK_KEYS)
        together = max(1, BLOCK_ELEMENTS // cells)
        for first in range(0, len(sequences), together):
            members = sequences[first : first + together]
            length, size = max(q_sizes[i] for i in members), max(k_sizes[i] for i in members)
            index = torch.tensor(members, device=device)
            padding: dict[str, Tensor | None] = {}
            for name, longest in (("q", length), ("k", size)):
                (layout, copies), (begin_B, tokens) = sides[name], starts[name]
                ranks = torch.arange(longest, device=device)
                lengths_n1 = layout.lengths[index][:, None]
                rows_nL = begin_B[index][:, None] + torch.minimum(ranks, lengths_n1 - 1)
                rows_nL = rows_nL if tokens is None else tokens[rows_nL]
                real_nL = ranks < lengths_n1
                padding[name] = None if min(layout.sizes[i] for i in members) == longest else ~real_nL
                hs = torch.arange(copies, device=device)[:, None]
                there = rows_nL[:, None] * copies + hs
                parts[name].append((there.flatten(), real_nL[:, None].expand_as(there).flatten()))
            keys, rows = padding["k"], padding["q"]
            made.append(
                Bucket(
                    members,
                    length,
                    size,
                    shift,
                    at["q"] * heads,
                    at["k"] * groups,
                    None
                    if keys is None
                    else torch.zeros(keys.shape, device=device).masked_fill_(keys, -torch.inf)[:, None, None],
                    None if rows is None else rows[:, None, :, None],
                    any(q_sizes[i] != k_sizes[i] for i in members),
                )
            )
            at["q"] += len(members) * length
            at["k"] += len(members) * size

    slots = {}
    for name, (layout, copies) in sides.items():
        there = (
            torch.cat([rows for rows, _ in parts[name]]) if made else torch.empty(0, dtype=torch.int64, device=device)
        )
        back = torch.full((_tokens(layout) * copies,), len(there), device=device)
        if made:
            real = torch.cat([kept for _, kept in parts[name]])
            back[there[real]] = real.nonzero()[:, 0]
        slots[name] = Slots(there, back)
    return Plan(made, slots["q"], slots["k"], _columns(q_layout), _columns(kv_layout))
