"""Checkpoints that are complete or do not count: manifests with content hashes, the choice of one, rotation.

A checkpoint's manifest says "unfinished" while the checkpoint is being written. It is replaced, in one step and after
everything else, by the size and the sha256 of every file. Old checkpoints are deleted only after that, so a run that
has saved once has a complete checkpoint at every moment.

| manifest | meaning | what `--resume` does |
|---|---|---|
| agrees with every file | complete | resumes from the newest |
| says unfinished | the process died while it was saving | skips it with a warning |
| disagrees, or cannot be read | damaged | skips it with a warning; refuses if no complete checkpoint is left |
| missing | another Trainer wrote it | never touches it; refuses if no complete checkpoint is left |
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

__all__ = [
    "MANIFEST_NAME",
    "CheckpointError",
    "begin_manifest",
    "checkpoint_fault",
    "complete_checkpoints",
    "file_sha256",
    "finish_manifest",
    "is_unfinished",
    "last_complete_checkpoint",
    "newest_complete",
    "numbered_checkpoints",
    "remove_checkpoint",
    "rotate_complete",
    "write_text_atomically",
]

MANIFEST_NAME = "checkpoint_manifest.json"
_FORMAT = 2


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or is damaged; the message names it, and the newest complete one."""


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write a file so that a reader, or a process killed meanwhile, leaves the old content or the new, never a part."""
    target = Path(path)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with staging.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)


def file_sha256(path: str | Path, sync: bool = False) -> str:
    """Return the sha256 of a file's content; with `sync`, after the content has reached the disk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- manifests ---------------------------------------------------------------------------------------------------
def begin_manifest(checkpoint: Path, step: int) -> None:
    """Mark a checkpoint, empty so far, as one that Urform is writing."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    manifest = {"format": _FORMAT, "step": step, "files": None}
    write_text_atomically(checkpoint / MANIFEST_NAME, json.dumps(manifest))


def finish_manifest(checkpoint: Path, step: int) -> None:
    """Declare a checkpoint complete: write size and sha256 of every file in it."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path != checkpoint / MANIFEST_NAME:
            name = path.relative_to(checkpoint).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path, sync=True)}
    manifest = {"format": _FORMAT, "step": step, "files": files}
    write_text_atomically(checkpoint / MANIFEST_NAME, json.dumps(manifest, indent=1))


def _read_manifest(checkpoint: Path) -> Mapping[str, Mapping[str, Any]] | str:
    """Return what the manifest says of every file, or why it says nothing."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
        files, step = manifest["files"], manifest["step"]
        if files is None:
            return "saving it did not finish"
        if f"{PREFIX_CHECKPOINT_DIR}-{step}" != checkpoint.name:
            return f"{MANIFEST_NAME} is of step {step}"
        for name, said in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST_NAME} names {name!r}, which is outside of the checkpoint"
            if not isinstance(said, dict):
                return f"{MANIFEST_NAME} gives no sha256 for {name!r}; an older Urform wrote it"
            if not isinstance(said["size"], int) or not isinstance(said["sha256"], str):
                return f"{MANIFEST_NAME} gives no size and sha256 for {name!r}"
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}, so another Trainer wrote it, or saving it did not finish"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        return f"{MANIFEST_NAME} cannot be read ({type(error).__name__}: {error})"
    result: Mapping[str, Mapping[str, Any]] = files
    return result


def is_unfinished(checkpoint: Path) -> bool:
    """Return whether Urform began to write a checkpoint and did not finish."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(manifest, dict) and "files" in manifest and manifest["files"] is None


def checkpoint_fault(checkpoint: str | Path, content: bool = True) -> str | None:
    """Return why a checkpoint does not count, or None if it is complete.

    Args:
        checkpoint: The folder.
        content: Whether to compare the sha256 of every file; otherwise only that it is there and its size.
    """
    folder = Path(checkpoint)
    files = _read_manifest(folder)
    if isinstance(files, str):
        return files
    for name, said in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != said["size"]:
            return f"{name} has {size} bytes instead of {said['size']}"
    for name, said in files.items() if content else ():
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error})"
        if found != said["sha256"]:
            return f"{name} is damaged: its bytes are not those that were saved (another sha256)"
    return None


# --- the checkpoints of a run ------------------------------------------------------------------------------------
def numbered_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Return every checkpoint folder of a run with its step, complete or not, oldest first."""
    found = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)):
            found.append((int(match[1]), path))
    return sorted(found)


def newest_complete(output_dir: str | Path) -> Iterator[Path]:
    """Yield the complete checkpoints of a run, newest first; others are skipped with a warning that says why."""
    for _, path in reversed(numbered_checkpoints(output_dir)):
        fault = checkpoint_fault(path)
        if fault is None:
            yield path
        else:
            kind = "damaged" if "damaged" in fault else "incomplete"
            warnings.warn(f"skipping the {kind} checkpoint {path}: {fault}", stacklevel=2)


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first; others are skipped with a warning."""
    return list(newest_complete(output_dir))[::-1]


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    return next(newest_complete(output_dir), None)


def rotate_complete(output_dir: str | Path, step: int, limit: int | None, best: str | None) -> None:
    """Delete old checkpoints after that of `step` is complete, so that `limit` are left.

    The newest, the best one, and whatever another Trainer wrote stay. Unfinished ones of earlier steps go. Checkpoints
    of later steps stay as well: the run has not come so far yet, they were skipped when it was resumed.
    """
    if limit is None or limit <= 0:
        return
    mine = [path for number, path in numbered_checkpoints(output_dir) if number <= step and _is_ours(path)]
    protected = {f"{PREFIX_CHECKPOINT_DIR}-{step}", *([Path(best).name] if best else [])}
    others = [path for path in mine if path.name not in protected]
    unfinished = [path for path in others if is_unfinished(path)]
    finished = [path for path in others if path not in unfinished]
    room = max(0, limit - (len(mine) - len(others)))
    for path in [*unfinished, *finished[: max(0, len(finished) - room)]]:
        remove_checkpoint(path)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint so that a process killed meanwhile leaves no half of it under its name."""
    trash = checkpoint.with_name(f".deleted.{checkpoint.name}.{uuid.uuid4().hex[:8]}")
    try:
        checkpoint.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)


def _is_ours(checkpoint: Path) -> bool:
    return (checkpoint / MANIFEST_NAME).is_file()
