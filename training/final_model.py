"""What comes after the last step of a run: the finished model, its scores on the test set, the results, the Hub."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from .averaging import average_checkpoints, last_checkpoints
from .checkpointing import write_text_atomically
from .metrics import score_translations
from .recipe import Recipe
from .resuming import RESULTS_FILE
from .trainer import UrformTrainer
from .translation import translate

__all__ = ["save_results"]

logger = logging.getLogger(__name__)

AVERAGE_FOLDER = "average"


def save_results(
    recipe: Recipe, trainer: UrformTrainer, folder: Path, metrics: dict[str, Any], test: list[tuple[str, str]]
) -> None:
    """Save the finished model, score it, write the results and push them if the recipe says so.

    Args:
        recipe: Of the run.
        trainer: After training.
        folder: The run's output directory.
        metrics: Of the training. The scores on the test set are added as `test`.
        test: (source, reference) pairs; none, and nothing is scored.
    """
    _save_model(recipe, trainer, folder)
    trainer.save_state()  # the losses, for the model card
    if test:
        metrics["test"] = _test(recipe, folder, test, trainer.args.device)
    write_text_atomically(folder / RESULTS_FILE, json.dumps(metrics, indent=1, ensure_ascii=False))
    if trainer.args.push_to_hub:
        trainer.push_saved("End of training")


def _save_model(recipe: Recipe, trainer: UrformTrainer, folder: Path) -> None:
    """Put the finished model (averaged if the recipe says so) into the output directory, file by file."""
    staging = folder / f".{AVERAGE_FOLDER}.{uuid.uuid4().hex[:8]}"
    try:
        checkpoints = _to_average(folder, recipe.run.average_last)
        if checkpoints:
            average_checkpoints(checkpoints, staging)
        else:
            trainer.save_model(str(staging), _internal_call=True)  # not pushed from there
        for path in staging.iterdir():
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _to_average(folder: Path, count: int) -> list[Path]:
    """Return the last `count` checkpoints, or, with a warning, all of them if there are fewer."""
    found = last_checkpoints(folder, count)
    if len(found) < count:
        which = f"the average of {len(found)}" if found else "that of the last step"
        logger.warning(
            "run.average_last=%d, and %s has %d complete checkpoints: the finished model is %s. For more checkpoints "
            "lower training.save_steps or raise training.save_total_limit",
            *(count, folder, len(found), which),
        )
    return found


def _test(recipe: Recipe, folder: Path, pairs: list[tuple[str, str]], device: torch.device) -> dict[str, Any]:
    # From disk, not from memory: what is scored is what was saved.
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hypotheses = translate(
        model,
        tokenizer,
        [recipe.data.source_prefix + source for source, _ in pairs],
        num_beams=recipe.run.num_beams,
        length_penalty=recipe.run.length_penalty,
        batch_size=recipe.run.test_batch_size,
    )
    (folder / "test_predictions.txt").write_text("\n".join(hypotheses) + "\n", encoding="utf-8")
    return score_translations(hypotheses, [target for _, target in pairs], recipe.data.target_language).to_dict()
