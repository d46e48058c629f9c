"""What a run's folder holds, and whether a run may go on in it.

- `recipe.yaml`: the recipe, without secrets; `run_record.json`: hashes of the training examples and of the tokenizer,
  the number of processes, and, once the run has ended, its steps.
- Without `--resume` nothing that an earlier run left is trusted: `refuse_earlier_run` refuses checkpoints and finished
  models, and `begin_afresh` deletes what a run that never saved left.
- With `--resume`, `refuse_changes` compares the recipe with the saved one. What only says how long, how often and where
  (`FREE`) may change. What a checkpoint's state decides (`FIXED`) may not. The rest may where the user names it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..publishing.weight_files import WeightFiles
from .checkpointing import (
    MANIFEST_NAME,
    file_sha256,
    is_unfinished,
    last_complete_checkpoint,
    numbered_checkpoints,
    write_text_atomically,
)
from .recipe import Recipe, load_recipe

__all__ = [
    "RECIPE_FILE",
    "RECORD_FILE",
    "RESULTS_FILE",
    "TOKENIZER_FOLDER",
    "RunRecord",
    "begin_afresh",
    "ended_at",
    "examples_sha256",
    "folder_sha256",
    "refuse_changes",
    "refuse_earlier_run",
    "refuse_other_shapes",
    "refuse_other_tokenizer",
    "refuse_shorter",
    "resume_point",
    "skips_newer",
    "sweep",
]

logger = logging.getLogger(__name__)

TOKENIZER_FOLDER = "tokenizer"
RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"
RECORD_FILE = "run_record.json"
_LEFTOVER = re.compile(
    r"\.{1,2}(average|tokenizer)\.[\w.-]+|\.deleted\.checkpoint-\d+\.[0-9a-f]{8}"
    r"|\.(recipe\.yaml|results\.json|run_record\.json)\.[0-9a-f]{8}"
)

# The training examples are compared by their content, so their files may move.
_DATA_PLACE = (
    "data_dir",
    "train_source",
    "train_target",
    "train_file",
    "dataset_name",
    "dataset_config",
    "train_split",
    "source_field",
    "target_field",
)
# Patterns of `section.field`.
FREE = re.compile(
    r"run\.(?!precision).*|data\.(origin|max_line_bytes)|data\.(validation|test)_.*|data\.(source|target)_language|model\.attn_implementation"
    r"|training\.(output_dir|max_steps|num_train_epochs|do_\w+|use_cpu|local_rank|ddp_\w+|run_name|project|report_to"
    r"|disable_tqdm|log_\w+|logging_\w+|save_\w+|eval_\w+|per_device_eval_batch_size|fp16_full_eval|bf16_full_eval"
    r"|predict_with_generate|generation_\w+|load_best_model_at_end|metric_for_best_model|greater_is_better"
    r"|batch_eval_metrics|include_\w+|prediction_loss_only|push_to_hub|hub_\w+|trackio_\w+|dataloader_num_workers"
    r"|dataloader_pin_memory|dataloader_persistent_workers|dataloader_prefetch_factor|skip_memory_metrics|debug"
    r"|torch_compile\w*|torch_empty_cache_steps|gradient_checkpointing\w*|activation_checkpointing\w*"
    r"|enable_jit_checkpoint|restore_callback_states_from_checkpoint|label_names|use_cache|logging_nan_inf_filter)"
)
FIXED = re.compile(
    r"tokenizer\..*|data\.task|model\.(from_pretrained|model_type|preset)"
    r"|training\.(optim|optim_\w+|learning_rate|weight_decay|adam_\w+|fsdp\w*|deepspeed|parallelism_config)"
)


@dataclass
class RunRecord:
    """What a run's folder says about its run in addition to the recipe.

    Attributes:
        examples_sha256: Of the training examples.
        tokenizer_sha256: Of the tokenizer's files.
        processes: Number of processes that the run began with.
        ended_at: Steps of a run that has ended with a model and results, else None.
    """

    examples_sha256: str
    tokenizer_sha256: str
    processes: int
    ended_at: int | None = None

    def save(self, folder: Path) -> None:
        """Write the record into the folder of its run."""
        write_text_atomically(folder / RECORD_FILE, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> RunRecord | None:
        """Return the record in a folder, None if there is none.

        Raises:
            ValueError: If it cannot be read.
        """
        path = folder / RECORD_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it to resume without a comparison of the data"
            ) from error


def examples_sha256(examples: Iterable[tuple[Any, ...]]) -> str:
    """Return the sha256 of examples, independent of the files that they come from."""
    digest = hashlib.sha256()
    for example in examples:
        line = json.dumps(list(example), ensure_ascii=False, default=str) + "\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """Return the sha256 of the names and contents of the files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


# --- the folder --------------------------------------------------------------------------------------------------
def sweep(folder: Path) -> None:
    """Delete what processes that were killed left half-written in the folder of a run."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def refuse_earlier_run(folder: Path) -> None:
    """Refuse to begin a run in a folder that holds another's checkpoints or model.

    Raises:
        ValueError: If it does.
    """
    if numbered_checkpoints(folder):
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run: go on with --resume, or choose another --output-dir"
        )
    weights = any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if (folder / RESULTS_FILE).is_file() or ((folder / RECIPE_FILE).is_file() and weights):
        raise ValueError(
            f"{folder} holds the model of an earlier run, which would be overwritten: choose another --output-dir, or "
            f"delete {folder}"
        )


def begin_afresh(folder: Path, recipe: Recipe) -> None:
    """Make a folder that of a new run: its recipe comes first, so whatever follows is known to be a run's.

    Raises:
        ValueError: If there is a tokenizer that no run wrote; it would be replaced.
    """
    if (folder / TOKENIZER_FOLDER).exists():
        if not (folder / RECIPE_FILE).is_file():
            raise ValueError(
                f"{folder / TOKENIZER_FOLDER} is where the run keeps its tokenizer, and no run wrote it: choose "
                "another --output-dir, or move it and name it by tokenizer.from_pretrained"
            )
        logger.warning("%s: replacing the tokenizer that an unfinished run left", folder)
    (folder / RECORD_FILE).unlink(missing_ok=True)
    recipe.save(folder / RECIPE_FILE)


def ended_at(folder: Path) -> int | None:
    """Return the steps of a run that has ended with a model and results, else None."""
    record = RunRecord.load(folder)
    return record.ended_at if record is not None and (folder / RESULTS_FILE).is_file() else None


def skips_newer(folder: Path, checkpoint: Path | None) -> bool:
    """Return whether a run has checkpoints newer than the newest complete one."""
    found = numbered_checkpoints(folder)
    return bool(found) and found[-1][1] != checkpoint


def resume_point(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; None, with a warning, if the run never saved one.

    Raises:
        ValueError: If there are checkpoints, all of them damaged or another Trainer's: beginning again would lose them.
    """
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is not None:
        return checkpoint
    lost = [path for _, path in numbered_checkpoints(folder) if not is_unfinished(path)]
    if lost:
        reason = "damaged, or were written by another Trainer"
        raise ValueError(
            f"{folder} has no complete checkpoint to resume from: {', '.join(path.name for path in lost)} are {reason} "
            f"(see {MANIFEST_NAME}). Restore them, or move them away to start from the beginning"
        )
    if ended_at(folder) is None:
        warnings.warn(f"nothing to resume in {folder}: starting from the beginning", stacklevel=2)
    return None


# --- the recipe --------------------------------------------------------------------------------------------------
def _flat(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as parsed, defaults included: `section.field`, and `model.config.field`, to value."""
    values: dict[str, Any] = {}
    for section in ("data", "tokenizer", "model", "run", "training"):
        parsed = getattr(recipe, section)
        for item in dataclasses.fields(parsed):
            if not item.init or item.name.endswith("_token"):
                continue  # a token is kept in no recipe, and shown in no message
            value = getattr(parsed, item.name)
            value = value.value if isinstance(value, Enum) else value
            key = f"{section}.{item.name}"
            if isinstance(value, Mapping) and key in ("model.config", "tokenizer.options"):
                values.update({f"{key}.{name}": part for name, part in value.items()})
            else:
                values[key] = value
    return values


def _changes(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    old, new = _flat(before), _flat(now)
    missing = "(not set)"
    pairs = {key: (old.get(key, missing), new.get(key, missing)) for key in {**old, **new}}
    return {key: pair for key, pair in pairs.items() if str(pair[0]) != str(pair[1])}


def refuse_changes(folder: Path, now: Recipe, record: RunRecord, allowed: Sequence[str] = ()) -> dict[str, str]:
    """Compare a run that is to be resumed with the one that its folder describes.

    Args:
        folder: The run's folder.
        now: The recipe to resume with.
        record: Of the data and the processes as they are now.
        allowed: `section.field`, `section` or `model.config` names of changes that the user allows.

    Returns:
        What changes and may: a line for each `section.field`.

    Raises:
        ValueError: If something differs that may not, field by field with both values and the remedy.
    """
    changes = _all_changes(folder, now, record)
    free = [key for key in changes if FREE.fullmatch(key)]
    fixed = [key for key in changes if FIXED.fullmatch(key)]
    others = [key for key in changes if key not in free and key not in fixed]
    refused = [key for key in others if not _is_allowed(key, allowed)]
    if fixed or refused:
        raise ValueError(_refusal(folder, changes, fixed, refused))
    return {key: f"{key}: {changes[key][0]} -> {changes[key][1]}" for key in [*free, *others]}


def _all_changes(folder: Path, now: Recipe, record: RunRecord) -> dict[str, tuple[Any, Any]]:
    """Return what differs from the run that a folder describes: `section.field` to the value then and now."""
    path, earlier = folder / RECIPE_FILE, RunRecord.load(folder)
    changes: dict[str, tuple[Any, Any]] = {}
    if path.is_file():
        changes = _changes(load_recipe(path), now)
    else:
        warnings.warn(f"{path} is missing: nobody can say whether the recipe has changed", stacklevel=3)
    if earlier is not None:
        for name in _DATA_PLACE:
            changes.pop(f"data.{name}", None)
        if earlier.examples_sha256 != record.examples_sha256:
            hashes = [f"sha256 {known.examples_sha256[:12]}…" for known in (earlier, record)]
            changes["data.train"] = (hashes[0], hashes[1])
        _compare_batches(changes, now, earlier.processes, record.processes)
    return changes


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def refuse_other_tokenizer(folder: Path) -> None:
    """Refuse to resume a run with another tokenizer than it began with.

    Raises:
        ValueError: If its files have changed.
    """
    earlier = RunRecord.load(folder)
    if earlier is not None and earlier.tokenizer_sha256 != folder_sha256(folder / TOKENIZER_FOLDER):
        raise ValueError(
            f"{folder / TOKENIZER_FOLDER} is not the tokenizer that the run began with (another sha256): delete it to "
            "have it made again from the training data, or start a new run in another --output-dir"
        )


def refuse_shorter(folder: Path, checkpoint: Path, planned: int) -> None:
    """Refuse to resume a run that has more steps than are wanted.

    Raises:
        ValueError: If it has.
    """
    done = int(checkpoint.name.rpartition("-")[2])
    if planned < done:
        raise ValueError(
            f"{folder} has done {done} steps and the recipe asks for {planned}: raise max_steps or num_train_epochs; "
            "an earlier checkpoint is a model of its own"
        )


def _compare_batches(changes: dict[str, tuple[Any, Any]], now: Recipe, before: int, processes: int) -> None:
    """Compare how many examples a batch has over all processes, which a token budget decides alone."""
    key = "training.per_device_train_batch_size"
    size = now.training.per_device_train_batch_size
    old = changes.pop(key, (size, size))[0]
    if now.data.tokens_per_batch is None and old * before != size * processes:
        changes[f"{key} x processes"] = (f"{old} x {before}", f"{size} x {processes}")


def _refusal(folder: Path, changes: Mapping[str, tuple[Any, Any]], fixed: list[str], asked: list[str]) -> str:
    lines = [f"{folder} cannot be resumed with another recipe:"]
    lines += [f"  {key}: {changes[key][0]} -> {changes[key][1]}" for key in [*fixed, *asked]]
    if fixed:
        lines.append(
            f"A checkpoint decides {', '.join(fixed)}: set the old value, or start a new run in another --output-dir "
            "(model.from_pretrained=CHECKPOINT takes its weights)."
        )
    if asked:
        flags = " ".join(f"--allow-change {key.partition(' ')[0]}" for key in asked)
        lines.append(f"To continue all the same (it is then no longer the same run): {flags}")
    lines.append(
        "max_steps, num_train_epochs, the run section, and what says how to log, save, evaluate and publish may change."
    )
    return "\n".join(lines)


def refuse_other_shapes(model: Any, checkpoint: Path) -> None:
    """Refuse a model whose weights or labels are not those of the checkpoint.

    Raises:
        ValueError: If a tensor has another shape, or a class another name.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, saved in WeightFiles(sorted(checkpoint.glob("model*.safetensors"))).entries.items():
        if shapes.get(name, saved.shape) != saved.shape:
            raise ValueError(
                f"{checkpoint} cannot be resumed: {name} has shape {saved.shape} there and {shapes[name]} in the "
                "model of this recipe; set the old sizes, or start a new run in another --output-dir"
            )
    path = checkpoint / "config.json"
    saved_labels = json.loads(path.read_text(encoding="utf-8")).get("id2label") if path.is_file() else None
    labels = {str(number): name for number, name in (getattr(model.config, "id2label", None) or {}).items()}
    if saved_labels is not None and saved_labels != labels:
        raise ValueError(f"{checkpoint} cannot be resumed: its classes are {saved_labels}, and the data's {labels}")
