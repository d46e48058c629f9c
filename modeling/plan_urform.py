# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""How attention is told who may see whom: packed, cached or masked. `choose_route` decides, and nothing else does.

- `Packed`, the fast path: the real tokens of a batch in one row, end to end, through all layers. No mask is made.
- `Cached`, a step of generation: the sequences stay padded, and layouts stand for the masks.
- `Masked`, all else (a named implementation, recorded states or weights, sliding or static caches, finished masks):
  the masks of transformers, for its attention functions.

A layer gets a `Plan`. Plans are named tuples, not dataclasses: FSDP and accelerate find the tensors in tuples.

Shapes: B batch, L target length, S source length, N real tokens, E hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .caches_urform import CACHE
from .kernels.attention_layouts import Layout
from .sequences_urform import Sequences, refuse_unpaired

logger = logging.get_logger(__name__)

OUTPUTS = ("output_hidden_states", "output_attentions", "output_cross_attentions")  #: of every layer

_MASKS: dict[tuple[str, bool], Callable[..., Any]] = {
    ("full_attention", True): create_causal_mask,
    ("full_attention", False): create_bidirectional_mask,
    ("sliding_attention", True): create_sliding_window_causal_mask,
    ("sliding_attention", False): create_bidirectional_sliding_window_mask,
}


# ---------------------------------------------------------------------------------------------- what a layer is given


class ByLayout(NamedTuple):
    """Attend by layouts, with Urform's own `attention()`; `packed`: tokens stand in one row `[1, N, ...]`."""

    queries: Layout
    keys: Layout
    packed: bool


class ByMask(NamedTuple):
    """Attend by a mask, with an attention function of transformers.

    Attributes:
        implementation: the function's name.
        mask: what the implementation's mask function made; None: nothing is hidden, or the function hides it itself.
        keywords: what the function is told as well: `position_ids`, `cu_seq_lens_*`, `max_length_*`, `is_causal`.
    """

    implementation: str | None
    mask: Any
    keywords: dict[str, Any]


How = ByLayout | ByMask


class Plan(NamedTuple):
    """What the layers of one type are told.

    Attributes:
        own: how self-attention attends.
        cross: how cross-attention attends, if there is any.
        cos_sin: cosines and sines of rotary positions, `[B, 1, L, R]` each, if the config has them.
    """

    own: How
    cross: How | None
    cos_sin: tuple[Tensor, Tensor] | None


# ------------------------------------------------------------------------------------------------------------ routes


@dataclass(frozen=True, eq=False)
class _Route:
    """How the layers of a stack are told who may see whom, in one forward pass: `Packed`, `Cached` or `Masked`."""

    def enter(self, x: Tensor) -> Tensor:
        """Return the stack's `[B, L, ...]` as the layers take it."""
        return x

    def enter_source(self, states: Tensor) -> Tensor:
        """Return the encoder's states `[B, S, E]` as the layers take them."""
        return states

    def leave(self, hidden: Tensor) -> Tensor:
        """Return what comes out of the layers as `[B, L, E]`."""
        return hidden


@dataclass(frozen=True, eq=False)
class Packed(_Route):
    """The real tokens of a `[B, L, ...]` batch as one row `[1, N, ...]`.

    Attributes:
        layout: the packed layout; each document is a sequence.
        index: int64 `[N]`, the places of the real tokens in `[B * L]`; None: all are real.
        shape: (B, L).
        num_documents: int64 `[B]`, documents in each row.
        own: how self-attention attends, in layers of every type.
        is_empty: a side has not one real token.
        source: the encoder's states, packed, for a decoder with cross-attention.
        cross: how cross-attention attends.
    """

    layout: Layout
    index: Tensor | None
    shape: tuple[int, int]
    num_documents: Tensor
    own: dict[str, How]
    is_empty: bool
    source: Packed | None = None
    cross: How | None = None

    @classmethod
    def of(cls, sequences: Sequences, kinds: frozenset[str], source: Packed | None = None) -> Packed:
        """Find the real tokens and their documents; wait for the device.

        Raises:
            ValueError: the source has other numbers of documents.
        """
        shape, documents, device = sequences.shape, sequences.documents, sequences.tokens.device
        index, mask = None, None if sequences.mask is None else sequences.mask.to(device).bool()
        num_documents = torch.ones(shape[0], dtype=torch.long)
        if mask is not None and not bool(mask.all()):
            index = mask.flatten().nonzero()[:, 0]
        if documents is not None:
            documents, starts = documents.expand(shape), sequences.cu_seqlens
            num_documents = documents[:, -1] + 1 if starts is None else torch.tensor([len(starts) - 1], device=device)
            numbers = (documents + (num_documents.cumsum(0) - num_documents)[:, None]).flatten()
            numbers = numbers if index is None else numbers[index]
            lengths = torch.bincount(numbers, minlength=int(num_documents.sum()))
        else:
            lengths = torch.full(shape[:1], shape[1], device=device) if mask is None else mask.sum(-1)
        sizes, starts = tuple(lengths.tolist()), nn.functional.pad(lengths.cumsum(0), (1, 0))
        layout = Layout(len(sizes), max(sizes, default=0), lengths, cu_seqlens=starts, known_sizes=sizes)
        own: dict[str, How] = dict.fromkeys(kinds, ByLayout(layout, layout, True))
        if source is None or layout.length == 0:
            return cls(layout, index, shape, num_documents, own, layout.length == 0)
        refuse_unpaired(num_documents, source.num_documents)
        cross = ByLayout(layout, source.layout, True)
        return cls(layout, index, shape, num_documents, own, source.is_empty, source, cross)

    def enter(self, x: Tensor) -> Tensor:
        flat = x.expand(*self.shape, *x.shape[2:]).flatten(0, 1)
        return (flat if self.index is None else flat.index_select(0, self.index))[None]

    def enter_source(self, states: Tensor) -> Tensor:
        return states if self.source is None else self.source.enter(states)

    def leave(self, hidden: Tensor) -> Tensor:
        flat = hidden[0]
        if self.index is not None:
            places = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[1:])
            flat = places.index_copy(0, self.index, flat)
        return flat.unflatten(0, self.shape)


@dataclass(frozen=True, eq=False)
class Cached(_Route):
    """New tokens after those in a growing cache, in padded tensors."""

    own: dict[str, How]
    cross: How | None


@dataclass(frozen=True, eq=False)
class Masked(_Route):
    """Padded tensors, and the masks of transformers.

    Attributes:
        config: the model's, or a copy that names eager attention because the caller reads attention weights.
        sequences: the stack's own.
        source: the encoder's, for a decoder with cross-attention.
        is_decoder: whether self-attention is causal.
        is_causal: what overrides that, if the caller gave it.
        clears_padding: padding gives zeros, as where it is packed.
    """

    config: PreTrainedConfig
    sequences: Sequences
    source: Sequences | None
    is_decoder: bool
    is_causal: bool | None
    clears_padding: bool

    def leave(self, hidden: Tensor) -> Tensor:
        mask = self.sequences.mask
        if mask is None or not self.clears_padding:
            return hidden
        return hidden.masked_fill(mask[..., None].to(hidden.device) == 0, 0.0)

    def masks(self, hidden: Tensor, states: Tensor | None, kinds: list[str]) -> tuple[dict[str, How], How | None]:
        """Make masks for hidden states `[B, L, E]` and those of the encoder `[B, S, E]`."""
        name, sequences = self.config._attn_implementation, self.sequences
        starts, longest = sequences.cu_seqlens, sequences.max_length
        keywords = {
            "is_causal": self.is_causal,
            "position_ids": None if sequences.documents is None else sequences.positions,
            **{"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest},
        }
        keywords = {key: value for key, value in keywords.items() if value is not None}
        own: dict[str, How] = {
            kind: ByMask(name, mask, keywords) for kind, mask in self._own_masks(hidden, kinds).items()
        }
        if states is None or self.source is None:
            return own, None
        return own, ByMask(name, self._cross_mask(hidden, states, self.source), {})

    def _own_masks(self, hidden: Tensor, kinds: list[str]) -> dict[str, Any]:
        sequences = self.sequences
        if isinstance(sequences.full_mask, dict):
            return {kind: sequences.full_mask.get(kind) for kind in kinds}
        documents = sequences.documents
        return {
            kind: _MASKS[kind, self.is_decoder](
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=sequences.mask if sequences.full_mask is None else sequences.full_mask,
                and_mask_function=None if documents is None else same_document(documents, documents),
                **{CACHE: sequences.cache},
            )
            for kind in kinds
        }

    def _cross_mask(self, hidden: Tensor, states: Tensor, source: Sequences) -> Any:
        """Make the mask of cross-attention: the source's padding, and each target document its own source document."""
        same, sides = None, (self.sequences.documents, source.documents)
        if sides != (None, None):
            one = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
            targets, sources = (
                one.expand(x.shape[:2]) if side is None else side
                for side, x in zip(sides, (hidden, states), strict=True)
            )
            if not is_tracing(hidden):
                refuse_unpaired(targets[:, -1] + 1, sources[:, -1] + 1)
            same = same_document(targets, sources)
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=source.mask if source.full_mask is None else source.full_mask,
            encoder_hidden_states=states,
            and_mask_function=same,
        )


Route = Packed | Cached | Masked


def same_document(query_documents: Tensor, key_documents: Tensor) -> Callable[..., Tensor]:
    """Return a mask function: a query sees the keys of its own document."""

    def inner(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return query_documents[batch_idx, q_idx] == key_documents[batch_idx, kv_idx]

    return inner


# ------------------------------------------------------------------------------------------------------- the choice


def takes_layouts(config: PreTrainedConfig) -> bool:
    """Return whether the attention that was named takes layouts instead of masks: "urform" does."""
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, None)  # type: ignore[arg-type]
    return getattr(attend, "takes_layouts", False)


def choose_route(
    config: PreTrainedConfig,
    kinds: frozenset[str],
    is_decoder: bool,
    sequences: Sequences,
    source: Sequences | None,
    keywords: dict[str, Any],
) -> Route:
    """Choose packed, cached or masked.

    Args:
        config: the model's.
        kinds: the types of the stack's layers.
        is_decoder: whether its self-attention is causal.
        sequences: the stack's own.
        source: the encoder's, for a decoder with cross-attention.
        keywords: `output_hidden_states`, `output_attentions`, `is_causal`, as the caller gave them.

    Raises:
        ValueError: packed rows hold other numbers of targets than of sources.
    """
    wanted = {name for name in OUTPUTS if keywords.get(name, getattr(config, name, None))}
    layouts = not config._names_attention or takes_layouts(config)
    if layouts and keywords.get("is_causal") is None and wanted <= {"output_hidden_states"}:
        route = _by_layouts(kinds, sequences, source, padded=bool(wanted))
        if route is not None:
            return route
    used = config if wanted <= {"output_hidden_states"} else _eager(config, layouts)
    clears = layouts and sequences.cache is None and sequences.is_plain
    return Masked(used, sequences, source, is_decoder, keywords.get("is_causal"), clears)


def _by_layouts(
    kinds: frozenset[str], sequences: Sequences, source: Sequences | None, padded: bool
) -> Packed | Cached | None:
    """Return the route without masks, if there is one; `padded`: the caller reads tensors of `[B, L]`."""
    cache, plain = sequences.cache, sequences.is_plain and (source is None or source.is_plain)
    if not plain or is_tracing(sequences.tokens):
        return None
    if cache is None and not padded and (sequences.mask is None or sequences.cu_seqlens is None):
        route = Packed.of(sequences, kinds, None if source is None else Packed.of(source, kinds))
        return None if route.is_empty else route
    if type(cache) is DynamicCache and kinds == {"full_attention"} and sequences.documents is None:
        return _cached(sequences, source)
    return None


def _eager(config: PreTrainedConfig, layouts: bool) -> PreTrainedConfig:
    """Return the config with eager attention, which alone returns weights, where the caller may be given it."""
    named = str(config._attn_implementation)
    if named == "eager":
        return config
    if not layouts and named != "sdpa":
        logger.warning_once(f"attn_implementation={named!r} returns no attention weights; set 'eager' to see them")
        return config
    logger.warning_once("output_attentions=True: this call uses eager attention, which alone returns weights")
    config = copy.copy(config)
    config._attn_implementation_internal = "eager"
    return config


def _cached(sequences: Sequences, source: Sequences | None) -> Cached | None:
    """Return the layouts of new queries and of all keys in a growing cache; None where a mask has to say it."""
    (batch, length), mask, device = sequences.shape, sequences.mask, sequences.tokens.device
    if source is not None and source.documents is not None:
        return None
    if mask is None:
        queries, keys = Layout.full(batch, length, device), Layout.full(batch, int(sequences.past) + length, device)
    elif length == 1:  # a single query stands at the end of its row
        queries, keys = Layout.full(batch, length, device), Layout.padded(mask, finite=True)
    elif bool((mask[:, -1] == 0).any()):  # padding on the right, from which generation would go on
        return None
    else:
        queries, keys = Layout.padded(mask[:, -length:], finite=True), Layout.padded(mask, finite=True)
    cross = None if source is None else ByLayout(queries, _source_layout(source), False)
    return Cached({"full_attention": ByLayout(queries, keys, False)}, cross)


_source_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _source_layout(source: Sequences) -> Layout:
    """Return the layout of encoder states; of one mask it is made once, for all the steps of a generation."""
    mask, device = source.mask, source.tokens.device
    if mask is None:
        return Layout.full(*source.shape, device)
    if mask.is_inference():  # nothing says when it changes
        return Layout.padded(mask.to(device).bool(), finite=True)
    known = _source_layouts.get(mask)
    if known is None or known[0] != mask._version:
        known = _source_layouts[mask] = (mask._version, Layout.padded(mask.to(device).bool(), finite=True))
    return known[1]
