"""From text to lists of ids in memory. Examples that are too long are counted and logged."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..tokenization.tokenization_urform import settings_kept

__all__ = ["EncodedDataset", "OverLength", "dataset_of", "encode_pairs", "token_ids", "tokenizer_settings_kept"]

logger = logging.getLogger(__name__)


@dataclass
class OverLength:
    """How many examples were longer than the limits, and what was done with them.

    Attributes:
        policy: `"drop"` leaves the example out, `"truncate"` cuts it, `"error"` raises.
        examples: Number of examples read.
        too_long: Number of examples over a limit.
        kept: Numbers of the examples that became features, in their order; the first example of a split is 1.
    """

    policy: str = "drop"
    examples: int = 0
    too_long: int = 0
    kept: list[int] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.policy not in ("drop", "truncate", "error"):
            raise ValueError(f"over_length must be 'drop', 'truncate' or 'error', got {self.policy!r}")


@dataclass
class EncodedDataset(Dataset[dict[str, Any]]):
    """A map-style dataset of dicts of ids, held in memory.

    Attributes:
        features: One dict per example, e.g. `{"input_ids": [...], "labels": [...]}`.
        over_length: What happened to examples that were too long.
        two_sided: Whether the labels are a sequence of their own (encoder-decoder) or lie along the input.
    """

    features: list[dict[str, Any]]
    over_length: OverLength = field(default_factory=OverLength)
    two_sided: bool = False

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.features[index]

    @property
    def lengths(self) -> list[tuple[int, ...]]:
        """Return the length of each example: of its source, and of its target where that is a sequence of its own."""
        if self.two_sided:
            return [(len(f["input_ids"]), len(f["labels"])) for f in self.features]
        return [(len(f["input_ids"]),) for f in self.features]


def _chunks(items: Iterable[tuple[str, ...]], size: int = 2000) -> Iterator[list[tuple[str, ...]]]:
    chunk: list[tuple[str, ...]] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def tokenizer_settings_kept(tokenizer: PreTrainedTokenizerBase) -> AbstractContextManager[Any]:
    """Restore what calls inside the block change on a tokenizer, such as truncation, which the run would save."""
    return settings_kept(tokenizer.backend_tokenizer) if tokenizer.is_fast else nullcontext()


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int | None, target: bool
) -> tuple[list[list[int]], list[bool]]:
    """Return the token ids of the texts, cut to the limit, and for each text whether it was too long."""
    key = "text_target" if target else "text"
    with tokenizer_settings_kept(tokenizer):
        encoded: list[list[int]] = tokenizer(**{key: list(texts)}, add_special_tokens=True, verbose=False)["input_ids"]
        too_long = [limit is not None and len(ids) > limit for ids in encoded]
        for index, long in enumerate(too_long):
            if long:
                # Cut by the tokenizer, which keeps the special tokens at the ends.
                cut = tokenizer(**{key: texts[index]}, truncation=True, max_length=limit)
                encoded[index] = cut["input_ids"]
    return encoded, too_long


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[tuple[str, str]],
    *,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    over_length: str = "drop",
    source_prefix: str = "",
) -> EncodedDataset:
    """Encode (source, target) pairs for an encoder-decoder: `input_ids` and `labels`.

    Args:
        tokenizer: Encodes the source as `text` and the target as `text_target`.
        pairs: The pairs, read once.
        max_source_length: Limit in tokens, special tokens included; None for none.
        max_target_length: The same for the target.
        over_length: `"drop"`, `"truncate"` or `"error"`.
        source_prefix: Put before each source, e.g. a language tag and a space.

    Raises:
        ValueError: If nothing is left, or if an example is too long and the policy is `"error"`.
    """
    report = OverLength(over_length)
    features: list[dict[str, Any]] = []
    for chunk in _chunks(pairs):
        sources, long_sources = token_ids(
            tokenizer, [source_prefix + pair[0] for pair in chunk], max_source_length, False
        )
        targets, long_targets = token_ids(tokenizer, [pair[1] for pair in chunk], max_target_length, True)
        for source, target, long in zip(
            sources, targets, (a or b for a, b in zip(long_sources, long_targets, strict=True)), strict=True
        ):
            report.examples += 1
            report.too_long += long
            if long and over_length == "error":
                raise ValueError(
                    f"example {report.examples} is longer than max_source_length={max_source_length} / "
                    f"max_target_length={max_target_length}; raise them or set over_length to 'drop' or 'truncate'"
                )
            if not (long and over_length == "drop"):
                features.append({"input_ids": source, "labels": target})
                report.kept.append(report.examples)
    return dataset_of(features, report, two_sided=True)


def dataset_of(features: list[dict[str, Any]], report: OverLength, two_sided: bool = False) -> EncodedDataset:
    """Return the features as a dataset, and log how many examples were too long.

    Raises:
        ValueError: If nothing is left.
    """
    if report.too_long:
        done = "dropped" if report.policy == "drop" else "truncated"
        logger.warning("%d of %d examples were too long and were %s", report.too_long, report.examples, done)
    if not features:
        raise ValueError(f"no example is left of {report.examples} ({report.too_long} of them too long)")
    return EncodedDataset(features, report, two_sided)
