"""How sequences sit in a tensor, said once: padded with a mask, or packed end to end.

Everything that has to know about padding asks a `Layout`. Positions count real tokens only, so the same sequence has
the same positions whether it is padded left, right, with holes, or packed.

Shapes: B sequences, L queries, S keys, N packed tokens. `_BL` in a name is the shape of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Layout:
    """Where the tokens of each sequence are. Make one with `Layout.padded`, `Layout.packed` or `Layout.full`.

    One layout serves every layer of a forward pass: what backends derive from it is computed once and kept in `memo`.
    It is no dataclass: FSDP walks the dataclasses among a layer's arguments, and copies them under mixed precision.

    Attributes:
        batch: number of sequences B.
        length: length of the padded tensor, or an upper bound on the packed sequences' lengths.
        lengths: int64 `[B]`, real tokens of each sequence.
        mask: bool `[B, L]`, True at real tokens; None where every token is real, and when packed.
        cu_seqlens: int64 `[B + 1]` when packed, else None.
        known_sizes: `lengths` on the host, where they came from there.
        finite: padding is known to hold no NaN and no infinity, so nothing need be cleaned.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        lengths: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        known_sizes: tuple[int, ...] | None = None,
        finite: bool = False,
    ):
        self.batch, self.length, self.lengths = batch, length, lengths
        self.mask, self.cu_seqlens = mask, cu_seqlens
        self.known_sizes, self.finite = known_sizes, finite
        self.memo: dict[Any, Any] = {}

    def __repr__(self) -> str:
        """Say what errors and debuggers need."""
        kind = "packed" if self.is_packed else "padded"
        return f"Layout({kind}, batch={self.batch}, length={self.length}, lengths={self.lengths})"

    @classmethod
    def padded(cls, mask: Tensor, finite: bool = False) -> Layout:
        """Lay sequences out in the rows of a `[B, L, ...]` tensor, with padding anywhere.

        Args:
            mask: `[B, L]`, bool or integer, nonzero at real tokens (a tokenizer's `attention_mask`).
            finite: padding surely holds neither NaN nor infinity (a model's own states), so backends need not clean it.

        Raises:
            ValueError: `mask` is not two-dimensional or not bool/integer.
        """
        if mask.dim() != 2:
            raise ValueError(f"mask must be [batch, length], got shape {tuple(mask.shape)}; pass the 2D attention_mask")
        if mask.is_floating_point() or mask.is_complex():
            raise ValueError(f"mask must be bool or integer, got {mask.dtype}; an additive mask is a DenseBias")
        mask_BL = mask if mask.dtype == torch.bool else mask != 0
        return cls(mask.shape[0], mask.shape[1], mask_BL.sum(-1), mask=mask_BL, finite=finite)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, max_length: int | None = None) -> Layout:
        """Lay sequences out end to end in an `[N, ...]` tensor.

        On a CPU, or without `max_length`, `cu_seqlens` is read to the host and checked. On an accelerator with
        `max_length` nothing waits for the device, and in a compiled graph nothing is read.

        Args:
            cu_seqlens: `[B + 1]` int32 or int64, starts of the sequences and the total: `[0, l1, l1 + l2, ..., N]`.
            max_length: an upper bound on the sequences' lengths (checked where they are read); None takes the longest.

        Raises:
            ValueError: wrong shape or dtype, not starting at 0, decreasing, or a sequence above `max_length`; no
                `max_length` in a compiled graph.
        """
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens must be [batch + 1], got shape {tuple(cu_seqlens.shape)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}; convert it")
        sizes = None
        if torch.compiler.is_compiling():
            if max_length is None:
                raise ValueError(
                    "max_length=None needs cu_seqlens on the host, which a compiled graph does not have; pass it"
                )
        elif max_length is None or cu_seqlens.device.type == "cpu":
            sizes = _checked_sizes(cu_seqlens.tolist(), max_length)
        cu = cu_seqlens.to(torch.int64)
        length = max(sizes, default=0) if sizes is not None else max_length
        return cls(len(cu) - 1, length or 0, cu.diff(), cu_seqlens=cu, known_sizes=sizes)

    @classmethod
    def full(cls, batch: int, length: int, device: torch.device | str = "cpu") -> Layout:
        """Lay `batch` sequences of the same `length` out without padding."""
        lengths_B = torch.full((batch,), length, device=device)
        return cls(batch, length, lengths_B, known_sizes=(length,) * batch)

    @classmethod
    def ragged(cls, sizes: Sequence[int], device: torch.device | str = "cpu", min_length: int = 0) -> Layout:
        """Lay sequences of known sizes out padded on the right; no mask where they fill the tensor."""
        length = max(min_length, *sizes) if sizes else min_length
        lengths_B = torch.tensor(sizes, dtype=torch.int64, device=device)
        mask_BL = None
        if min(sizes, default=length) < length:
            mask_BL = torch.arange(length, device=device) < lengths_B[:, None]
        return cls(len(sizes), length, lengths_B, mask=mask_BL, known_sizes=tuple(sizes))

    def to(self, device: torch.device | str, **options: Any) -> Layout:
        """Return the layout on a device, as `Tensor.to` does: accelerate moves a layer's arguments with it."""
        if self.lengths.device == torch.device(device):
            return self

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, **options)

        def make() -> Layout:
            lengths = self.lengths.to(device, **options)
            moved = (move(self.mask), move(self.cu_seqlens))
            return Layout(self.batch, self.length, lengths, *moved, self.known_sizes, self.finite)

        return self.once(("to", str(device)), make)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Make something from this layout once, and keep it with the layout (not inside a compiled graph)."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the sequences on the host; waits for the device where they are not known."""
        return self.known_sizes or self.once("sizes", lambda: tuple(self.lengths.tolist()))

    @property
    def positions(self) -> Tensor:
        """Rank of each token among the real tokens of its sequence: int64 `[B | 1, L]`, packed `[N]`.

        Its value at padding means nothing.
        """
        return self.once("positions", self._positions)

    def _positions(self) -> Tensor:
        if self.cu_seqlens is not None:
            return torch.arange(len(self.sequences), device=self.lengths.device) - self.cu_seqlens[self.sequences]
        if self.mask is None or self.known_sizes is not None:  # padded on the right, if at all
            return torch.arange(self.length, device=self.lengths.device)[None]
        return self.mask.cumsum(-1) - 1

    @property
    def sequences(self) -> Tensor:
        """The sequence of each packed token, int64 `[N]`."""
        numbers_B = torch.arange(self.batch, device=self.lengths.device)
        total = sum(self.sizes)
        return self.once("sequences", lambda: torch.repeat_interleave(numbers_B, self.lengths, output_size=total))

    @property
    def is_packed(self) -> bool:
        """Whether tokens sit in one `[N, ...]` tensor."""
        return self.cu_seqlens is not None

    def as_padded(self) -> Layout:
        """Give the layout of `pad(x)`: itself, or the packed sequences padded on the right."""
        return Layout.ragged(self.sizes, self.lengths.device) if self.is_packed else self

    def pad(self, x: Tensor) -> Tensor:
        """Copy packed `[N, ...]` to `[B, length, ...]`, padding with real tokens; a padded tensor is returned as is."""
        return x if self.cu_seqlens is None else self.take(x, range(self.batch), self.as_padded())

    def take(self, x_N: Tensor, sequences: Sequence[int], grid: Layout) -> Tensor:
        """Copy some packed sequences to a padded tensor laid out as `grid`; padding repeats a sequence's last token."""
        if self.cu_seqlens is None:
            raise ValueError("take() reads packed sequences, and this layout is padded; index its rows instead")
        starts_B = self.cu_seqlens[torch.tensor(sequences, dtype=torch.int64, device=x_N.device)]
        columns_1L = torch.arange(grid.length, device=x_N.device)[None]
        offsets_BL = torch.minimum(columns_1L, (grid.lengths[:, None] - 1).clamp(min=0))
        index_BL = (starts_B[:, None] + offsets_BL).clamp(max=max(x_N.shape[0] - 1, 0))
        return x_N.index_select(0, index_BL.flatten()).unflatten(0, index_BL.shape)

    def unpad(self, x_BL: Tensor) -> Tensor:
        """Undo `pad`."""
        return x_BL[self.sequences, self.positions] if self.is_packed else x_BL

    def clean(self, x_BL: Tensor) -> Tensor:
        """Zero the padding, so that not even a NaN there reaches a real token through 0 * NaN."""
        repeats = self.known_sizes and min(self.known_sizes) > 0  # then padding repeats its own sequence
        if self.mask is None or self.finite or repeats:
            return x_BL
        return x_BL.masked_fill(~self.mask[:, :, None, None], 0)


def query_positions(q_layout: Layout, kv_layout: Layout, causal: bool) -> Tensor:
    """Give the positions `[B | 1, L]` of the queries among the keys of padded layouts.

    Queries count from 0 like the keys; when `causal`, the last query of a sequence meets its last key.
    """
    if not causal:
        return q_layout.positions
    if q_layout.known_sizes is not None and q_layout.known_sizes == kv_layout.known_sizes:
        return q_layout.positions
    if q_layout.mask is None and kv_layout.mask is None:
        return q_layout.positions + (kv_layout.length - q_layout.length)
    return q_layout.positions + (kv_layout.lengths - q_layout.lengths)[:, None]


def visible(
    q_layout: Layout, kv_layout: Layout, causal: bool, window: tuple[int | None, int | None] | None
) -> Tensor | None:
    """Say which keys each query may attend, for padded layouts.

    Returns:
        bool `[B | 1, 1, L | 1, S]`, or None where every query may attend every key. Rows of query padding are not
        treated; their output is dropped.
    """
    left, right = window or (None, None)
    right = 0 if causal and q_layout.length > 1 else right  # a single query is the last one: it sees every key
    keep = None if kv_layout.mask is None else kv_layout.mask[:, None, None, :]
    if left is None and right is None:
        return keep
    q_pos_BL = query_positions(q_layout, kv_layout, causal)
    ahead_BLS = kv_layout.positions[:, None, :] - q_pos_BL[:, :, None]
    bounds = [] if left is None else [ahead_BLS >= -left]
    bounds += [] if right is None else [ahead_BLS <= right]
    for bound_BLS in bounds:
        keep = bound_BLS[:, None] if keep is None else keep & bound_BLS[:, None]
    return keep


def _checked_sizes(starts: list[int], max_length: int | None) -> tuple[int, ...]:
    """Lengths of packed sequences from their starts and the total."""
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {starts[0]}; prepend 0 to the cumulated lengths")
    sizes = tuple(end - start for start, end in pairwise(starts))
    if min(sizes, default=0) < 0:
        at = next(i for i, size in enumerate(sizes) if size < 0)
        raise ValueError(f"cu_seqlens must not decrease, got {starts[at]} then {starts[at + 1]} at index {at + 1}")
    longest = max(sizes, default=0)
    if max_length is not None and max_length < longest:
        raise ValueError(f"max_length={max_length} is below the longest sequence ({longest}); pass at least that")
    return sizes
