# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""The engine: `prepare_from` and `prepare_to` plan a conversion by the tables of `families.py`; `assemble` runs it."""

import copy
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

# What old checkpoints hold and transformers computes when a model is made.
_MADE_BY_THE_CLASS = r"(^|\.)position_ids$|rotary_emb\.inv_freq$"


def empty(model_class: type[PreTrainedModel], config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Return a model without storage, to read names and shapes from."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config), **options)


def stock_class(head: Head) -> type[PreTrainedModel]:
    """Return the class of transformers."""
    return getattr(transformers, head.stock)


def our_class(head: Head) -> type[PreTrainedModel]:
    """Return Urform's class."""
    return getattr(modeling_urform, head.ours)


def output_name(head: Head) -> str | None:
    """Return the name of the output projection in the stock class; None if it has none."""
    names = [rule.stock for rule in head.weights if rule.ours == "lm_head.weight"]
    return names[0] if names and isinstance(names[0], str) else None


def is_untied(stock: PreTrainedModel, head: Head, state: Mapping[str, Tensor]) -> bool:
    """Check whether an output projection that the config ties has values of its own."""
    name = output_name(head)
    if name is None or name not in state:
        return False
    twins = [twin for twin in Side.of(stock).tied.get(name, ()) if twin != name and twin in state]
    if not twins:
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
    """Plan the conversion of a stock class with this config and these weights to Urform.

    Args:
        stock: The class's config.
        name: The class.
        state: Its tensors; none is read before the config has been found to be expressible.
        rename: Called with the tensors of the class before the state is read; it gives the state their names.
    """
    family = find_family(stock)
    head = find_head(family, stock=name)
    config = urform_config(stock, head, family=family)
    model = empty(stock_class(head), stock, **head.options)
    if rename is not None:
        rename(Side.of(model), head)
    if is_untied(model, head, state):
        with warnings.catch_warnings():  # the first call has warned
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
    """Return what a checkpoint has and Urform has no place for, on the meta device.

    Tensors that the stock class ignores as well are left out.
    """
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
    """Plan the conversion of our class with this config to a family."""
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


def _places(kept: Mapping[str, list[Any]], prefix: str, whole: Side) -> dict[str, str]:
    """Return {name in the class, or in the checkpoint where the class has none: name in `source_weights`}."""
    places = {}
    for name, (_, shape) in kept.items():
        names = [n for n in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if n in whole.shapes]
        places[names[0] if names and list(whole.shapes[names[0]]) == shape else name] = name
    return places


def assemble(
    conversion: Conversion, state: Mapping[str, Tensor], dtype: torch.dtype, *, back: bool, cast: bool = False
) -> PreTrainedModel:
    """Return the converted model. Its tensors are copies of the source's, never views.

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
