# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Padding and packing: which tokens are real, where documents begin, and a batch without its padding.

On the fast path a stack takes its real tokens once, end to end, computes on them alone, and puts them back in the end.

Shapes: B batch, L length, N real tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from .kernels.attention_layouts import Layout


@dataclass(frozen=True)
class Packing:
    """The real tokens of a `[B, L, ...]` batch as one row `[1, N, ...]`.

    Attributes:
        layout: the packed layout; a row is a sequence, or its documents are.
        index: int64 `[N]`, where the real tokens stand in `[B * L]`; None: all are real.
        shape: (B, L).
        documents: `[B]`, sequences in each row; None: one in each.
    """

    layout: Layout
    index: Tensor | None
    shape: tuple[int, int]
    documents: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether not one token is real."""
        return self.index is not None and self.index.numel() == 0

    def pack(self, x: Tensor) -> Tensor:
        """Take the real tokens: `[B, L, ...]` to `[1, N, ...]`."""
        flat = x.flatten(0, 1)
        return (flat if self.index is None else flat.index_select(0, self.index))[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Put them back: `[1, N, ...]` to `[B, L, ...]`, zeros at padding."""
        flat = x[0]
        if self.index is not None:
            places = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[1:])
            flat = places.index_copy(0, self.index, flat)
        return flat.unflatten(0, self.shape)


def takes_layouts(config: PreTrainedConfig) -> bool:
    """Whether attention takes `Layout` and bias objects instead of masks: it is "urform", or none was named."""
    if not config._names_attention:  # the library's default then serves the paths that Urform's own leaves
        return True
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, None)
    return getattr(attend, "takes_layouts", False)


def find_packing(
    shape: tuple[int, int],
    mask: Tensor | None,
    documents: Tensor | None,
    cu_seq_lens: Tensor | None,
    device: torch.device,
) -> Packing:
    """Find the real tokens of a `[B, L]` batch and their sequences; waits for the device.

    Args:
        shape: (B, L).
        mask: `[B, L]`, nonzero at real tokens; None: all.
        documents: `[B | 1, L]`, the documents of packed rows numbered from 0 (`find_documents`); None: one in each row.
        cu_seq_lens: their starts in a single row, instead of `documents`.
        device: where the batch is.
    """
    batch, length = shape
    index = None
    if mask is not None:
        mask = mask.to(device).bool()
        if not bool(mask.all()):
            index = mask.flatten().nonzero()[:, 0]
    if cu_seq_lens is not None:
        return Packing(Layout.packed(cu_seq_lens.to(device)), None, shape, torch.tensor([len(cu_seq_lens) - 1]))
    if documents is None:
        lengths = torch.full((batch,), length, device=device) if mask is None else mask.sum(-1)
        return Packing(Layout.packed(nn.functional.pad(lengths.cumsum(0), (1, 0))), index, shape)
    documents = documents.expand(shape)
    in_row = documents[:, -1] + 1
    numbers = (documents + (in_row.cumsum(0) - in_row)[:, None]).flatten()
    numbers = numbers if index is None else numbers[index]
    lengths = torch.bincount(numbers, minlength=int(in_row.sum()))
    return Packing(Layout.packed(nn.functional.pad(lengths.cumsum(0), (1, 0))), index, shape, in_row)


_source_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def source_layout(states: Tensor, mask: Tensor | None) -> Layout:
    """The layout of encoder states `[B, S, E]`; of one mask it is made once, for all the steps of a generation."""
    if mask is None:
        return Layout.full(states.shape[0], states.shape[1], states.device)
    if mask.is_inference():  # nothing says when it changes
        return Layout.padded(mask.to(states.device).bool(), finite=True)
    known = _source_layouts.get(mask)
    if known is None or known[0] != mask._version:
        known = _source_layouts[mask] = (mask._version, Layout.padded(mask.to(states.device).bool(), finite=True))
    return known[1]


def check_pairs(target: Packing, source: Packing) -> None:
    """Raise ValueError unless each target document has a source document."""
    ones = torch.ones(1, dtype=torch.long)
    rows = [
        (ones if side.documents is None else side.documents.cpu()).expand(side.shape[0]) for side in (target, source)
    ]
    refuse_unpaired(*rows)


def refuse_unpaired(targets: Tensor, sources: Tensor) -> None:
    """Raise ValueError unless rows hold as many target documents `[B]` as source documents `[B]`."""
    if not torch.equal(targets, sources):
        raise ValueError(
            f"packed rows hold {targets.tolist()} targets but {sources.tolist()} sources; "
            "position_ids and decoder_position_ids (or cu_seq_lens_k and cu_seq_lens_q) must agree"
        )


def find_documents(
    length: int, position_ids: Tensor | None, mask: Tensor | None, cu_seq_lens: Tensor | None
) -> Tensor | None:
    """Number the documents of packed rows, `[B, L]`; None where every row is one document.

    They are told by `cu_seq_lens` (one row), or else begin wherever `position_ids` of real tokens do not go up by one.
    """
    if cu_seq_lens is not None:
        places = torch.arange(length, device=cu_seq_lens.device)
        return torch.searchsorted(cu_seq_lens[1:].to(places), places, right=True)[None]
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != length:
        return None
    begins = position_ids.diff(dim=-1) != 1
    if mask is not None and mask.shape[1] == length:
        begins = begins & mask[:, 1:].bool() & mask[:, :-1].bool()
    if not is_tracing(begins) and not begins.any():
        return None
    return nn.functional.pad(begins.long().cumsum(-1), (1, 0))


def check_starts(cu_seq_lens: Tensor, rows: int, length: int) -> None:
    """Raise ValueError unless `cu_seq_lens` `[documents + 1]` divides one row of `length` tokens.

    Reads them on the host; in a graph that is being traced nothing is read.
    """
    if rows != 1:
        raise ValueError(f"cu_seq_lens describe one packed row, the batch is {rows}; pack to batch 1")
    if is_tracing(cu_seq_lens):
        return
    starts = cu_seq_lens.tolist()
    if cu_seq_lens.ndim != 1 or starts[:1] != [0] or starts[-1] != length or sorted(starts) != starts:
        raise ValueError(
            f"cu_seq_lens={starts} must rise from 0 to the row's length, {length}; give the starts of the documents "
            "and the total (for an encoder-decoder: cu_seq_lens_q of the targets, cu_seq_lens_k of the sources)"
        )


def sequence_lengths(positions: Tensor, documents: Tensor | None) -> Tensor:
    """Length of the sequence of each token, by the last position in it: `[B, L]` from positions `[B, L]`."""
    if documents is None:
        return (positions.amax(-1, keepdim=True) + 1).expand_as(positions)
    documents = documents.expand_as(positions)
    last = positions.new_zeros(positions.shape[0], positions.shape[1])
    return last.scatter_reduce(1, documents, positions, "amax").gather(1, documents) + 1


def follows_its_own(length: int, mask: Tensor | None, documents: Tensor | None, device: torch.device) -> Tensor | None:
    """Whether the token before each is a real one of its own document, bool `[B | 1, L]`; None: everywhere.

    A causal model is asked for those tokens alone: padding and other documents predict nothing.
    """
    follows = None
    if mask is not None:
        follows = nn.functional.pad(mask[:, -length:], (1, 0), value=1)[:, :-1].to(device) != 0
    if documents is not None:
        same = nn.functional.pad(documents.diff(dim=-1) == 0, (1, 0), value=True).to(device)
        follows = same if follows is None else follows & same
    return follows


def find_positions(
    given: Tensor,
    mask: Tensor | None,
    cu_seq_lens: Tensor | None,
    documents: Tensor | None,
    past: int | Tensor,
    input_ids: Tensor | None,
    config: PreTrainedConfig,
) -> Tensor:
    """Positions `[B or 1, L]` of `given` `[B, L, ...]` in each document, after `past` cached tokens.

    They count what `config.position_counting` says; by tokens, padding stands at -1.
    """
    length = given.shape[1]
    places = torch.arange(length, device=given.device)
    if cu_seq_lens is not None and documents is not None:
        return places[None] - cu_seq_lens.to(places)[documents]
    if config.position_counting == "mask" and mask is not None and mask.shape[1] >= length:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    if config.position_counting == "tokens" and input_ids is not None:
        real = input_ids != config.pad_token_id
        return (real.long().cumsum(-1) - 1 + past).masked_fill(~real, -1)
    return (places + past)[None]


def same_document(query_documents: Tensor, key_documents: Tensor) -> Callable:
    """Mask function: a query sees the keys of its own document."""

    def inner(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return query_documents[batch_idx, q_idx] == key_documents[batch_idx, kv_idx]

    return inner
