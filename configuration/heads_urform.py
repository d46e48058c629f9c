# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""The one table of heads: which Auto class makes which of our classes, and which architectures a class serves.

Registration with transformers, the `auto_map` of a bundle, the snippets of a model card and the refusal of a wrong
architecture by the models all read it.
"""

from typing import NamedTuple


class Head(NamedTuple):
    """A row of the table.

    Attributes:
        auto_class: The Auto class of transformers that makes it; None for what is a part of a model or a base class.
        name: Our class.
        architectures: What `UrformConfig.architecture` may be for it.
    """

    auto_class: str | None
    name: str
    architectures: tuple[str, ...]


_ENCODER, _DECODER, _BOTH = "encoder", "decoder", "encoder-decoder"

TABLE = (
    Head("AutoModel", "UrformModel", (_ENCODER, _DECODER, _BOTH)),
    Head("AutoModelForSeq2SeqLM", "UrformForConditionalGeneration", (_BOTH,)),
    Head("AutoModelForCausalLM", "UrformForCausalLM", (_DECODER,)),
    Head("AutoModelForMaskedLM", "UrformForMaskedLM", (_ENCODER,)),
    Head("AutoModelForSequenceClassification", "UrformForSequenceClassification", (_ENCODER, _DECODER, _BOTH)),
    Head("AutoModelForTokenClassification", "UrformForTokenClassification", (_ENCODER, _DECODER)),
    Head("AutoModelForQuestionAnswering", "UrformForQuestionAnswering", (_ENCODER, _DECODER, _BOTH)),
    Head("AutoModelForMultipleChoice", "UrformForMultipleChoice", (_ENCODER, _DECODER)),
    Head("AutoModelForTextEncoding", "UrformEncoderModel", (_ENCODER, _BOTH)),
    Head(None, "UrformEncoder", (_ENCODER, _BOTH)),
    Head(None, "UrformDecoder", (_DECODER, _BOTH)),
    Head(None, "UrformPreTrainedModel", (_ENCODER, _DECODER, _BOTH)),
)

# Auto class -> our class and the architectures that it serves.
HEADS = {head.auto_class: (head.name, head.architectures) for head in TABLE if head.auto_class is not None}
_SERVED = {head.name: head.architectures for head in TABLE}


def architectures_of(model_class: type) -> tuple[str, ...]:
    """Return the architectures that a class serves: those of the nearest of its base classes that is in the table.

    Raises:
        ValueError: the class is none of Urform's and derives from none of them.
    """
    for base in model_class.__mro__:
        if base.__name__ in _SERVED:
            return _SERVED[base.__name__]
    raise ValueError(f"{model_class.__name__} derives from none of Urform's classes: {', '.join(_SERVED)}")


def auto_map(architecture: str) -> dict[str, str]:
    """Return the `auto_map` of a model repository: the config and every head that serves `architecture`."""
    heads = {auto: f"modeling_urform.{name}" for auto, (name, serves) in HEADS.items() if architecture in serves}
    return {"AutoConfig": "configuration_urform.UrformConfig", **heads}
