# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Configs by the tables of `families.py`, both ways; nothing is taken on trust.

A config is converted and converted back, before any weight is read. What did not survive and changes numbers is
refused, all of it in one message; what did not survive and changes none is kept for the way back.
"""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields as dataclass_fields
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..configuration.checks_urform import check_size
from ..configuration.configuration_urform import UrformConfig
from ..configuration.unknown_fields import READ_BY_LIBRARY
from ..modeling import modeling_urform
from .families import FAMILIES
from .family import TOKEN_IDS, Family, Head

# What no config field says about numbers, on either side.
_BOOKKEEPING = frozenset(
    "architectures transformers_version dtype torch_dtype model_type name_or_path source_family source_fields "
    "source_weights urform attn_implementation auto_map base_model_tp_plan".split()
)
_TRAINING_ONLY = frozenset(
    "hidden_dropout_prob attention_dropout activation_dropout classifier_dropout freeze_pad_embedding".split()
)
_WITHOUT_EFFECT = _BOOKKEEPING | frozenset(
    "initializer initializer_range use_cache bos_token_id eos_token_id output_hidden_states return_dict "
    "chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder".split()
)
# What a config raises that cannot be; AttributeError in 5.17 where it does not expect rotary parameters per layer type.
_INVALID = (ValueError, StrictDataclassError, AttributeError)
LENGTH_ROPES = ("dynamic", "longrope")  # the rotary scalings whose frequencies follow a length
_REFUSED = ("quantization_config", "auto_map", "per_layer_config")


def _is_unset(name: str) -> Callable[[Any, Family], bool]:
    return lambda stock, family: not getattr(stock, name)


def _is_causal(stock: PreTrainedConfig, family: Family) -> bool:
    return {"decoder": bool(stock.is_causal), "encoder": not stock.is_causal}.get(family.fixed["architecture"], False)


# Fields that transformers looks for in every config (`getattr`, `hasattr`), though the classes of most families do not
# declare them: when they change no number. test_conversion_fields.py looks for those that a release adds.
_LOOKED_FOR: dict[str, Callable[[Any, Family], bool]] = {
    **{name: _is_unset(name) for name in (*READ_BY_LIBRARY, "fusion_config", "transformers_weights")},
    "is_causal": _is_causal,
    "layer_types": lambda stock, family: set(stock.layer_types or ()) <= {"full_attention"},
    "original_max_position_embeddings": lambda stock, family: True,  # in `rope_parameters` by now
    "sliding_window": lambda stock, family: stock.sliding_window is None,
    "tie_last_hidden_states": lambda stock, family: stock.tie_last_hidden_states in (None, True),
    "token_classification_bias": lambda stock, family: bool(stock.token_classification_bias),
}


def _as_read(stock: PreTrainedConfig) -> PreTrainedConfig:
    """A copy with what the models of transformers read: rotary parameters that stand beside `rope_parameters`."""
    stock = copy.deepcopy(stock)
    if "rope_parameters" in _names(stock) and stock.rope_parameters:
        stock.standardize_rope_params()
    return stock


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
    positions, counting, layout = config.position_encoding, config.position_counting, config.sinusoidal_layout
    waves = positions == "sinusoidal"
    absolute = waves or positions == "learned"
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
        "sinusoidal_layout": lambda: "halves" if language and layout == "interleaved" else layout,
        "position_counting": lambda: "columns" if waves and pairs and counting == "mask" else counting,
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
        "sinusoidal_layout": waves,
        **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), positions == "t5"),
        "rope_parameters": positions == "rope",
        "rope_length": positions == "rope" and any(p["rope_type"] in LENGTH_ROPES for p in _rope(config).values()),
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


def find_head(
    family: Family, *, stock: str | None = None, ours: str | None = None, came_as: Collection[str] = ()
) -> Head:
    """The row of a family's table for a stock class or for one of ours.

    Where two stock classes are one of ours, it is the first, or the one among `came_as`.

    Raises:
        ValueError: It has none.
    """
    found = [head for head in family.heads if (head.stock if stock else head.ours) == (stock or ours)]
    if found:
        return next((head for head in found if head.stock in came_as), found[0])
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
    stock = _as_read(stock)
    if head is None:
        named = [h for h in family.heads if h.stock in (stock.architectures or ())]
        head = (named or list(family.heads))[0]
    have = _public(stock)
    check_size("num_hidden_layers", stock.num_hidden_layers)  # before lists of that length are made
    obstacles = {name: repr(have[name]) for name in _REFUSED if have.get(name)}
    undeclared = have.keys() - _names(stock)
    obstacles |= {
        n: repr(have[n]) for n in sorted(_LOOKED_FOR.keys() & undeclared) if not _LOOKED_FOR[n](stock, family)
    }
    fields = family.to_urform(stock, head)
    extras = copy.deepcopy(have.get("urform") or {})
    if untied:
        fields["tie_word_embeddings"] = False
        extras.pop("tie_word_embeddings", None)
    kept: dict[str, Any] = {}
    try:
        config = _with_extras(family, head, fields, extras)
        if "source_family" not in extras:
            config.source_family = family.model_type
        back = _public(_build(family, family.to_stock(config, head)))
    except _INVALID as error:
        raise ValueError(_refusal(f"a {type(stock).__name__}", "Urform", obstacles, error)) from error
    lost = {}
    for name, value in have.items():
        if name in _BOOKKEEPING or name in obstacles or (name in back and back[name] == value):
            continue
        if name == "tie_word_embeddings" and untied:
            continue
        if name in TOKEN_IDS and fields.get(name) is None:  # no token of this vocabulary
            kept[name] = value
        elif name in family.training_only:
            lost[name] = kept[name] = value
        elif family.idle[name](stock) if name in family.idle else name in family.ignored:
            kept[name] = value
        elif name not in family.idle and (name not in back or (back[name] is None and value is False)):
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
        if head is not find_head(family, ours=head.ours):  # two classes there are one here
            kept["architectures"] = [head.stock]
        config.source_fields = kept or None
    return config


def _with_extras(family: Family, head: Head, fields: dict[str, Any], extras: dict[str, Any]) -> UrformConfig:
    """The config of these fields and of those extras on which no number depends: the family's own fields say those.

    An extra may have begun to matter: what a language model did not use may be what a classifier is made of.
    """
    want = what_matters(UrformConfig(**fields), head.ours)
    for name in family.fields.keys() & extras.keys() & _TRAINING_ONLY:
        del extras[name]
    while True:
        config = UrformConfig(**{**fields, **extras})
        have = what_matters(config, head.ours)
        wrong = {name for name in {*want, *have} if want.get(name) != have.get(name)} - set(family.held_by_weights)
        if not wrong & extras.keys():
            return config
        for name in wrong & extras.keys():
            del extras[name]


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
    if want.get("position_counting") == "columns" and config.position_counting == "mask":
        warnings.warn(
            f"{family.model_type} counts padding as positions: rows padded on the right give the same, rows padded on "
            "the left do not; pad on the right",
            stacklevel=3,
        )
    if config.source_family == family.model_type and config.source_fields:
        again = _build(family, {**fields, **copy.deepcopy(config.source_fields)})
        if _means(again, head, family, have):
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


def _means(stock: PreTrainedConfig, head: Head, family: Family, what: dict[str, Any]) -> bool:
    """Whether a stock config can be expressed, and comes to these numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return what_matters(urform_config(stock, head, family=family), head.ours) == what
        except ValueError:
            return False


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
        fields = config.source_fields if name == config.source_family and config.source_weights else None
        came_as = (fields or {}).get("architectures", ())
        head = find_head(family, ours=ours, came_as=came_as)
        return family, head, stock_config(config, family, head)
    reasons = []
    for family in FAMILIES.values():
        try:
            head = find_head(family, ours=ours)
            return family, head, stock_config(config, family, head)
        except ValueError as error:
            reasons.append(f"{family.model_type}: {error}")
    raise ValueError(f"no family can express this {ours}:\n" + "\n".join(reasons))
