"""Recipes: one YAML file per kind of run, with five sections, each read into a dataclass whose fields say their types.

::

    data:       which files, which task, how long            DataArguments
    tokenizer:  one to train, or one that exists             TokenizerArguments
    model:      a preset and config fields, or weights       ModelArguments
    training:   transformers' own arguments                  Seq2SeqTrainingArguments
    run:        precision, and what follows the last step    RunArguments

A recipe is found by name among the package's (`urform train multi30k-en-de`) or by path. Every value can be given on
the command line: `section.name=value`, or `name=value` where the name is unique. Unknown names are refused, with the
nearest known one, before torch and transformers are imported.
"""

import ast
import copy
import dataclasses
import difflib
import importlib.resources
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypedDict, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import StrictDataclassFieldValidationError, strict, validate_typed_dict

from ..dependencies import missing_dependency

try:
    import yaml
except ModuleNotFoundError as error:
    raise missing_dependency("yaml", "reading a recipe") from error

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments

from ..tokenization.text_files import MAX_LINE_BYTES
from .languages import normalize_language

__all__ = [
    "TASKS",
    "DataArguments",
    "ModelArguments",
    "Recipe",
    "TokenizerArguments",
    "describe_recipes",
    "list_recipes",
    "load_recipe",
    "read_recipe",
]

TASKS = ("seq2seq", "causal-lm", "masked-lm", "text-classification", "token-classification")


@strict
@dataclass
class DataArguments:
    """Which data, for which task.

    Per split give either `<split>_source` and `<split>_target` (two text files, line by line, for seq2seq), or
    `<split>_file` (TSV, JSON Lines; plain text for the language models), or a `dataset_name`. File names may end in
    .gz, .xz or .bz2. Relative names are looked up in `data_dir`, by default the working directory.
    """

    task: str = field(default="seq2seq", metadata={"help": f"One of {', '.join(TASKS)}."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the files below."})
    origin: str | None = field(default=None, metadata={"help": "Where the files come from; said when one is missing."})
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


@strict
@dataclass
class TokenizerArguments:
    """A tokenizer to train on the training data (both sides together), or an existing one."""

    from_pretrained: str | None = field(default=None, metadata={"help": "A folder or Hub name instead of training."})
    model: str = field(default="bpe", metadata={"help": "bpe, unigram, wordpiece, byte-bpe or char."})
    vocab_size: int = 8000
    languages: list[str] = field(default_factory=list, metadata={"help": "Language tags <2xx> to reserve."})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Passed to UrformTokenizer.train."})


@strict
@dataclass
class ModelArguments:
    """A model to build from a preset and config fields, or one to go on training."""

    from_pretrained: str | None = field(default=None, metadata={"help": "A folder or Hub name: fine-tune it."})
    model_type: str = field(default="urform", metadata={"help": "Any model type of transformers."})
    preset: str | None = field(default=None, metadata={"help": "Name in urform.list_presets()."})
    config: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of the config."})
    attn_implementation: str | None = None


@strict
@dataclass
class RunArguments:
    """The precision of the products, and what happens after the last step."""

    precision: str | None = field(
        default=None,
        metadata={
            "help": "auto: bfloat16 if a one-second measurement finds it faster on this device, else float32. Without "
            "it, and wherever training.bf16 or training.fp16 is given, transformers' arguments decide."
        },
    )
    average_last: int = field(default=0, metadata={"help": "Average so many of the last checkpoints."})
    num_beams: int = field(default=5, metadata={"help": "Beams when the finished model translates the test set."})
    length_penalty: float = 1.0
    test_batch_size: int = 64

    def __post_init__(self) -> None:
        if self.precision not in (None, "auto"):
            raise ValueError(
                f"run.precision must be auto or null, got {self.precision!r}: for a fixed precision set "
                "training.bf16 or training.fp16"
            )
        if self.average_last < 0:
            raise ValueError(f"run.average_last must not be negative, got {self.average_last}")


_OWN_SECTIONS: dict[str, type] = {
    "data": DataArguments,
    "tokenizer": TokenizerArguments,
    "model": ModelArguments,
    "run": RunArguments,
}
_SECTIONS = (*_OWN_SECTIONS, "training")


@dataclass
class Recipe:
    """The five sections of a recipe, parsed; `raw` is what was read, to be kept with the model."""

    data: DataArguments
    tokenizer: TokenizerArguments
    model: ModelArguments
    run: RunArguments
    training: "Seq2SeqTrainingArguments"
    raw: dict[str, Any] = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write the recipe as read, overrides included, so that it can be run again. Secrets are left out."""
        from ..publishing.secret_fields import without_secrets
        from .checkpointing import write_text_atomically

        values, secrets = without_secrets(self.raw)
        note = f"# left out, as they are secrets: {', '.join(secrets)}\n" if secrets else ""
        write_text_atomically(path, note + yaml.safe_dump(values, allow_unicode=True, sort_keys=False))


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
    """Return the names of the recipes in the package."""
    folder = importlib.resources.files(__package__) / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def describe_recipes() -> dict[str, str]:
    """Return a line of description for each recipe in the package: the first line of its opening comment."""
    return {name: _read(name)[0].partition("\n")[0].lstrip("# ") for name in list_recipes()}


def _read(name: str | Path) -> tuple[str, str]:
    """Return the text of a recipe and its name in messages."""
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    known = list_recipes()
    if str(name) in known:
        item = importlib.resources.files(__package__) / "recipes" / f"{name}.yaml"
        return item.read_text(encoding="utf-8"), f"recipe {name}"
    raise FileNotFoundError(
        f"no recipe {str(name)!r}: not a file, and not one of the recipes {', '.join(known)}"
        f"{_nearest(str(name), known)}"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _declared_fields(source: Path, class_name: str) -> set[str]:
    """Return the names of a class's annotated fields, from its source, as importing transformers takes seconds."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    fields = {
        item.target.id
        for item in body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and "ClassVar" not in ast.dump(item)
    }
    return {name for name in fields if not name.startswith("_")}


@lru_cache
def _training_fields() -> frozenset[str]:
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise missing_dependency("transformers", "training", None)
    folder = Path(spec.origin).parent
    return frozenset(
        _declared_fields(folder / "training_args.py", "TrainingArguments")
        | _declared_fields(folder / "training_args_seq2seq.py", "Seq2SeqTrainingArguments")
    )


@lru_cache
def _config_fields() -> frozenset[str]:
    source = Path(__file__).parents[1] / "configuration" / "configuration_urform.py"
    return frozenset(_declared_fields(source, "UrformConfig"))


def _field_names(section: str) -> frozenset[str]:
    if section == "training":
        return _training_fields()
    return frozenset(item.name for item in dataclasses.fields(_OWN_SECTIONS[section]) if item.init)


def _suggestion(name: str, section: str | None = None) -> str:
    """Name the key that was probably meant: of the section if there is one, of another, or of the model's config."""
    known = {key: f"model.config.{key}" for key in _config_fields()}
    for other in _SECTIONS:
        known.update({key: key if section is None else f"{other}.{key}" for key in _field_names(other)})
    if section is not None:
        known.update({key: key for key in _field_names(section)})
    within = known if section is None or name in known else _field_names(section)
    close = difflib.get_close_matches(name, list(within), n=1, cutoff=0.5)
    return f" (did you mean {known[close[0]]!r}?)" if close else ""


def _override(values: dict[str, Any], text: str) -> None:
    """Apply one `key=value` of the command line."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ValueError(f"expected key=value, got {text!r}")
    parts = key.split(".")
    if parts[0] not in _SECTIONS:
        owners = [section for section in _SECTIONS if parts[0] in _field_names(section)]
        if not owners:
            hint = _nearest(parts[0], _SECTIONS) if len(parts) > 1 else _suggestion(key)
            raise ValueError(f"unknown key {key!r}{hint}")
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


_typed_dict: Any = TypedDict  # called with names that only the recipe knows, which type checkers do not follow


def _converted(value: Any, hint: Any) -> Any:
    """Return a number of YAML as the float or the text that a field wants; other values as they are."""
    kinds = get_args(hint) or (hint,)
    if type(value) not in (int, float) or type(value) in kinds:
        return value
    if type(value) is int and float in kinds:
        return float(value)
    return str(value) if str in kinds else value


def _type_name(hint: Any) -> str:
    """Return a type as a user of YAML reads it, e.g. "int or null"."""
    arms = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = ("null" if arm is type(None) else str(arm) if get_args(arm) else arm.__name__ for arm in arms)
    return " or ".join(names).replace("typing.", "")


def _parse_section(section: str, values: Mapping[str, Any]) -> Any:
    """Return a section as its dataclass.

    Raises:
        ValueError: If a value is not of its field's type, or not one of the field's values.
    """
    if section == "training":
        from transformers import Seq2SeqTrainingArguments
    kind: Any = Seq2SeqTrainingArguments if section == "training" else _OWN_SECTIONS[section]
    hints = get_type_hints(kind)
    parsed = {name: _converted(value, hints[name]) for name, value in values.items()}
    for name, value in parsed.items():
        if section == "training" and isinstance(value, list):
            continue  # names of enum members: transformers checks them
        try:
            validate_typed_dict(_typed_dict(section, {name: hints[name]}), {name: value})
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"{section}.{name} must be {_type_name(hints[name])}, got {value!r}") from error
    return kind(**parsed)


def read_recipe(
    recipe: str | Path, overrides: Iterable[str] = (), *, output_dir: str | Path | None = None
) -> dict[str, Any]:
    """Read a recipe and refuse unknown keys, without an import of torch or transformers.

    Args:
        recipe: See `load_recipe`.
        overrides: See `load_recipe`.
        output_dir: See `load_recipe`.

    Raises:
        FileNotFoundError: If there is no such recipe.
        ValueError: If it is no mapping of sections, or has an unknown key; the message names it.
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
        for name in values[section]:
            if name not in _field_names(section):
                raise ValueError(f"{where}: unknown key {section}.{name}{_suggestion(str(name), section)}")
    training = values.setdefault("training", {})
    if output_dir is not None:
        training["output_dir"] = str(output_dir)
    training.setdefault("output_dir", f"outputs/{Path(recipe).stem}")
    return values


def load_recipe(recipe: str | Path, overrides: Iterable[str] = (), *, output_dir: str | Path | None = None) -> Recipe:
    """Read a recipe.

    Args:
        recipe: Path of a YAML file, or the name of one in the package.
        overrides: `key=value` texts; the values are YAML.
        output_dir: Instead of `training.output_dir`; without either, `outputs/<name of the recipe>`.

    Raises:
        FileNotFoundError: If there is no such recipe.
        ValueError: If it is not valid; the message names the key. If accelerate is not installed.
    """
    values = read_recipe(recipe, overrides, output_dir=output_dir)
    own = {section: _parse_section(section, values.get(section, {})) for section in _OWN_SECTIONS}
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_dependency(error.name or "accelerate", "training") from error
    import torch

    from ..publishing.secret_fields import hide_tokens

    training = values["training"]
    if not torch.accelerator.is_available():  # else transformers refuses bf16; not kept with the recipe
        training = {"use_cpu": True, **training}
    result = Recipe(**own, training=_parse_section("training", training), raw=copy.deepcopy(values))
    hide_tokens(result.training)
    keep = result.training.save_total_limit
    if keep is not None and keep < result.run.average_last:
        raise ValueError(
            f"run.average_last={result.run.average_last} needs as many checkpoints, "
            f"but training.save_total_limit={keep} keeps fewer"
        )
    return result
