"""Where a checkpoint is named by a folder or by an id on the Hub: say at once that it is neither."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

__all__ = ["NoSuchSourceError", "need_source"]

SECONDS = 10.0


class NoSuchSourceError(FileNotFoundError, ValueError):
    """A name that is neither a folder nor a repository; both errors, for it is a missing file and a wrong argument."""


def need_source(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> None:
    """Raise NoSuchSourceError if `source` is no folder, and is no repository that the Hub or its cache has.

    The Hub is asked once, where a download would be tried again for a minute.

    Args:
        source: Folder, or id on the Hub.
        revision: Branch, tag or commit on the Hub.
        token: As for `huggingface_hub`.
        cache_dir: Of `huggingface_hub`.
        local_files_only: Whether the Hub is not to be asked.
    """
    name, folder = os.fspath(source), Path(source)
    if folder.is_dir():
        return
    if folder.exists():
        raise NoSuchSourceError(f"{name} is a file; give the folder that it is in")
    local = re.match(r"[./~]|[A-Za-z]:", name) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    try:
        validate_repo_id(name)
    except HFValidationError:
        local = True
    if local:
        raise NoSuchSourceError(f"no such folder: {name} (neither a folder nor an id on the Hub)")
    cached = any(
        isinstance(try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision), str)
        for file in ("config.json", "adapter_config.json")
    )
    if cached or local_files_only:
        return
    try:
        HfApi().repo_info(name, revision=revision, token=token, timeout=SECONDS)
    except RevisionNotFoundError:
        return  # the download says which there are
    except RepositoryNotFoundError as error:
        raise NoSuchSourceError(
            f"no such folder: {name}, and no repository of that name on the Hub that you may read (private ones need "
            "`hf auth login`)"
        ) from error
    except Exception as error:  # of the library that huggingface_hub uses for HTTP
        raise NoSuchSourceError(
            f"no such folder: {name}, and the Hub cannot be asked for a repository of that name "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'})"
        ) from error
