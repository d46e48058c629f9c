"""The average of the last checkpoints of a run (Vaswani et al. 2017, section 6.1), one tensor in memory at a time.

Averaging the weights of checkpoints that a decaying learning rate left close to each other is nearly as good as an
ensemble of them and costs nothing at inference; see also Izmailov et al. 2018 (arXiv:1803.05407).
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..publishing.bundle_stamp import STAMP_NAME, read_stamp, write_stamp
from ..publishing.weight_files import WeightFiles, weight_files
from .checkpointing import MANIFEST_NAME, newest_complete
from .loss_sums import LOSS_STATE_NAME

__all__ = ["average_checkpoints", "last_checkpoints"]

# Files of a checkpoint that belong to the model; optimizer, scheduler and random states do not outlive an average.
_MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
_NOT_MODEL = {"trainer_state.json", MANIFEST_NAME, LOSS_STATE_NAME, STAMP_NAME}


def last_checkpoints(output_dir: str | Path, count: int) -> list[Path]:
    """Return the newest complete checkpoints of a run, oldest first: `count` of them, or all where there are fewer."""
    return list(itertools.islice(newest_complete(output_dir), count))[::-1]


def _weights(checkpoint: Path) -> WeightFiles:
    files = weight_files(checkpoint)
    if files == [checkpoint / SAFE_WEIGHTS_NAME] and not files[0].is_file():
        raise FileNotFoundError(f"{checkpoint} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    return WeightFiles(files)


def _mean(name: str, checkpoints: Sequence[WeightFiles]) -> Tensor:
    files = [weights.entries[name].file for weights in checkpoints]
    total: Tensor | None = None
    first: Tensor | None = None
    for path, weights in zip(files, checkpoints, strict=True):
        tensor = weights[name]
        if first is None:
            first = tensor
            total = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            continue
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} in {path} and {tuple(first.shape)} {first.dtype} "
                f"in {files[0]}: these are not checkpoints of one run"
            )
        if not first.is_floating_point():
            if not torch.equal(first, tensor):
                raise ValueError(f"{name} holds {first.dtype} values that differ between {files[0]} and {path}")
        else:
            total = total + tensor.to(total.dtype) if total is not None else None
    if first is None or total is None:
        raise ValueError(f"no checkpoint holds {name}")
    return (total / len(files)).to(first.dtype) if first.is_floating_point() else first


def _sweep(output: Path) -> None:
    """Delete what killed processes left while they averaged into `output`."""
    for path in output.parent.glob(f".{glob.escape(output.name)}.*"):
        match = re.fullmatch(rf"\.{re.escape(output.name)}\.(\d+)\.[0-9a-f]{{8}}", path.name)
        if match and path.is_dir() and not _is_running(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    return True


def average_checkpoints(checkpoints: Sequence[str | Path], output_dir: str | Path) -> Path:
    """Write a model directory whose weights are the mean of those of the checkpoints.

    Sums are kept in float32 (float64 for float64 weights). Tied weights are stored once in every checkpoint and so in
    the average. Sharded checkpoints give a sharded average. Configuration and tokenizer come from the last checkpoint.

    Args:
        checkpoints: Directories with safetensors weights, of one run.
        output_dir: Written whole or not at all. An existing directory is replaced.

    Raises:
        ValueError: If the checkpoints do not hold the same tensors, or none is given.
        FileNotFoundError: If one has no weights.
    """
    if not checkpoints:
        raise ValueError("no checkpoints to average")
    paths = [Path(checkpoint) for checkpoint in checkpoints]
    checkpoints_weights = [_weights(path) for path in paths]
    last = checkpoints_weights[-1]
    for path, weights in zip(paths, checkpoints_weights, strict=True):
        if difference := weights.keys() ^ last.keys():
            raise ValueError(f"{path} and {paths[-1]} hold different tensors: {', '.join(sorted(difference)[:5])}")

    output = Path(output_dir)
    _sweep(output)
    staging = output.with_name(f".{output.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    staging.mkdir(parents=True)
    try:
        _copy_model_files(paths[-1], staging)
        for shard in last.files:
            names = [name for name, entry in last.entries.items() if entry.file == shard]
            averaged = {name: _mean(name, checkpoints_weights) for name in names}
            save_file(averaged, staging / shard.name, metadata=last.metadata[shard] or None)
        if (stamp := read_stamp(paths[-1])) is not None:  # of a run that is pushed: other weights, another stamp
            write_stamp(staging, stamp["urform"])
        if output.is_dir():
            shutil.rmtree(output)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def _copy_model_files(checkpoint: Path, target: Path) -> None:
    """Copy configuration, tokenizer, code and the index of the shards."""
    for file in {file for pattern in _MODEL_FILES for file in checkpoint.glob(pattern)}:
        if file.name not in _NOT_MODEL:
            shutil.copy2(file, target / file.name)
