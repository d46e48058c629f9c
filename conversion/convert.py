# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Models by the tables of `families.py`, both ways: `from_transformers` and `to_transformers`."""

import copy
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..configuration.configuration_urform import UrformConfig
from ..modeling import modeling_urform
from .configs import choose_family, find_family, find_head, urform_config
from .family import TWICE, Family, Head
from .tensors import SOURCE_WEIGHTS, Side, Step, is_dropped, plan, reader, run_step

# What old checkpoints hold and transformers makes anew.
_MADE_BY_THE_CLASS = r"(^|\.)position_ids$|rotary_emb\.inv_freq$"


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
    theirs = Side.of(model, _untied_output(head, config))
    left = _left_behind(head, state, theirs, type(model)._keys_to_ignore_on_load_unexpected or ())
    if left:
        config.source_weights = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in left.items()}
        theirs = theirs.holding({name: tensor.shape for name, tensor in left.items()})
    ours = Side.of(empty(our_class(head), config))
    kept = {name: _own_name(ours, name) for name in left}
    steps = plan(family, head, config, theirs, ours, back=False, kept=kept)
    for i, step in enumerate(steps):  # what a checkpoint may lack
        if step.fill is not None and not any(twin in state for name in step.sources for twin in theirs.tied[name]):
            steps[i] = step._replace(sources=())
    return Conversion(family, head, config, stock, steps, theirs, ours)


def _untied_output(head: Head, config: UrformConfig) -> list[str]:
    name = output_name(head)
    return [name] if name and not config.tie_word_embeddings else []


def _left_behind(head: Head, state: Mapping[str, Tensor], theirs: Side, ignored: Collection[str]) -> dict[str, Tensor]:
    """What a checkpoint has and ours has no place for; without what the stock class overlooks too. On no device."""
    names = [name for name in state if name not in theirs.shapes or is_dropped(head, name)]
    names = [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
    for first, second in (rule.names(0)[0] for rule in head.weights if rule.op is TWICE):
        alone = theirs.tied.get(second) == (second,) and first in state and second in state
        if alone and not torch.equal(state[first], state[second]):
            names.append(second)
    return {name: torch.empty_like(state[name], device="meta") for name in sorted(names)}


def _own_name(ours: Side, name: str) -> str:
    return f"{ours.prefix}{SOURCE_WEIGHTS}{name.replace('.', '/')}"


def prepare_to(config: UrformConfig, name: str, family: str | None) -> Conversion:
    """The conversion of our class of this config to a family."""
    found, head, stock = choose_family(config, name, family)
    ours = Side.of(empty(our_class(head), config))
    kept = config.source_weights or {}
    if kept and config.source_family != found.model_type:
        warnings.warn(f"{', '.join(kept)} came with {config.source_family}; {head.stock} lacks them", stacklevel=3)
        kept = {}
    whole = Side.of(empty(stock_class(head), stock))
    places = _places(kept, stock_class(head).base_model_prefix, whole)
    theirs = Side.of(empty(stock_class(head), stock, **head.options), _untied_output(head, config))
    if whole.shapes.keys() - theirs.shapes.keys() <= places.keys():  # BERT's pooler came along
        head = replace(head, options={})
        theirs = Side.of(empty(stock_class(head), stock), _untied_output(head, config))
    theirs = theirs.holding({place: torch.Size(kept[name][1]) for place, name in places.items()})
    own_names = {place: _own_name(ours, name) for place, name in places.items()}
    steps = plan(found, head, config, theirs, ours, back=True, kept=own_names)
    return Conversion(found, head, config, stock, steps, ours, theirs)


def _places(kept: Mapping[str, list], prefix: str, whole: Side) -> dict[str, str]:
    """{name of the class, or of the checkpoint where the class has none: name in `source_weights`}."""
    places = {}
    for name, (_, shape) in kept.items():
        names = [n for n in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if n in whole.shapes]
        places[names[0] if names and list(whole.shapes[names[0]]) == shape else name] = name
    return places


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
            kept = SOURCE_WEIGHTS in name or any(SOURCE_WEIGHTS in source for source in step.sources)
            if not kept and (cast or not back or not step.sources):
                made[name] = made[name].to(dtype)  # stock T5 in float16 has some float32, Urform has one dtype
    missing, strange = model.load_state_dict(made, strict=False, assign=True)
    strange = [name for name in strange if not re.search(_MADE_BY_THE_CLASS, name)]
    if strange:
        warnings.warn(f"{', '.join(strange)} came along, but {head.stock} has no place for them", stacklevel=3)
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
