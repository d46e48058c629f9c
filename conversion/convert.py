# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Conversion by the tables of `families.py`: configs, tensors and models, both ways.

Nothing is taken on trust. A config is converted and converted back before any weight is read; what did not survive and
changes numbers is refused, all of it in one message. A model is converted by the names and shapes of both sides: a
tensor without a rule, or a rule without its tensor, is an error.
"""

import copy
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields as dataclass_fields
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..configuration.configuration_urform import UrformConfig
from ..modeling import modeling_urform
from .families import FAMILIES
from .family import Family, Fill, Head, Shapes, Tensors

Transform = Callable[[Tensors, Shapes, UrformConfig], Tensors]

# What no config field says about numbers, on either side.
_BOOKKEEPING = frozenset(
    "architectures transformers_version dtype torch_dtype model_type name_or_path source_family source_fields urform "
    "attn_implementation auto_map".split()
)
_TRAINING_ONLY = frozenset(
    "hidden_dropout_prob attention_dropout activation_dropout classifier_dropout freeze_pad_embedding".split()
)
_WITHOUT_EFFECT = _BOOKKEEPING | frozenset(
    "initializer initializer_range use_cache bos_token_id eos_token_id output_hidden_states return_dict "
    "chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder".split()
)
_INVALID = (ValueError, StrictDataclassError)  # what a config raises that cannot be
_REFUSED = ("quantization_config", "auto_map", "per_layer_config")


def _public(config: PreTrainedConfig) -> dict[str, Any]:
    names = _names(config)  # OPT has a field that begins with an underscore
    return {name: value for name, value in vars(config).items() if name in names or not name.startswith("_")}


def _names(config: PreTrainedConfig) -> set[str]:
    return {field.name for field in dataclass_fields(config)}


def _listed(obstacles: Mapping[str, str]) -> str:
    return "; ".join(f"{name}={what}" for name, what in obstacles.items())


# ------------------------------------------------------------------------------------------------------- what matters


def _rope(config: UrformConfig) -> dict[str, dict[str, Any]]:
    """The rotary parameters of each layer type in use."""
    kinds = {*config.layer_types, *(config.decoder_layer_types or ())}
    given = config.rope_parameters
    table = given if config.rope_is_per_layer_type else dict.fromkeys(kinds, given)
    return {kind: {"partial_rotary_factor": 1.0, **table[kind]} for kind in sorted(kinds)}


def what_matters(config: UrformConfig, ours: str) -> dict[str, Any]:
    """The fields on which the numbers of a model of class `ours` depend, each in one spelling.

    Dropout and initialisation are left out, and so is every axis that this config does not use.
    """
    names = _names(config) - _WITHOUT_EFFECT - _TRAINING_ONLY
    found = {name: getattr(config, name) for name in names}
    language = hasattr(getattr(modeling_urform, ours), "project")
    encodes, alone = config.architecture == "encoder", ours == "UrformEncoderModel"
    pairs = config.is_encoder_decoder and not alone
    classifies = ours in (
        "UrformForSequenceClassification",
        "UrformForTokenClassification",
        "UrformForMultipleChoice",
        "UrformForQuestionAnswering",
    )
    pools = ours in ("UrformForSequenceClassification", "UrformForMultipleChoice")
    dense = classifies and config.classifier_activation is not None and (pools or config.token_classifier_dense)
    positions = config.position_encoding
    absolute = positions in ("learned", "sinusoidal")
    scaled = positions == "rope" and any(p["rope_type"] != "default" for p in _rope(config).values())
    sliding = "sliding_attention" in {*config.layer_types, *(config.decoder_layer_types or ())}
    spelled = {
        "attention_scale": lambda: config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        "attention_out_bias": lambda: (
            config.attention_bias if config.attention_out_bias is None else config.attention_out_bias
        ),
        "final_norm": lambda: config.norm_position != "post" if config.final_norm is None else config.final_norm,
        "classifier_pooling": lambda: config.classifier_pooling or ("first" if encodes else "last"),
        "lm_head_activation": lambda: config.lm_head_activation or config.hidden_act,
        "rope_parameters": lambda: _rope(config) if positions == "rope" else None,
        "pad_token_id": lambda: config.pad_token_id if pools or pairs or config.position_counting == "tokens" else None,
    }
    applies = {
        **dict.fromkeys(("tie_word_embeddings", "lm_head_bias", "lm_head_transform"), language),
        **dict.fromkeys(("logit_scale", "final_logit_softcapping"), language),
        "lm_head_activation": language and config.lm_head_transform,
        "transform_bias": dense or (language and config.lm_head_transform),
        "classifier_pooling": pools,
        "classifier_activation": dense or (classifies and pools),
        "classifier_norm": dense,
        "classifier_bias": classifies and ours != "UrformForQuestionAnswering",
        "token_classifier_dense": classifies and not pools,
        "max_position_embeddings": positions == "learned" or scaled,
        **dict.fromkeys(("position_offset", "position_counting"), absolute),
        "sinusoidal_layout": positions == "sinusoidal",
        **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), positions == "t5"),
        "rope_parameters": positions == "rope",
        "sliding_window": sliding,
        "norm_bias": config.norm_type == "layernorm",
        **dict.fromkeys(("share_embeddings", *(name for name in names if name.startswith("decoder_"))), pairs),
        "architecture": not alone,
    }
    for name, spell in spelled.items():
        if name in found:
            found[name] = spell()
    found = {name: value for name, value in found.items() if applies.get(name, True)}
    if classifies:
        found.update(num_labels=config.num_labels, problem_type=config.problem_type)
    return found


# ------------------------------------------------------------------------------------------------------------ configs


def find_family(stock: PreTrainedConfig) -> Family:
    """The family of a stock config.

    Raises:
        ValueError: No table describes its `model_type`.
    """
    family = FAMILIES.get(stock.model_type)
    if family is None or type(stock).__name__ != family.stock_config:
        raise ValueError(
            f"model_type={stock.model_type!r} ({type(stock).__name__}) is no family that Urform converts; there are: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return family


def find_head(family: Family, *, stock: str | None = None, ours: str | None = None) -> Head:
    """The row of a family's table for a stock class or for one of ours.

    Raises:
        ValueError: It has none.
    """
    for head in family.heads:
        if (head.stock if stock else head.ours) == (stock or ours):
            return head
    have = ", ".join(dict.fromkeys(head.stock if stock else head.ours for head in family.heads))
    raise ValueError(
        f"{stock or ours} has no counterpart in the family {family.model_type!r}; there is one for: {have}"
    )


def urform_config(
    stock: PreTrainedConfig, head: Head | None = None, *, family: Family | None = None, untied: bool = False
) -> UrformConfig:
    """The Urform config of a stock config, checked by converting it back.

    Args:
        stock: A config of one of `FAMILIES`.
        head: The row of the class that it is for; None: by `stock.architectures`, else the backbone.
        family: None: by `stock.model_type`.
        untied: The weights say that the output projection is no embedding table, whatever the config says.

    Raises:
        ValueError: It cannot be expressed; the message lists every field that stands in the way.
    """
    family = family or find_family(stock)
    if head is None:
        named = [h for h in family.heads if h.stock in (stock.architectures or ())]
        head = (named or list(family.heads))[0]
    have = _public(stock)
    obstacles = {name: repr(have[name]) for name in _REFUSED if have.get(name)}
    fields = family.to_urform(stock, head)
    extras = copy.deepcopy(have.get("urform") or {})
    if untied:
        fields["tie_word_embeddings"] = False
        extras.pop("tie_word_embeddings", None)
    kept: dict[str, Any] = {}
    try:
        config = UrformConfig(**{**fields, **extras})
        back = _public(_build(family, family.to_stock(config, head)))
    except _INVALID as error:
        raise ValueError(_refusal(f"a {type(stock).__name__}", "Urform", obstacles, error)) from error
    lost = {}
    for name, value in have.items():
        if name in _BOOKKEEPING or name in obstacles or (name in back and back[name] == value):
            continue
        if name == "tie_word_embeddings" and untied:
            continue
        if name in family.training_only:
            lost[name] = kept[name] = value
        elif name in family.ignored or name not in back or (back[name] is None and value is False):
            kept[name] = value
        else:
            obstacles[name] = repr(value)
    if obstacles:
        raise ValueError(_refusal(f"a {type(stock).__name__}", "Urform", obstacles))
    if lost:
        warnings.warn(
            f"{type(stock).__name__}: only training depends on {_listed({k: repr(v) for k, v in lost.items()})}, which "
            "Urform lacks; kept in source_fields for the way back",
            stacklevel=3,
        )
    if "source_family" not in extras:
        config.source_family, config.source_fields = family.model_type, kept or None
    return config


def _refusal(what: str, where: str, obstacles: Mapping[str, str], error: Exception | None = None) -> str:
    reasons = ([_listed(obstacles)] if obstacles else []) + ([" ".join(str(error).split())] if error else [])
    return f"{what} cannot be expressed in {where}; in the way stand: {'; '.join(reasons)}"


def _build(family: Family, fields: dict[str, Any]) -> PreTrainedConfig:
    config_class = getattr(transformers, family.stock_config)
    known = _names(config_class) | set(config_class.attribute_map)  # None for another would be a field of no meaning
    return config_class(**{name: value for name, value in fields.items() if name in known or value is not None})


def stock_config(config: UrformConfig, family: Family, head: Head) -> PreTrainedConfig:
    """The stock config of a Urform config for one class of a family, checked by converting it back.

    What it cannot hold and changes no numbers is in its attribute `urform` (a dict), for the way back.

    Raises:
        ValueError: The family cannot express it; the message lists every field that stands in the way.
    """
    fields = family.to_stock(config, head)
    try:
        stock = _build(family, fields)
        back = UrformConfig(**family.to_urform(stock, head))
    except _INVALID as error:
        raise ValueError(_refusal("this UrformConfig", family.model_type, {}, error)) from error
    want, have = what_matters(config, head.ours), what_matters(back, head.ours)
    obstacles = {
        name: f"{want.get(name)!r} (there {have.get(name)!r})"
        for name in sorted({*want, *have})
        if want.get(name) != have.get(name) and name not in family.held_by_weights
    }
    if obstacles:
        raise ValueError(_refusal("this UrformConfig", family.model_type, obstacles))
    if config.source_family == family.model_type and config.source_fields:
        again = _build(family, {**fields, **copy.deepcopy(config.source_fields)})
        if what_matters(UrformConfig(**family.to_urform(again, head)), head.ours) == have:
            stock = again
            back = UrformConfig(**family.to_urform(stock, head))
    ours, theirs = _public(config), _public(back)
    differ = {k: v for k, v in ours.items() if (k not in theirs or theirs[k] != v) and k not in _BOOKKEEPING}
    lost = {k: v for k, v in differ.items() if k in _TRAINING_ONLY and v is not None}
    if lost:
        warnings.warn(
            f"only training depends on {_listed({k: repr(v) for k, v in lost.items()})}, which {family.model_type} "
            "lacks; kept in its config's attribute `urform` for the way back",
            stacklevel=3,
        )
    if config.source_family != family.model_type:
        differ.update(source_family=config.source_family, source_fields=config.source_fields)
    if differ:
        stock.urform = copy.deepcopy(differ)
    stock.architectures = [head.stock]
    return stock


def choose_family(config: UrformConfig, ours: str, name: str | None = None) -> tuple[Family, Head, PreTrainedConfig]:
    """The family to convert to: the named one, else where the config comes from, else the first that can express it.

    Raises:
        ValueError: None can, or the named one cannot; with what stands in the way.
    """
    if name is not None and name not in FAMILIES:
        raise ValueError(f"family={name!r} is unknown; there are: {', '.join(sorted(FAMILIES))}")
    name = name or config.source_family
    if name is not None and name in FAMILIES:
        family = FAMILIES[name]
        head = find_head(family, ours=ours)
        return family, head, stock_config(config, family, head)
    reasons = []
    for family in FAMILIES.values():
        try:
            head = find_head(family, ours=ours)
            return family, head, stock_config(config, family, head)
        except ValueError as error:
            reasons.append(f"{family.model_type}: {error}")
    raise ValueError(f"no family can express this {ours}:\n" + "\n".join(reasons))


# ------------------------------------------------------------------------------------------------------------ tensors


class Step(NamedTuple):
    """One rule for one layer: read `sources`, apply `op`, write `targets` of these shapes.

    One side may be empty: `targets` are filled with `fill`, or `sources` must be full of it and are left behind.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    op: Transform
    fill: Fill | None = None


class Side(NamedTuple):
    """The tensors of a model: name to shape, and name to the names that share its storage (itself among them)."""

    shapes: dict[str, torch.Size]
    tied: dict[str, tuple[str, ...]]
    prefix: str

    @classmethod
    def of(cls, model: PreTrainedModel, untied: Collection[str] = ()) -> "Side":
        """Of a model on any device, meta too; `untied` names tensors to be counted alone."""
        tensors = model.state_dict(keep_vars=True)
        groups: dict[Any, list[str]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(name if name in untied else id(tensor), []).append(name)
        prefix = model.base_model_prefix
        return cls(
            {name: tensor.shape for name, tensor in tensors.items()},
            {name: tuple(group) for group in groups.values() for name in group},
            f"{prefix}." if prefix and hasattr(model, prefix) else "",
        )


def _instances(family: Family, head: Head, config: UrformConfig, stock: Side, ours: Side) -> Iterator[tuple]:
    """Every rule for every layer, as (rule, names there, names here)."""
    layers = max(config.num_hidden_layers, config.decoder_num_hidden_layers or 0)
    for rules, there, here in ((family.weights, stock.prefix, ours.prefix), (head.weights, "", "")):
        for rule in rules:
            for layer in range(layers if rule.names(0) != rule.names(1) else 1):
                theirs, own = rule.names(layer)
                yield rule, tuple(there + name for name in theirs), tuple(here + name for name in own)


def plan(family: Family, head: Head, config: UrformConfig, stock: Side, ours: Side, *, back: bool) -> list[Step]:
    """Which tensors become which; `back` is the way from Urform to the stock class.

    Raises:
        ValueError: A tensor of either side has no rule: the table is incomplete.
    """
    left_theirs = {name for name in stock.shapes if not _is_dropped(head, name)}
    left_ours = set(ours.shapes)
    steps: list[Step] = []
    for rule, theirs, own in _instances(family, head, config, stock, ours):
        here = all(name in ours.shapes for name in own)
        if not all(name in stock.shapes for name in theirs) or not (here or rule.fill is not None):
            continue
        own = own if here else ()
        sources, targets, side = (own, theirs, stock) if back else (theirs, own, ours)
        left = left_theirs if back else left_ours
        if not targets or left.intersection(targets):  # else written already, under the name of a tied tensor
            shapes = tuple(side.shapes[name] for name in targets)
            op = rule.op.to_stock if back else rule.op.to_ours
            steps.append(Step(sources, targets, shapes, op, rule.fill))
        left_theirs.difference_update(*(stock.tied[name] for name in theirs))
        left_ours.difference_update(*(ours.tied[name] for name in own))
    if left_theirs or left_ours:
        raise ValueError(
            f"the table of the family {family.model_type!r} has no rule for {sorted(left_theirs)} of {head.stock} and "
            f"{sorted(left_ours)} of {head.ours}"
        )
    return steps


def run_step(step: Step, read: Callable[[str], Tensor], config: UrformConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a step by name, as its rule makes them of what `read` gives for a name.

    Raises:
        ValueError: A tensor has another shape than the config says, or should be constant and is not.
    """
    sources = [read(name) for name in step.sources]
    if step.fill is not None and not (sources and step.targets):
        for name, tensor in zip(step.sources, sources, strict=False):
            if not torch.allclose(tensor.float(), _full(tensor.shape, step.fill), atol=torch.finfo(tensor.dtype).eps):
                what = step.fill if isinstance(step.fill, float) else "what its class makes of it"
                raise ValueError(f"{name} is not {what} throughout, but Urform's config has no such tensor")
        yield from ((name, _full(shape, step.fill)) for name, shape in zip(step.targets, step.shapes, strict=True))
        return
    for name, shape, tensor in zip(step.targets, step.shapes, step.op(sources, step.shapes, config), strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name} comes out as {list(tensor.shape)}, the config says {list(shape)}")
        yield name, tensor


def _full(shape: torch.Size, fill: Fill) -> Tensor:
    return torch.full(shape, fill) if isinstance(fill, float) else fill(shape)


def reader(state: Mapping[str, Tensor], side: Side) -> Callable[[str], Tensor]:
    """How to read a tensor of a side from `state`, under whichever of its tied names it is there."""

    def read(name: str) -> Tensor:
        for twin in (name, *side.tied[name]):
            if twin in state:
                return state[twin]
        raise ValueError(f"the weights lack {name}; the checkpoint is incomplete or of another class")

    return read


# ------------------------------------------------------------------------------------------------------------- models


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
    behind = [key for key in state if key not in conversion.source.shapes or _is_dropped(head, key)]
    behind = [key for key in behind if not re.search(known, key)]
    if behind:
        warnings.warn(f"Urform has no place for {', '.join(sorted(behind))} of {name}; left behind", stacklevel=3)
    return conversion


def _is_dropped(head: Head, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in head.dropped)


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
