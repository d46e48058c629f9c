# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Configs by the tables of `families.py`, both ways. Every conversion is checked.

A config is converted and converted back, before any weight is read. What did not survive and changes numbers is
refused, all of it in one message; what did not survive and changes none is kept for the way back.
"""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..configuration.checks_urform import check_size, filled
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
    """Return a copy with what the models of transformers read: separate rotary fields go into `rope_parameters`."""
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

_POOLING = ("UrformForSequenceClassification", "UrformForMultipleChoice")
_CLASSIFIERS = (*_POOLING, "UrformForTokenClassification", "UrformForQuestionAnswering")


@dataclass(frozen=True)
class _Use:
    """What a model of the class `ours` with this config uses: the conditions of the two tables below."""

    config: UrformConfig
    ours: str

    @property
    def is_encoder_alone(self) -> bool:
        return self.ours == "UrformEncoderModel"

    @property
    def has_two_stacks(self) -> bool:
        return self.config.is_encoder_decoder and not self.is_encoder_alone

    @property
    def has_lm_head(self) -> bool:
        return hasattr(getattr(modeling_urform, self.ours), "project")

    @property
    def has_lm_transform(self) -> bool:
        return self.has_lm_head and self.config.lm_head_transform

    @property
    def classifies(self) -> bool:
        return self.ours in _CLASSIFIERS

    @property
    def pools(self) -> bool:
        return self.ours in _POOLING

    @property
    def has_dense_classifier(self) -> bool:
        wanted = self.pools or self.config.token_classifier_dense
        return self.classifies and self.config.classifier_activation is not None and wanted

    @property
    def positions(self) -> str:
        return self.config.position_encoding

    @property
    def has_absolute_positions(self) -> bool:
        return self.positions in ("sinusoidal", "learned")

    @property
    def rope_types(self) -> set[str]:
        rope = _rope(self.config) if self.positions == "rope" else {}
        return {parameters["rope_type"] for parameters in rope.values()}

    @property
    def layer_types(self) -> set[str]:
        return {*(self.config.layer_types or ()), *(self.config.decoder_layer_types or ())}


def _rope(config: UrformConfig) -> dict[str, dict[str, Any]]:
    """Return the rotary parameters of each layer type in use."""
    kinds = _Use(config, "").layer_types
    parameters: dict[str, Any] = filled(config.rope_parameters)
    by_kind = parameters if config.rope_is_per_layer_type else dict.fromkeys(kinds, parameters)
    return {kind: {"partial_rotary_factor": 1.0, **by_kind[kind]} for kind in sorted(kinds)}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


# Fields that say one thing in several ways: the one way that is compared.
_SPELLED: dict[str, Callable[[_Use], Any]] = {
    "attention_scale": lambda use: _or(use.config.attention_scale, use.config.head_dim**-0.5),
    "attention_out_bias": lambda use: _or(use.config.attention_out_bias, use.config.attention_bias),
    "final_norm": lambda use: _or(use.config.final_norm, use.config.norm_position != "post"),
    "classifier_pooling": lambda use: (
        use.config.classifier_pooling or ("first" if use.config.architecture == "encoder" else "last")
    ),
    "lm_head_activation": lambda use: use.config.lm_head_activation or use.config.hidden_act,
    "rope_parameters": lambda use: _rope(use.config) if use.positions == "rope" else None,
    "sinusoidal_layout": lambda use: (  # "interleaved" is a matter of the order of features: see Family.reorders
        "halves" if use.has_lm_head and use.config.sinusoidal_layout == "interleaved" else use.config.sinusoidal_layout
    ),
    "position_counting": lambda use: (
        "columns"
        if use.positions == "sinusoidal" and use.has_two_stacks and use.config.position_counting == "mask"
        else use.config.position_counting
    ),
    "pad_token_id": lambda use: (
        use.config.pad_token_id if use.pools or use.has_two_stacks or use.config.position_counting == "tokens" else None
    ),
}
# Fields on which numbers depend only sometimes: when they do. Those of the decoder: with two stacks.
_APPLIES: dict[str, Callable[[_Use], bool]] = {
    **dict.fromkeys(
        ("tie_word_embeddings", "lm_head_bias", "lm_head_transform", "logit_scale", "final_logit_softcapping"),
        lambda use: use.has_lm_head,
    ),
    "lm_head_activation": lambda use: use.has_lm_transform,
    "transform_bias": lambda use: use.has_dense_classifier or use.has_lm_transform,
    "classifier_pooling": lambda use: use.pools,
    "classifier_activation": lambda use: use.has_dense_classifier or use.pools,
    "classifier_norm": lambda use: use.has_dense_classifier,
    "classifier_bias": lambda use: use.classifies and use.ours != "UrformForQuestionAnswering",
    "token_classifier_dense": lambda use: use.classifies and not use.pools,
    "max_position_embeddings": lambda use: use.positions == "learned" or bool(use.rope_types - {"default"}),
    **dict.fromkeys(("position_offset", "position_counting"), lambda use: use.has_absolute_positions),
    "sinusoidal_layout": lambda use: use.positions == "sinusoidal",
    **dict.fromkeys(
        ("relative_attention_num_buckets", "relative_attention_max_distance"), lambda use: use.positions == "t5"
    ),
    "rope_parameters": lambda use: use.positions == "rope",
    "rope_length": lambda use: not use.rope_types.isdisjoint(LENGTH_ROPES),
    "sliding_window": lambda use: "sliding_attention" in use.layer_types,
    "norm_bias": lambda use: use.config.norm_type == "layernorm",
    "share_embeddings": lambda use: use.has_two_stacks,
    "architecture": lambda use: not use.is_encoder_alone,
}


def what_matters(config: UrformConfig, ours: str) -> dict[str, Any]:
    """Return the fields on which the numbers of a model of class `ours` depend, each in one spelling.

    Dropout and initialisation are left out, and so is every axis that this config does not use.
    """
    use, found = _Use(config, ours), {}
    for name in _names(config) - _WITHOUT_EFFECT - _TRAINING_ONLY:
        applies = use.has_two_stacks if name.startswith("decoder_") else _APPLIES.get(name, lambda use: True)(use)
        if applies:
            found[name] = _SPELLED[name](use) if name in _SPELLED else getattr(config, name)
    if use.classifies:
        found.update(num_labels=config.num_labels, problem_type=config.problem_type)
    return found


# ------------------------------------------------------------------------------------------------------------ configs


def find_family(stock: PreTrainedConfig) -> Family:
    """Return the family of a stock config.

    Raises:
        ValueError: No table describes its `model_type`.
    """
    family = FAMILIES.get(stock.model_type)
    if family is None or type(stock).__name__ != family.stock_config:
        raise ValueError(
            f"model_type={stock.model_type!r} ({type(stock).__name__}) is not a family that Urform converts; "
            f"there are: {', '.join(sorted(FAMILIES))}"
        )
    return family


def find_head(
    family: Family, *, stock: str | None = None, ours: str | None = None, came_as: Collection[str] = ()
) -> Head:
    """Return the row of a family's table for a stock class or for one of ours.

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
    """Return the Urform config of a stock config, checked by converting it back.

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
    head = head or _named_head(family, stock)
    have = _public(stock)
    check_size("num_hidden_layers", stock.num_hidden_layers)  # before lists of that length are made
    obstacles = _refused_fields(stock, family, have)
    fields = family.to_urform(stock, head)
    extras = copy.deepcopy(have.get("urform") or {})
    skipped = {*_BOOKKEEPING, *obstacles}
    if untied:
        fields["tie_word_embeddings"] = False
        extras.pop("tie_word_embeddings", None)
        skipped.add("tie_word_embeddings")
    try:
        config = _with_extras(family, head, fields, extras)
        config.source_family = extras.get("source_family", family.model_type)
        back = _public(_build(family, family.to_stock(config, head)))
    except _INVALID as error:
        raise ValueError(_refusal(f"a {type(stock).__name__}", "Urform", obstacles, error)) from error
    differ = _not_restored(have, back, skipped)
    losses = _losses(differ, stock, family, fields, back)
    obstacles |= losses["numbers"]
    if obstacles:
        raise ValueError(_refusal(f"a {type(stock).__name__}", "Urform", obstacles))
    if losses["training"]:
        warnings.warn(
            f"{type(stock).__name__}: only training depends on {_listed(losses['training'])}, which Urform lacks; kept "
            "in source_fields for the way back",
            stacklevel=3,
        )
    if "source_family" not in extras:
        if head is not find_head(family, ours=head.ours):  # two classes there are one here
            differ["architectures"] = [head.stock]
        config.source_fields = differ or None
    return config


def _named_head(family: Family, stock: PreTrainedConfig) -> Head:
    """Return the row of the class that a config names, else of the backbone."""
    named = [head for head in family.heads if head.stock in (stock.architectures or ())]
    return named[0] if named else family.heads[0]


def _refused_fields(stock: PreTrainedConfig, family: Family, have: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields that are not converted in any family, and those that only the library reads, as text."""
    refused = [name for name in _REFUSED if have.get(name)]
    undeclared = have.keys() - _names(stock)
    refused += [name for name in sorted(_LOOKED_FOR.keys() & undeclared) if not _LOOKED_FOR[name](stock, family)]
    return {name: repr(have[name]) for name in refused}


def _not_restored(fields: Mapping[str, Any], back: Mapping[str, Any], skipped: Collection[str]) -> dict[str, Any]:
    """Return the fields that did not come back as they went."""
    return {k: v for k, v in fields.items() if k not in skipped and (k not in back or back[k] != v)}


def _losses(
    differ: Mapping[str, Any],
    stock: PreTrainedConfig,
    family: Family,
    fields: Mapping[str, Any],
    back: Mapping[str, Any],
) -> dict[str, dict[str, str]]:
    """Return fields of a stock config that did not come back as they went, as text, by what depends on them.

    Args:
        differ: These fields.
        stock: The config.
        family: The family.
        fields: The fields of ours that were made of the config.
        back: The fields that came back.

    Returns:
        {"nothing" | "training" | "numbers": {name: value}}.
    """
    losses: dict[str, dict[str, str]] = {"nothing": {}, "training": {}, "numbers": {}}
    for name, value in differ.items():
        is_unset = name not in back or (back[name] is None and value is False)
        if name in TOKEN_IDS and fields.get(name) is None:  # no token of this vocabulary
            kind = "nothing"
        elif name in family.training_only:
            kind = "training"
        elif name in family.idle:
            kind = "nothing" if family.idle[name](stock) else "numbers"
        else:
            kind = "nothing" if name in family.ignored or is_unset else "numbers"
        losses[kind][name] = repr(value)
    return losses


def _with_extras(family: Family, head: Head, fields: dict[str, Any], extras: dict[str, Any]) -> UrformConfig:
    """Return the config of these fields and of those extras on which no number depends.

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
    """Return the stock config of a Urform config for one class of a family, checked by converting it back.

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
    if obstacles := _differing(want, have, family):
        raise ValueError(_refusal("this UrformConfig", family.model_type, obstacles))
    if want.get("position_counting") == "columns" and config.position_counting == "mask":
        warnings.warn(
            f"{family.model_type} counts padding as positions: rows padded on the right give the same, rows padded on "
            "the left do not; pad on the right",
            stacklevel=3,
        )
    if config.source_family == family.model_type and config.source_fields:
        original = _build(family, {**fields, **copy.deepcopy(config.source_fields)})
        if _means(original, head, family, have):
            stock = original
            back = UrformConfig(**family.to_urform(stock, head))
    extras = _not_restored(_public(config), _public(back), _BOOKKEEPING)
    if training := {k: repr(v) for k, v in extras.items() if k in _TRAINING_ONLY and v is not None}:
        warnings.warn(
            f"only training depends on {_listed(training)}, which {family.model_type} lacks; kept in its config's "
            "attribute `urform` for the way back",
            stacklevel=3,
        )
    if config.source_family != family.model_type:
        extras.update(source_family=config.source_family, source_fields=config.source_fields)
    if extras:
        stock.urform = copy.deepcopy(extras)
    stock.architectures = [head.stock]
    return stock


def _differing(want: Mapping[str, Any], have: Mapping[str, Any], family: Family) -> dict[str, str]:
    """Return the fields that matter and that a family cannot hold, with both values as text."""
    names = [name for name in sorted({*want, *have}) if want.get(name) != have.get(name)]
    return {
        name: f"{want.get(name)!r} (there {have.get(name)!r})" for name in names if name not in family.held_by_weights
    }


def _means(stock: PreTrainedConfig, head: Head, family: Family, what: dict[str, Any]) -> bool:
    """Check whether a stock config can be expressed, and comes to these numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return what_matters(urform_config(stock, head, family=family), head.ours) == what
        except ValueError:
            return False


def choose_family(config: UrformConfig, ours: str, name: str | None = None) -> tuple[Family, Head, PreTrainedConfig]:
    """Return the family to convert to: the named one, else the config's source, else the first that can express it.

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
