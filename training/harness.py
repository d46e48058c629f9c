"""Score a model with the Language Model Evaluation Harness (`lm-eval`): `urform evaluate --lm-eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

__all__ = ["evaluate_harness"]

BACKENDS = {"decoder": "causal", "encoder-decoder": "seq2seq"}


def evaluate_harness(
    model_dir: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, dict[str, Any]]:
    """Return lm-eval's results: metrics by task.

    Args:
        model_dir: A folder with a decoder or an encoder-decoder, and its tokenizer.
        tasks: Names of tasks or of groups of tasks; `lm_eval ls tasks` lists them.
        include_path: Folder with tasks of your own, YAML.
        num_fewshot: Number of examples in front of each question; None leaves it to the task.
        limit: Number of examples of each task; None takes all.
        batch_size: Requests per batch.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If lm-eval is not installed, if it does not know a task, or if the model is an encoder.
    """
    for folder in (model_dir, include_path):
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
    backend = _backend(model_dir)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        package = (error.name or "lm_eval").replace("_", "-")
        raise ValueError(f"--lm-eval needs {package}: pip install lm-eval") from error

    manager = TaskManager(include_path=str(include_path) if include_path is not None else None)
    _refuse_unknown(tasks, manager)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if backend == "causal" and getattr(tokenizer, "add_eos_token", False):
        # lm-eval continues the context: no end of sequence may stand before the answer.
        tokenizer.add_eos_token = False  # type: ignore[misc]  # some tokenizers let it be set
    model = HFLM(pretrained=str(model_dir), tokenizer=tokenizer, backend=backend, batch_size=batch_size, device=device)
    result = simple_evaluate(
        model, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
    )
    return {
        task: {name: value for name, value in metrics.items() if name not in ("name", "alias")}
        for task, metrics in result["results"].items()
    }


def _refuse_unknown(tasks: Sequence[str], manager: Any) -> None:
    known = manager.match_tasks(list(tasks))
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(
            f"lm-eval knows no task {', '.join(map(repr, unknown))}; `lm_eval ls tasks` lists what it knows, and "
            "include_path adds a folder of your own"
        )


def _backend(model_dir: str | Path) -> str:
    config = AutoConfig.from_pretrained(model_dir)
    architecture = getattr(config, "architecture", None)
    if architecture is None:  # not ours
        return BACKENDS["encoder-decoder" if config.is_encoder_decoder else "decoder"]
    if architecture not in BACKENDS:
        raise ValueError(
            f"{model_dir} holds an {architecture}; lm-eval scores decoders and encoder-decoders. "
            "Score it on a test set instead: urform evaluate MODEL FILE"
        )
    return BACKENDS[architecture]
