"""What is written when one of our objects is saved for others: the `Publisher` of `configuration/bundle_urform.py`.

`save_with_code` adds the flat code (`bundle_code.py`), `requirements.txt`, an `auto_map` with every head that the
architecture has, where transformers records only the class that is being saved, and the stamp (`bundle_stamp.py`).
registration.py installs this module as the publisher; it is imported when something is saved.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..configuration.heads_urform import auto_map
from ..configuration.version_urform import CONFIG_KEY, config_stamp, package_version
from .bundle_code import ENTRIES, code_names, write_code
from .bundle_stamp import STAMP_NAME, read_stamp, write_stamp


def meet_trainer(instance: Any) -> None:
    """Take note of the Trainer, if there is one, whose method is using the model `instance` right now."""
    if "transformers.trainer" in sys.modules and hasattr(instance, "state_dict"):
        from .trainer_push import meet_trainer as meet

        meet(instance)


def save_with_code(
    instance: Any, save: Callable[..., Any], directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """Call `save`, transformers' own `save_pretrained`, and add the bundle's code and stamp.

    Args:
        instance: a config, a model or a tokenizer of ours.
        save: its `save_pretrained` as transformers defines it.
        directory: the folder to save into.
        *args: for `save`.
        **kwargs: for `save`.
    """
    if os.path.isfile(directory):
        return save(directory, *args, **kwargs)  # says what is wrong
    writes = kwargs.get("is_main_process", True)
    if writes:
        write_code(directory)
    with _code_is_saved(instance):
        saved = save(directory, *args, **kwargs)
    if writes and not kwargs.get("push_to_hub"):  # else `before_upload` has stamped it
        write_stamp(directory, package_version())
    return saved


def bundle_names() -> set[str]:
    """Return the names of the files that `save_with_code` adds."""
    return code_names() | {STAMP_NAME}


def before_upload(
    instance: Any, directory: str | os.PathLike[str], repo_id: str, revision: str | None, token: Any
) -> None:
    """Complete a folder that transformers is about to upload: a model's card, and the stamp of the whole repository."""
    if hasattr(instance, "state_dict"):
        from .model_card import complete_card

        complete_card(Path(directory), repo_id)
    write_stamp(directory, package_version(), _remote_stamp(repo_id, revision, token))


@contextlib.contextmanager
def _code_is_saved(instance: Any) -> Iterator[None]:
    """Keep transformers from copying code: the config, a model and a tokenizer are each asked in their own way."""
    config: Any = instance if hasattr(instance, "to_json_file") else getattr(instance, "config", None)
    own: dict[str, Any] = {"_auto_class": None}
    stamped: dict[str, Any] = {}
    if config is None:
        own["_auto_map"] = {"AutoTokenizer": [f"tokenization_urform.{type(instance).__name__}", None]}
    else:
        heads = auto_map(config.architecture)
        if config is not instance:
            own["is_remote_code"] = lambda: False
        else:  # it may be saved by a model that is defined elsewhere and has named itself
            named = (getattr(config, "auto_map", None) or {}).items()
            heads |= {auto: name for auto, name in named if not name.startswith(ENTRIES) and "--" not in name}
        stamped = {"auto_map": heads, CONFIG_KEY: config_stamp(package_version())}
    with _attributes(instance, own), _attributes(config, stamped):
        yield


@contextlib.contextmanager
def _attributes(instance: Any, values: dict[str, Any]) -> Iterator[None]:
    """Give an instance attributes of its own for a while."""
    before = {name: vars(instance)[name] for name in values if name in vars(instance)}
    if values:
        vars(instance).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(instance).pop(name, None)
        if values:
            vars(instance).update(before)


def _remote_stamp(repo_id: str, revision: str | None, token: Any) -> dict[str, Any] | None:
    """Return the stamp that a repository has, None if it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

    try:
        path = hf_hub_download(repo_id, STAMP_NAME, revision=revision, token=token)
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None
    return read_stamp(os.path.dirname(path))
