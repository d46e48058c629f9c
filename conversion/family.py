# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""What a family of transformers is, as data: its config and its weights against Urform's, both ways.

A family is one `Family`: how its config's fields are called here (`fields`), what they always are (`fixed`), what is
no plain rename (`axes`), which of its classes is which of ours (`heads`), and how its tensors are called, cut and
turned (`weights`). `configs.py` and `tensors.py` read these tables; nothing else knows a family. There is no code per
tensor, and what a table does not say is refused: a config that does not come back as it went stands in the way, and so
does a tensor without a rule. A worked example, complete but for its other heads:

    GPT2 = Family(
        "gpt2",
        "GPT2Config",
        fixed={"architecture": "decoder", "position_encoding": "learned", "classifier_activation": None},
        fields={**same("vocab_size", "hidden_size"), "norm_eps": "layer_norm_epsilon"},
        axes=(
            Axis(  # n_inner=None stands for 4 * n_embd
                lambda stock: {"intermediate_size": stock.n_inner or 4 * stock.n_embd},
                lambda config: {"n_inner": config.intermediate_size},
            ),
        ),
        ignored=("n_inner",),  # the axis reads it; None and 4 * n_embd are one
        training_only=("embd_pdrop",),
        heads=(
            Head("UrformModel", "GPT2Model"),
            Head("UrformForCausalLM", "GPT2LMHeadModel", (Rule("lm_head.weight", "lm_head.weight"),)),
        ),
        weights=(  # as in the bare models: no "transformer.", no "model."
            Rule("wte.weight", "decoder.embed_tokens.weight"),
            *modules("h.{i}.", "decoder.layers.{i}.", {"ln_1": "self_attn_norm"}),
            Rule("h.{i}.attn.c_attn.weight", QKV_WEIGHTS, TRANSPOSED_PARTS),  # a tuple of three names of ours
            Rule("h.{i}.attn.c_attn.bias", QKV_BIASES, PARTS),
        ),
    )

What the engine does by itself: ids of special tokens, labels, `tie_word_embeddings`, dtype (`COMMON`); the prefix of
the backbone in a class with a head; which rules apply (those whose tensors there are: a bias that neither side has
needs no mention); tied tensors (a rule for one name is enough, and a checkpoint may hold any of them).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configuration.configuration_urform import UrformConfig

Tensors = Sequence[Tensor]
Shapes = Sequence[torch.Size]
Fill = float | Callable[[torch.Size], Tensor]

# Fields of the same name and meaning on both sides, for every family.
COMMON = (
    "id2label label2id problem_type output_hidden_states return_dict chunk_size_feed_forward use_cache pad_token_id "
    "bos_token_id eos_token_id tie_word_embeddings"
).split()
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


class Op(NamedTuple):
    """What happens to a rule's tensors; each way takes them, the shapes to make of them, and the config."""

    to_ours: Callable[[Tensors, Shapes, UrformConfig], Tensors]
    to_stock: Callable[[Tensors, Shapes, UrformConfig], Tensors]


def _cut(tensors: Tensors, shapes: Shapes, config: UrformConfig) -> Tensors:
    return tensors[0].split([shape[0] for shape in shapes])


def _join(tensors: Tensors, shapes: Shapes, config: UrformConfig) -> Tensors:
    return (torch.cat(tuple(tensors)),)


def _turn(tensors: Tensors, shapes: Shapes, config: UrformConfig) -> Tensors:
    return [tensor.T for tensor in tensors]


def _shape(tensors: Tensors, shapes: Shapes, config: UrformConfig) -> Tensors:
    return [tensor.reshape(shape) for tensor, shape in zip(tensors, shapes, strict=True)]


def _deal(tensors: Tensors, shapes: Shapes, config: UrformConfig) -> Tensors:
    grouped = tensors[0].unflatten(0, (-1, len(shapes), config.head_dim))
    return [part.flatten(0, 1) for part in grouped.unbind(1)]


def _shuffle(tensors: Tensors, shapes: Shapes, config: UrformConfig) -> Tensors:
    return (torch.stack([part.unflatten(0, (-1, config.head_dim)) for part in tensors], dim=1).flatten(0, 2),)


def _keep(tensors: Tensors, shapes: Shapes, config: UrformConfig) -> Tensors:
    return tensors


COPY = Op(_keep, _keep)
TRANSPOSED = Op(_turn, _turn)  # Conv1D's weights
RESHAPED = Op(_shape, _shape)
PARTS = Op(_cut, _join)  # one tensor there is several here, one below the other: q|k|v, gate|up
TRANSPOSED_PARTS = Op(lambda x, s, c: _cut(_turn(x, s, c), s, c), lambda x, s, c: _turn(_join(x, s, c), s, c))
INTERLEAVED = Op(_deal, _shuffle)  # (head, q|k|v, width) there
# Two names there for one tensor. Untied they are two, of which nothing reads the second (BERT's output bias).
TWICE = Op(
    lambda tensors, shapes, config: tensors[:1], lambda tensors, shapes, config: (tensors[0], tensors[0].clone())
)


@dataclass(frozen=True)
class Rule:
    """Some tensors there are some tensors here.

    Args:
        stock: Name or names there; `{i}` stands for the number of a layer. In `Family.weights` without the prefix of
            the backbone, in `Head.weights` in full.
        ours: Name or names here, likewise.
        op: What happens to them.
        fill: Where we lack the tensor by configuration: the value that the stock one has throughout, or how its class
            makes it of the shape, else it is refused (BART's `final_logits_bias` is a zero for a model without
            `lm_head_bias`). A checkpoint may lack it.
    """

    stock: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    op: Op = COPY
    fill: Fill | None = None

    def names(self, layer: int) -> tuple[list[str], list[str]]:
        """Return the names there and here for one layer."""
        sides = ((side,) if isinstance(side, str) else side for side in (self.stock, self.ours))
        stock, ours = ([name.replace("{i}", str(layer)) for name in side] for side in sides)
        return stock, ours


def modules(stock: str, ours: str, names: Mapping[str, str], op: Op = COPY) -> tuple[Rule, ...]:
    """Return rules for weight and bias of modules: prefix there and here, {name there: name here}, `op` for weights."""
    return tuple(
        Rule(f"{stock}{theirs}.{kind}", f"{ours}{own}.{kind}", op if kind == "weight" else COPY)
        for theirs, own in names.items()
        for kind in ("weight", "bias")
    )


class Axis(NamedTuple):
    """What is no plain rename: the stock config to fields here, and our config to fields there."""

    to_urform: Callable[[Any], dict[str, Any]]
    to_stock: Callable[[UrformConfig], dict[str, Any]]


def same(*names: str) -> dict[str, str]:
    """Return fields of the same name on both sides; names that the stock config maps to its own work too."""
    return {name: name for name in names}


@dataclass(frozen=True)
class Head:
    """One of our classes and its counterpart.

    Args:
        ours: Name of our class.
        stock: Name of the class in transformers.
        weights: Rules of the head's tensors, with full names on both sides.
        fixed: Fields of our config that this head fixes, over the family's.
        axes: Config axes of this head alone, after the family's.
        dropped: Regular expressions for stock tensors (full names) that have no place here; they are kept for the way
            back (`UrformConfig.source_weights`).
        options: Keywords with which the stock class is built (BERT: `add_pooling_layer=False`).
        renamed: {name in checkpoints: name in the class}, where transformers renames when it loads and saves.
    """

    ours: str
    stock: str
    weights: tuple[Rule, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()
    dropped: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        model_type: As in transformers.
        stock_config: Name of its config class.
        heads: Its classes; the first with a class of ours is its counterpart.
        weights: Rules of the backbone's tensors, with names as in the bare models (ours begin with `encoder.` or
            `decoder.`).
        fixed: Our fields that it always has. What neither stands here nor comes from `fields`, `axes` or `COMMON` has
            Urform's default (dropouts: 0).
        fields: {our field: its field}.
        axes: What is no plain rename. Later ones win over earlier ones and over `fields`.
        training_only: Its fields without effect in inference: where they do not survive, a warning says so, and they
            are kept in `source_fields` for the way back.
        ignored: Its fields without effect on any number, or of several spellings that an axis reads (None for a
            default); kept likewise, without a warning.
        idle: {its field: when it has no effect, given the config}; then kept likewise.
        held_by_weights: Our fields that its tensors can express though its config cannot (with `Rule.fill`).
    """

    model_type: str
    stock_config: str
    heads: tuple[Head, ...]
    weights: tuple[Rule, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()
    training_only: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    idle: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    held_by_weights: tuple[str, ...] = ()

    def reorders(self, config: UrformConfig) -> bool:
        """Check whether its sinusoids are ours (Vaswani et al. 2017) but for the order of the features.

        Sines and cosines alternate here and stand in two halves there. A Transformer does not care in which order the
        features of its residual stream are, if all that read and write it agree: the conversion changes the order. So
        logits are the same, and hidden states in another order: a backbone without its output layer is refused.
        """
        return (self.fixed.get("sinusoidal_layout"), config.sinusoidal_layout) == ("halves", "interleaved")

    def to_urform(self, stock: Any, head: Head) -> dict[str, Any]:
        """Return the fields of our config for a stock config, unchecked."""
        fields: dict[str, Any] = dict.fromkeys(("hidden_dropout_prob", "attention_dropout", "activation_dropout"), 0.0)
        fields.update(dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")))
        fields.update({name: getattr(stock, name) for name in COMMON if hasattr(stock, name)})
        fields.update(self.fixed)
        fields.update({ours: getattr(stock, theirs) for ours, theirs in self.fields.items()})
        fields.update(head.fixed)
        for axis in (*self.axes, *head.axes):
            fields.update(axis.to_urform(stock))
        for name in TOKEN_IDS:  # checkpoints have -1 for none, and tiny ones the ids of the large
            value = fields.get(name)
            if any(not 0 <= i < fields["vocab_size"] for i in (value if isinstance(value, list) else [value or 0])):
                fields[name] = None
        return fields

    def to_stock(self, config: UrformConfig, head: Head) -> dict[str, Any]:
        """Return the fields of the stock config for ours, unchecked."""
        fields: dict[str, Any] = {name: getattr(config, name) for name in COMMON}
        fields.update({theirs: getattr(config, ours) for ours, theirs in self.fields.items()})
        for axis in (*self.axes, *head.axes):
            fields.update(axis.to_stock(config))
        return fields
