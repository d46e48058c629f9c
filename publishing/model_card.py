"""The model card: metadata that the Hub understands, and what is known of the model, its training and its results.

`make_card` says only what is in the checkpoint, in what the training run left in its folder, and in the card data that
the author gives. What is not known is left out, or said to be unknown. The text is the template in `card_template.py`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configuration.checkpoint_files import read_json, refuse_links
from ..configuration.version_urform import package_version
from ..dependencies import HOW_TO_INSTALL, install_command
from .card_metadata import FIELDS, data_name, make_metadata, signature_of
from .card_pictures import ALIGNMENT_NAME, CURVE_NAME, can_draw, draw_alignment, draw_curve
from .card_snippets import auto_class, snippets
from .card_template import MARK, TEMPLATE
from .checkpoint_checks import has_tokenizer
from .training_record import TrainingRecord
from .weight_files import WeightFiles, weight_files

PLACEHOLDERS = (
    MARK,
    "[More Information Needed]",  # transformers' push_to_hub
    "This model card has been generated automatically according to the information the Trainer had access to",
)
_TEXTS = ("description", "intended_use", "training_data", "limitations", "citation", "example")
_WATTS = {"cpu": 100.0, "gpu": 400.0}


def read_card_data(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `--card-data`: a YAML (or JSON) mapping of the fields that `make_card` knows.

    Raises:
        ValueError: the file is no mapping, or has a field that is unknown; `metadata` takes any others of the Hub's.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"card data {path} cannot be read: {error}") from error
    known = {*FIELDS, *_TEXTS, "metadata", "power_watts", "dataset_name"}
    if not isinstance(data, dict):
        raise ValueError(
            f"card data {path} must be a mapping like 'license: apache-2.0'; it is a {type(data).__name__}"
        )
    if unknown := sorted(set(map(str, data)) - known):
        raise ValueError(
            f"card data {path}: {', '.join(unknown)} unknown; known are {', '.join(sorted(known))} "
            "(other metadata of the Hub goes under 'metadata')"
        )
    return data


def make_card(
    folder: Path,
    repo_id: str,
    record: TrainingRecord,
    given: Mapping[str, Any] | None = None,
    *,
    code: bool = True,
    verified: bool = False,
) -> Any:
    """Write the pictures into `folder` and return the card (`huggingface_hub.ModelCard`).

    Args:
        folder: the bundle: `config.json`, weights, tokenizer.
        repo_id: what the snippets load.
        record: what is known of the training.
        given: the author's card data. Metadata override what was found; texts come before what is known.
        code: whether the bundle holds code for `trust_remote_code=True`.
        verified: whether the snippets are run before publication.
    """
    from huggingface_hub import ModelCard

    from ..configuration.configuration_urform import UrformConfig

    given = dict(given or {})
    refuse_links(folder)
    config, full = read_json(folder / "config.json"), UrformConfig.from_pretrained(folder)
    tokenizer = _tokenizer(folder)
    _warn_of_missing_pictures(record, config, given, tokenizer)
    layers = f"{full.num_hidden_layers}" + (f" + {full.decoder_num_hidden_layers}" if full.is_encoder_decoder else "")
    data = record.recipe.get("data", {})
    example = str(given.get("example") or "1 2 3")
    return ModelCard.from_template(
        make_metadata(config, repo_id, record, given, getattr(tokenizer, "languages", ())),
        template_str=TEMPLATE,
        **{name: str(given.get(name) or "").strip() for name in _TEXTS if name != "example"},
        title=given.get("model_name") or repo_id.rpartition("/")[2],
        repo_id=repo_id,
        mark=MARK,
        version=package_version(),
        how_to_install=HOW_TO_INSTALL,
        code=code,
        verified=verified,
        snippets=snippets(config, repo_id, tokenizer, example, code),
        config=full,
        article="An" if full.architecture[0] == "e" else "A",
        head=(config.get("architectures") or ["UrformModel"])[0],
        layers=layers,
        parameters=_parameters(folder),
        record=record,
        results=_results(record),
        arguments=[(name, f"`{_number(value)}`") for name, value in _arguments_in_force(record).items()],
        data=data,
        data_name=data_name(record, given),
        limits=[name for name in ("max_source_length", "max_target_length", "tokens_per_batch") if data.get(name)],
        power_watts=given.get("power_watts"),
        watts=float(given.get("power_watts") or _WATTS["gpu" if record.on_gpu else "cpu"]),
        has_curve=draw_curve(record.curve, folder / CURVE_NAME),
        curve_name=CURVE_NAME,
        has_alignment=_draw_alignment(folder, config, given, tokenizer),
        alignment_name=ALIGNMENT_NAME,
    )


def update_card(folder: Path, repo_id: str, record: TrainingRecord, given: Mapping[str, Any] | None = None) -> Any:
    """Return the card that is in `folder`, its text as it is, with the metadata that it lacks or the author gives."""
    from huggingface_hub import ModelCard

    refuse_links(folder)
    card = ModelCard.load(folder / "README.md")
    languages = getattr(_tokenizer(folder), "languages", ())
    ours = make_metadata(read_json(folder / "config.json"), repo_id, record, dict(given or {}), languages).to_dict()
    named = {*(given or {}), *(dict(given or {}).get("metadata") or {})}
    text = card.text
    merged = {**ours, **card.data.to_dict(), **{key: value for key, value in ours.items() if key in named}}
    import yaml

    front = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).strip()
    return ModelCard(f"---\n{front}\n---\n{text}")


def is_placeholder(card: Path) -> bool:
    """Return whether a card was made by a program (this one, transformers or Trainer) and not by a person."""
    text = card.read_text(encoding="utf-8")
    return any(mark in text for mark in PLACEHOLDERS)


def complete_card(folder: Path, repo_id: str) -> None:
    """Replace the card that transformers' `push_to_hub` writes by one about this model; a person's card stays."""
    path = folder / "README.md"
    refuse_links(folder)
    if path.is_file() and is_placeholder(path) and (folder / "config.json").is_file():
        from huggingface_hub import ModelCard

        tags = ModelCard.load(path).data.tags or []
        make_card(folder, repo_id, TrainingRecord(), {"tags": tags} if tags else None).save(path)


# ---------------------------------------------------------------------------------------------- what the template tells


def _tokenizer(folder: Path) -> Any:
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _parameters(folder: Path) -> int:
    """Return the number of parameters in the weights that load by default."""
    return sum(math.prod(entry.shape) for entry in WeightFiles(weight_files(folder)).entries.values())


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _arguments_in_force(record: TrainingRecord) -> dict[str, Any]:
    """Return the training arguments that are set, without those that another one, or the recipe, overrides."""
    arguments = record.arguments
    overridden = {"num_train_epochs" if (arguments.get("max_steps") or 0) > 0 else "max_steps"}
    if record.recipe.get("data", {}).get("tokens_per_batch"):
        overridden.add("per_device_train_batch_size")
    return {name: value for name, value in arguments.items() if value is not None and name not in overridden}


def _results(record: TrainingRecord) -> list[tuple[str, str, str, str]]:
    """Return a row for each metric: its name, its value, the data, and how it was computed."""
    rows = [(metric, f"{value:.4g}", "validation", "") for metric, value in record.results.items()]
    for metric, value in record.test.items():
        if isinstance(value, (int, float)):
            signature = signature_of(record, metric)
            rows.append((metric, _number(value), "test", f"`{signature}`".replace("|", "\\|") if signature else ""))
    return rows


def _warn_of_missing_pictures(
    record: TrainingRecord, config: dict[str, Any], given: Mapping[str, Any], tokenizer: Any
) -> None:
    if can_draw():
        return
    missing = ["the learning curve"] if any(len(points) > 1 for points in record.curve.values()) else []
    missing += ["the attention alignment"] if _can_align(config, given, tokenizer) else []
    if missing:
        remedy = f"Run: pip install matplotlib (or {install_command('hub')}), and publish again"
        warnings.warn(
            f"the model card is written without {' and '.join(missing)}: matplotlib is not installed. {remedy}",
            UserWarning,
            stacklevel=3,
        )


def _can_align(config: dict[str, Any], given: Mapping[str, Any], tokenizer: Any) -> bool:
    return tokenizer is not None and auto_class(config) == "AutoModelForSeq2SeqLM" and bool(given.get("example"))


def _draw_alignment(folder: Path, config: dict[str, Any], given: Mapping[str, Any], tokenizer: Any) -> bool:
    if not _can_align(config, given, tokenizer) or not can_draw():
        return False
    return draw_alignment(folder, str(given["example"]), folder / ALIGNMENT_NAME)
