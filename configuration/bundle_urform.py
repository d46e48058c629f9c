# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""`BundledCodeMixin`: the first base of the config, the models and the tokenizer, here and in a bundle's flat copy.

- It loads safetensors only, for pickled weights may run code.
- It sees when something is published: `push_to_hub`, `save_pretrained(push_to_hub=True)`, a Trainer that pushes, and
  every `save_pretrained` once somebody has called `register_for_auto_class`. The `Publisher` then writes the bundle.

The publisher is `publishing/bundle_saving.py`, which registration.py installs (`install_publisher`), so that nothing in
this folder imports publishing. A flat copy has no publisher: there, files already lie flat and transformers' own
copying works.
"""

import os
from collections.abc import Callable, Collection
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from .checkpoint_files import INDEX_NAME, read_weight_map, refuse_pickled
from .heads_urform import auto_map
from .version_urform import need_libraries

# The flat copy lies in transformers' module cache or next to a checkpoint, the package's own file in configuration/.
IS_FLAT_COPY = Path(__file__).resolve().parent.name != "configuration"
_PACKAGE = __name__.partition(".")[0]
if IS_FLAT_COPY:  # an installed Urform has had its requirements checked by pip
    need_libraries()


class Publisher(Protocol):
    """What happens when one of our objects is saved for others; see `publishing/bundle_saving.py`."""

    def meet_trainer(self, instance: Any) -> None:
        """Take note of the Trainer, if there is one, whose method is using `instance` right now."""

    def save_with_code(
        self, instance: Any, save: Callable[..., Any], directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Call `save`, transformers' own `save_pretrained`, and add the bundle's code and stamp."""

    def bundle_names(self) -> Collection[str]:
        """Return the names of the files that `save_with_code` adds."""

    def before_upload(
        self, instance: Any, directory: str | os.PathLike[str], repo_id: str, revision: str | None, token: Any
    ) -> None:
        """Complete a folder that transformers is about to upload: the model card and the stamp."""


_find_publisher: Callable[[], Publisher] | None = None
_publishing: ContextVar[bool] = ContextVar("_publishing", default=False)


def install_publisher(find: Callable[[], Publisher]) -> None:
    """Install the function that returns the publisher; it is called when something is saved, not before."""
    global _find_publisher
    _find_publisher = find


def _publisher() -> Publisher | None:
    return None if _find_publisher is None else _find_publisher()


def publish_with(model_or_tokenizer: Any) -> None:
    """Let every later `save_pretrained` of this model or tokenizer write the bundle, as if it were being pushed."""
    if isinstance(model_or_tokenizer, BundledCodeMixin):
        vars(model_or_tokenizer)["_is_published"] = True


class BundledCodeMixin:
    """Writes the bundle in `save_pretrained` where something is published, or its class registered for an Auto class.

    First base of the config, the models and the tokenizer. Otherwise, for a subclass defined elsewhere, and in the flat
    copy, transformers' own code does its work. The `auto_map` is completed in the flat copy, too.
    """

    _auto_class: Any

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `forward` takes what Trainer gives to the loss: it does. Trainer reads this when it takes a model."""
        publisher = _publisher()
        if publisher is not None:
            publisher.meet_trainer(self)
        return True

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, and the code with it if this is published or registered for an Auto class."""
        publisher = _publisher()
        if publisher is not None:
            publisher.meet_trainer(self)
        publishes = bool(kwargs.get("push_to_hub")) or _publishing.get() or "_is_published" in vars(self)
        token = _publishing.set(False)  # a model saves its config by itself; that one is not published for itself
        save = super().save_pretrained  # type: ignore[misc]
        try:
            if not (publishes or type(self)._auto_class is not None) or not self._is_ours():
                return save(save_directory, *args, **kwargs)
            if publisher is not None:
                return publisher.save_with_code(self, save, save_directory, *args, **kwargs)
            config: Any = self if hasattr(self, "to_json_file") else getattr(self, "config", None)
            if config is not None and type(self)._auto_class is not None:
                config.auto_map = {**(getattr(config, "auto_map", None) or {}), **auto_map(config.architecture)}
            return save(save_directory, *args, **kwargs)
        finally:
            _publishing.reset(token)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; a model's weights from safetensors only, for pickles may run code."""
        if hasattr(cls, "base_model_prefix"):
            if kwargs.get("use_safetensors") is False:
                raise ValueError(
                    "use_safetensors=False would read pickled weights, which Urform does not; convert them with "
                    "safetensors.torch.save_file and leave the argument out"
                )
            kwargs["use_safetensors"] = True
            _check_index(*args[:1], **kwargs)
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Load weights and adapters as transformers does, but no pickles, whatever named them."""
        refuse_pickled(checkpoint_files)
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push as transformers does, with everything that lets the repository load where Urform is not installed."""
        token = _publishing.set(True)
        try:
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]
        finally:
            _publishing.reset(token)

    @classmethod
    def _is_ours(cls) -> bool:
        owner = next(c for c in cls.__mro__ if not c.__module__.startswith("torch."))  # FSDP2 subclasses the model
        return owner.__module__.partition(".")[0] == _PACKAGE

    def _get_files_timestamps(self, working_dir: str | os.PathLike[str]) -> dict[str, float]:
        """Leave the bundle out, for it is written before transformers looks at what is new and must be uploaded."""
        stamps = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        publisher = _publisher()
        ours = publisher.bundle_names() if publisher is not None else ()
        return {name: t for name, t in stamps.items() if name not in ours}

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Upload as transformers does, after the model card and the stamp of all that the repository then holds."""
        publisher = _publisher()
        if publisher is not None and self._is_ours():
            publisher.before_upload(self, working_dir, repo_id, kwargs.get("revision"), kwargs.get("token"))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def _check_index(pretrained_model_name_or_path: Any = None, **options: Any) -> None:
    """Refuse an index that names pickles before transformers reads one of them, as it does to find the dtype."""
    from transformers.utils.hub import cached_file

    if pretrained_model_name_or_path is None:
        return
    variant = options.get("variant")
    name = INDEX_NAME if variant is None else INDEX_NAME.replace(".json", f".{variant}.json")
    named = ("cache_dir", "proxies", "token", "revision", "local_files_only", "subfolder")
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    given = {key: options[key] for key in named if options.get(key) is not None}
    given |= {f"_raise_exceptions_for_{what}": False for what in quiet}
    try:
        index = cached_file(str(pretrained_model_name_or_path), name, **given)
    except OSError:  # no such folder or repository: transformers is about to say so
        return
    if index is not None:
        read_weight_map(index)
