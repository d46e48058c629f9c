"""Urform: one Transformer for Hugging Face transformers.

`import urform` makes `UrformConfig`, the models and the tokenizer known to every Auto class of transformers, makes
`attn_implementation="urform"` known to every model of transformers, and gives the methods of PEFT their default
target modules.

It costs almost nothing: neither torch nor transformers is imported here. Public names are imported at first use
(PEP 562), and registration (registration.py) waits for the modules that it concerns. Releases of torch and transformers
that the tests have not run on give one warning.
"""

import importlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hub_upload as hub_upload
    from .configuration.configuration_urform import UrformConfig, list_presets
    from .configuration.version_urform import VERSION as __version__
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
    "configuration.version_urform": ("__version__",),
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
_NAMED_THERE = {"__version__": "VERSION"}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name, or the module `hub_upload`, at its first use."""
    if name == "hub_upload":
        return importlib.import_module(f"{__name__}.hub_upload")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), _NAMED_THERE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "hub_upload"})


if __name__ == "urform":  # and not in a second copy under another name (pytest imports the root's __init__.py as one)
    from .dependencies import warn_untested
    from .registration import watch_imports

    warn_untested()
    watch_imports()
