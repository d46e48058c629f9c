"""One function per verb of the command line: `train`, `evaluate`, `predict`. (`demo` is in `demo.py`.)"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..dependencies import missing_dependency

try:
    from accelerate import PartialState
except ModuleNotFoundError as error:
    raise missing_dependency(error.name or "accelerate", "training") from error
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..publishing.checkpoint_checks import read_json
from ..tokenization.text_files import unencodable
from .averaging import average_checkpoints, last_checkpoints
from .batching import padding_share
from .checkpointing import last_complete_checkpoint, write_text_atomically
from .encoding import EncodedDataset
from .metrics import TranslationScores, check_scorers, score_translations
from .preflight import (
    EstimateCallback,
    check_files,
    check_generation,
    check_lengths,
    limit_tokenizer,
    position_limits,
    settle_precision,
)
from .recipe import Recipe, load_recipe
from .resuming import (
    RECIPE_FILE,
    RESULTS_FILE,
    TOKENIZER_FOLDER,
    RunRecord,
    begin_afresh,
    ended_at,
    examples_sha256,
    folder_sha256,
    refuse_changes,
    refuse_earlier_run,
    refuse_other_shapes,
    refuse_other_tokenizer,
    refuse_shorter,
    resume_point,
    skips_newer,
    sweep,
)
from .tasks import ARCHITECTURES, Labels, accuracy, auto_class, build_dataset, data_collator, has_split, read_split
from .trainer import InterruptCallback, TrainingInterruptedError, UrformTrainer

__all__ = [
    "Evaluation",
    "TrainResult",
    "build_model",
    "evaluate",
    "last_complete_checkpoint",
    "predict",
    "train",
    "train_tokenizer",
    "translate",
]

logger = logging.getLogger(__name__)

AVERAGE_FOLDER = "average"


@dataclass
class TrainResult:
    """What a run leaves behind.

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
class Evaluation:
    """Scores and the hypotheses they belong to."""

    scores: TranslationScores
    hypotheses: list[str] = field(repr=False)


# --- building blocks ---------------------------------------------------------------------------------------------
def train_tokenizer(recipe: Recipe, examples: Sequence[tuple[Any, ...]]) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe: loaded, or trained on every text of the training examples."""
    arguments = recipe.tokenizer
    if arguments.from_pretrained:
        return AutoTokenizer.from_pretrained(arguments.from_pretrained)
    from ..tokenization.tokenization_urform import UrformTokenizer

    def texts() -> Iterator[str]:
        sides = 2 if recipe.data.task == "seq2seq" else 1
        for example in examples:
            for value in example[:sides]:
                yield " ".join(value) if isinstance(value, list) else value

    # A target that begins with <s> would only teach the model to copy its own start symbol.
    options = {"add_bos": False} if recipe.data.task == "seq2seq" else {}
    return UrformTokenizer.train(
        texts(),
        vocab_size=arguments.vocab_size,
        model=arguments.model,
        languages=arguments.languages,
        **{**options, **arguments.options},
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: Labels) -> PreTrainedModel:
    """The model of a recipe, with the task's head and the tokenizer's vocabulary and special tokens.

    Raises:
        ValueError: If the config refuses a field, or the tokenizer lacks a token that the task needs.
    """
    arguments, task = recipe.model, recipe.data.task
    head = auto_class(task)
    fields: dict[str, Any] = dict(arguments.config)
    if labels.names:
        fields["id2label"] = dict(enumerate(labels.names))
        fields["label2id"] = {name: index for index, name in enumerate(labels.names)}
    implementation = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if arguments.from_pretrained:
        model = head.from_pretrained(arguments.from_pretrained, **fields, **implementation)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and {arguments.from_pretrained} embeds "
                f"{model.get_input_embeddings().num_embeddings}: set tokenizer.from_pretrained to it"
            )
        return model
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError("training needs a tokenizer with a padding and an end token")
    fields.setdefault("vocab_size", len(tokenizer))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    config = _new_config(recipe, fields)
    if config.is_encoder_decoder and config.decoder_start_token_id is None:
        config.decoder_start_token_id = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.pad_token_id
        )
    return head.from_config(config, **implementation)


def _new_config(recipe: Recipe, fields: dict[str, Any]) -> PreTrainedConfig:
    arguments = recipe.model
    if arguments.preset is not None:
        if arguments.model_type != "urform":
            raise ValueError(f"model.preset is for model_type urform, not {arguments.model_type}")
        from ..configuration.configuration_urform import UrformConfig

        return UrformConfig.from_preset(arguments.preset, **fields)
    if arguments.model_type == "urform":
        fields.setdefault("architecture", ARCHITECTURES.get(recipe.data.task, "encoder"))
    return AutoConfig.for_model(arguments.model_type, **fields)


def _check_config(recipe: Recipe) -> None:
    """Refuse a config that cannot be built before data are read and a tokenizer is trained for it."""
    if not recipe.model.from_pretrained and not recipe.tokenizer.from_pretrained:
        _new_config(recipe, {"vocab_size": recipe.tokenizer.vocab_size, **recipe.model.config})


def _prepare_tokenizer(recipe: Recipe, examples: list[tuple[Any, ...]], goes_on: bool) -> PreTrainedTokenizerBase:
    """Trains once, on the main process, and keeps the tokenizer with the run; everybody loads it from there."""
    output_dir = Path(recipe.training.output_dir or "outputs")
    folder = output_dir / TOKENIZER_FOLDER
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            sweep(output_dir)
            if not goes_on:
                begin_afresh(output_dir, recipe)
        if not folder.is_dir() or (state.is_main_process and not goes_on):
            staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
            train_tokenizer(recipe, examples).save_pretrained(staging)
            if folder.is_dir():
                shutil.rmtree(folder)  # an earlier run's
            staging.rename(folder)
        if goes_on:
            refuse_other_tokenizer(output_dir)
    return AutoTokenizer.from_pretrained(folder)


def _warn_of_single_process(world_size: int) -> None:
    # accelerate 1.15: `launch --cpu --num_processes 2` sets MASTER_ADDR and then starts one process (without mpirun).
    launched = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ
    if launched and "WORLD_SIZE" not in os.environ and world_size == 1:
        logger.warning(
            "accelerate launch was asked for several processes and started one: on CPUs use "
            "`accelerate launch --multi_gpu --num_processes N` with use_cpu=true, or torchrun"
        )


def _check_scorers(recipe: Recipe) -> None:
    """Refuse a run whose scores could not be computed at its end."""
    scored = has_split(recipe.data, "test") or recipe.training.predict_with_generate
    if recipe.data.task == "seq2seq" and scored:
        check_scorers(recipe.data.target_language)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> list[str]:
    return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)


def _compute_metrics(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], dict[str, float]] | None:
    if recipe.data.task in ("text-classification", "token-classification"):
        return accuracy
    if recipe.data.task == "seq2seq" and recipe.training.predict_with_generate:

        def generation_metrics(prediction: Any) -> dict[str, float]:
            scores = score_translations(
                _decoded(tokenizer, prediction.predictions),
                _decoded(tokenizer, prediction.label_ids),
                recipe.data.target_language,
            )
            return {"bleu": scores.bleu, "chrf": scores.chrf, "exact_match": scores.exact_match}

        return generation_metrics
    return None


# --- train -------------------------------------------------------------------------------------------------------
def train(
    recipe: str | Path | Recipe,
    overrides: Iterable[str] = (),
    *,
    resume: bool = False,
    output_dir: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    allow_changes: Sequence[str] = (),
) -> TrainResult:
    """Trains a model by a recipe, saves it, and scores it on the test set if there is one.

    Args:
        recipe: Name or path of a recipe, or one already loaded.
        overrides: `key=value` texts, see `load_recipe`.
        resume: Go on from the newest complete checkpoint in the output directory; leave a run that has ended alone.
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
    data, training = loaded.data, loaded.training
    _warn_of_single_process(training.world_size)
    check_files(data)
    _check_config(loaded)
    _check_scorers(loaded)
    folder = Path(training.output_dir or "outputs")
    checkpoint, goes_on = _starting_point(folder, resume)
    set_seed(training.seed)

    examples = list(read_split(data, "train"))[: data.max_train_examples]
    tokenizer = _prepare_tokenizer(loaded, examples, goes_on)
    record = RunRecord(examples_sha256(examples), folder_sha256(folder / TOKENIZER_FOLDER), training.world_size)
    if goes_on:
        changes = refuse_changes(folder, loaded, record, allow_changes)
        if (ended := _left_as_it_is(folder, checkpoint, changes)) is not None:
            return ended
    labels = Labels()
    train_set = build_dataset(data, "train", tokenizer, labels, examples)
    labels.frozen = True
    if data.task in ("text-classification", "token-classification"):
        labels.names = labels.names or ["0"]
    eval_set: EncodedDataset | None = None
    if training.eval_strategy != "no":
        if not has_split(data, "validation"):
            raise ValueError("training.eval_strategy needs validation data: set data.validation_source and _target")
        eval_set = build_dataset(data, "validation", tokenizer, labels, list(read_split(data, "validation")))
    test = list(read_split(data, "test")) if has_split(data, "test") and data.task == "seq2seq" else []

    training = settle_precision(loaded, checkpoint)
    # Data are read before the seed is used, so reading changes nothing about the initial weights.
    set_seed(training.seed)
    model = build_model(loaded, tokenizer, labels)
    limits = position_limits(model)
    limit_tokenizer(tokenizer, limits, loaded.tokenizer.options.get("model_max_length"))
    check_lengths(data, "train", train_set, limits)
    check_generation(loaded, test, tokenizer, limits)
    if eval_set is not None:
        check_lengths(data, "validation", eval_set, limits)
        # Like lengths together: evaluation goes in this order.
        eval_set.features.sort(key=lambda feature: len(feature["input_ids"]))
    interrupt = InterruptCallback()
    trainer = UrformTrainer(
        model=model,
        args=training,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        data_collator=data_collator(data.task, tokenizer, model),
        compute_metrics=_compute_metrics(loaded, tokenizer),
        callbacks=[*callbacks, EstimateCallback(), interrupt],
        tokens_per_batch=data.tokens_per_batch,
        pool_batches=data.pool_batches,
    )
    if checkpoint is not None:
        refuse_other_shapes(model, checkpoint)
        refuse_shorter(folder, checkpoint, trainer.planned_steps())
    if training.should_save:
        loaded.save(folder / RECIPE_FILE)
        record.save(folder)
    with interrupt.installed():
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.signal_number:
        step = trainer.state.global_step
        raise TrainingInterruptedError(
            interrupt.signal_number, step, folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        )  # fmt: skip

    metrics: dict[str, Any] = dict(output.metrics)
    metrics["num_parameters"] = model.num_parameters()
    metrics["examples"] = train_set.over_length.examples
    metrics["examples_too_long"] = train_set.over_length.too_long
    if sampler := _sampler(trainer):
        metrics["padding_share"] = round(padding_share(sampler), 4)
    if training.should_save:
        _finish(loaded, trainer, folder, metrics, test)
        record.ended_at = trainer.state.global_step
        record.save(folder)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(folder, trainer.state.global_step, metrics, trainer.state.log_history)


def _finish(
    recipe: Recipe, trainer: UrformTrainer, folder: Path, metrics: dict[str, Any], test: list[tuple[str, str]]
) -> None:
    """What comes after the last step: the model, its scores in `metrics`, the results, the Hub."""
    _save_final(recipe, trainer, folder)
    trainer.save_state()  # the losses, for the model card
    if test:
        metrics["test"] = _test(recipe, folder, test, trainer.args.device)
    write_text_atomically(folder / RESULTS_FILE, json.dumps(metrics, indent=1, ensure_ascii=False))
    if trainer.args.push_to_hub:
        trainer.push_saved("End of training")


def _starting_point(folder: Path, resume: bool) -> tuple[Path | None, bool]:
    """The checkpoint to go on from, and whether what the folder holds belongs to this run."""
    if not resume:
        refuse_earlier_run(folder)
        return None, False
    checkpoint = resume_point(folder)
    return checkpoint, checkpoint is not None or ended_at(folder) is not None


def _left_as_it_is(folder: Path, checkpoint: Path | None, changes: Mapping[str, str]) -> TrainResult | None:
    """The result of a run that has ended, unless it is to go on to more steps; says so, and what else changes."""
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


def _sampler(trainer: UrformTrainer) -> Any:
    from .batching import GlobalBatchSampler

    sampler: Any = getattr(trainer.callback_handler.train_dataloader, "batch_sampler", None)
    while sampler is not None and not isinstance(sampler, GlobalBatchSampler):
        sampler = getattr(sampler, "batch_sampler", None)
    return sampler


def _to_average(folder: Path, count: int) -> list[Path]:
    """The last checkpoints; fewer than `count`, with a warning, where there are fewer."""
    found = last_checkpoints(folder, count)
    if len(found) < count:
        logger.warning(
            "run.average_last=%d, and %s has %d complete checkpoints: the finished model is %s. For more checkpoints "
            "lower training.save_steps or raise training.save_total_limit",
            count, folder, len(found), f"the average of {len(found)}" if found else "that of the last step",
        )  # fmt: skip
    return found


def _save_final(recipe: Recipe, trainer: UrformTrainer, folder: Path) -> None:
    """Puts the finished model (averaged if the recipe says so) into the output directory, file by file."""
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


# --- predict and evaluate ----------------------------------------------------------------------------------------
class LineError(ValueError):
    """A text that cannot be translated: its index, and why."""

    def __init__(self, index: int, why: str, where: str = "") -> None:
        super().__init__(f"{where}line {index + 1} {why}")
        self.index, self.why = index, why


def _one_line(text: str) -> str:
    return " ".join(part for part in re.split(r"[\r\n]+", text.strip()) if part)


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    num_beams: int = 5,
    length_penalty: float = 1.0,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Generates one line per text, in the order of the texts; an empty text gives an empty line.

    Args:
        model: Any encoder-decoder.
        tokenizer: Its tokenizer.
        texts: Sources; a language tag goes in front.
        num_beams: 1 is greedy.
        length_penalty: As in transformers: the exponent of the length that divides a beam's score.
        batch_size: Sources per batch; like lengths are put together.
        max_new_tokens: Limit of a translation; None allows twice the source's tokens plus 20.
        progress: Called with the number of texts finished, batch by batch.

    Raises:
        LineError: A text is too long for the model or is not valid Unicode. Nothing is translated then.
    """
    results = [""] * len(texts)
    limits = position_limits(model)
    limit, target_limit = limits.source, limits.target
    for index, text in enumerate(texts):
        if wrong := unencodable(text):
            raise LineError(index, f"is not valid Unicode: {wrong}")
    encoded = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -len(encoded[i]))
    if limit is not None:
        for index in sorted(order):
            if len(encoded[index]) > limit:
                has = f"has {len(encoded[index])} tokens"
                raise LineError(index, f"{has} and the model takes at most {limit}: split the line")
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [encoded[i] for i in chosen]}, padding_side="right", return_tensors="pt"
        ).to(model.device)  # fmt: skip
        room = max_new_tokens or 2 * batch["input_ids"].shape[1] + 20
        with torch.inference_mode():
            generated = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_beams=num_beams,
                do_sample=False,
                length_penalty=length_penalty,
                early_stopping=num_beams > 1,
                max_new_tokens=min(room, target_limit - 1) if target_limit else room,
            )
        for i, text in zip(chosen, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
            results[i] = _one_line(text)
        if progress:
            progress(len(chosen))
    return results


def _load(model_dir: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not Path(model_dir).is_dir():
        raise FileNotFoundError(f"no such model folder: {model_dir}")
    if not Path(model_dir, "config.json").is_file():
        raise ValueError(f"{model_dir} holds no finished model (no config.json); name a checkpoint in it, or --resume")
    model = AutoModelForSeq2SeqLM.from_pretrained(model_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), AutoTokenizer.from_pretrained(model_dir)


def predict(
    model_dir: str | Path,
    lines: Iterable[str],
    *,
    prefix: str = "",
    num_beams: int = 5,
    length_penalty: float = 1.0,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    window: int = 1024,
    progress: Callable[[int], None] | None = None,
    name: str | Path | None = None,
) -> Iterator[str]:
    """Translates a stream: one line out per line in, in order, `window` lines in memory at a time.

    An error, in a line or in reading the lines, is raised after the translations of all lines before it have come out.

    Args:
        model_dir: A folder that `train` wrote, or any encoder-decoder with its tokenizer.
        lines: Sources without line ends.
        prefix: Put before every line, e.g. `"<2de> "`.
        num_beams: 1 is greedy.
        length_penalty: See `translate`.
        batch_size: See `translate`.
        max_new_tokens: See `translate`.
        window: Lines read before the first is translated; sorted by length inside.
        progress: Called with the number of lines finished.
        name: What errors call the stream, e.g. its file.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no finished model, or if a line is too long for it (named by its number in the stream).
    """
    model, tokenizer = _load(model_dir)

    def translated(block: list[str]) -> list[str]:
        return translate(
            model, tokenizer, [prefix + line if line.strip() else "" for line in block], num_beams=num_beams,
            length_penalty=length_penalty, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress,
        )  # fmt: skip

    done = 0
    for block in _blocks(lines, window):
        try:
            yield from translated(block)
        except LineError as error:
            yield from translated(block[: error.index])
            raise LineError(done + error.index, error.why, f"{name}, " if name else "") from None
        done += len(block)


def _blocks(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Blocks of lines. Where reading fails, what came before is a block of its own, and then the error is raised."""
    block: list[str] = []
    remaining = iter(lines)
    while True:
        try:
            block.append(next(remaining))
        except StopIteration:
            break
        except (ValueError, OSError):
            yield block
            raise
        if len(block) == size:
            yield block
            block = []
    yield block


def evaluate(
    model_dir: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    language: str = "en",
    prefix: str = "",
    num_beams: int = 5,
    length_penalty: float = 1.0,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Translates the sources and scores the result against the references.

    Args:
        model_dir: See `predict`.
        pairs: (source, reference) pairs.
        language: Target language, chooses the metrics' tokenizers.
        prefix: Put before every source.
        num_beams: See `translate`.
        length_penalty: See `translate`.
        batch_size: See `translate`.
        max_new_tokens: See `translate`.
        progress: Called with the number of sources finished.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no finished model, or if there is nothing to score.
    """
    check_scorers(language)
    hypotheses = list(
        predict(
            model_dir, [source for source, _ in pairs], prefix=prefix, num_beams=num_beams,
            length_penalty=length_penalty, batch_size=batch_size, max_new_tokens=max_new_tokens,
            window=max(1, len(pairs)), progress=progress,
        )
    )  # fmt: skip
    return Evaluation(score_translations(hypotheses, [target for _, target in pairs], language), hypotheses)
