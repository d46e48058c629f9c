# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Reading a checkpoint's folder without trusting it: its JSON, the index of its weights, its links.

Everything that reads a folder uses these functions: `from_pretrained`, conversion, averaging, publishing. They know
neither torch nor transformers, and travel with the code that is published.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .checks_urform import check_object

INDEX_NAME = "model.safetensors.index.json"
# Folders inside a checkpoint's folder of which files are read, too.
_READ_FOLDERS = ("additional_chat_templates", "checkpoint-*")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a JSON object from a file; ValueError with the file's name if it is none, or nested too deeply."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); save the checkpoint again.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read as JSON; save the checkpoint again.") from error
    check_object(value, str(path))
    return value


def read_weight_map(index: str | os.PathLike[str]) -> dict[str, str]:
    """Return which file in the folder of the index holds which weight.

    Raises:
        ValueError: there is no weight map in it, or a file that it names is no safetensors file of the same folder: a
            pickle may run code when it is loaded.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index} has no weight_map; save the model again with save_pretrained.")
    strange = sorted({repr(name) for name in found.values() if not _is_shard(name)})
    if strange:
        shown = ", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
        raise ValueError(
            f"{index} names {shown}; a shard is a .safetensors file beside the index. Save the model again with "
            "save_pretrained: pickled weights are not loaded."
        )
    return found


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name


def refuse_pickled(files: Iterable[str | os.PathLike[str]] | None) -> None:
    """Raise a ValueError if one of the files of weights that are about to be loaded is no safetensors file."""
    for file in files or ():
        if not os.fspath(file).endswith(".safetensors"):
            raise ValueError(
                f"{os.fspath(file)} is no safetensors file, and pickled weights may run code when they are loaded. "
                "Convert them with safetensors.torch.save_file."
            )


# -------------------------------------------------------------------------------------------------------------- links


def refuse_link(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Raise a ValueError if `path`, a file or folder in `folder`, is a link, or is reached through one, that leads out.

    Without this, a link to any file of the machine would put its content into what is published. The folder itself may
    be a link, and links inside it may point at each other. In huggingface_hub's cache the files of a snapshot are links
    into the repository's `blobs` folder; these are allowed, for that is how a download is laid out.
    """
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if not any(real.is_relative_to(place) for place in (root, *_blobs(root))):
        raise ValueError(
            f"{os.fspath(path)} is a link that leads out of the folder, to {real}. What it points at is not read as a "
            "part of the checkpoint: put a copy in its place, or remove it."
        )


def refuse_links(folder: str | os.PathLike[str], everything: bool = False) -> None:
    """Do what `refuse_link` does for all that may be read of a checkpoint's folder.

    Args:
        folder: the checkpoint's folder. Looked at are its entries and those of the folders in it that are read.
        everything: whether to look at all folders in it, to any depth.
    """
    for path in sorted(Path(folder).rglob("*")) if everything else _entries(Path(folder)):
        refuse_link(folder, path)


def _entries(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    yield from sorted(folder.iterdir())
    for pattern in _READ_FOLDERS:
        for inner in sorted(folder.glob(pattern)):
            if inner.is_dir():
                yield from sorted(inner.iterdir())


def _blobs(root: Path) -> Iterator[Path]:
    """Yield the `blobs` folder that a snapshot in huggingface_hub's cache, `REPO/snapshots/COMMIT`, links into."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots":
            yield place.parent.parent / "blobs"
            return
