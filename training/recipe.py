"""Recipes: one YAML file per kind of run, with four sections, each read into a dataclass by `HfArgumentParser`.

::

    data:       which files, which task, how long            DataArguments
    tokenizer:  one to train, or one that exists             TokenizerArguments
    model:      a preset and config fields, or weights       ModelArguments
    training:   transformers' own arguments                  Seq2SeqTrainingArguments

A recipe is found by name among the package's (`urform train multi30k-en-de`) or by path. Every value can be given on
the command line: `section.name=value`, or `name=value` where the name is unique. Unknown names are refused, with the
nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from ..tokenization.text_files import MAX_LINE_BYTES
from .languages import normalize_language

__all__ = [
    "TASKS",
    "DataArguments",
    "ModelArguments",
    "Recipe",
    "TokenizerArguments",
    "list_recipes",
    "load_recipe",
]

TASKS = ("seq2seq", "causal-lm", "masked-lm", "text-classification", "token-classification")


@dataclass
class DataArguments:
    """Which data, for which task.

    Per split give either `<split>_source` and `<split>_target` (two text files, line by line, for seq2seq), or
    `<split>_file` (TSV, JSON Lines; plain text for the language models), or a `dataset_name`. File names may end in
    .gz, .xz or .bz2. Relative names are looked up in `data_dir`, or beside nothing else than the working directory.
    """

    task: str = field(default="seq2seq", metadata={"help": f"One of {', '.join(TASKS)}."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the files below."})
    train_source: str | None = field(default=None, metadata={"help": "Source side, one sentence per line."})
    train_target: str | None = field(default=None, metadata={"help": "Target side, line by line."})
    validation_source: str | None = None
    validation_target: str | None = None
    test_source: str | None = None
    test_target: str | None = None
    train_file: str | None = field(default=None, metadata={"help": "One .tsv, .jsonl or text file instead."})
    validation_file: str | None = None
    test_file: str | None = None
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the datasets library instead."})
    dataset_config: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    source_field: str = field(default="0", metadata={"help": "Column of a TSV (number or name), field of a JSON line."})
    target_field: str = field(default="1", metadata={"help": "The same for the target, label or tags."})
    source_language: str | None = field(default=None, metadata={"help": "Code, e.g. en; for the record only."})
    target_language: str = field(default="en", metadata={"help": "Code; chooses the metrics' tokenizers."})
    source_prefix: str = field(default="", metadata={"help": "Put before every source, e.g. '<2de> '."})
    max_source_length: int | None = field(default=256, metadata={"help": "In tokens, special tokens included."})
    max_target_length: int | None = field(default=256, metadata={"help": "In tokens, special tokens included."})
    over_length: str = field(default="drop", metadata={"help": "Training examples over a limit: drop|truncate|error."})
    max_line_bytes: int | None = field(
        default=MAX_LINE_BYTES, metadata={"help": "Longest line of a data file in bytes; null for no limit."}
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Padded tokens (source + target) of one batch over all processes; without it batches have "
            "per_device_train_batch_size examples per process."
        },
    )
    pool_batches: int = field(default=4, metadata={"help": "Width of a pool of like lengths, in batches."})

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(
                f"data.task must be one of {', '.join(TASKS)}, got {self.task!r}{_nearest(self.task, TASKS)}"
            )
        if self.over_length not in ("drop", "truncate", "error"):
            raise ValueError(f"data.over_length must be drop, truncate or error, got {self.over_length!r}")
        for side in ("source", "target"):
            if (code := getattr(self, f"{side}_language")) is not None:
                try:
                    normalize_language(code)
                except ValueError as error:
                    raise ValueError(f"data.{side}_language: {error}") from None


@dataclass
class TokenizerArguments:
    """A tokenizer to train on the training data (both sides together), or an existing one."""

    from_pretrained: str | None = field(default=None, metadata={"help": "A folder or Hub name instead of training."})
    model: str = field(default="bpe", metadata={"help": "bpe, unigram, wordpiece, byte-bpe or char."})
    vocab_size: int = 8000
    languages: list[str] = field(default_factory=list, metadata={"help": "Language tags <2xx> to reserve."})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Passed to UrformTokenizer.train."})


@dataclass
class ModelArguments:
    """A model to build from a preset and config fields, or one to go on training."""

    from_pretrained: str | None = field(default=None, metadata={"help": "A folder or Hub name: fine-tune it."})
    model_type: str = field(default="urform", metadata={"help": "Any model type of transformers."})
    preset: str | None = field(default=None, metadata={"help": "Name in urform.list_presets()."})
    config: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of the config."})
    attn_implementation: str | None = None


@dataclass
class RunArguments:
    """What happens after the last step."""

    average_last: int = field(default=0, metadata={"help": "Average so many of the last checkpoints."})
    num_beams: int = field(default=5, metadata={"help": "Beams when the finished model translates the test set."})
    length_penalty: float = 1.0
    test_batch_size: int = 64

    def __post_init__(self) -> None:
        if self.average_last < 0:
            raise ValueError(f"run.average_last must not be negative, got {self.average_last}")


_SECTIONS: dict[str, type] = {
    "data": DataArguments,
    "tokenizer": TokenizerArguments,
    "model": ModelArguments,
    "run": RunArguments,
    "training": Seq2SeqTrainingArguments,
}


@dataclass
class Recipe:
    """The five sections of a recipe, parsed; `raw` is what was read, to be kept beside the model."""

    data: DataArguments
    tokenizer: TokenizerArguments
    model: ModelArguments
    run: RunArguments
    training: Seq2SeqTrainingArguments
    raw: dict[str, Any] = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Writes the recipe as read, overrides included, so that it can be run again."""
        Path(path).write_text(yaml.safe_dump(self.raw, allow_unicode=True, sort_keys=False), encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where 1.1 surprises: `1e-3` is a number, `no` is a word (or Norwegian); a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key!r} is given twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in value if not tag.endswith(":bool")]
    for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def list_recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = importlib.resources.files(__package__) / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def _read(name: str | Path) -> tuple[str, str]:
    """Text of a recipe and what to call it in messages."""
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    known = list_recipes()
    if str(name) in known:
        item = importlib.resources.files(__package__) / "recipes" / f"{name}.yaml"
        return item.read_text(encoding="utf-8"), f"recipe {name}"
    raise FileNotFoundError(
        f"no recipe {str(name)!r}: neither a file nor one of {', '.join(known)}{_nearest(str(name), known)}"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _field_names(section: str) -> set[str]:
    return {item.name for item in dataclasses.fields(_SECTIONS[section]) if item.init}


def _override(values: dict[str, Any], text: str) -> None:
    """Applies one `key=value` of the command line."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ValueError(f"expected key=value, got {text!r}")
    parts = key.split(".")
    if parts[0] not in _SECTIONS:
        owners = [section for section in _SECTIONS if parts[0] in _field_names(section)]
        if not owners:
            everything = [name for section in _SECTIONS for name in _field_names(section)]
            raise ValueError(f"unknown key {key!r}{_nearest(parts[0], everything)}")
        if len(owners) > 1:
            choices = " or ".join(f"{owner}.{key}" for owner in owners)
            raise ValueError(f"{key!r} is ambiguous: say {choices}")
        parts.insert(0, owners[0])
    try:
        value = yaml.load(raw, _Loader) if raw else None
    except yaml.YAMLError as error:
        raise ValueError(f"{key}: cannot read the value {raw!r} ({error})") from error
    place = values
    for part in parts[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ValueError(f"{key!r}: {part!r} is a value, not a section")
    place[parts[-1]] = value


def _check_type(section: str, name: str, value: Any, hint: Any) -> Any:
    """Refuses a value of the wrong simple type; an int may stand for a float."""
    allowed = {arm for arm in (get_args(hint) or (hint,)) if arm in (bool, int, float, str, type(None))}
    if not allowed or type(value) in allowed or isinstance(value, (dict, list)):
        return value
    if type(value) is int and float in allowed:
        return float(value)
    if str in allowed and not isinstance(value, bool) and value is not None:
        return str(value)
    names = " or ".join(sorted("null" if arm is type(None) else arm.__name__ for arm in allowed))
    raise ValueError(f"{section}.{name} must be {names}, got {value!r}")


def _parse_section(section: str, values: Mapping[str, Any], where: str) -> Any:
    kind = _SECTIONS[section]
    known = _field_names(section)
    for name in values:
        if name not in known:
            raise ValueError(f"{where}: unknown key {section}.{name}{_nearest(str(name), known)}")
    hints = get_type_hints(kind)
    checked = {name: _check_type(section, name, value, hints.get(name)) for name, value in values.items()}
    return HfArgumentParser(kind).parse_dict(checked, allow_extra_keys=False)[0]


def load_recipe(
    recipe: str | Path, overrides: Iterable[str] = (), *, output_dir: str | Path | None = None
) -> Recipe:  # fmt: skip
    """Reads a recipe.

    Args:
        recipe: Path of a YAML file, or the name of one in the package.
        overrides: `key=value` texts; the values are YAML.
        output_dir: Instead of `training.output_dir`; without either, `outputs/<name of the recipe>`.

    Raises:
        FileNotFoundError: If there is no such recipe.
        ValueError: If it is not valid; the message names the key.
    """
    text, where = _read(recipe)
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected the sections {', '.join(_SECTIONS)}, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    for section, content in values.items():
        if section not in _SECTIONS:
            raise ValueError(f"{where}: unknown section {section!r}{_nearest(str(section), _SECTIONS)}")
        if content is None:
            values[section] = {}
        elif not isinstance(content, dict):
            raise ValueError(f"{where}: section {section!r} must be a mapping, got {type(content).__name__}")
    training = values.setdefault("training", {})
    if output_dir is not None:
        training["output_dir"] = str(output_dir)
    training.setdefault("output_dir", f"outputs/{Path(recipe).stem}")
    settings = dict(values)
    if not torch.accelerator.is_available():  # else transformers refuses bf16; not kept with the recipe
        settings["training"] = {"use_cpu": True, **training}
    parsed = {section: _parse_section(section, settings.get(section, {}), where) for section in _SECTIONS}
    result = Recipe(**parsed, raw=values)
    keep = result.training.save_total_limit
    if keep is not None and keep < result.run.average_last:
        raise ValueError(
            f"{where}: run.average_last={result.run.average_last} needs as many checkpoints, "
            f"but training.save_total_limit={keep} keeps fewer"
        )
    return result
