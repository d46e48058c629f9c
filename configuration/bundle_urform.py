# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""The package's own code, laid flat next to a checkpoint, so that `trust_remote_code=True` loads it without Urform.

Transformers copies the file that defines a class and the files that it imports relatively, all into one folder, and
cannot follow an import into another folder. So:

- `flatten_package` writes the modules of `FOLDERS` side by side, relative imports rewritten to `from .module import x`
  where the syntax tree finds them and not one other character changed. What the loader of transformers cannot follow is
  refused with file and line.
- `BundledCodeMixin`, first base of the config, the models and the tokenizer, does this whenever something is published
  (`push_to_hub`, `save_pretrained(push_to_hub=True)`, a Trainer that pushes) and in every `save_pretrained` once
  somebody has called `register_for_auto_class`. With the code come an `auto_map` with every head that the architecture
  has, where transformers records only the class that is being saved, `requirements.txt` and the stamp.
- `HEADS` is the one table of Auto class, our class and the architectures that it serves.

This module is part of the bundle itself. There, files already lie flat and transformers' own copying works.
"""

import ast
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .bundle_stamp import CONFIG_KEY, NEEDS, STAMP_NAME, config_stamp, need_libraries, read_stamp, write_stamp
from .checkpoint_files import INDEX_NAME, read_weight_map, refuse_pickled

FOLDERS = (
    "configuration",
    "modeling",
    "modeling/kernels",
    "modeling/kernels/blockwise",
    "modeling/kernels/triton",
    "modeling/stock_models",
    "tokenization",
)
ENTRIES = ("configuration_urform", "modeling_urform", "tokenization_urform")

_ENCODER, _DECODER, _BOTH = "encoder", "decoder", "encoder-decoder"
HEADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "AutoModel": ("UrformModel", (_ENCODER, _DECODER, _BOTH)),
    "AutoModelForSeq2SeqLM": ("UrformForConditionalGeneration", (_BOTH,)),
    "AutoModelForCausalLM": ("UrformForCausalLM", (_DECODER,)),
    "AutoModelForMaskedLM": ("UrformForMaskedLM", (_ENCODER,)),
    "AutoModelForSequenceClassification": ("UrformForSequenceClassification", (_ENCODER, _DECODER, _BOTH)),
    "AutoModelForTokenClassification": ("UrformForTokenClassification", (_ENCODER, _DECODER)),
    "AutoModelForQuestionAnswering": ("UrformForQuestionAnswering", (_ENCODER, _DECODER, _BOTH)),
    "AutoModelForMultipleChoice": ("UrformForMultipleChoice", (_ENCODER, _DECODER)),
    "AutoModelForTextEncoding": ("UrformEncoderModel", (_ENCODER, _BOTH)),
}

# The flat copy lies in transformers' module cache or beside a checkpoint, the package's own file in configuration/.
IS_FLAT_COPY = Path(__file__).resolve().parent.name != "configuration"
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = __name__.partition(".")[0]
if IS_FLAT_COPY:  # an installed Urform has had its requirements checked by pip
    need_libraries()

# Called with the folder and the repository's name before transformers uploads what a model wrote: the model card.
BEFORE_UPLOAD: list[Callable[[Path, str], None]] = []
_publishing: ContextVar[bool] = ContextVar("_publishing", default=False)

# What a machine with nothing but transformers and torch can import.
_AVAILABLE = frozenset(sys.stdlib_module_names) | {
    "torch", "transformers", "numpy", "tokenizers", "safetensors", "huggingface_hub", "packaging", "tqdm",
}  # fmt: skip
# The two expressions by which transformers finds relative imports (dynamic_module_utils.get_relative_imports).
_LOADER_SEES = re.compile(r"^\s*import\s+\.(\S+)\s*$|^\s*from\s+\.(\S+)\s+import", re.MULTILINE)
_DOTTED = re.compile(r"from\s+(\.+\s*[\w.]*)\s+import\b")


# ------------------------------------------------------------------------------------------------------- flattening


def flatten_package(directory: str | os.PathLike[str], root: Path = _ROOT, package: str = _PACKAGE) -> list[Path]:
    """Write the package's modules flat into `directory`; return the paths written.

    Only modules that the entry files reach by relative imports are written: transformers loads no others.

    Args:
        directory: the folder to write to, made if needed. Files are replaced one by one, each atomically.
        root: the folder of the package.
        package: the package's import name, to refuse absolute imports of itself.

    Raises:
        ValueError: naming file and line, when a module cannot be laid flat or loaded from the flat copy.
    """
    modules = _modules(root)
    flat: dict[str, str] = {}
    waiting = [name for name in ENTRIES if name in modules]
    if not waiting:
        raise ValueError(f"{root} has none of the entry modules {', '.join(ENTRIES)}; there is nothing to bundle.")
    while waiting:
        name = waiting.pop()
        if name not in flat:
            flat[name], needed = _flatten_module(modules[name], modules, root, package)
            waiting.extend(needed)
    os.makedirs(directory, exist_ok=True)
    return [_write(Path(directory) / f"{name}.py", source) for name, source in sorted(flat.items())]


def _modules(root: Path) -> dict[str, Path]:
    modules: dict[str, Path] = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            if path.name == "__init__.py":
                continue
            if path.stem in modules:
                raise ValueError(
                    f"{path}:1: a module named {path.stem!r} exists already: {modules[path.stem]}. "
                    "The bundle lays all modules into one folder; rename one of them."
                )
            modules[path.stem] = path
    return modules


def _flatten_module(path: Path, modules: dict[str, Path], root: Path, package: str) -> tuple[str, list[str]]:
    """Return the module's text for the flat folder and the names of the modules that it imports."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)

    def refuse(line: int, why: str) -> ValueError:
        return ValueError(f"{path}:{line}: {why}")

    relative: list[ast.ImportFrom] = []
    for node, guarded in _imports(ast.parse(source, str(path))):
        if isinstance(node, ast.ImportFrom) and node.level:
            relative.append(node)
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for top in (name.partition(".")[0] for name in names):
            if top == package:
                raise refuse(node.lineno, f"imports {package!r} by its absolute name; use a relative import.")
            if top not in _AVAILABLE and not guarded:
                raise refuse(
                    node.lineno,
                    f"imports {top!r} outside of try: the bundle must load where it is not installed. "
                    f"Write try: import {top} / except ImportError: {top} = None.",
                )

    needed = []
    for node in sorted(relative, key=lambda n: n.lineno, reverse=True):
        name = _target(node, path, modules, root, refuse)
        index = node.lineno - 1
        start = len(lines[index].encode()[: node.col_offset].decode())  # col_offset counts bytes
        match = _DOTTED.match(lines[index], start)
        if lines[index][:start].strip() or match is None:
            raise refuse(node.lineno, "a relative import must begin its line and have 'from .module import' on it.")
        lines[index] = lines[index][: match.start(1)] + f".{name}" + lines[index][match.end(1) :]
        needed.append(name)

    text = "".join(lines)
    statements = {node.lineno for node in relative}
    for match in _LOADER_SEES.finditer(text):
        at = match.start() + len(match[0]) - len(match[0].lstrip())
        line = text.count("\n", 0, at) + 1
        if line not in statements:
            raise refuse(
                line, f"{match[0].strip()!r} is no import, but transformers' loader takes it for one; reword it."
            )
    return text, needed


def _target(node: ast.ImportFrom, path: Path, modules: dict[str, Path], root: Path, refuse: Any) -> str:
    """Return the basename of the module that a relative import names."""
    folder = path.parent
    for _ in range(node.level - 1):
        folder = folder.parent
    target = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
    if target.with_suffix(".py") == modules.get(target.name):
        return target.name
    shown = "." * node.level + (node.module or "")
    if node.module is None or target.is_dir():
        raise refuse(
            node.lineno,
            f"'from {shown} import …' imports from a package, which a flat folder has not; name the module: "
            f"from {shown.rstrip('.') + '.' if node.module else shown}module import …",
        )
    raise refuse(
        node.lineno, f"'from {shown} import …' names no module of {', '.join(FOLDERS)}; only these are bundled."
    )


def _imports(node: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield every import of the tree and whether it stands in a `try` statement."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, guarded
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, guarded or isinstance(node, ast.Try))


def _write(path: Path, text: str) -> Path:
    """Write atomically: several processes may save into one folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# ----------------------------------------------------------------------------------------------------------- saving


def auto_map(architecture: str) -> dict[str, str]:
    """Return the `auto_map` of a model repository: the config and every head that serves `architecture`."""
    heads = {auto: f"modeling_urform.{name}" for auto, (name, serves) in HEADS.items() if architecture in serves}
    return {"AutoConfig": "configuration_urform.UrformConfig", **heads}


def package_version() -> str:
    """Return the version of the Urform that this module belongs to."""
    return str(sys.modules[_PACKAGE].__version__)


def write_code(directory: str | os.PathLike[str]) -> None:
    """Write what makes a checkpoint load without Urform, next to it: the flat modules and `requirements.txt`."""
    flatten_package(directory)
    needs = "".join(f"{name}>={least}\n" for name, least in NEEDS.items())
    _write(Path(directory) / "requirements.txt", needs)


def publish_with(model_or_tokenizer: Any) -> None:
    """Let every later `save_pretrained` of this model or tokenizer write the bundle, as if it were being pushed."""
    if isinstance(model_or_tokenizer, BundledCodeMixin):
        vars(model_or_tokenizer)["_is_published"] = True


class BundledCodeMixin:
    """Makes `save_pretrained` write the bundle where something is published, or its class registered for an Auto class.

    First base of the config, the models and the tokenizer. Otherwise, for a subclass defined elsewhere, and in the flat
    copy, transformers' own code does its work (the `auto_map` is completed all the same).
    """

    _auto_class: Any

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, and the code with it if this is published or registered for an Auto class."""
        publishes = bool(kwargs.get("push_to_hub")) or _publishing.get() or "_is_published" in vars(self)
        token = _publishing.set(False)  # a model saves its config by itself; that one is not published for itself
        try:
            if not (publishes or type(self)._auto_class is not None) or not self._is_ours():
                return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            return self._save_with_code(save_directory, *args, **kwargs)
        finally:
            _publishing.reset(token)

    def _save_with_code(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        save = super().save_pretrained  # type: ignore[misc]
        config: Any = self if hasattr(self, "to_json_file") else getattr(self, "config", None)
        if IS_FLAT_COPY:
            if config is not None and type(self)._auto_class is not None:
                config.auto_map = {**(getattr(config, "auto_map", None) or {}), **auto_map(config.architecture)}
            return save(save_directory, *args, **kwargs)
        if os.path.isfile(save_directory):
            return save(save_directory, *args, **kwargs)  # says what is wrong
        writes = kwargs.get("is_main_process", True)
        if writes:
            write_code(save_directory)
        with self._code_is_saved(config):
            saved = save(save_directory, *args, **kwargs)
        if writes and not kwargs.get("push_to_hub"):  # else `_upload_modified_files` has stamped it
            write_stamp(save_directory, package_version())
        return saved

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

    @contextlib.contextmanager
    def _code_is_saved(self, config: Any) -> Iterator[None]:
        """Keep transformers from copying code: the config, a model and a tokenizer are each asked in their own way."""
        own: dict[str, Any] = {"_auto_class": None}
        stamped: dict[str, Any] = {}
        if config is None:
            own["_auto_map"] = {"AutoTokenizer": [f"tokenization_urform.{type(self).__name__}", None]}
        else:
            heads = auto_map(config.architecture)
            if config is not self:
                own["is_remote_code"] = lambda: False
            else:  # it may be saved by a model that is defined elsewhere and has named itself
                named = (getattr(config, "auto_map", None) or {}).items()
                heads |= {auto: name for auto, name in named if not name.startswith(ENTRIES) and "--" not in name}
            stamped = {"auto_map": heads, CONFIG_KEY: config_stamp(package_version())}
        with _attributes(self, own), _attributes(config, stamped):
            yield

    def _get_files_timestamps(self, working_dir: str | os.PathLike[str]) -> dict[str, float]:
        """Leave the bundle out, for it is written before transformers looks at what is new and must be uploaded."""
        stamps = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        if IS_FLAT_COPY:
            return stamps
        ours = {*(f"{name}.py" for name in _modules(_ROOT)), "requirements.txt", STAMP_NAME}
        return {name: t for name, t in stamps.items() if name not in ours}

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Upload as transformers does, after the model card and the stamp of all that the repository then holds."""
        if not IS_FLAT_COPY and self._is_ours():
            if hasattr(self, "state_dict"):
                for finish in BEFORE_UPLOAD:
                    finish(Path(working_dir), repo_id)
            before = _remote_stamp(repo_id, kwargs.get("revision"), kwargs.get("token"))
            write_stamp(working_dir, package_version(), before)
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
