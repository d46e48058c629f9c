# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Models by the tables of `families.py`, both ways: `from_transformers` and `to_transformers`."""

import copy
import os
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..configuration.configuration_urform import UrformConfig
from ..modeling import modeling_urform
from .configs import choose_family, find_family, find_head, urform_config
from .family import Family, Head
from .tensors import Side, Step, is_dropped, plan, reader, run_step


def empty(model_class: type[PreTrainedModel], config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model without storage, to read names and shapes of."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config), **options)


def stock_class(head: Head) -> type[PreTrainedModel]:
    """The class of transformers."""
    return getattr(transformers, head.stock)


def our_class(head: Head) -> type[PreTrainedModel]:
    """Urform's class."""
    return getattr(modeling_urform, head.ours)


def output_name(head: Head) -> str | None:
    """What the stock class calls its output projection."""
    names = [rule.stock for rule in head.weights if rule.ours == "lm_head.weight"]
    return names[0] if names and isinstance(names[0], str) else None


def is_untied(stock: PreTrainedModel, head: Head, state: Mapping[str, Tensor]) -> bool:
    """Whether an output projection that is tied by the config has values of its own."""
    name = output_name(head)
    side = Side.of(stock)
    twins = [twin for twin in side.tied.get(name, ()) if twin != name and twin in state] if name else []
    if not twins or name not in state:
        return False
    own, other = state[name], state[twins[0]]
    return own is not other and own.data_ptr() != other.data_ptr() and not torch.equal(own, other)


class Conversion(NamedTuple):
    """All that a conversion needs to know before it reads weights: both configs, and the steps."""

    family: Family
    head: Head
    ours: UrformConfig
    stock: PreTrainedConfig
    steps: list[Step]
    source: Side
    target: Side


def prepare_from(
    stock: PreTrainedConfig,
    name: str,
    state: Mapping[str, Tensor],
    rename: Callable[[Side, Head], None] | None = None,
) -> Conversion:
    """The conversion of a stock class of this config and these weights to Urform.

    Args:
        stock: The class's config.
        name: The class.
        state: Its tensors; none is read before the config has been found to be expressible.
        rename: Called before they are looked at, with the names that the class has: gives them those.
    """
    family = find_family(stock)
    head = find_head(family, stock=name)
    config = urform_config(stock, head, family=family)
    model = empty(stock_class(head), stock, **head.options)
    if rename is not None:
        rename(Side.of(model), head)
    if is_untied(model, head, state):
        with warnings.catch_warnings():  # given already
            warnings.simplefilter("ignore")
            config = urform_config(stock, head, family=family, untied=True)
    conversion = _prepare(family, head, config, stock, model, back=False)
    tied = conversion.source.tied
    for i, step in enumerate(conversion.steps):  # what a checkpoint may lack
        if step.fill is not None and not any(twin in state for name in step.sources for twin in tied[name]):
            conversion.steps[i] = step._replace(sources=())
    known = "|".join(model._keys_to_ignore_on_load_unexpected or ("$^",))
    behind = [key for key in state if key not in conversion.source.shapes or is_dropped(head, key)]
    behind = [key for key in behind if not re.search(known, key)]
    if behind:
        warnings.warn(f"Urform has no place for {', '.join(sorted(behind))} of {name}; left behind", stacklevel=3)
    return conversion


def prepare_to(config: UrformConfig, name: str, family: str | None) -> Conversion:
    """The conversion of our class of this config to a family."""
    found, head, stock = choose_family(config, name, family)
    return _prepare(found, head, config, stock, empty(stock_class(head), stock, **head.options), back=True)


def _prepare(
    family: Family, head: Head, config: UrformConfig, stock: PreTrainedConfig, model: PreTrainedModel, back: bool
) -> Conversion:
    name = output_name(head)
    theirs = Side.of(model, [name] if name and not config.tie_word_embeddings else ())
    ours = Side.of(empty(our_class(head), config))
    steps = plan(family, head, config, theirs, ours, back=back)
    return Conversion(family, head, config, stock, steps, *((ours, theirs) if back else (theirs, ours)))


def assemble(
    conversion: Conversion, state: Mapping[str, Tensor], dtype: torch.dtype, *, back: bool, cast: bool = False
) -> PreTrainedModel:
    """The model that a conversion leads to, of copies of the source's tensors, never views.

    Args:
        conversion: What to do.
        state: The source's tensors.
        dtype: The model's; a stock model's tensors keep their own unless `cast`.
        back: Whether to make the stock model; ours otherwise.
        cast: Give every tensor `dtype`.
    """
    head, read = conversion.head, reader(state, conversion.source)
    with no_init_weights():
        if back:
            model = stock_class(head)._from_config(conversion.stock, dtype=dtype, **head.options)
        else:
            model = our_class(head)._from_config(conversion.ours, dtype=dtype)
    made = {}
    for step in conversion.steps:
        for name, tensor in run_step(step, read, conversion.ours):
            made[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
            if cast or not back or not step.sources:  # stock T5 in float16 has some float32, Urform has one dtype
                made[name] = made[name].to(dtype)
    missing = model.load_state_dict(made, strict=False, assign=True).missing_keys
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    return model


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = model.state_dict()
    absent = [name for name, tensor in state.items() if tensor.is_meta]
    if absent:
        raise ValueError(f"{absent[0]} of the model has no storage (meta, offloaded); convert the checkpoint's folder")
    return state


def _carry(source: PreTrainedModel, target: PreTrainedModel) -> PreTrainedModel:
    """What is no weight: the generation config, the device, the mode, the name."""
    if target.can_generate() and source.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
    target.config._name_or_path = source.config._name_or_path
    return target.to(source.device).train(source.training)


def from_transformers(model: PreTrainedModel | str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """A Urform model that computes what a stock model computes, with the same weights.

    Args:
        model: A model of one of the families, or the folder or Hub id of one.
        **kwargs: For a folder or a Hub id: see `load_stock`.

    Raises:
        ValueError: No such family or class, or a config that cannot be expressed, with the fields that stand in the
            way; before any weight is read.
    """
    if not isinstance(model, PreTrainedModel):
        from .checkpoints import load_stock

        return load_stock(model, **kwargs)
    if kwargs:
        raise ValueError(f"{', '.join(kwargs)} is for a folder or a Hub id; model is a {type(model).__name__}: drop it")
    state = _state(model)
    conversion = prepare_from(model.config, type(model).__name__, state)
    return _carry(model, assemble(conversion, state, model.dtype, back=False))


def to_transformers(model: PreTrainedModel, family: str | None = None) -> PreTrainedModel:
    """The stock model that computes what a Urform model computes, with the same weights.

    Args:
        model: A Urform model.
        family: A `model_type` of transformers. None: where the model comes from, else the first that can express it.

    Raises:
        ValueError: The family (or none of them) can express the config; with the fields that stand in the way.
    """
    if not isinstance(getattr(model, "config", None), UrformConfig):
        raise ValueError(
            f"model is a {type(model).__name__}, not one of Urform's; convert those with from_transformers"
        )
    conversion = prepare_to(model.config, type(model).__name__, family)
    return _carry(model, assemble(conversion, _state(model), model.dtype, back=True))
