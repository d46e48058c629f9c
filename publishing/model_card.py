"""The model card: metadata that the Hub understands, and what is known of the model, its training and its results.

`make_card` says only what is in the checkpoint, in what the training run left beside it, and in the card data that the
author gives; what is not known is not mentioned, or said to be unknown.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..configuration.bundle_urform import package_version
from ..configuration.checkpoint_files import read_json, refuse_links
from ..dependencies import HOW_TO_INSTALL, install_command
from .card_pictures import ALIGNMENT_NAME, CURVE_NAME, can_draw, draw_alignment, draw_curve
from .card_snippets import Snippet, auto_class, snippets
from .checkpoint_checks import has_tokenizer
from .training_record import TrainingRecord
from .weight_files import WeightFiles, weight_files

MARK = "<!-- This card was written by urform; without this line it is yours, and is kept when you publish again. -->"
PLACEHOLDERS = (
    MARK,
    "[More Information Needed]",  # transformers' push_to_hub
    "This model card has been generated automatically according to the information the Trainer had access to",
)
TASKS = {
    "AutoModelForSeq2SeqLM": "text-generation",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
}
_METADATA = ("language", "license", "license_name", "license_link", "base_model", "datasets", "metrics", "tags",
             "pipeline_tag", "model_name", "library_name")  # fmt: skip
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
    known = {*_METADATA, *_TEXTS, "metadata", "power_watts", "dataset_name"}
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

    given = dict(given or {})
    refuse_links(folder)
    import urform

    config, full = read_json(folder / "config.json"), urform.UrformConfig.from_pretrained(folder)
    tokenizer = _tokenizer(folder)
    example = str(given.get("example") or "1 2 3")
    shown = snippets(config, repo_id, tokenizer, example, code)
    _warn_of_missing_pictures(record, config, given, tokenizer)
    sections = [
        f"# {given.get('model_name') or repo_id.rpartition('/')[2]}",
        _joined(given.get("description"), _description(folder, full, config)),
        _section("Intended use", given.get("intended_use")),
        _how_to_use(shown, code, verified),
        _section("Results", _results(record)),
        _section("Training data", _joined(given.get("training_data"), _data(record, given))),
        _section("Training", _training(record, folder)),
        _section("Compute", _compute(record, given)),
        _section("Attention alignment", _alignment(folder, config, given) if tokenizer is not None else None),
        _section("Limitations", _limitations(full, record, given.get("limitations"))),
        _section("Checking the files", _checking(repo_id)),
        _section("Citation", given.get("citation")),
        MARK,
    ]
    metadata = _metadata(config, repo_id, record, given, getattr(tokenizer, "languages", ()))
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n")


def update_card(folder: Path, repo_id: str, record: TrainingRecord, given: Mapping[str, Any] | None = None) -> Any:
    """Return the card that is in `folder`, its text as it is, with the metadata that it lacks or the author gives."""
    from huggingface_hub import ModelCard

    refuse_links(folder)
    card = ModelCard.load(folder / "README.md")
    languages = getattr(_tokenizer(folder), "languages", ())
    ours = _metadata(read_json(folder / "config.json"), repo_id, record, dict(given or {}), languages).to_dict()
    named = {*(given or {}), *(dict(given or {}).get("metadata") or {})}
    text = card.text
    merged = {**ours, **card.data.to_dict(), **{key: value for key, value in ours.items() if key in named}}
    import yaml

    front = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).strip()
    return ModelCard(f"---\n{front}\n---\n{text}")


def is_placeholder(card: Path) -> bool:
    """Whether a card was made by a program (this one, transformers or Trainer) and not by a person."""
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


# --------------------------------------------------------------------------------------------------------- metadata


def _metadata(
    config: dict[str, Any], repo_id: str, record: TrainingRecord, given: dict[str, Any], tags_for: Iterable[str]
) -> Any:
    """Return the metadata; `tags_for` are the codes of the languages that the tokenizer has tags for."""
    from huggingface_hub import ModelCardData

    data = record.recipe.get("data", {})
    task = str(given.get("pipeline_tag") or TASKS.get(auto_class(config), "feature-extraction"))
    codes = {data.get("source_language"), data.get("target_language"), *tags_for} - {None, ""}
    languages = {re.split("[-_]", str(code))[0].lower() for code in codes}  # a card names languages, not their scripts
    found = {
        "language": sorted(name for name in languages if re.fullmatch(r"[a-z]{2,3}", name)) or None,
        "base_model": record.recipe.get("model", {}).get("from_pretrained"),
        "datasets": [data["dataset_name"]] if data.get("dataset_name") else None,
        "library_name": "transformers",
        "pipeline_tag": task,
        "model_name": repo_id.rpartition("/")[2],
    }
    if found["base_model"] and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", found["base_model"]):
        found["base_model"] = None  # a folder of the author's machine says nothing to others
    found |= {key: given[key] for key in _METADATA if given.get(key) is not None}
    tags = [found.get("tags")] if isinstance(found.get("tags"), str) else list(found.get("tags") or [])
    found["tags"] = list(dict.fromkeys(["urform", config.get("architecture", "encoder-decoder"), *tags]))
    results = _eval_results(record, task, _data_name(record, given))
    extra = dict(given.get("metadata") or {})
    return ModelCardData(**{k: v for k, v in found.items() if v is not None}, eval_results=results or None, **extra)


def _data_name(record: TrainingRecord, given: dict[str, Any]) -> str:
    data = record.recipe.get("data", {})
    datasets = given.get("datasets")
    named = given.get("dataset_name") or data.get("dataset_name")
    named = named or (datasets[0] if isinstance(datasets, list) and datasets else datasets)
    return str(named or Path(data.get("data_dir") or "").name or "the run's own data")


def _eval_results(record: TrainingRecord, task: str, name: str) -> list[Any]:
    from huggingface_hub import EvalResult

    kind = re.sub(r"[^a-z0-9_.-]+", "_", name.lower()).strip("_") or "own"

    def result(metric: str, value: float, split: str, signature: str | None = None) -> Any:
        return EvalResult(
            task_type=task,
            dataset_type=kind,
            dataset_name=name,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 4),
            metric_name=f"{metric} ({split})",
            metric_args={"signature": signature} if signature else None,
        )

    results = [result(metric, value, "validation") for metric, value in record.results.items()]
    for metric, value in record.test.items():
        if isinstance(value, (int, float)) and metric != "examples":
            results.append(result(metric, float(value), "test", _signature(record, metric)))
    return results


def _signature(record: TrainingRecord, metric: str) -> str | None:
    return next((str(record.test[k]) for k in (f"{metric}_signature", f"{metric}_tokenizer") if k in record.test), None)


# --------------------------------------------------------------------------------------------------------- sections


def _section(title: str, text: Any) -> str:
    return f"## {title}\n\n{str(text).strip()}" if text else ""


def _joined(words: Any, known: str | None) -> str:
    """Return the author's words, then what is known: the one does not replace the other."""
    return "\n\n".join(text for text in (str(words or "").strip(), known) if text)


def _tokenizer(folder: Path) -> Any:
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _description(folder: Path, full: Any, config: dict[str, Any]) -> str:
    layers = str(full.num_hidden_layers)
    if full.is_encoder_decoder:
        layers += f" + {full.decoder_num_hidden_layers}"
    count = _parameters(folder)
    article = "An" if full.architecture[0] == "e" else "A"
    return (
        f"{article} {full.architecture} Transformer ({(config.get('architectures') or ['UrformModel'])[0]}) made with "
        f"urform {package_version()}: {layers} layers, {full.hidden_size} wide, {full.vocab_size:,} tokens, "
        f"{count:,} parameters; positions: {full.position_encoding}, norm: {full.norm_type}, {full.norm_position}."
    )


def _parameters(folder: Path) -> int:
    """Return the number of parameters in the weights that load by default."""
    import math

    return sum(math.prod(entry.shape) for entry in WeightFiles(weight_files(folder)).entries.values())


def _how_to_use(shown: list[Snippet], code: bool, verified: bool) -> str:
    parts = ["## How to use"]
    if not code:
        parts.append("This repository holds no code: urform has to be installed.")
    parts.append(f"Urform is on no package index; it is installed by {HOW_TO_INSTALL}.")
    if verified:
        parts.append("Each of these was run before publication, as it stands here.")
    for snippet in shown:
        parts.append(f"{snippet.title}:\n\n```python\n{snippet.code}\n```")
    return "\n\n".join(parts)


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *rest = rows
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ("---",) * len(head), *rest])


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _results(record: TrainingRecord) -> str | None:
    rows: list[tuple[str, ...]] = [("metric", "value", "data", "signature")]
    rows += [(metric, f"{value:.4g}", "validation", "") for metric, value in record.results.items()]
    for metric, value in record.test.items():
        if isinstance(value, (int, float)):
            signature = _signature(record, metric)
            rows.append((metric, _number(value), "test", f"`{signature}`".replace("|", "\\|") if signature else ""))
    text = _table(rows) if len(rows) > 1 else ""
    if record.best is not None:
        name, value, step = record.best
        text += f"\n\nBest {name}: {value:.4g}" + (f", at step {step}." if step else ".")
    return text or None


def _data(record: TrainingRecord, given: dict[str, Any]) -> str | None:
    data = record.recipe.get("data", {})
    if not data:
        return None
    said = [f"Task: {data['task']}." if data.get("task") else "", f"Data: {_data_name(record, given)}."]
    limits = [f"{k} {data[k]}" for k in ("max_source_length", "max_target_length", "tokens_per_batch") if data.get(k)]
    return " ".join(s for s in said if s) + (f" Limits: {', '.join(limits)}." if limits else "")


def _training(record: TrainingRecord, folder: Path) -> str | None:
    parts = []
    if record.steps:
        epochs = f", {record.epochs:.3g} epochs" if record.epochs else ""
        parts.append(f"{record.steps:,} updates{epochs}.")
    if record.arguments:
        parts.append(_table([("argument", "value"), *((k, f"`{_number(v)}`") for k, v in record.arguments.items())]))
    if draw_curve(record.curve, folder / CURVE_NAME):
        parts.append(f"![Loss over steps]({CURVE_NAME})")
    return "\n\n".join(parts) or None


def _compute(record: TrainingRecord, given: dict[str, Any]) -> str | None:
    parts = []
    if record.flops:
        parts.append(
            f"{record.flops:.3g} floating-point operations, as Trainer counts them: 6 x tokens x parameters without "
            "embeddings."
        )
    if record.seconds:
        stated = given.get("power_watts")
        watts = float(stated) if stated else _WATTS["gpu" if record.on_gpu else "cpu"]
        energy = record.seconds * watts * record.processes / 3.6e6
        source = "stated by the author" if stated else "an assumption, not a measurement"
        parts.append(
            "Energy, estimated: seconds x watts per device x devices / 3,600,000 = "
            f"{record.seconds:,.0f} x {watts:,.0f} x {record.processes} / 3,600,000 = {energy:.3g} kWh. "
            f"The {watts:,.0f} W are {source}" + (f"; device: {record.device}." if record.device else ".")
        )
    return "\n\n".join(parts) or None


def _warn_of_missing_pictures(
    record: TrainingRecord, config: dict[str, Any], given: dict[str, Any], tokenizer: Any
) -> None:
    if can_draw():
        return
    missing = ["the learning curve"] if any(len(points) > 1 for points in record.curve.values()) else []
    missing += ["the attention alignment"] if tokenizer is not None and _has_alignment(config, given) else []
    if missing:
        remedy = f"pip install matplotlib (or {install_command('hub')}), and publish again"
        warnings.warn(
            f"the model card is written without {' and '.join(missing)}, for matplotlib is not installed: {remedy}",
            UserWarning,
            stacklevel=3,
        )


def _has_alignment(config: dict[str, Any], given: dict[str, Any]) -> bool:
    return auto_class(config) == "AutoModelForSeq2SeqLM" and bool(given.get("example"))


def _alignment(folder: Path, config: dict[str, Any], given: dict[str, Any]) -> str | None:
    if not _has_alignment(config, given) or not can_draw():
        return None
    if not draw_alignment(folder, str(given["example"]), folder / ALIGNMENT_NAME):
        return None
    return (
        "Where the last decoder layer looks (mean over heads) while it writes; input below, output at the left.\n\n"
        f"![Attention alignment]({ALIGNMENT_NAME})"
    )


def _limitations(full: Any, record: TrainingRecord, words: Any) -> str:
    """Return the author's words or, for want of them, what holds for any model; and the limit of the positions."""
    ends = full.position_encoding == "learned"
    known = f"Inputs end at {full.max_position_embeddings} tokens: positions are a learned table." if ends else ""
    if words:
        return _joined(words, known)
    said = [known] if known else []
    if not record.results and not record.test:
        said.append("No results are recorded: how good the model is was not measured, or not here.")
    else:
        said.append("Nothing is known of its quality beyond the results above.")
    said.append("It repeats what its training data say, their errors and prejudices included.")
    return "\n".join(f"- {line}" for line in said)


def _checking(repo_id: str) -> str:
    return (
        f"`urform doctor bundle {repo_id}` compares every file with the sha256 that it was published with. Weights are "
        "safetensors; nothing is pickled."
    )
