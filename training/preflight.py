"""What a run settles before its first step: files, lengths against the model's positions, precision, duration.

Whatever can be known at the start is said at the start, and not after hours of work.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..configuration.checkpoint_files import read_json
from ..publishing.training_record import ARGUMENTS_NAME
from .encoding import EncodedDataset
from .metrics import check_scorers
from .recipe import DataArguments, Recipe
from .tasks import Split, has_split, place_of, split_files

__all__ = [
    "EstimateCallback",
    "PositionLimits",
    "check_files",
    "check_generation",
    "check_lengths",
    "check_metrics",
    "limit_tokenizer",
    "position_limits",
    "product_time_ratio",
    "refuse_single_class",
    "settle_precision",
    "warn_of_single_process",
]

logger = logging.getLogger(__name__)


def check_files(data: DataArguments) -> None:
    """Raise FileNotFoundError if a file that the recipe names for any split is missing; says where they come from."""
    splits: tuple[Split, ...] = ("train", "validation", "test")
    files = [file for split in splits for file in split_files(data, split)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f", nor {len(missing) - 1} more of the recipe's {len(files)} files" if len(missing) > 1 else ""
        hint = f". {data.origin.strip()}" if data.origin else ""
        raise FileNotFoundError(f"no such file: {missing[0]}{more}{hint}")


def check_metrics(recipe: Recipe) -> None:
    """Refuse a run whose scores could not be computed at its end.

    Raises:
        ValueError: If what scores text in the target language is not installed, or if the language is unknown.
    """
    scored = has_split(recipe.data, "test") or recipe.training.predict_with_generate
    if recipe.data.task == "seq2seq" and scored:
        check_scorers(recipe.data.target_language)


def refuse_single_class(data: DataArguments, names: Collection[str]) -> None:
    """Refuse to train a classifier on examples of one class: its loss would be 0 whatever the model says.

    Raises:
        ValueError: If the task is a classification and there are fewer than two names.
    """
    if data.task in ("text-classification", "token-classification") and len(names) < 2:
        found = f"every label of the training data is {min(names)!r}" if names else "the training data have no label"
        raise ValueError(
            f"{found}, and task {data.task} needs at least two classes: add examples of another class, or check "
            f"data.target_field={data.target_field!r}"
        )


def warn_of_single_process(world_size: int) -> None:
    """Warn where accelerate was asked for several processes and started one."""
    # accelerate 1.15: `launch --cpu --num_processes 2` sets MASTER_ADDR and then starts one process (without mpirun).
    launched = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ
    if launched and "WORLD_SIZE" not in os.environ and world_size == 1:
        logger.warning(
            "accelerate launch was asked for several processes and started one: on CPUs use "
            "`accelerate launch --multi_gpu --num_processes N` with use_cpu=true, or torchrun"
        )


# --- lengths -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PositionLimits:
    """How many positions a model has.

    Attributes:
        source_table: Rows of the position table that reads `input_ids`; None without a table, where every length runs.
        target_table: The same for an encoder-decoder's decoder.
        declared: `config.max_position_embeddings`, a limit in name only where there is no table.
    """

    source_table: int | None
    target_table: int | None
    declared: int | None

    @property
    def source(self) -> int | None:
        """How long an input the model is for."""
        return self.source_table or self.declared

    @property
    def target(self) -> int | None:
        """The same for an encoder-decoder's output."""
        return self.target_table or self.declared


_TABLE_NAME = re.compile(r"(embed_positions|position_embeddings?|positions_embed|wpe|pos_emb)$")


def position_limits(model: PreTrainedModel) -> PositionLimits:
    """Read the limits off the model's position tables, of any family of transformers."""
    config = model.config
    rows: dict[str, list[int]] = {"source": [], "target": []}
    for name, module in model.named_modules():
        parts = name.split(".")
        if not isinstance(module, nn.Embedding) or not _TABLE_NAME.fullmatch(parts[-1]):
            continue
        if hasattr(module, "make_weight") or any("vision" in part for part in parts):
            continue  # a table that grows; a table of image patches
        # Rows that no position uses: before the first (BART, OPT), up to that of padding (RoBERTa).
        unused = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
        count = module.num_embeddings - getattr(config, "position_offset", unused)
        one_side = config.is_encoder_decoder and ("encoder" in parts or "decoder" in parts)
        for side in rows:
            if not one_side or ("decoder" in parts) == (side == "target"):
                rows[side].append(count)
    return PositionLimits(
        min(rows["source"], default=None),
        min(rows["target"], default=None),
        getattr(config, "max_position_embeddings", None),
    )


def limit_tokenizer(tokenizer: PreTrainedTokenizerBase, limits: PositionLimits, asked: int | None = None) -> None:
    """Let `truncation=True` cut where the model's positions end.

    Args:
        tokenizer: Its `model_max_length` is lowered if need be, never raised.
        limits: Of the model.
        asked: What the recipe gives as the tokenizer's `model_max_length`.

    Raises:
        ValueError: If more is asked for than the model has.
    """
    if asked is not None:
        if limits.source_table is not None and asked > limits.source_table:
            raise ValueError(
                f"tokenizer.options.model_max_length={asked}, but the model has {limits.source_table} positions: lower "
                "it, or raise model.config.max_position_embeddings"
            )
    elif limits.source is not None and tokenizer.model_max_length > limits.source:
        tokenizer.model_max_length = limits.source


def check_lengths(data: DataArguments, split: Split, dataset: EncodedDataset, limits: PositionLimits) -> None:
    """Compare every encoded example of a split with the model's positions.

    Examples beyond a limit in name only are counted in the log.

    Raises:
        ValueError: If one is longer than a position table; names the file and the line.
    """
    tables = (("source", limits.source_table), ("target", limits.target_table))
    for (side, limit), lengths in zip(tables, zip(*dataset.lengths, strict=True), strict=False):
        if limit is None or max(lengths) <= limit:
            continue
        over = [index for index, length in enumerate(lengths) if length > limit]
        first = over[0]
        more = f" (so are {len(over) - 1} more)" if len(over) > 1 else ""
        what = {"drop": "drops", "truncate": "cuts", "error": "names"}[dataset.over_length.policy]
        raise ValueError(
            f"{place_of(data, split, dataset.over_length.kept[first])} is too long for the model{more}: its {side} has "
            f"{lengths[first]} tokens and the model {limit} positions. Set data.max_{side}_length={limit}, which "
            f"{what} longer examples, or raise model.config.max_position_embeddings to {max(lengths)}"
        )
    if limits.source_table is None and limits.declared is not None and split == "train":
        over_declared = sum(max(pair) > limits.declared for pair in dataset.lengths)
        if over_declared:
            logger.warning(
                "%d of %d training examples are longer than max_position_embeddings=%d, where the tokenizer's "
                "truncation and `urform predict` end: raise model.config.max_position_embeddings",
                over_declared,
                len(dataset),
                limits.declared,
            )


def check_generation(
    recipe: Recipe, pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, limits: PositionLimits
) -> None:
    """Refuse what could not be generated during or after training.

    Raises:
        ValueError: If a source of the test set, or the length that evaluation may generate, is beyond the model's
            positions.
    """
    data, longest = recipe.data, recipe.training.generation_max_length
    if longest is not None and limits.target_table is not None and longest > limits.target_table:
        raise ValueError(
            f"training.generation_max_length={longest}, but the decoder has {limits.target_table} positions: lower it, "
            "or raise model.config.max_position_embeddings"
        )
    if limits.source is None or not pairs:
        return
    encoded = tokenizer([data.source_prefix + source for source, _ in pairs], verbose=False)["input_ids"]
    for number, ids in enumerate(encoded, start=1):
        if len(ids) > limits.source:
            raise ValueError(
                f"{place_of(data, 'test', number)} is too long for the model: its source has {len(ids)} tokens and the "
                f"model takes at most {limits.source}. Split it, or raise model.config.max_position_embeddings"
            )


# --- precision ---------------------------------------------------------------------------------------------------
def product_time_ratio(device: torch.device, dtype: torch.dtype = torch.bfloat16, seconds: float = 1.0) -> float:
    """Return how many times as long a matrix product takes in `dtype` as in float32 on this device.

    Args:
        device: Where to measure.
        dtype: bfloat16 or float16.
        seconds: How long to measure; the shortest time of each dtype counts, so other work on the machine does not.
    """
    rows, width = (512, 512) if device.type == "cpu" else (4096, 4096)
    operands = {
        kind: (torch.ones(rows, width, dtype=kind, device=device), torch.ones(width, width, dtype=kind, device=device))
        for kind in (torch.float32, dtype)
    }
    best = dict.fromkeys(operands, float("inf"))
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for kind, (left, right) in operands.items():
            start = time.perf_counter()
            torch.mm(left, right)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if rounds:  # the first of each prepares the kernels
                best[kind] = min(best[kind], time.perf_counter() - start)
        rounds += 1
    return best[dtype] / best[torch.float32]


# Casting the operands costs time too: bfloat16 must be clearly faster.
_WORTH_IT = 0.75


def settle_precision(recipe: Recipe, checkpoint: Path | None = None) -> Seq2SeqTrainingArguments:
    """Choose bfloat16 or float32 for `run.precision: auto`; warn where the recipe insists on what is slow here.

    A resumed run keeps the precision of its checkpoint. All processes follow the measurement of the first.

    Args:
        recipe: Stays as it is.
        checkpoint: Where the run goes on from.

    Returns:
        The arguments to train with.
    """
    arguments, given = copy.copy(recipe.training), recipe.raw.get("training") or {}
    named = any(given.get(name) is not None for name in ("bf16", "fp16"))
    if named or recipe.run.precision is None or "ACCELERATE_MIXED_PRECISION" in os.environ:
        _warn_of_slow_precision(arguments)
        return arguments
    record = read_json(checkpoint / ARGUMENTS_NAME) if checkpoint and (checkpoint / ARGUMENTS_NAME).is_file() else {}
    if "bf16" in record:
        chosen, why = bool(record["bf16"]), "as in the checkpoint"
    else:
        ratio = _agreed_ratio(arguments, torch.bfloat16)
        chosen = ratio < _WORTH_IT
        why = f"a bfloat16 product takes {ratio:.2g} times as long as a float32 one on this device"
    arguments.bf16 = chosen
    arguments.mixed_precision = "bf16" if chosen else "no"
    logger.info("precision: %s (%s)", "bfloat16" if chosen else "float32", why)
    return arguments


def _agreed_ratio(arguments: Seq2SeqTrainingArguments, dtype: torch.dtype) -> float:
    measured: list[float | None] = [
        product_time_ratio(arguments.device, dtype) if arguments.process_index == 0 else None
    ]
    if arguments.world_size > 1:
        torch.distributed.broadcast_object_list(measured, src=0)
    (ratio,) = measured
    return float(ratio or 0)


def _warn_of_slow_precision(arguments: Seq2SeqTrainingArguments) -> None:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if arguments.mixed_precision == name and (ratio := _agreed_ratio(arguments, dtype)) > 1:
            logger.warning(
                "%s: on this device a product in it takes %.2g times as long as in float32. Set training.%s=false, or "
                "leave it out and set run.precision=auto",
                name,
                ratio,
                name,
            )


# --- duration ----------------------------------------------------------------------------------------------------
class EstimateCallback(TrainerCallback):
    """Says after the first seconds of training how long the rest will take, once."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None
        self._said = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure from the end of the first step, which costs more than the others."""
        now = time.monotonic()
        if self._start is None:
            self._start = (state.global_step, now)
        elif not self._said and now - self._start[1] >= self.SECONDS and state.is_world_process_zero:
            self._said = True
            steps = state.global_step - self._start[0]
            rate, left = (now - self._start[1]) / steps, state.max_steps - state.global_step
            logger.info(
                "%s more steps will take about %s (%.2g s each, measured on %d); evaluating and saving not counted",
                f"{left:,}",
                _duration(rate * left),
                rate,
                steps,
            )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
