"""The metadata of a model card, which the Hub understands: language, tags, task, base model, results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .card_snippets import auto_class
from .training_record import TrainingRecord

TASKS = {
    "AutoModelForSeq2SeqLM": "text-generation",  # between two languages: "translation"
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
}
# What an author may give in card data; anything else of the Hub's goes under `metadata`.
FIELDS = (
    *("language", "license", "license_name", "license_link", "base_model", "datasets", "metrics", "tags"),
    *("pipeline_tag", "model_name", "library_name"),
)


def make_metadata(
    config: dict[str, Any], repo_id: str, record: TrainingRecord, given: Mapping[str, Any], tags_for: Iterable[str]
) -> Any:
    """Return the metadata (`huggingface_hub.ModelCardData`).

    Args:
        config: the checkpoint's `config.json`.
        repo_id: the repository's name.
        record: what is known of the training.
        given: the author's card data, which override what was found.
        tags_for: codes of the languages that the tokenizer has tags for.
    """
    from huggingface_hub import ModelCardData

    languages = _languages(record, tags_for)
    task = str(given.get("pipeline_tag") or _task(auto_class(config), given.get("language") or languages))
    found: dict[str, Any] = {
        "language": languages,
        "base_model": _base_model(record),
        "datasets": [name] if (name := record.recipe.get("data", {}).get("dataset_name")) else None,
        "library_name": "transformers",
        "pipeline_tag": task,
        "model_name": repo_id.rpartition("/")[2],
    }
    found |= {key: given[key] for key in FIELDS if given.get(key) is not None}
    tags = [found.get("tags")] if isinstance(found.get("tags"), str) else list(found.get("tags") or [])
    found["tags"] = list(dict.fromkeys(["urform", config.get("architecture", "encoder-decoder"), *tags]))
    results = _eval_results(record, task, data_name(record, given))
    extra = dict(given.get("metadata") or {})
    return ModelCardData(**{k: v for k, v in found.items() if v is not None}, eval_results=results or None, **extra)


def _task(auto: str, languages: Any) -> str:
    """Return the task of the head of an Auto class. A sequence-to-sequence model of several languages translates."""
    if auto == "AutoModelForSeq2SeqLM" and isinstance(languages, list) and len(languages) > 1:
        return "translation"
    return TASKS.get(auto, "feature-extraction")


def _languages(record: TrainingRecord, tags_for: Iterable[str]) -> list[str] | None:
    data = record.recipe.get("data", {})
    codes = {data.get("source_language"), data.get("target_language"), *tags_for} - {None, ""}
    languages = {re.split("[-_]", str(code))[0].lower() for code in codes}  # a card names languages, not their scripts
    return sorted(name for name in languages if re.fullmatch(r"[a-z]{2,3}", name)) or None


def _base_model(record: TrainingRecord) -> str | None:
    name = record.recipe.get("model", {}).get("from_pretrained")
    # A folder on the author's machine says nothing to others.
    return name if name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def data_name(record: TrainingRecord, given: Mapping[str, Any]) -> str:
    """Return the name of the data of a run: the author's, the recipe's, or that of its folder."""
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
            results.append(result(metric, float(value), "test", signature_of(record, metric)))
    return results


def signature_of(record: TrainingRecord, metric: str) -> str | None:
    """Return how a metric on the test set was computed, as its library says it."""
    return next((str(record.test[k]) for k in (f"{metric}_signature", f"{metric}_tokenizer") if k in record.test), None)
