"""The stamp of a published checkpoint: which Urform wrote it, and the sha256 of every file that its outputs depend on.

`write_stamp` writes it as `urform_bundle.json`. `bundle_faults` says what has changed since (`urform doctor bundle`).
What is read of it wherever a model is loaded stands in `configuration/version_urform.py`.

The stamp finds files that were damaged, truncated or changed by hand. It is no signature: anyone with write access can
regenerate it. Model cards and pictures are not part of it; they may be edited on the Hub.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import Version

from ..configuration.version_urform import FORMAT, NEEDS

STAMP_NAME = "urform_bundle.json"

_PART = re.compile(
    r"[^/]+\.(?:py|safetensors|jinja|model)|requirements\.txt"  # code, weights, templates, SentencePiece
    r"|(?:config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|[^/]+\.safetensors\.index(?:\.[^/.]+)?\.json|(?:merges|vocab)\.txt|additional_chat_templates/[^/]+\.jinja"
)


def bundle_files(directory: str | os.PathLike[str]) -> list[str]:
    """Return the names, with forward slashes, of the files in `directory` that a stamp covers."""
    root = Path(directory)
    names = [p.name for p in root.iterdir()] + [f"{p.parent.name}/{p.name}" for p in root.glob("*/*.jinja")]
    return sorted(name for name in names if _PART.fullmatch(name) and (root / name).is_file())


def code_hash(modules: Mapping[str, bytes]) -> str:
    """Return the sha256 of flat modules, given as file name and content."""
    digest = hashlib.sha256()
    for name, content in sorted(modules.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def write_stamp(
    directory: str | os.PathLike[str], urform_version: str, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write `urform_bundle.json` over the files that are in `directory`; return it.

    Args:
        directory: holds the files of a bundle, or those that go into a repository with others.
        urform_version: the version of the package whose code this is.
        before: the stamp of the repository that the files go into; what it says of other files is kept.
    """
    root = Path(directory)
    files = {} if before is None else dict(_listed(before))
    for name in bundle_files(root):
        state = (root / name).stat()
        files[name] = {"sha256": _sha256(str(root / name), state.st_size, state.st_mtime_ns), "size": state.st_size}
    stamp: dict[str, Any] = {
        "format": FORMAT,
        "urform": urform_version,
        "made_with": {name: _version(name) for name in NEEDS},
        "files": dict(sorted(files.items())),
    }
    modules = {name: (root / name).read_bytes() for name in files if name.endswith(".py") and (root / name).is_file()}
    if modules:
        stamp["code"] = code_hash(modules)
    elif before is not None and "code" in before:
        stamp["code"] = before["code"]
    stamp["sha256"] = _content_hash(stamp)
    (root / STAMP_NAME).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    return stamp


def read_stamp(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the stamp in `directory`, None if there is none; ValueError if it is not one."""
    path = Path(directory) / STAMP_NAME
    if not path.is_file():
        return None
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
        _listed(stamp)
        Version(stamp["urform"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no stamp of Urform ({error}); publish the checkpoint again.") from error
    return stamp


def bundle_faults(directory: str | os.PathLike[str], stamp: Mapping[str, Any]) -> list[str]:
    """Return what is not as `stamp` says, one line each; no file's content is run or loaded."""
    root, faults, listed = Path(directory), [], _listed(stamp)
    if stamp.get("sha256") != _content_hash(stamp):
        faults.append(f"{STAMP_NAME}: changed by hand: its content does not have the sha256 that it names")
    for name, said in sorted(listed.items()):
        if not _PART.fullmatch(name) or name.startswith("."):
            faults.append(f"{name!r}: no name of a bundle's file; it was not looked at")
        elif not (root / name).is_file():
            faults.append(f"{name}: missing")
        elif (size := (root / name).stat().st_size) != said.get("size"):
            faults.append(f"{name}: {size} bytes instead of {said.get('size')}")
        elif _sha256(str(root / name), size, (root / name).stat().st_mtime_ns) != said.get("sha256"):
            faults.append(f"{name}: changed: another sha256 than when it was published")
    faults += [f"{name}: not in the stamp: added afterwards" for name in bundle_files(root) if name not in listed]
    return faults


def _listed(stamp: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    listed: Mapping[str, Mapping[str, Any]] = stamp["files"]
    if not all(isinstance(said, Mapping) for said in listed.values()):
        raise ValueError("'files' is not a table")
    return listed


def _content_hash(stamp: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in stamp.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=256)  # Trainer's pushes stamp the weights with the model and again with the tokenizer
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
