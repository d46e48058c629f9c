# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""What a batch is, decided once at the model's door: which tokens are real, in which document, at which position.

`Sequences.of` consumes `attention_mask`, `position_ids` and `cu_seq_lens_*`. Nothing below it reads them again.

**One rule for packed documents**, for Urform's models and for stock models under `attn_implementation="urform"`: a
document begins where the position of a real token is not the position of the real token before it plus one.
`find_documents` is that rule.

Shapes: B batch, L length, P tokens in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

PackedRow = tuple[Tensor, "int | None"]  # `cu_seq_lens_*` `[documents + 1]` and `max_length_*` of one row


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a `[B, L]` batch.

    Attributes:
        shape: (B, L).
        positions: int64 `[B | 1, L]`, the position of each token; None for encoder states, which have none any more.
        mask: `[B, P + L]`, nonzero at real tokens; None: all are real, or `full_mask` says it.
        documents: int64 `[B | 1, L]`, numbers the packed documents of each row from 0; None: one in each row.
        packed_row: where the documents of a single row start, if the caller gave `cu_seq_lens_*`.
        full_mask: a finished mask: 4D, of a library's own type, or a dict with one for each layer type.
        past: how many tokens a cache holds before these.
    """

    shape: tuple[int, int]
    positions: Tensor | None = None
    mask: Tensor | None = None
    documents: Tensor | None = None
    packed_row: PackedRow | None = None
    full_mask: Any = None
    past: int | Tensor = 0

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        packed_row: PackedRow | None = None,
        cache: Cache | None = None,
        prefix: str = "",
    ) -> Sequences:
        """Decide what the inputs of a stack are; `prefix` ("decoder_") is for messages.

        Raises:
            ValueError: both or neither of ids and embeddings, wrong shapes or dtypes, a mask that does not cover the
                cache, starts that do not divide the row.
        """
        tokens = check_tokens(config, input_ids, inputs_embeds, prefix)
        (batch, length), past = tokens.shape[:2], 0 if cache is None else cache.get_seq_length()
        mask, full_mask = split_mask(attention_mask)
        if mask is not None and isinstance(past, int) and past > 0 and mask.shape[1] < past + length:
            raise ValueError(
                f"{prefix}attention_mask covers {mask.shape[1]} tokens, but the cache holds {past} and {length} more "
                f"come; give a mask of {past + length}, or none"
            )
        if packed_row is not None:
            check_starts(packed_row[0], batch, length)
        starts_fresh = not isinstance(past, Tensor) and past == 0
        documents = find_documents(length, position_ids if starts_fresh else None, mask, packed_row)
        if position_ids is None:
            position_ids = count_positions(config, tokens, mask, documents, packed_row, past)
        return cls((batch, length), position_ids, mask, documents, packed_row, full_mask, past)

    @classmethod
    def of_states(
        cls, states: Tensor, attention_mask: Any, position_ids: Tensor | None, packed_row: PackedRow | None
    ) -> Sequences:
        """Decide what encoder states `[B, L, E]` are, which cross-attention reads."""
        (batch, length), (mask, full_mask) = states.shape[:2], split_mask(attention_mask)
        documents = find_documents(length, position_ids, mask, packed_row)
        return cls((batch, length), None, mask, documents, packed_row, full_mask)

    @property
    def is_plain(self) -> bool:
        """Return whether real tokens and documents say it all: no finished mask, nor a mask of another length."""
        if self.full_mask is not None or self.mask is None:
            return self.full_mask is None
        batch, length = self.shape
        return not isinstance(self.past, Tensor) and tuple(self.mask.shape) == (batch, self.past + length)

    def predicted(self, device: torch.device) -> Tensor | None:
        """Return which tokens `[B | 1, L]` a causal model is asked for; None: all.

        The token before must be a real one of the same document: padding and other documents predict nothing.
        """
        follows = None
        if self.mask is not None:
            follows = nn.functional.pad(self.mask[:, -self.shape[1] :], (1, 0), value=1)[:, :-1].to(device) != 0
        if self.documents is not None:
            same = nn.functional.pad(self.documents.diff(dim=-1) == 0, (1, 0), value=True).to(device)
            follows = same if follows is None else follows & same
        return follows


def find_documents(
    length: int, position_ids: Tensor | None, mask: Tensor | None, packed_row: PackedRow | None = None
) -> Tensor | None:
    """Number the documents of packed rows from 0, int64 `[B | 1, L]`; return None where every row is one document.

    A document begins where the position of a real token is not the position of the real token before it plus one.
    Padding between two tokens may count in their positions or not: neither begins a document.

    Args:
        length: L.
        position_ids: `[B | 1, L]`; None, or another shape, tells nothing.
        mask: `[B, L]`, nonzero at real tokens; None, or another length: all are real.
        packed_row: the starts of the documents of a single row, instead of the rule.
    """
    if packed_row is not None:
        places = torch.arange(length, device=packed_row[0].device)
        return torch.searchsorted(packed_row[0][1:].to(places), places, right=True)[None]
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != length:
        return None
    begins = position_ids.diff(dim=-1) != 1
    if mask is not None and mask.shape[1] == length:
        begins = _begins_after_padding(position_ids, mask.to(position_ids.device) != 0)
    if not is_tracing(begins) and not begins.any():
        return None
    return nn.functional.pad(begins.long().cumsum(-1), (1, 0))


def _begins_after_padding(position_ids: Tensor, real: Tensor) -> Tensor:
    """Return where documents begin, bool `[B, L - 1]`: each real token is compared with the real one before it."""
    places = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    before = torch.where(real, places, -1).cummax(-1).values[:, :-1]  # -1: no real token has come yet
    positions = position_ids.expand(real.shape)
    step = positions[:, 1:] - positions.gather(1, before.clamp(min=0))
    goes_on = (step == 1) | (step == places[:, 1:] - before)
    return real[:, 1:] & (before >= 0) & ~goes_on


def count_positions(
    config: PreTrainedConfig,
    tokens: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    packed_row: PackedRow | None,
    past: int | Tensor,
) -> Tensor:
    """Count the positions `[B | 1, L]` of `tokens` `[B, L]` or `[B, L, E]` in each document, after `past` tokens.

    `config.position_counting` says what is counted: columns, real tokens by the mask, or by the pad token (which then
    stands at -1).
    """
    length = tokens.shape[1]
    places = torch.arange(length, device=tokens.device)
    if packed_row is not None and documents is not None:
        return places[None] - packed_row[0].to(places)[documents]
    if config.position_counting == "mask" and mask is not None and mask.shape[1] >= length:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    if config.position_counting == "tokens" and tokens.ndim == 2:
        real = tokens != config.pad_token_id
        return (real.long().cumsum(-1) - 1 + past).masked_fill(~real, -1)
    return (places + past)[None]


def sequence_lengths(positions: Tensor, documents: Tensor | None) -> Tensor:
    """Return the length of each token's sequence, by the last position in it: `[B, L]` from positions `[B, L]`."""
    if documents is None:
        return (positions.amax(-1, keepdim=True) + 1).expand_as(positions)
    documents = documents.expand_as(positions)
    last = positions.new_zeros(positions.shape[0], positions.shape[1])
    return last.scatter_reduce(1, documents, positions, "amax").gather(1, documents) + 1


def split_mask(attention_mask: Any) -> tuple[Tensor | None, Any]:
    """Return a padding mask `[B, S]` and a finished mask, of which at most one is not None.

    A padding mask of a float type, as PEFT's prefixes make it, becomes bool.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None, attention_mask
    return (attention_mask.bool() if attention_mask.is_floating_point() else attention_mask), None


def check_tokens(
    config: PreTrainedConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None, prefix: str
) -> Tensor:
    """Return the one of ids `[B, L]` and embeddings `[B, L, E]` that was given, or raise ValueError."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"Give exactly one of {prefix}input_ids and {prefix}inputs_embeds")
    if inputs_embeds is not None:
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != config.hidden_size or 0 in inputs_embeds.shape:
            raise ValueError(
                f"inputs_embeds must be [batch, length, hidden_size={config.hidden_size}] with at least one token, "
                f"got {list(inputs_embeds.shape)}"
            )
        return inputs_embeds
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32 token ids, got {input_ids.dtype}; call .long() on ids")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [batch, length] with at least one token, got {list(input_ids.shape)}")
    return input_ids


def check_starts(cu_seq_lens: Tensor, rows: int, length: int) -> None:
    """Raise ValueError unless `cu_seq_lens` `[documents + 1]` divides one row of `length` tokens.

    It is read on the host, but not in a graph that is being traced.
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


def refuse_unpaired(targets: Tensor, sources: Tensor) -> None:
    """Raise ValueError unless rows hold as many target documents `[B]` as source documents `[B]`."""
    if not torch.equal(targets.cpu(), sources.cpu()):
        raise ValueError(
            f"packed rows hold {targets.tolist()} targets but {sources.tolist()} sources; "
            "position_ids and decoder_position_ids (or cu_seq_lens_k and cu_seq_lens_q) must agree"
        )
