"""`train`: a run by a recipe, from its files to the finished model.

The other verbs of the command line, `evaluate` and `predict`, are in `evaluation.py` and `translation.py`, `demo` is in
`demo.py`. The first two can be imported from here as well.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..dependencies import missing_dependency

try:
    import accelerate  # noqa: F401
except ModuleNotFoundError as error:
    raise missing_dependency(error.name or "accelerate", "training") from error
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration.checkpoint_files import read_json
from .batching import GlobalBatchSampler, padding_share
from .checkpointing import last_complete_checkpoint
from .encoding import EncodedDataset
from .evaluation import Evaluation, evaluate
from .final_model import save_results
from .interruption import InterruptCallback, TrainingInterruptedError
from .metrics import metric_function
from .model_building import build_model, check_config, prepare_tokenizer, train_tokenizer
from .preflight import (
    EstimateCallback,
    check_files,
    check_generation,
    check_lengths,
    check_metrics,
    limit_tokenizer,
    position_limits,
    refuse_single_class,
    settle_precision,
    warn_of_single_process,
)
from .recipe import Recipe, load_recipe
from .resuming import (
    RECIPE_FILE,
    RESULTS_FILE,
    TOKENIZER_FOLDER,
    RunRecord,
    ended_at,
    examples_sha256,
    folder_sha256,
    refuse_changes,
    refuse_earlier_run,
    refuse_other_shapes,
    refuse_shorter,
    resume_point,
    skips_newer,
)
from .tasks import Labels, build_dataset, class_names, data_collator, has_split, read_split
from .trainer import UrformTrainer
from .translation import predict, translate

__all__ = [
    "Evaluation",
    "TrainResult",
    "TrainingInterruptedError",
    "build_model",
    "evaluate",
    "last_complete_checkpoint",
    "predict",
    "train",
    "train_tokenizer",
    "translate",
]

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """The outcome of a run.

    Attributes:
        output_dir: Holds the finished model and tokenizer; `AutoModel….from_pretrained(output_dir)` loads them.
        steps: Optimizer steps done in all.
        metrics: Trainer's metrics, padding and over-length counts, and the test scores if the recipe names a test set.
        log_history: Every logged loss.
    """

    output_dir: Path
    steps: int
    metrics: dict[str, Any]
    log_history: list[dict[str, float]] = field(repr=False)


@dataclass
class _Splits:
    """The data of a run: ids to train and evaluate on, test pairs as text, and the names of the classes."""

    train: EncodedDataset
    validation: EncodedDataset | None
    test: list[tuple[str, str]]
    labels: Labels


def train(
    recipe: str | Path | Recipe,
    overrides: Iterable[str] = (),
    *,
    resume: bool = False,
    output_dir: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    allow_changes: Sequence[str] = (),
) -> TrainResult:
    """Train a model by a recipe, save it, and score it on the test set if there is one.

    Args:
        recipe: Name or path of a recipe, or one already loaded.
        overrides: `key=value` texts, see `load_recipe`.
        resume: Continue from the newest complete checkpoint in the output directory. A run that has ended stays as it
            is.
        output_dir: Where everything goes.
        callbacks: Further Trainer callbacks.
        allow_changes: With `resume`, names (`section.field` or `section`) of values that may differ from the run's.

    Raises:
        TrainingInterruptedError: After Ctrl-C or SIGTERM, with a checkpoint saved.
        CheckpointError: If a checkpoint cannot be written.
        NonFiniteError: If a loss, a gradient or a weight is NaN or infinite.
        ValueError: If the recipe or the data are not valid, or not those of the run that is to be resumed.
        FileNotFoundError: If a file is missing.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides, output_dir=output_dir)
    warn_of_single_process(loaded.training.world_size)
    check_files(loaded.data)
    check_config(loaded)
    check_metrics(loaded)
    folder = Path(loaded.training.output_dir or "outputs")
    checkpoint, continues = _starting_point(folder, resume)
    set_seed(loaded.training.seed)

    examples = list(read_split(loaded.data, "train"))[: loaded.data.max_train_examples]
    refuse_single_class(loaded.data, class_names(loaded.data, examples))
    tokenizer = prepare_tokenizer(loaded, examples, continues)
    tokenizer_sha256 = folder_sha256(folder / TOKENIZER_FOLDER)
    record = RunRecord(examples_sha256(examples), tokenizer_sha256, loaded.training.world_size)
    if continues:
        changes = refuse_changes(folder, loaded, record, allow_changes)
        if (ended := _ended_run(folder, checkpoint, changes)) is not None:
            return ended
    splits = _encode_splits(loaded, tokenizer, examples)

    training = settle_precision(loaded, checkpoint)
    # Data are read before the seed is used, so reading changes nothing about the initial weights.
    set_seed(training.seed)
    model = build_model(loaded, tokenizer, splits.labels)
    _check_splits(loaded, splits, tokenizer, model)
    trainer = _make_trainer(loaded, training, model, tokenizer, splits, callbacks)
    if checkpoint is not None:
        refuse_other_shapes(model, checkpoint)
        refuse_shorter(folder, checkpoint, trainer.planned_steps())
    if training.should_save:
        loaded.save(folder / RECIPE_FILE)
        record.save(folder)
    metrics = _train_until_end(trainer, folder, checkpoint)

    metrics["num_parameters"] = model.num_parameters()
    metrics["examples"] = splits.train.over_length.examples
    metrics["examples_too_long"] = splits.train.over_length.too_long
    if sampler := _sampler(trainer):
        metrics["padding_share"] = round(padding_share(sampler), 4)
    if training.should_save:
        save_results(loaded, trainer, folder, metrics, splits.test)
        record.ended_at = trainer.state.global_step
        record.save(folder)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(folder, trainer.state.global_step, metrics, trainer.state.log_history)


# --- before the first step ---------------------------------------------------------------------------------------
def _starting_point(folder: Path, resume: bool) -> tuple[Path | None, bool]:
    """Return the checkpoint to continue from, and whether what the folder holds belongs to this run."""
    if not resume:
        refuse_earlier_run(folder)
        return None, False
    checkpoint = resume_point(folder)
    return checkpoint, checkpoint is not None or ended_at(folder) is not None


def _ended_run(folder: Path, checkpoint: Path | None, changes: Mapping[str, str]) -> TrainResult | None:
    """Return the result of a run that has ended, None if training goes on. Log or warn what changes.

    Raises:
        ValueError: If more steps are wanted of a run that left no checkpoint.
    """
    steps = ended_at(folder)
    if skips_newer(folder, checkpoint):
        steps = None  # its last checkpoints are damaged: train them again
    is_longer = not changes.keys().isdisjoint(("training.max_steps", "training.num_train_epochs"))
    if steps is None or (is_longer and checkpoint is not None):
        for line in changes.values():
            logger.warning("resuming with a change: %s", line)
        return None
    if is_longer:
        raise ValueError(
            f"the run in {folder} has ended at step {steps} and left no checkpoint to go on from: start a new run in "
            f"another --output-dir with model.from_pretrained={folder}"
        )
    without = f" (changes without effect: {'; '.join(changes.values())})" if changes else ""
    warnings.warn(
        f"nothing to resume: the run in {folder} has ended at step {steps} and is left as it is{without}. To train "
        f"longer, raise max_steps or num_train_epochs; to average and score the model again, delete {RESULTS_FILE}",
        stacklevel=3,
    )
    history = read_json(folder / "trainer_state.json").get("log_history", [])
    return TrainResult(folder, steps, read_json(folder / RESULTS_FILE), history)


def _encode_splits(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, examples: list[tuple[Any, ...]]) -> _Splits:
    """Encode the training examples, and read and encode the other splits.

    Raises:
        ValueError: If the recipe evaluates and names no validation data, or if data are not valid, or if the training
            examples that are not too long have a single class.
    """
    data, labels = recipe.data, Labels()
    train_set = build_dataset(data, "train", tokenizer, labels, examples)
    labels.frozen = True
    if data.task in ("text-classification", "token-classification"):
        refuse_single_class(data, labels.names)
    validation: EncodedDataset | None = None
    if recipe.training.eval_strategy != "no":
        if not has_split(data, "validation"):
            raise ValueError("training.eval_strategy needs validation data: set data.validation_source and _target")
        validation = build_dataset(data, "validation", tokenizer, labels, list(read_split(data, "validation")))
    test = list(read_split(data, "test")) if has_split(data, "test") and data.task == "seq2seq" else []
    return _Splits(train_set, validation, test, labels)


def _check_splits(recipe: Recipe, splits: _Splits, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Compare lengths with the model's positions; see `check_lengths` and `check_generation` for what is refused."""
    limits = position_limits(model)
    limit_tokenizer(tokenizer, limits, recipe.tokenizer.options.get("model_max_length"))
    check_lengths(recipe.data, "train", splits.train, limits)
    check_generation(recipe, splits.test, tokenizer, limits)
    if splits.validation is not None:
        check_lengths(recipe.data, "validation", splits.validation, limits)


# --- the steps ---------------------------------------------------------------------------------------------------
def _make_trainer(
    recipe: Recipe,
    training: Seq2SeqTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: _Splits,
    callbacks: Sequence[TrainerCallback],
) -> UrformTrainer:
    if splits.validation is not None:
        # Evaluation goes in this order, so that a batch has texts of similar length.
        splits.validation.features.sort(key=lambda feature: len(feature["input_ids"]))
    return UrformTrainer(
        model=model,
        args=training,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=tokenizer,
        data_collator=data_collator(recipe.data.task, tokenizer, model),
        compute_metrics=metric_function(recipe, tokenizer),
        callbacks=[*callbacks, EstimateCallback()],
        tokens_per_batch=recipe.data.tokens_per_batch,
        pool_batches=recipe.data.pool_batches,
    )


def _train_until_end(trainer: UrformTrainer, folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Train and return Trainer's metrics.

    Raises:
        TrainingInterruptedError: After SIGINT or SIGTERM, with a checkpoint saved.
    """
    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    with interrupt.installed():
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.signal_number:
        step = trainer.state.global_step
        raise TrainingInterruptedError(interrupt.signal_number, step, folder / f"{PREFIX_CHECKPOINT_DIR}-{step}")
    return dict(output.metrics)


def _sampler(trainer: UrformTrainer) -> GlobalBatchSampler | None:
    """Return the sampler of global batches inside the wrappers that accelerate puts around it."""
    sampler: Any = getattr(trainer.callback_handler.train_dataloader, "batch_sampler", None)
    while sampler is not None and not isinstance(sampler, GlobalBatchSampler):
        sampler = getattr(sampler, "batch_sampler", None)
    return sampler
