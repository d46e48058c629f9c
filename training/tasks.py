"""The tasks a recipe can name: how each reads its data, encodes it, collates it, and which head it trains.

Heads come from the Auto classes, so every task trains any model of transformers that has the head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .data_files import Check, open_lines, read_dataset, read_parallel, read_records, texts
from .encoding import EncodedDataset, OverLength, dataset_of, encode_pairs, token_ids, tokenizer_settings_kept
from .recipe import DataArguments

__all__ = [
    "AUTO_CLASSES",
    "Labels",
    "build_dataset",
    "class_names",
    "data_collator",
    "has_split",
    "place_of",
    "read_split",
    "split_files",
]

Split = Literal["train", "validation", "test"]

AUTO_CLASSES = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
ARCHITECTURES = {"seq2seq": "encoder-decoder", "causal-lm": "decoder"}


@dataclass
class Labels:
    """Names of classes, in the order of their ids; grows while the training data is read."""

    names: list[str] = field(default_factory=list)
    frozen: bool = False

    def id(self, name: str) -> int:
        """Return the id of a class.

        Raises:
            ValueError: For a class that training did not have.
        """
        if name not in self.names:
            if self.frozen:
                raise ValueError(f"label {name!r} does not occur in the training data, which has: {self.names}")
            self.names.append(name)
        return self.names.index(name)


def auto_class(task: str) -> Any:
    """Return the Auto class of a task's head."""
    return getattr(transformers, AUTO_CLASSES[task])


def _path(data: DataArguments, name: str) -> Path:
    return Path(data.data_dir or ".", name).expanduser()


def has_split(data: DataArguments, split: Split) -> bool:
    """Return whether the recipe names data for a split."""
    if getattr(data, f"{split}_source") or getattr(data, f"{split}_file"):
        return True
    return data.dataset_name is not None and getattr(data, f"{split}_split") is not None


def read_split(data: DataArguments, split: Split) -> Iterator[tuple[Any, ...]]:
    """Return the examples of a split: (source, target), (text,), (text, label) or (list of words, list of tags).

    Raises:
        FileNotFoundError: If a file is missing; it is named.
        ValueError: If the recipe names no data for the split, or half a pair, or if a file is malformed (named, with
            the line).
    """
    source, target = getattr(data, f"{split}_source"), getattr(data, f"{split}_target")
    file = getattr(data, f"{split}_file")
    one_field = data.task in ("causal-lm", "masked-lm")
    fields = [data.source_field] if one_field else [data.source_field, data.target_field]
    if source or target:
        if not (source and target):
            missing = f"{split}_target" if source else f"{split}_source"
            raise ValueError(f"data.{missing} is not set, its other half is")
        if data.task != "seq2seq":
            raise ValueError(f"data.{split}_source and data.{split}_target are for task seq2seq, not {data.task}")
        return read_parallel(_path(data, source), _path(data, target), data.max_line_bytes)
    check = _CHECKS.get(data.task, texts)
    if file:
        path = _path(data, file)
        records = any(suffix in (".tsv", ".jsonl", ".json") for suffix in map(str.lower, path.suffixes))
        if one_field and not records:
            return _plain(path, data.max_line_bytes)
        return read_records(path, fields, check, data.max_line_bytes)
    if data.dataset_name:
        return read_dataset(data.dataset_name, data.dataset_config, getattr(data, f"{split}_split"), fields, check)
    raise ValueError(
        f"the recipe names no {split} data: set data.{split}_source and data.{split}_target, "
        f"data.{split}_file or data.dataset_name"
    )


def split_files(data: DataArguments, split: Split) -> list[Path]:
    """Return the files that the recipe names for a split."""
    names = (getattr(data, f"{split}_{kind}") for kind in ("source", "target", "file"))
    return [_path(data, name) for name in names if name]


def place_of(data: DataArguments, split: Split, number: int) -> str:
    """Return where a user finds an example of a split: its file and line, else its number alone."""
    files = split_files(data, split)
    if not files:
        return f"example {number} of {data.dataset_name} ({getattr(data, f'{split}_split')})"
    line, kinds = number, {suffix.lower() for suffix in files[0].suffixes}
    if kinds & {".jsonl", ".json"} or (".tsv" not in kinds and data.task in ("causal-lm", "masked-lm")):
        # Blank lines are no examples there.
        lines = enumerate(open_lines(files[0], data.max_line_bytes), start=1)
        filled = (index for index, text in lines if text.strip())
        line = next(itertools.islice(filled, number - 1, None))
    elif ".tsv" in kinds:
        fields = (data.source_field, data.target_field)[: 1 if data.task in ("causal-lm", "masked-lm") else 2]
        line += not all(name.isdecimal() for name in fields)  # the header
    return f"example {number} of the {split} data ({files[0]}, line {line})"


def _plain(path: Path, max_line_bytes: int | None) -> Iterator[tuple[str]]:
    count = 0
    for line in open_lines(path, max_line_bytes):
        if line.strip():
            count += 1
            yield (line,)
    if not count:
        raise ValueError(f"no data: {path} is empty")


def _label(value: Any) -> str:
    """Return a label as text. JSON Lines and data sets may have numbers."""
    if not isinstance(value, (str, int)) and not (isinstance(value, float) and math.isfinite(value)):
        raise ValueError(f"expected a label, got {type(value).__name__}: {value!r:.60}")
    return texts((str(value),))[0]


def _text_and_label(example: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*texts(example[:1]), _label(example[1]))


def _words_and_tags(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return words and tags as lists. In a TSV they are separated by spaces (a no-break space belongs to its word)."""
    sides = []
    for value in example:
        side = [part for part in value.split(" ") if part] if isinstance(value, str) else value
        if not isinstance(side, list):
            raise ValueError(f"expected words and tags, got {type(value).__name__}: {value!r:.60}")
        sides.append(side)
    words, tags = list(texts(tuple(sides[0]))), [_label(tag) for tag in sides[1]]
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} words but {len(tags)} tags")
    if "" in words:
        raise ValueError(f"word {words.index('') + 1} is empty and has the tag {tags[words.index('')]!r}")
    return words, tags


_CHECKS: dict[str, Check] = {"text-classification": _text_and_label, "token-classification": _words_and_tags}


def class_names(data: DataArguments, examples: Iterable[tuple[Any, ...]]) -> set[str]:
    """Return the labels or tags that occur in the examples of a classification task; none for other tasks."""
    if data.task == "text-classification":
        return {example[1] for example in examples}
    if data.task == "token-classification":
        return {tag for example in examples for tag in example[1]}
    return set()


def build_dataset(
    data: DataArguments,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    examples: list[tuple[Any, ...]],
) -> EncodedDataset:
    """Encode the examples of a split for the task.

    The examples are those of `read_split`. Over-long ones are treated as `data.over_length` says in training, and
    truncated in evaluation, so that every example counts there.
    """
    policy = data.over_length if split == "train" else "truncate"
    if data.task == "seq2seq":
        return encode_pairs(
            tokenizer,
            examples,
            max_source_length=data.max_source_length,
            max_target_length=data.max_target_length,
            over_length=policy,
            source_prefix=data.source_prefix,
        )
    encode: Callable[..., EncodedDataset] = _encode_words if data.task == "token-classification" else _encode_texts
    with tokenizer_settings_kept(tokenizer):
        return encode(data, tokenizer, labels, examples, OverLength(policy))


def _encode_texts(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    examples: list[tuple[Any, ...]],
    report: OverLength,
) -> EncodedDataset:
    encoded, too_long = token_ids(tokenizer, [example[0] for example in examples], data.max_source_length, False)
    features: list[dict[str, Any]] = []
    for example, ids, long in zip(examples, encoded, too_long, strict=True):
        report.examples += 1
        report.too_long += long
        if long and report.policy == "error":
            raise ValueError(f"example {report.examples} is longer than max_source_length={data.max_source_length}")
        if long and report.policy == "drop":
            continue
        feature: dict[str, Any] = {"input_ids": ids}
        if data.task == "text-classification":
            feature["labels"] = labels.id(example[1])
        elif data.task == "causal-lm":
            feature["labels"] = list(ids)
        features.append(feature)
        report.kept.append(report.examples)
    return dataset_of(features, report)


def _encode_words(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    examples: list[tuple[Any, ...]],
    report: OverLength,
) -> EncodedDataset:
    features: list[dict[str, Any]] = []
    for words, tags in examples:
        report.examples += 1
        tag_ids = [labels.id(tag) for tag in tags]
        encoding = tokenizer(words, is_split_into_words=True, verbose=False)
        limit = data.max_source_length
        if limit is not None and len(encoding["input_ids"]) > limit:
            report.too_long += 1
            if report.policy == "error":
                raise ValueError(f"example {report.examples} is longer than max_source_length={limit}")
            if report.policy == "drop":
                continue
            encoding = tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit)
        # The first token of a word carries its tag; the others, and the special tokens, none.
        word_ids = encoding.word_ids()
        aligned = [
            -100 if word is None or (index and word_ids[index - 1] == word) else tag_ids[word]
            for index, word in enumerate(word_ids)
        ]
        features.append({"input_ids": encoding["input_ids"], "labels": aligned})
        report.kept.append(report.examples)
    return dataset_of(features, report)


def data_collator(task: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
    """Return the collator of transformers that pads (and masks) a task's batches."""
    if task in ("seq2seq", "causal-lm"):
        # With the model it also makes `decoder_input_ids`, which the label-smoothed loss needs.
        return DataCollatorForSeq2Seq(tokenizer, model=model if model.config.is_encoder_decoder else None)
    if task == "masked-lm":
        return DataCollatorForLanguageModeling(tokenizer, mlm=True)
    if task == "token-classification":
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorWithPadding(tokenizer)
