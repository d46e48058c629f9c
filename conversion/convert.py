# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""The two functions that convert a model: `from_transformers` and `to_transformers`."""

import copy
import os
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..configuration.configuration_urform import UrformConfig
from .checkpoints import load_stock
from .engine import assemble, prepare_from, prepare_to


def from_transformers(model: PreTrainedModel | str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Return a Urform model that computes what a stock model computes, with the same weights.

    Args:
        model: A model of one of the families, or the folder or Hub id of one.
        **kwargs: For a folder or a Hub id: see `load_stock`.

    Raises:
        ValueError: There is no such family or class, or a config cannot be expressed; the message lists the fields that
            stand in the way. No weight has been read by then.
    """
    if not isinstance(model, PreTrainedModel):
        return load_stock(model, **kwargs)
    if kwargs:
        raise ValueError(f"{', '.join(kwargs)} is for a folder or a Hub id; model is a {type(model).__name__}: drop it")
    state = _state(model)
    conversion = prepare_from(model.config, type(model).__name__, state)
    return _carry(model, assemble(conversion, state, model.dtype, back=False))


def to_transformers(model: PreTrainedModel, family: str | None = None) -> PreTrainedModel:
    """Return the stock model that computes what a Urform model computes, with the same weights.

    Args:
        model: A Urform model.
        family: A `model_type` of transformers. None: where the model comes from, else the first that can express it.

    Raises:
        ValueError: The family (or none of them) can express the config; the message lists the fields that stand in the
            way.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, UrformConfig):
        raise ValueError(
            f"model is a {type(model).__name__}, not one of Urform's; convert those with from_transformers"
        )
    conversion = prepare_to(config, type(model).__name__, family)
    return _carry(model, assemble(conversion, _state(model), model.dtype, back=True))


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = model.state_dict()
    absent = [name for name, tensor in state.items() if tensor.is_meta]
    if absent:
        raise ValueError(f"{absent[0]} of the model has no storage (meta, offloaded); convert the checkpoint's folder")
    return state


def _carry(source: PreTrainedModel, target: Any) -> PreTrainedModel:
    """Copy what is not a weight: the generation config, the device, the mode, the name."""
    if target.can_generate() and source.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
    target.config._name_or_path = source.config._name_or_path
    moved: PreTrainedModel = target.to(source.device)
    return moved.train(source.training)
