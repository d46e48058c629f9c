# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Encoder-decoder families as tables; see `family.py` for the format."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from ..configuration.configuration_urform import UrformConfig
from .families_decoder import classifier_rate
from .family import RESHAPED, Axis, Family, Head, Rule, modules, same


def _both(stock: str, ours: str) -> tuple[Rule, ...]:
    """Return a rule for the encoder and one for the decoder."""
    return tuple(Rule(f"{side}.{stock}", f"{side}.{ours}") for side in ("encoder", "decoder"))


_CLASSIFIER_DROPOUT = Axis(
    lambda stock: {"classifier_dropout": stock.classifier_dropout},
    lambda config: {"classifier_dropout": classifier_rate(config)},
)
# Where the output projection has a table of its own, the encoder and the decoder have theirs.
_SHARED_OR_NOT = Axis(
    lambda stock: {"share_embeddings": stock.tie_word_embeddings},
    lambda config: {"tie_word_embeddings": config.share_embeddings},
)
_ALL_OR_NONE = Axis(
    lambda stock: {},
    lambda config: {"tie_word_embeddings": config.share_embeddings and config.tie_word_embeddings},
)


def _normalizes(family: str, *, before: bool, embedding: bool) -> Axis:
    """Return two fields that published configs of a family have and CTranslate2 reads, but transformers does not."""
    fields = {"normalize_before": before, "normalize_embedding": embedding}
    return Axis(lambda stock: {}, lambda config: {} if config.source_family == family else fields)


_CLASSIFIER = modules("classification_head.", "classifier.", {"dense": "transform.dense", "out_proj": "out_proj"})
_QA = modules("", "", {"qa_outputs": "qa_outputs"})
_PAIR: dict[str, Any] = {"architecture": "encoder-decoder", "classifier_pooling": "last"}

# ------------------------------------------------------------------------------------------------- BART and its kin

_BART_LAYER = {
    **{f"self_attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"},
    "self_attn.out_proj": "self_attn.o_proj",
    "self_attn_layer_norm": "self_attn_norm",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
    "final_layer_norm": "mlp_norm",
}
_BART_CROSS = {
    **{f"encoder_attn.{x}_proj": f"cross_attn.{x}_proj" for x in "qkv"},
    "encoder_attn.out_proj": "cross_attn.o_proj",
    "encoder_attn_layer_norm": "cross_attn_norm",
}
_BART_STACK = {"layernorm_embedding": "embed_norm", "layer_norm": "norm"}
_BART_WEIGHTS = (
    *_both("embed_tokens.weight", "embed_tokens.weight"),
    Rule("shared.weight", "encoder.embed_tokens.weight"),
    *_both("embed_positions.weight", "embed_positions.weight"),
    *modules("encoder.", "encoder.", _BART_STACK),
    *modules("decoder.", "decoder.", _BART_STACK),
    *modules("encoder.layers.{i}.", "encoder.layers.{i}.", _BART_LAYER),
    *modules("decoder.layers.{i}.", "decoder.layers.{i}.", {**_BART_LAYER, **_BART_CROSS}),
)
_BART_FIELDS = {
    **same("vocab_size", "max_position_embeddings", "scale_embedding", "decoder_start_token_id"),
    **same("attention_dropout", "activation_dropout"),
    "hidden_size": "d_model",
    "hidden_act": "activation_function",
    "hidden_dropout_prob": "dropout",
    "initializer_range": "init_std",
    **{
        f"{prefix}{ours}": f"{side}_{theirs}"
        for prefix, side in (("", "encoder"), ("decoder_", "decoder"))
        for ours, theirs in {
            "num_hidden_layers": "layers",
            "num_attention_heads": "attention_heads",
            "intermediate_size": "ffn_dim",
        }.items()
    },
}
_LAYERDROP = ("encoder_layerdrop", "decoder_layerdrop")
# What generation is forced to is in the generation config.
_NOTHING_FORCED = Axis(lambda stock: {}, lambda config: {"forced_eos_token_id": None})
# None may stand for a start token that the generation config names.
_IGNORED = ("decoder_start_token_id", "forced_eos_token_id")
_LM_HEAD = Rule("lm_head.weight", "lm_head.weight")
_LOGITS_BIAS = Rule("final_logits_bias", "lm_head.bias", RESHAPED, fill=0.0)


def _bart_heads(name: str) -> tuple[Head, ...]:
    return (
        Head("UrformModel", f"{name}Model"),
        Head(
            "UrformForConditionalGeneration",
            f"{name}ForConditionalGeneration",
            (_LM_HEAD, _LOGITS_BIAS),
            axes=(_ALL_OR_NONE,),
        ),
        Head("UrformForSequenceClassification", f"{name}ForSequenceClassification", _CLASSIFIER),
        Head(
            "UrformForQuestionAnswering",
            f"{name}ForQuestionAnswering",
            _QA,
        ),
    )


_BART = {
    **_PAIR,
    "position_encoding": "learned",
    "position_offset": 2,
    "position_counting": "columns",
    "embedding_norm": True,
    "lm_head_bias": True,
}

BART = Family(
    "bart",
    "BartConfig",
    heads=_bart_heads("Bart"),
    weights=_BART_WEIGHTS,
    fixed={**_BART, "norm_position": "post", "final_norm": False},
    fields=_BART_FIELDS,
    axes=(_SHARED_OR_NOT, _CLASSIFIER_DROPOUT, _NOTHING_FORCED, _normalizes("bart", before=False, embedding=True)),
    training_only=_LAYERDROP,
    ignored=_IGNORED,
    held_by_weights=("lm_head_bias",),
)

MBART = Family(
    "mbart",
    "MBartConfig",
    heads=_bart_heads("MBart"),
    weights=_BART_WEIGHTS,
    fixed={**_BART, "norm_position": "pre", "final_norm": True, "decoder_start_from_labels": True},
    fields=_BART_FIELDS,
    axes=(_SHARED_OR_NOT, _CLASSIFIER_DROPOUT, _NOTHING_FORCED, _normalizes("mbart", before=True, embedding=True)),
    training_only=_LAYERDROP,
    ignored=_IGNORED,
    held_by_weights=("lm_head_bias",),
)

M2M_100 = Family(
    "m2m_100",
    "M2M100Config",
    heads=(
        Head("UrformModel", "M2M100Model"),
        Head("UrformForConditionalGeneration", "M2M100ForConditionalGeneration", (_LM_HEAD,), axes=(_ALL_OR_NONE,)),
    ),
    weights=_BART_WEIGHTS,
    fixed={
        **_PAIR,
        "norm_position": "pre",
        "final_norm": True,
        "position_encoding": "sinusoidal",
        "sinusoidal_layout": "tensor2tensor",
        "position_counting": "tokens",
    },
    fields=_BART_FIELDS,
    axes=(
        _SHARED_OR_NOT,
        Axis(  # the pad token's own row of the table is zero, texts begin after it
            lambda stock: {"position_offset": 0 if stock.pad_token_id is None else stock.pad_token_id + 1},
            lambda config: {},
        ),
    ),
    training_only=_LAYERDROP,
    ignored=("decoder_start_token_id",),
)


def _waves(shape: torch.Size) -> Tensor:
    """Return the sinusoids of Marian and Pegasus, a table in the model, which a checkpoint may lack."""
    return MarianSinusoidalPositionalEmbedding(*shape).create_weight()


# Our interleaved sinusoids are these, with the features of the whole model in another order (`Family.reorders`).
_HALVES = {
    **_PAIR,
    "position_encoding": "sinusoidal",
    "sinusoidal_layout": "halves",
    "position_counting": "columns",
    "lm_head_bias": True,
}
_WAVES = tuple(Rule(f"{side}.embed_positions.weight", (), fill=_waves) for side in ("encoder", "decoder"))

MARIAN = Family(
    "marian",
    "MarianConfig",
    heads=(
        Head("UrformModel", "MarianModel"),
        Head("UrformForConditionalGeneration", "MarianMTModel", (_LM_HEAD, _LOGITS_BIAS)),
    ),
    weights=(*_BART_WEIGHTS, *_WAVES),
    fixed={**_HALVES, "norm_position": "post", "final_norm": False},
    fields=_BART_FIELDS,
    axes=(
        Axis(  # the flag makes the table that all would be tied to, `tie_word_embeddings` ties them
            lambda stock: {"share_embeddings": stock.share_encoder_decoder_embeddings and stock.tie_word_embeddings},
            lambda config: {"share_encoder_decoder_embeddings": config.share_embeddings},
        ),
        _NOTHING_FORCED,
    ),
    training_only=_LAYERDROP,
    ignored=(*_IGNORED, "share_encoder_decoder_embeddings"),
    held_by_weights=("lm_head_bias",),
)

PEGASUS = Family(
    "pegasus",
    "PegasusConfig",
    heads=(
        Head("UrformModel", "PegasusModel"),
        Head(
            "UrformForConditionalGeneration",
            "PegasusForConditionalGeneration",
            (_LM_HEAD, _LOGITS_BIAS),
            axes=(_ALL_OR_NONE,),
        ),
    ),
    weights=(*_BART_WEIGHTS, *_WAVES),
    fixed={**_HALVES, "norm_position": "pre", "final_norm": True},
    fields=_BART_FIELDS,
    axes=(
        _SHARED_OR_NOT,
        _NOTHING_FORCED,
        _normalizes("pegasus", before=True, embedding=False),
    ),
    training_only=_LAYERDROP,
    ignored=(*_IGNORED, "is_decoder"),
    held_by_weights=("lm_head_bias",),
)

# --------------------------------------------------------------------------------------------------------------- T5


def _t5_layer(side: str, sublayers: Mapping[int, tuple[str, str]]) -> tuple[Rule, ...]:
    """Return the rules of one block; its sublayers stand in a list: place there, (name there, name here)."""
    there, here = f"{side}.block.{{i}}.layer", f"{side}.layers.{{i}}"
    rules = []
    for place, (theirs, ours) in sublayers.items():
        rules.append(Rule(f"{there}.{place}.layer_norm.weight", f"{here}.{ours}_norm.weight"))
        inner = {x: f"{x}_proj" for x in "qkvo"}
        if ours == "mlp":
            inner = {"wi": "up_proj", "wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
        rules += [Rule(f"{there}.{place}.{theirs}.{a}.weight", f"{here}.{ours}.{b}.weight") for a, b in inner.items()]
    return tuple(rules)


_T5_SELF, _T5_CROSS = ("SelfAttention", "self_attn"), ("EncDecAttention", "cross_attn")
_T5_MLP = ("DenseReluDense", "mlp")
_T5_WEIGHTS = (
    Rule("shared.weight", "encoder.embed_tokens.weight"),
    *_both("final_layer_norm.weight", "norm.weight"),
    *_both("block.0.layer.0.SelfAttention.relative_attention_bias.weight", "position_bias.table.weight"),
    *_t5_layer("encoder", {0: _T5_SELF, 1: _T5_MLP}),
    *_t5_layer("decoder", {0: _T5_SELF, 1: _T5_CROSS, 2: _T5_MLP}),
)


def _t5_heads(name: str) -> tuple[Head, ...]:
    alone: dict[str, Any] = {
        "fixed": {"architecture": "encoder", "decoder_num_hidden_layers": None},
        # the class itself sets these
        "axes": (Axis(lambda stock: {}, lambda config: {"use_cache": False, "is_encoder_decoder": False}),),
    }
    return (
        Head("UrformModel", f"{name}Model"),
        Head("UrformForConditionalGeneration", f"{name}ForConditionalGeneration", (_LM_HEAD,)),
        Head("UrformEncoderModel", f"{name}EncoderModel", **alone),
        Head("UrformForSequenceClassification", f"{name}ForSequenceClassification", _CLASSIFIER),
        Head(
            "UrformForTokenClassification",
            f"{name}ForTokenClassification",
            modules("", "", {"classifier": "classifier.out_proj"}),
            **alone,
        ),
        Head("UrformForQuestionAnswering", f"{name}ForQuestionAnswering", _QA),
    )


def _t5_to_urform(stock: Any) -> dict[str, Any]:
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_dropout", "activation_dropout"), stock.dropout_rate)
    start = getattr(stock, "decoder_start_token_id", None)
    return {
        **rates,
        "hidden_act": stock.dense_act_fn,
        "gated_mlp": stock.is_gated_act,
        "decoder_start_token_id": stock.pad_token_id if start is None else start,
    }


def _t5_to_stock(config: UrformConfig) -> dict[str, Any]:
    act = config.hidden_act
    if config.gated_mlp:  # "gated-gelu" is an old name for the approximation
        act = "gated-gelu" if act == "gelu_new" else f"gated-{act}"
    return {
        "dropout_rate": config.hidden_dropout_prob,
        "feed_forward_proj": act,
        "num_decoder_layers": config.decoder_num_hidden_layers,
        "decoder_start_token_id": config.decoder_start_token_id,
    }


_T5: dict[str, Any] = {
    "fixed": {
        **_PAIR,
        "norm_position": "pre",
        "norm_type": "rmsnorm",
        "position_encoding": "t5",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_scale": 1.0,
        "initializer": "t5",
        "freeze_pad_embedding": False,
    },
    "fields": {
        **same("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        **same("relative_attention_num_buckets", "relative_attention_max_distance"),
        "head_dim": "d_kv",
        "intermediate_size": "d_ff",
        "decoder_num_hidden_layers": "num_decoder_layers",
        "norm_eps": "layer_norm_epsilon",
    },
    "training_only": ("initializer_factor",),
    "ignored": (
        *("is_encoder_decoder", "use_cache", "feed_forward_proj", "num_decoder_layers", "decoder_start_token_id"),
    ),
    "held_by_weights": ("tie_word_embeddings",),
}
_T5_AXES = (_CLASSIFIER_DROPOUT, Axis(_t5_to_urform, _t5_to_stock))

T5 = Family(
    "t5",
    "T5Config",
    heads=_t5_heads("T5"),
    weights=_T5_WEIGHTS,
    axes=(
        *_T5_AXES,
        Axis(  # 1.1 does not scale
            lambda stock: {"logit_scale": stock.d_model**-0.5 if stock.scale_decoder_outputs else 1.0},
            lambda config: {"scale_decoder_outputs": config.logit_scale != 1.0},
        ),
    ),
    **_T5,
)

MT5 = Family("mt5", "MT5Config", heads=_t5_heads("MT5"), weights=_T5_WEIGHTS, axes=_T5_AXES, **_T5)

ENCODER_DECODERS = (BART, MBART, M2M_100, MARIAN, PEGASUS, T5, MT5)
