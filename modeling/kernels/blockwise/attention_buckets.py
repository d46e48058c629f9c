"""Buckets: sequences of similar lengths side by side, so that batched matrix products serve any layout.

Shapes: B sequences, L queries, S keys, H heads, G key/value heads, D head dim, n sequences of a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..attention_layouts import Layout


class Limits:
    """How large a block of scores may be."""

    elements = 1 << 19  #: scores of a block: they and their gradient fit a CPU's last cache
    keys = 1024  #: keys of a block; rows that see more of them need online softmax
    rows = 16  #: queries of a block, at least


@dataclass(frozen=True)
class BucketSide:
    """The queries, or the keys and values, of a bucket: n sequences of up to `length` tokens, in `heads` heads.

    Attributes:
        count: n.
        length: tokens of the longest sequence.
        heads: H or G.
        start: first token, where the sequences follow each other and none is shorter; else -1.
        rows: int64 `[n * heads * length]`, rows of the flat `[tokens * heads, D]` tensor; None if `start` says it all.
        at: first slot in the tensor from which `BucketPlan.restore` gathers.
        padding: bool `[n, length]`, True after a sequence's last token; None: none is shorter.
    """

    count: int
    length: int
    heads: int
    start: int
    rows: Tensor | None
    at: int
    padding: Tensor | None

    def take(self, x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """Return this side of `[..., heads, D]` as `[n * groups, heads / groups * length, D]`; a view if possible."""
        if self.rows is not None:
            block = x.reshape(-1, x.shape[-1]).index_select(0, self.rows)
        else:
            tokens = x.reshape(-1, *x.shape[-2:]).narrow(0, self.start, self.count * self.length)
            block = tokens.unflatten(0, (self.count, self.length)).transpose(1, 2)
        return block.to(dtype).reshape(self.count * groups, -1, x.shape[-1])

    def window(self, out: Tensor, slots: Tensor | None) -> Tensor:
        """Return the places of this side in `out`, or its slots, as `[n, heads, length, D]` to write to."""
        if self.rows is not None and slots is not None:
            mine = slots[self.at : self.at + self.rows.shape[0]]
            return mine.view(self.count, self.heads, self.length, -1)
        tokens = out.view(-1, self.heads, out.shape[-1]).narrow(0, self.start, self.count * self.length)
        return tokens.unflatten(0, (self.count, self.length)).transpose(1, 2)


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar lengths.

    Attributes:
        members: numbers of the sequences.
        q: their queries; `k`: their keys.
        shift: position of the first query.
        key_padding: `[n, 1, 1, S]`, 0 at keys and -inf after a sequence's last; None: all have S keys.
        ragged: whether a sequence has other queries than keys, so that masks may leave a row without a key.
    """

    members: list[int]
    q: BucketSide
    k: BucketSide
    shift: int
    key_padding: Tensor | None
    ragged: bool


@dataclass(frozen=True)
class Restored:
    """How what buckets computed gets back into a tensor of the layout's shape.

    Attributes:
        slots: how many rows the buckets that are not contiguous hold.
        whole: int64 `[tokens * heads]`, the slot of every row, where no bucket is contiguous; padding reads slot
            number `slots`, which holds zeros.
        rows: else, the rows to be filled from slots, and `sources`, the slots.
    """

    slots: int
    whole: Tensor | None
    rows: Tensor | None
    sources: Tensor | None

    def begin(self, like: Tensor, width: int, dtype: torch.dtype, fill: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """Make the tensor that contiguous buckets write to (`like`'s shape, but for `width`), and the slots."""
        out = torch.empty(0) if self.whole is not None else like.new_empty(*like.shape[:-1], width, dtype=dtype)
        if self.slots == 0 and self.rows is None and self.whole is None:
            return out, None
        slots = like.new_empty(self.slots + 1, width, dtype=dtype)
        slots[-1] = fill
        return out, slots

    def finish(self, out: Tensor, slots: Tensor | None, like: Tensor) -> Tensor:
        """Bring the slots back to their rows."""
        if slots is None:
            return out
        width = slots.shape[-1]
        if self.whole is not None:
            return slots.index_select(0, self.whole).view(*like.shape[:-1], width)
        if self.rows is not None and self.sources is not None:
            out.view(-1, width).index_copy_(0, self.rows, slots.index_select(0, self.sources))
        return out


@dataclass(frozen=True)
class BucketPlan:
    """All buckets of a pair of layouts, and how to get back from them."""

    buckets: list[Bucket]
    q: Restored
    kv: Restored
    q_columns: Tensor | None  #: int64 `[B, L]`, padded coordinates of the real tokens; None: they stand at the left
    k_columns: Tensor | None


@dataclass
class _Places:
    """Where the tokens of a layout are, and which slots have been given to its buckets so far."""

    layout: Layout
    heads: int

    def __post_init__(self) -> None:
        layout, device = self.layout, self.layout.lengths.device
        self.tokens: Tensor | None = None  # flat places of the real tokens, where they are not just in order
        if layout.is_packed:
            self.starts = list(accumulate(layout.sizes, initial=0))
        else:
            self.starts = [i * layout.length for i in range(layout.batch + 1)]
            if layout.mask is not None and layout.known_sizes is None:
                self.starts = list(accumulate(layout.sizes, initial=0))
                self.tokens = layout.mask.flatten().nonzero()[:, 0]
        self.total = self.starts[-1] if self.tokens is None else layout.batch * layout.length
        self.begins = torch.tensor(self.starts[:-1], device=device)
        self.slots = 0
        self.filled: list[tuple[Tensor, Tensor]] = []
        self.spans: list[tuple[int, int]] = []  # tokens of contiguous buckets

    def side(self, members: list[int]) -> BucketSide:
        layout, device = self.layout, self.layout.lengths.device
        lengths = [layout.sizes[i] for i in members]
        longest = max(lengths)
        begins = [self.starts[i] for i in members]
        even = min(lengths) == longest
        if even and self.tokens is None and all(b - a == longest for a, b in pairwise(begins)):
            self.spans.append((begins[0], begins[0] + longest * len(members)))
            return BucketSide(len(members), longest, self.heads, begins[0], None, 0, None)
        index = torch.tensor(members, device=device)
        ranks, lengths_n1 = torch.arange(longest, device=device), layout.lengths[index][:, None]
        tokens_nL = self.begins[index][:, None] + torch.minimum(ranks, lengths_n1 - 1)
        tokens_nL = tokens_nL if self.tokens is None else self.tokens[tokens_nL]
        real_nL = ranks < lengths_n1
        rows = tokens_nL[:, None] * self.heads + torch.arange(self.heads, device=device)[:, None]
        self.filled.append((rows.flatten(), real_nL[:, None].expand_as(rows).flatten()))
        at, self.slots = self.slots, self.slots + rows.numel()
        return BucketSide(len(members), longest, self.heads, -1, rows.flatten(), at, None if even else ~real_nL)

    def restored(self) -> Restored:
        device = self.layout.lengths.device
        straight = sum(stop - start for start, stop in self.spans)
        if not self.filled and straight == self.total:
            return Restored(0, None, None, None)
        back = torch.full((self.total * self.heads,), self.slots, device=device)
        if self.filled:
            rows, real = (torch.cat(parts) for parts in zip(*self.filled, strict=True))
            back[rows[real]] = real.nonzero()[:, 0]
        if straight == 0:
            return Restored(self.slots, back, None, None)
        untouched = torch.ones(self.total, dtype=torch.bool, device=device)
        for start, stop in self.spans:
            untouched[start:stop] = False
        rows = untouched.repeat_interleave(self.heads).nonzero()[:, 0]
        return Restored(self.slots, None, rows, back[rows])


def _columns(layout: Layout) -> Tensor | None:
    """Return padded coordinates of the real tokens `[B, L]`, in order; None where they are 0, 1, 2 and so on."""
    if layout.mask is None or layout.known_sizes is not None:
        return None
    order = torch.sort(~layout.mask, dim=-1, stable=True).indices
    at_left = layout.mask[:, 1:] <= layout.mask[:, :-1]
    return None if bool(at_left.all()) else order


def _round_up(size: int) -> int:
    """Round up to 16, 32, 48, 64, 96, 128, 192 and so on: sequences of one bucket are about as long.

    Short sequences are sorted coarsely: another bucket costs them more than the padding that it saves.
    """
    step = max(16, 1 << max((size - 1).bit_length() - 2, 0))
    return -(-size // step) * step


def make_bucket_plan(q_layout: Layout, kv_layout: Layout, heads: int, groups: int, aligned: bool) -> BucketPlan:
    """Sort sequences into buckets by their lengths; `aligned`: and by the position of their first query."""
    q_sizes, k_sizes = q_layout.sizes, kv_layout.sizes
    similar: dict[tuple[int, int, int], list[int]] = {}
    for i, (q_size, k_size) in enumerate(zip(q_sizes, k_sizes, strict=True)):
        if q_size > 0 and k_size > 0:
            shift = k_size - q_size if aligned else 0
            similar.setdefault((shift, _round_up(max(q_size, k_size)), _round_up(q_size) if shift else 0), []).append(i)

    device = q_layout.lengths.device
    queries, keys = _Places(q_layout, heads), _Places(kv_layout, groups)
    buckets = []
    for (shift, _, _), sequences in similar.items():
        length, size = max(q_sizes[i] for i in sequences), max(k_sizes[i] for i in sequences)
        together = max(1, Limits.elements // (heads * length * size))  # in one block; longer ones take several
        for first in range(0, len(sequences), together):
            members = sequences[first : first + together]
            q, k = queries.side(members), keys.side(members)
            key_padding = None
            if k.padding is not None:
                key_padding = torch.zeros(k.padding.shape, device=device).masked_fill_(k.padding, -torch.inf)
                key_padding = key_padding[:, None, None]
            ragged = any(q_sizes[i] != k_sizes[i] for i in members)
            buckets.append(Bucket(members, q, k, shift, key_padding, ragged))
    return BucketPlan(buckets, queries.restored(), keys.restored(), _columns(q_layout), _columns(kv_layout))
