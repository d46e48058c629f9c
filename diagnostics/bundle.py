"""`urform doctor bundle`: is a published checkpoint what it was when it was published? No code of it is run.

Every file is compared with the sha256 in the stamp (`publishing/bundle_stamp.py`). The stamp is no signature: it
finds what was damaged, truncated or edited, not what somebody else published again.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..configuration.version_urform import package_version, version_warnings
from ..publishing.bundle_code import flatten_package
from ..publishing.bundle_stamp import STAMP_NAME, bundle_faults, code_hash, read_stamp


@dataclass(frozen=True)
class BundleReport:
    """What `check_bundle` found.

    Attributes:
        source: The folder, or the repository's name and revision.
        published_with: The version of urform in the stamp.
        files: How many files the stamp names.
        faults: What is not as it was published, one line each.
        notes: What is worth knowing and no fault: versions, mostly.
    """

    source: str
    published_with: str | None
    files: int
    faults: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is as it was published."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def to_text(self) -> str:
        """Say what was found, line by line."""
        lines = [f"{self.source}: {self.files} files, published with urform {self.published_with or 'unknown'}"]
        lines += [f"FAULT {fault}" for fault in self.faults] + [f"note  {note}" for note in self.notes]
        return "\n".join([*lines, "" if self.faults else "every file is as it was published"]).rstrip()


def check_bundle(path_or_id: str | os.PathLike[str], revision: str | None = None) -> BundleReport:
    """Compare a published checkpoint with its stamp.

    Args:
        path_or_id: a folder, or a repository, which is downloaded into huggingface_hub's cache.
        revision: a branch, tag or commit of the repository.

    Raises:
        ValueError: the stamp cannot be read.
        NoSuchSourceError: there is no such folder or repository (a FileNotFoundError and a ValueError).
        OSError: there is no such revision.
    """
    folder, source = Path(path_or_id), str(path_or_id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        from ..publishing.checkpoint_source import need_source

        need_source(source, revision=revision)
        folder = Path(snapshot_download(source, revision=revision))
        source += f"@{revision}" if revision else ""
    stamp = read_stamp(folder)
    if stamp is None:
        missing = f"{STAMP_NAME}: missing: not published by urform, or the stamp was deleted"
        return BundleReport(source, None, 0, (missing,), ())
    faults = [*bundle_faults(folder, stamp), *_code_from_elsewhere(folder, stamp["files"])]
    pickles = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    faults += [f"{name}: pickled weights, which may run code when loaded" for name in pickles]
    notes = list(version_warnings(stamp, package_version()))
    if "code" in stamp and stamp["urform"] == package_version() and stamp["code"] != installed_code_hash():
        notes.append(f"its code is not that of the installed urform {package_version()}, although of the same version")
    return BundleReport(source, stamp["urform"], len(stamp["files"]), tuple(faults), tuple(notes))


def installed_code_hash() -> str:
    """Return the hash that a bundle of the installed Urform has."""
    with tempfile.TemporaryDirectory() as scratch:
        return code_hash({path.name: path.read_bytes() for path in flatten_package(scratch)})


def _code_from_elsewhere(folder: Path, files: Any) -> list[str]:
    """Say which entries of an auto_map run code that the stamp does not cover: another repository's, another file's."""
    faults = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            entries = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map") or {}
        except (OSError, ValueError, AttributeError):
            continue  # missing or changed: said above
        for auto, values in entries.items() if isinstance(entries, dict) else [("auto_map", entries)]:
            for value in values if isinstance(values, list) else [values]:
                if value is not None and f"{str(value).partition('.')[0]}.py" not in files:
                    faults.append(f"{name}: {auto} would run {value!r}, which is not a file of this bundle")
    return faults
