# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""What a batch is, decided once at the model's door: which tokens are real, in which document, at which position.

`Sequences.of` consumes `attention_mask`, `position_ids` and `cu_seq_lens_*`. Nothing below it reads them again.

**One rule for packed documents**, for Urform's models and for stock models under `attn_implementation="urform"`: a
document begins where the position of a real token is not the position of the real token before it plus one.
`kernels/packed_documents.py` is that rule.

Shapes: B batch, L length, P tokens in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils.import_utils import is_tracing

from .kernels.packed_documents import find_documents, number_documents


class Role(NamedTuple):
    """Whose inputs these are: the last letter of their `cu_seq_lens_*`, and what their names begin with."""

    letter: str
    prefix: str


ALONE, SOURCE, TARGET = Role("q", ""), Role("k", ""), Role("q", "decoder_")


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a `[B, L]` batch.

    Attributes:
        tokens: ids `[B, L]`, or embeddings or encoder states `[B, L, E]`.
        shape: (B, L).
        positions: int64 `[B | 1, L]`, the position of each token.
        mask: `[B, P + L]`, nonzero at real tokens; None: all are real, or `full_mask` says it.
        documents: int64 `[B | 1, L]`, numbers the packed documents of each row from 0; None: one in each row.
        cu_seqlens: int `[documents + 1]`, where the documents of a single row start, if the caller gave it.
        max_length: an upper bound on the lengths of these documents, if the caller gave it.
        full_mask: a finished mask: 4D, of a library's own type, or a dict with one for each layer type.
        cache: of self-attention, which holds P tokens before these.
        past: P.
        is_plain: real tokens and documents say it all: there is no finished mask, nor a mask of another length.
    """

    tokens: Tensor
    shape: tuple[int, int]
    positions: Tensor
    mask: Tensor | None
    documents: Tensor | None
    cu_seqlens: Tensor | None
    max_length: int | None
    full_mask: Any
    cache: Cache | None
    past: int | Tensor
    is_plain: bool

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        keywords: dict[str, Any],
        role: Role = ALONE,
        cache: Cache | None = None,
    ) -> Sequences:
        """Decide what the inputs of a stack are.

        Args:
            keywords: may hold `cu_seq_lens_q` and `max_length_q`, or `cu_seq_lens_k` and `max_length_k` of a source.
            role: `ALONE` for a stack by itself, `SOURCE` and `TARGET` for the two sides of an encoder-decoder.

        Raises:
            ValueError: both or neither of ids and embeddings, wrong shapes or dtypes, a mask that does not cover the
                cache, starts that do not divide the row.
        """
        tokens = check_tokens(config, input_ids, inputs_embeds, role.prefix)
        shape, mask, full_mask = (tokens.shape[0], tokens.shape[1]), None, attention_mask
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:  # PEFT's prefixes make it of a float type
            mask, full_mask = attention_mask.bool() if attention_mask.is_floating_point() else attention_mask, None
        past: int | Tensor = 0
        if cache is not None:
            cache = self_attention_cache(cache)
            past = cache.get_seq_length()
            check_past(mask, past, shape[1], role.prefix)
        starts, longest = (keywords.get(f"{name}_{role.letter}") for name in ("cu_seq_lens", "max_length"))
        documents, positions = place(config, tokens, mask, position_ids, starts, past)
        plain = mask is None or (not isinstance(past, Tensor) and mask.shape == (shape[0], past + shape[1]))
        plain = plain and full_mask is None
        return cls(tokens, shape, positions, mask, documents, starts, longest, full_mask, cache, past, plain)

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


def place(
    config: PreTrainedConfig,
    tokens: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    starts: Tensor | None,
    past: int | Tensor,
) -> tuple[Tensor | None, Tensor]:
    """Return the documents of tokens (see `find_documents`) and their positions in them, int64 `[B | 1, L]`.

    Positions that are not given are counted after `past` tokens. `config.position_counting` says what counts: columns,
    real tokens by the mask, or all but pad tokens (which stand at -1).
    """
    length, documents = tokens.shape[1], None
    if starts is not None:
        check_starts(starts, *tokens.shape[:2])
        documents = number_documents(starts, length)
    elif position_ids is not None and isinstance(past, int) and past == 0:
        documents = find_documents(position_ids, mask, length, readable=not is_tracing(position_ids))
    if position_ids is not None:
        return documents, position_ids
    if starts is not None and documents is not None:
        places = torch.arange(length, device=tokens.device)
        return documents, places[None] - starts.to(places)[documents]
    if config.position_counting == "mask" and mask is not None and mask.shape[1] >= length:
        return documents, (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    if config.position_counting == "tokens" and tokens.ndim == 2:
        real = tokens != config.pad_token_id
        return documents, (real.long().cumsum(-1) - 1 + past).masked_fill(~real, -1)
    return documents, (torch.arange(length, device=tokens.device) + past)[None]


def sequence_lengths(positions: Tensor, documents: Tensor | None) -> Tensor:
    """Return the length of each token's sequence, by the last position in it: `[B, L]` from positions `[B, L]`."""
    if documents is None:
        return (positions.amax(-1, keepdim=True) + 1).expand_as(positions)
    documents = documents.expand_as(positions)
    last = positions.new_zeros(positions.shape[0], positions.shape[1])
    return last.scatter_reduce(1, documents, positions, "amax").gather(1, documents) + 1


def self_attention_cache(cache: Cache) -> Cache:
    """Return the part of a cache that self-attention fills; raise ValueError for another object."""
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, which is not a Cache of transformers; give a DynamicCache "
            "or StaticCache (continuous batching, generate_batch, is not supported: use generate)"
        )
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def check_tokens(
    config: PreTrainedConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None, prefix: str
) -> Tensor:
    """Return the one of ids `[B, L]` and embeddings `[B, L, E]` that was given, or raise ValueError."""
    if input_ids is None and inputs_embeds is not None:
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != config.hidden_size or 0 in inputs_embeds.shape:
            raise ValueError(
                f"inputs_embeds must be [batch, length, hidden_size={config.hidden_size}] with at least one token, "
                f"got {list(inputs_embeds.shape)}"
            )
        return inputs_embeds
    if input_ids is None or inputs_embeds is not None:
        raise ValueError(f"Give exactly one of {prefix}input_ids and {prefix}inputs_embeds")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32 token ids, got {input_ids.dtype}; call .long() on ids")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [batch, length] with at least one token, got {list(input_ids.shape)}")
    return input_ids


def check_past(mask: Tensor | None, past: int | Tensor, length: int, prefix: str) -> None:
    """Raise ValueError for a mask that does not cover what the cache holds: which keys it means would be a guess."""
    if mask is not None and isinstance(past, int) and past > 0 and mask.shape[1] < past + length:
        raise ValueError(
            f"{prefix}attention_mask covers {mask.shape[1]} tokens, but the cache holds {past} and {length} more "
            f"come; give a mask of {past + length}, or none"
        )


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
