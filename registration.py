"""What `import urform` registers in transformers, PEFT and lm-eval, without importing any of them.

A rule of `_RULES` runs right after the modules that it names have been imported. Where they have been imported already,
it runs at once; otherwise a finder on `sys.meta_path`, which watches these few modules, runs it. Hence the order of
imports does not matter. `from transformers import AutoModel` stays as fast as it is without Urform: mappings of classes
are given names, which become classes when they are asked for.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from .configuration.heads_urform import HEADS

__all__ = ["watch_imports"]

_PACKAGE = __name__.rpartition(".")[0]
_MODELING = f"{_PACKAGE}.modeling.modeling_urform"
_CONFIGURATION = f"{_PACKAGE}.configuration.configuration_urform"
# The classes that transformers learns by name, and the modules that define them.
_CLASSES = {
    "UrformConfig": _CONFIGURATION,
    "UrformTokenizer": f"{_PACKAGE}.tokenization.tokenization_urform",
    **{name: _MODELING for name, _ in HEADS.values()},
}


def _class(name: str) -> Any:
    return getattr(importlib.import_module(_CLASSES[name]), name)


class _Name(str):
    """The name of one of our classes before anybody has asked for it."""


class _LazyClasses(dict[Any, Any]):
    """A dict of classes where ours stand as names and are imported when somebody looks at them."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        return _class(value) if isinstance(value, _Name) else value

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
    mapping.register(key, _Name(name), exist_ok=True)


def _register_config(auto: Any) -> None:
    _put(auto.CONFIG_MAPPING, "urform", "UrformConfig")


def _register_models(auto: Any, configuration: Any) -> None:
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
    auto.REGISTERED_TOKENIZER_CLASSES["UrformTokenizer"] = _Name("UrformTokenizer")


def _register_attention(modeling_utils: Any) -> None:
    if (
        f"{_PACKAGE}.modeling.stock_models.attention_interface" not in sys.modules
    ):  # else it is just being imported: next rule
        importlib.import_module(".modeling.stock_models.attention_interface", _PACKAGE)


def _register_imported_attention(modeling_utils: Any, attention_interface: Any) -> None:
    attention_interface.register_attention()


class _LazyAttribute:
    """One of our classes as an attribute of the module `transformers`; an attribute that somebody sets wins over it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type) -> Any:
        if getattr(module, "__name__", "") != "transformers":
            raise AttributeError(f"{module!r} has no attribute {self.name!r}")
        return _class(self.name)


def _register_classes(import_utils: Any) -> None:
    # TRL, `transformers serve` and others look for `getattr(transformers, config.architectures[0])`. The attributes are
    # set on the class of that module: transformers executes its __init__ twice (`direct_transformers_import`), and each
    # importer holds one of two module objects.
    for name in _CLASSES:
        setattr(import_utils._LazyModule, name, _LazyAttribute(name))


def _register_peft_targets(constants: Any) -> None:
    # The defaults of every method that has some for Llama, whose linear layers are named as ours are. Norms are not.
    norms = ["self_attn_norm", "cross_attn_norm", "mlp_norm", "norm"]
    own = {"TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING": norms}
    for name, mapping in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in mapping:
            mapping.setdefault("urform", own.get(name, mapping["llama"]))


def _register_auto_peft(auto: Any) -> None:
    # An adapter without a task type names the module of its base model, which AutoPeftModel imports from a list only.
    if hasattr(auto, "get_default_import_allowlist"):
        others = auto.get_default_import_allowlist
        auto.get_default_import_allowlist = lambda: [*others(), _PACKAGE]


def _register_trainable_tokens(model: Any) -> None:
    # PEFT ties what is tied to the table that it wraps, and fails where it has wrapped the tied one too: a target
    # `embed_tokens` means the encoder's table where the decoder shares it.
    prepare = model.TrainableTokensModel._prepare_adapter_config

    def _prepare_adapter_config(self: Any, peft_config: Any, model_config: dict[str, Any]) -> Any:
        peft_config = prepare(self, peft_config, model_config)
        ours = model_config.get("model_type") == "urform" and model_config.get("architecture") == "encoder-decoder"
        targets = peft_config.target_modules
        names = set() if isinstance(targets, str) else set(targets)  # a string is a regular expression
        if ours and model_config.get("share_embeddings") and "embed_tokens" in names:
            peft_config.target_modules = (names - {"embed_tokens"}) | {"encoder.embed_tokens"}
        return peft_config

    model.TrainableTokensModel._prepare_adapter_config = _prepare_adapter_config


def _register_lm_eval(huggingface: Any) -> None:
    # lm-eval tells causal from sequence-to-sequence models by `model_type`; ours says it by its architecture.
    by_model_type = huggingface.HFLM._get_backend

    def _get_backend(self: Any, config: Any, backend: str = "default", **kwargs: Any) -> None:
        if backend == "default" and getattr(config, "model_type", None) == "urform":
            backend = "seq2seq" if config.is_encoder_decoder else "causal"
        by_model_type(self, config, backend, **kwargs)

    huggingface.HFLM._get_backend = _get_backend


def _publisher() -> Any:
    from .publishing import bundle_saving

    return bundle_saving


def _register_publisher(bundle: Any) -> None:
    bundle.install_publisher(_publisher)


_AUTO = "transformers.models.auto"
# A rule runs whenever one of its modules has been imported (or reloaded) and all of them are there: with these modules.
_RULES: list[tuple[Sequence[str], Callable[..., None]]] = [
    (("transformers.utils.import_utils",), _register_classes),
    ((f"{_AUTO}.configuration_auto",), _register_config),
    ((f"{_AUTO}.modeling_auto", _CONFIGURATION), _register_models),
    ((f"{_AUTO}.tokenization_auto",), _register_tokenizer),
    (("transformers.modeling_utils",), _register_attention),
    (
        ("transformers.modeling_utils", f"{_PACKAGE}.modeling.stock_models.attention_interface"),
        _register_imported_attention,
    ),
    (("peft.utils.constants",), _register_peft_targets),
    (("peft.auto",), _register_auto_peft),
    (("peft.tuners.trainable_tokens.model",), _register_trainable_tokens),
    (("lm_eval.models.huggingface",), _register_lm_eval),
    ((f"{_PACKAGE}.configuration.bundle_urform",), _register_publisher),
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


def watch_imports() -> None:
    """Run every rule whose modules have been imported; let the others run when theirs are."""
    sys.meta_path.insert(0, _Finder())
    for name in sorted(_WATCHED & sys.modules.keys()):
        importlib.import_module(name)  # waits if another thread is importing it right now
        _after_import(name)
