"""Attention biases as objects: what is added to the scores, told by position instead of by an L x S tensor.

ALiBi, T5's buckets and the clipped relative table are computed from positions by each backend; `DenseBias` is the
general case and the slow one. Gradients reach slopes, tables and dense tensors.

Shapes: B batch, L queries, S keys, H heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Bias:
    """What every attention bias offers; see `ALiBi`, `T5Bias`, `RelativeBias` and `DenseBias`."""

    kind: str  #: name in the capability table
    weight: Tensor  #: the tensor that gradients reach

    def dense(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Give the bias as a tensor `[B | 1, H, L, S]`.

        Args:
            q_positions: integer `[B | 1, L]`, positions of the queries (already shifted, if causal).
            k_positions: integer `[B | 1, S]`, positions of the keys.
        """
        return self.by_distance(k_positions[:, None, :] - q_positions[:, :, None]).transpose(0, 1)

    def by_distance(self, ahead: Tensor) -> Tensor:
        """Give a positional bias by `key - position` (integer, any shape): `[H, ...]`."""
        raise NotImplementedError

    def check(self, batch: int, heads: int, q_length: int, kv_length: int, *, packed: tuple[bool, bool]) -> None:
        """Raise ValueError unless the bias fits attention of these sizes."""
        raise NotImplementedError

    def to(self, device: torch.device | str, **options: Any) -> Bias:
        """Return the bias on a device, as `Tensor.to` does: accelerate moves a layer's arguments with it."""
        if self.weight.device == torch.device(device):
            return self
        moved = copy.copy(self)
        moved.weight = self.weight.to(device, **options)
        return moved

    def narrow(self, sequences: Sequence[int] | None, q_length: int, kv_length: int) -> Bias:
        """Give the bias of some sequences (None: of all), cut to these lengths; positional biases give themselves."""
        return self


def _require_heads(name: str, found: int, heads: int, shape: torch.Size) -> None:
    if found != heads:
        raise ValueError(f"{name} has {found} heads (shape {tuple(shape)}) but q has {heads}; make them equal")


def _require_weight(name: str, weight: Tensor, dims: int, shape: str) -> None:
    if weight.dim() != dims or not weight.is_floating_point():
        raise ValueError(f"{name} must be a floating-point {shape}, got {weight.dtype} of shape {tuple(weight.shape)}")


class ALiBi(Bias):
    """Add `-slope * |position - key|` (Press et al. 2022, "Train Short, Test Long", section 3).

    Args:
        slopes: floating point `[H]`; a leaf that requires grad makes them trainable.
    """

    kind = "alibi"

    def __init__(self, slopes: Tensor):
        _require_weight("slopes", slopes, 1, "[heads]")
        self.weight = slopes

    @property
    def slopes(self) -> Tensor:
        """The slopes `[H]`."""
        return self.weight

    def by_distance(self, ahead: Tensor) -> Tensor:
        """Give the bias `[H, ...]`, in float32 or wider: products with long distances need the digits."""
        slopes_H = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return -slopes_H.view(-1, *(1 for _ in ahead.shape)) * ahead.abs().to(slopes_H.dtype)

    def check(self, batch: int, heads: int, q_length: int, kv_length: int, *, packed: tuple[bool, bool]) -> None:
        """Raise ValueError unless there is a slope for each head."""
        _require_heads("ALiBi slopes", self.weight.shape[0], heads, self.weight.shape)


class T5Bias(Bias):
    """Add `table[bucket(key - position), head]` (Raffel et al. 2020, section 2.1; buckets as in transformers' T5).

    Args:
        table: floating point `[buckets, H]`.
        bidirectional: half of the buckets for keys ahead of the query; else those share bucket 0.
        max_distance: distances from here on share the last bucket.
    """

    kind = "t5"

    def __init__(self, table: Tensor, bidirectional: bool = True, max_distance: int = 128):
        _require_weight("table", table, 2, "[buckets, heads]")
        exact = table.shape[0] // (4 if bidirectional else 2)
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"T5Bias with {table.shape[0]} buckets, bidirectional={bidirectional} and max_distance={max_distance} "
                f"has no logarithmic buckets; use at least 4 buckets and a max_distance above {max(exact, 1)}"
            )
        self.weight, self.bidirectional, self.max_distance = table, bidirectional, max_distance

    @property
    def table(self) -> Tensor:
        """The table `[buckets, H]`."""
        return self.weight

    def bucket(self, ahead: Tensor) -> Tensor:
        """Map `key - position` (integer, any shape) to buckets: exact up to half of them, then logarithmic."""
        buckets = self.weight.shape[0]
        if self.bidirectional:
            buckets //= 2
            first = (ahead > 0) * buckets
            distance = ahead.abs()
        else:
            first = torch.zeros_like(ahead)
            distance = (-ahead).clamp(min=0)
        exact = buckets // 2
        # float32 and this order of operations, so that borders between buckets fall where T5's checkpoints have them
        octave = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (octave * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)

    def by_distance(self, ahead: Tensor) -> Tensor:
        """Give the bias `[H, ...]`."""
        return F.embedding(self.bucket(ahead), self.weight).movedim(-1, 0)

    def check(self, batch: int, heads: int, q_length: int, kv_length: int, *, packed: tuple[bool, bool]) -> None:
        """Raise ValueError unless the table has a column for each head."""
        _require_heads("T5Bias table", self.weight.shape[1], heads, self.weight.shape)


class RelativeBias(Bias):
    """Add `table[head, clip(key - position, -R, R) + R]` (Shaw et al. 2018, section 3.2, as scalars per head).

    Args:
        table: floating point `[H, 2R + 1]`.
    """

    kind = "relative"

    def __init__(self, table: Tensor):
        _require_weight("table", table, 2, "[heads, 2R + 1]")
        if table.shape[1] % 2 == 0:
            raise ValueError(f"RelativeBias table needs 2R + 1 columns, got {table.shape[1]}; distance 0 is the middle")
        self.weight = table

    @property
    def table(self) -> Tensor:
        """The table `[H, 2R + 1]`."""
        return self.weight

    def by_distance(self, ahead: Tensor) -> Tensor:
        """Give the bias `[H, ...]`."""
        reach = self.weight.shape[1] // 2
        return F.embedding(ahead.clamp(-reach, reach) + reach, self.weight.t()).movedim(-1, 0)

    def check(self, batch: int, heads: int, q_length: int, kv_length: int, *, packed: tuple[bool, bool]) -> None:
        """Raise ValueError unless the table has a row for each head."""
        _require_heads("RelativeBias table", self.weight.shape[0], heads, self.weight.shape)


class DenseBias(Bias):
    """Add any tensor: the general case, O(L x S) in memory. `-inf` forbids a key.

    Args:
        tensor: floating point, broadcastable to `[B, H, L, S]`. Rows and columns are those of the tensors: padded
            coordinates where the layout is padded, the token's index inside its sequence where it is packed.
    """

    kind = "dense"

    def __init__(self, tensor: Tensor):
        if tensor.dim() > 4 or not tensor.is_floating_point():
            raise ValueError(
                f"tensor must be floating point and broadcast to [B, H, L, S], got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; turn a bool mask into 0 and -inf"
            )
        self.weight = tensor

    @property
    def tensor(self) -> Tensor:
        """The tensor as it was given."""
        return self.weight

    def _as_4d(self) -> Tensor:
        return self.weight[(None,) * (4 - self.weight.dim())]

    def dense(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Give the tensor as `[B | 1, H | 1, L | 1, S | 1]`, whatever the positions."""
        return self._as_4d()

    def check(self, batch: int, heads: int, q_length: int, kv_length: int, *, packed: tuple[bool, bool]) -> None:
        """Raise ValueError unless the tensor broadcasts to `[B, H, L, S]` (packed: covers the longest sequence)."""
        shape = self._as_4d().shape
        wanted = (batch, heads, q_length, kv_length)
        longer_is_fine = (False, False, *packed)
        for size, want, longer in zip(shape, wanted, longer_is_fine, strict=True):
            if size != 1 and size != want and not (longer and size > want):  # `in` fails on symbolic sizes
                raise ValueError(
                    f"DenseBias tensor of shape {tuple(self.weight.shape)} does not broadcast to "
                    f"[B, H, L, S] = {list(wanted)}; give each dimension that size or 1"
                )

    def narrow(self, sequences: Sequence[int] | None, q_length: int, kv_length: int) -> DenseBias:
        """Give the bias of some sequences (None: of all), cut to these lengths."""
        tensor = self._as_4d()
        if sequences is not None and tensor.shape[0] > 1:
            tensor = tensor[torch.tensor(sequences, dtype=torch.int64, device=tensor.device)]
        rows = tensor.shape[2] if tensor.shape[2] == 1 else q_length
        columns = tensor.shape[3] if tensor.shape[3] == 1 else kv_length
        return DenseBias(tensor[:, :, :rows, :columns])
