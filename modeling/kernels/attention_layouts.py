"""How sequences sit in a tensor, said once: padded with a mask, or packed end to end.

Everything that has to know about padding asks a `Layout`. Positions count real tokens only, so the same sequence has
the same positions whether it is padded left, right, with holes, or packed.

Shapes: B sequences, L queries, S keys, N packed tokens. `_BL` in a name is the shape of the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of each sequence are. Make one with `Layout.padded`, `Layout.packed` or `Layout.full`.

    Attributes:
        batch: number of sequences B.
        length: length of the padded tensor, or of the longest packed sequence.
        lengths: int64 `[B]`, real tokens of each sequence.
        positions: int64, rank of each token among the real tokens of its sequence: `[B, L]` (or `[1, L]` when nothing
            is padded), packed `[N]`. Its value at padding means nothing.
        mask: bool `[B, L]`, True at real tokens; None where every token is real, and when packed.
        cu_seqlens: int64 `[B + 1]` when packed, else None.
        sequences: int64 `[N]` when packed, the sequence of each token; else None.
        sizes: `lengths` on the host, where they are known there (packed, or padded on the right by `ragged`).
    """

    batch: int
    length: int
    lengths: Tensor
    positions: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    sequences: Tensor | None = None
    sizes: tuple[int, ...] | None = None

    @classmethod
    def padded(cls, mask: Tensor) -> Layout:
        """Lay sequences out in the rows of a `[B, L, ...]` tensor, with padding anywhere.

        Args:
            mask: `[B, L]`, bool or integer, nonzero at real tokens (a tokenizer's `attention_mask`).

        Raises:
            ValueError: `mask` is not two-dimensional or not bool/integer.
        """
        if mask.dim() != 2:
            raise ValueError(f"mask must be [batch, length], got shape {tuple(mask.shape)}; pass the 2D attention_mask")
        if mask.is_floating_point() or mask.is_complex():
            raise ValueError(f"mask must be bool or integer, got {mask.dtype}; an additive mask is a DenseBias")
        mask_BL = mask if mask.dtype == torch.bool else mask != 0
        ranks_BL = mask_BL.cumsum(-1)
        return cls(mask.shape[0], mask.shape[1], mask_BL.sum(-1), ranks_BL - 1, mask=mask_BL)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, max_length: int | None = None) -> Layout:
        """Lay sequences out end to end in an `[N, ...]` tensor.

        Reads `cu_seqlens` to the host once, here; a layout serves every layer of a forward pass.

        Args:
            cu_seqlens: `[B + 1]` int32 or int64, starts of the sequences and the total: `[0, l1, l1 + l2, ..., N]`.
            max_length: an upper bound on the sequences' lengths (checked); None takes the longest.

        Raises:
            ValueError: wrong shape or dtype, not starting at 0, decreasing, or a sequence above `max_length`.
        """
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens must be [batch + 1], got shape {tuple(cu_seqlens.shape)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}; convert it")
        starts: list[int] = cu_seqlens.tolist()
        if starts[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {starts[0]}; prepend 0 to the cumulated lengths")
        sizes = tuple(end - start for start, end in pairwise(starts))
        if min(sizes, default=0) < 0:
            at = next(i for i, size in enumerate(sizes) if size < 0)
            raise ValueError(f"cu_seqlens must not decrease, got {starts[at]} then {starts[at + 1]} at index {at + 1}")
        longest = max(sizes, default=0)
        if max_length is not None and max_length < longest:
            raise ValueError(f"max_length={max_length} is below the longest sequence ({longest}); pass at least that")
        cu = cu_seqlens.to(torch.int64)
        lengths_B = cu.diff()
        sequences_N = torch.repeat_interleave(
            torch.arange(len(sizes), device=cu.device), lengths_B, output_size=starts[-1]
        )
        rows_N = torch.arange(starts[-1], device=cu.device) - cu[sequences_N]
        return cls(len(sizes), longest, lengths_B, rows_N, cu_seqlens=cu, sequences=sequences_N, sizes=sizes)

    @classmethod
    def full(cls, batch: int, length: int, device: torch.device | str = "cpu") -> Layout:
        """Lay `batch` sequences of the same `length` out without padding."""
        lengths_B = torch.full((batch,), length, device=device)
        return cls(batch, length, lengths_B, torch.arange(length, device=device)[None])

    @classmethod
    def ragged(cls, sizes: Sequence[int], device: torch.device | str = "cpu", min_length: int = 0) -> Layout:
        """Lay sequences of known sizes out padded on the right; no mask where they fill the tensor."""
        length = max(min_length, *sizes) if sizes else min_length
        lengths_B = torch.tensor(sizes, dtype=torch.int64, device=device)
        positions_1L = torch.arange(length, device=device)[None]
        mask_BL = None if min(sizes, default=length) == length else positions_1L < lengths_B[:, None]
        return cls(len(sizes), length, lengths_B, positions_1L, mask=mask_BL, sizes=tuple(sizes))

    @property
    def is_packed(self) -> bool:
        """Whether tokens sit in one `[N, ...]` tensor."""
        return self.cu_seqlens is not None

    def as_padded(self) -> Layout:
        """Give the layout of `pad(x)`: itself, or the packed sequences padded on the right."""
        return self if self.sizes is None or not self.is_packed else Layout.ragged(self.sizes, self.lengths.device)

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
        return x_BL if self.sequences is None else x_BL[self.sequences, self.positions]

    def clean(self, x_BL: Tensor) -> Tensor:
        """Zero the padding, so that not even a NaN there reaches a real token through 0 * NaN."""
        if self.mask is None or (self.sizes is not None and min(self.sizes) > 0):  # padding repeats its own sequence
            return x_BL
        return x_BL.masked_fill(~self.mask[:, :, None, None], 0)


def query_positions(q_layout: Layout, kv_layout: Layout, causal: bool) -> Tensor:
    """Give the positions `[B | 1, L]` of the queries among the keys of padded layouts.

    Queries count from 0 like the keys; when `causal`, the last query of a sequence meets its last key.
    """
    if not causal:
        return q_layout.positions
    if q_layout.sizes is not None and q_layout.sizes == kv_layout.sizes:
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
