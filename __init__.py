"""Urform: one Transformer for Hugging Face transformers.

`import urform` makes `UrformConfig`, the models and the tokenizer known to every Auto class of transformers, makes
`attn_implementation="urform"` known to every model of transformers, and gives PEFT its default LoRA targets.

It costs almost nothing: neither torch nor transformers is imported here. Public names are imported at first use
(PEP 562). What must be registered in transformers is registered at once where the module concerned has already been
imported, and otherwise right after that module has been imported, by a finder on `sys.meta_path` that watches the few
modules named in `_RULES`. Hence the order of imports does not matter, and `from transformers import AutoModel` stays as
fast as it is without Urform: the Auto classes are given names, which become classes when they are asked for.
"""

import importlib
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hub_upload as hub_upload
    from .configuration.configuration_urform import UrformConfig, list_presets
    from .conversion.convert import from_transformers, to_transformers
    from .conversion.torch_transformer import from_torch_transformer
    from .diagnostics.bundle import check_bundle
    from .diagnostics.isolation import check_isolation
    from .diagnostics.kernels_check import check_kernels
    from .modeling.kernels.attention_biases import ALiBi, DenseBias, RelativeBias, T5Bias
    from .modeling.kernels.attention_dispatch import attention, attention_backends
    from .modeling.kernels.attention_layouts import Layout
    from .modeling.kernels.loss_linear_cross_entropy import linear_cross_entropy
    from .modeling.modeling_urform import (
        UrformEncoderModel,
        UrformForCausalLM,
        UrformForConditionalGeneration,
        UrformForMaskedLM,
        UrformForMultipleChoice,
        UrformForQuestionAnswering,
        UrformForSequenceClassification,
        UrformForTokenClassification,
        UrformModel,
    )
    from .tokenization.tokenization_urform import UrformTokenizer

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "DenseBias",
    "Layout",
    "RelativeBias",
    "T5Bias",
    "UrformConfig",
    "UrformEncoderModel",
    "UrformForCausalLM",
    "UrformForConditionalGeneration",
    "UrformForMaskedLM",
    "UrformForMultipleChoice",
    "UrformForQuestionAnswering",
    "UrformForSequenceClassification",
    "UrformForTokenClassification",
    "UrformModel",
    "UrformTokenizer",
    "__version__",
    "attention",
    "attention_backends",
    "check_bundle",
    "check_isolation",
    "check_kernels",
    "from_torch_transformer",
    "from_transformers",
    "linear_cross_entropy",
    "list_presets",
    "to_transformers",
]

_HOME = {
    "configuration.configuration_urform": ("UrformConfig", "list_presets"),
    "conversion.convert": ("from_transformers", "to_transformers"),
    "conversion.torch_transformer": ("from_torch_transformer",),
    "diagnostics.bundle": ("check_bundle",),
    "diagnostics.isolation": ("check_isolation",),
    "diagnostics.kernels_check": ("check_kernels",),
    "modeling.kernels.attention_biases": ("ALiBi", "DenseBias", "RelativeBias", "T5Bias"),
    "modeling.kernels.attention_dispatch": ("attention", "attention_backends"),
    "modeling.kernels.attention_layouts": ("Layout",),
    "modeling.kernels.loss_linear_cross_entropy": ("linear_cross_entropy",),
    "modeling.modeling_urform": tuple(n for n in __all__ if re.fullmatch(r"Urform(For\w+|\w*Model)", n)),
    "tokenization.tokenization_urform": ("UrformTokenizer",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name, or the module `hub_upload`, at its first use."""
    if name == "hub_upload":
        return importlib.import_module(f"{__name__}.hub_upload")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "hub_upload"})


# ---------------------------------------------------------------------------------------------------- registration


class _LazyClasses(dict[Any, Any]):
    """A dict of classes where ours stand as names (strings) and are imported when somebody looks at them."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        return getattr(sys.modules[__name__], value) if isinstance(value, str) else value

    def __iter__(self) -> Iterator[Any]:  # overridden so that dict(self) and pickling copy classes, not names
        return super().__iter__()

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def values(self) -> Any:
        return {key: self[key] for key in self}.values()

    def items(self) -> Any:
        return {key: self[key] for key in self}.items()


def _put(mapping: Any, key: Any, name: str) -> None:
    """Do what `AutoX.register` does to its mapping, with the class given by name."""
    if not isinstance(mapping._extra_content, _LazyClasses):
        mapping._extra_content = _LazyClasses(mapping._extra_content)
    mapping.register(key, name, exist_ok=True)


def _register_config(auto: Any) -> None:
    _put(auto.CONFIG_MAPPING, "urform", "UrformConfig")


def _register_models(auto: Any, configuration: Any) -> None:
    from .configuration.bundle_urform import HEADS

    for auto_class, (name, _) in HEADS.items():
        mapping = getattr(auto, auto_class)._model_mapping
        _put(mapping, configuration.UrformConfig, name)
        # Trainer's label smoothing, the model card and some pipelines read the class names of these static tables.
        mapping._model_mapping["urform"] = name


def _register_tokenizer(auto: Any) -> None:
    # By its name alone: were it in TOKENIZER_MAPPING too, transformers would take a repository's copy of the class with
    # trust_remote_code=True, and not, as it does for models, the installed one.
    if not isinstance(auto.REGISTERED_TOKENIZER_CLASSES, _LazyClasses):
        auto.REGISTERED_TOKENIZER_CLASSES = _LazyClasses(auto.REGISTERED_TOKENIZER_CLASSES)
    auto.REGISTERED_TOKENIZER_CLASSES["UrformTokenizer"] = "UrformTokenizer"


def _register_attention(modeling_utils: Any) -> None:
    if f"{__name__}.modeling.attention_interface" not in sys.modules:  # else it is just being imported: next rule
        importlib.import_module(".modeling.attention_interface", __name__)


def _register_imported_attention(modeling_utils: Any, attention_interface: Any) -> None:
    attention_interface.register_attention()


def _register_lora_targets(constants: Any) -> None:
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("urform", ["q_proj", "v_proj"])


def _complete_card(folder: Any, repo_id: str) -> None:
    from .publishing.model_card import complete_card

    complete_card(folder, repo_id)


def _register_card(bundle: Any) -> None:
    if _complete_card not in bundle.BEFORE_UPLOAD:
        bundle.BEFORE_UPLOAD.append(_complete_card)


def _register_trainer(trainer: Any) -> None:
    from .publishing.trainer_push import PublishCallback

    if PublishCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(PublishCallback)


_CONFIGURATION = f"{__name__}.configuration.configuration_urform"
_AUTO = "transformers.models.auto"
# A rule runs whenever one of its modules has been imported (or reloaded) and all of them are there: with these modules.
_RULES: list[tuple[Sequence[str], Callable[..., None]]] = [
    ((f"{_AUTO}.configuration_auto",), _register_config),
    ((f"{_AUTO}.modeling_auto", _CONFIGURATION), _register_models),
    ((f"{_AUTO}.tokenization_auto",), _register_tokenizer),
    (("transformers.modeling_utils",), _register_attention),
    (("transformers.modeling_utils", f"{__name__}.modeling.attention_interface"), _register_imported_attention),
    (("peft.utils.constants",), _register_lora_targets),
    ((f"{__name__}.configuration.bundle_urform",), _register_card),
    (("transformers.trainer",), _register_trainer),
]
_WATCHED = frozenset(name for names, _ in _RULES for name in names)
_imported: set[str] = set()


def _after_import(name: str) -> None:
    _imported.add(name)
    for names, function in _RULES:
        if name in names and all(n in _imported and n in sys.modules for n in names):
            function(*(sys.modules[n] for n in names))


class _Loader(importlib.abc.Loader):
    """A module's own loader, which stays the module's loader; then `_after_import`."""

    def __init__(self, name: str, loader: Any) -> None:
        self.name, self.loader = name, loader

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.loader, attribute)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _after_import(self.name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `_WATCHED` through the other finders and lets `_Loader` load them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _WATCHED:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(fullname, spec.loader)
                return spec
        return None


def _watch_imports() -> None:
    sys.meta_path.insert(0, _Finder())
    for name in sorted(_WATCHED & sys.modules.keys()):
        importlib.import_module(name)  # waits if another thread is importing it right now
        _after_import(name)


if __name__ == "urform":  # and not in a second copy under another name (pytest imports the root's __init__.py as one)
    _watch_imports()
