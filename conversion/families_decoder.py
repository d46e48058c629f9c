# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Decoder families as tables; see `family.py` for the format."""

import copy

from .family import Axis, Family, Head, Rule, modules, same

_GENERIC_SCORE = modules("score", "classifier.out_proj", {"": ""})  # transformers' generic classifiers

ROPE = Axis(
    lambda stock: {"rope_parameters": copy.deepcopy(stock.rope_parameters)},
    lambda config: {"rope_parameters": copy.deepcopy(config.rope_parameters)},
)


def _heads(name: str, *heads: str) -> tuple[Head, ...]:
    """The classes that transformers derives for most decoders."""
    table = {
        "Model": Head("UrformModel", f"{name}Model"),
        "ForCausalLM": Head("UrformForCausalLM", f"{name}ForCausalLM", modules("", "", {"lm_head": "lm_head"})),
        "ForSequenceClassification": Head(
            "UrformForSequenceClassification",
            f"{name}ForSequenceClassification",
            _GENERIC_SCORE,
            fixed={"classifier_bias": False},
        ),
        "ForTokenClassification": Head("UrformForTokenClassification", f"{name}ForTokenClassification", _GENERIC_SCORE),
        "ForQuestionAnswering": Head(
            "UrformForQuestionAnswering",
            f"{name}ForQuestionAnswering",
            modules("", "", {"qa_outputs": "qa_outputs"}),
        ),
    }
    return tuple(table[head] for head in heads or table)


_LLAMA_FIXED = {
    "architecture": "decoder",
    "norm_position": "pre",
    "norm_type": "rmsnorm",
    "position_encoding": "rope",
    "gated_mlp": True,
    "classifier_pooling": "last",
    "classifier_activation": None,
    "classifier_dropout": 0.0,
}
_LLAMA_FIELDS = {
    **same(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "attention_dropout",
    ),
    "norm_eps": "rms_norm_eps",
}
_LLAMA_LAYER = {
    **{f"self_attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    "input_layernorm": "self_attn_norm",
    "post_attention_layernorm": "mlp_norm",
}
_LLAMA_WEIGHTS = (
    Rule("embed_tokens.weight", "decoder.embed_tokens.weight"),
    Rule("norm.weight", "decoder.norm.weight"),
    *modules("layers.{i}.", "decoder.layers.{i}.", _LLAMA_LAYER),
)

LLAMA = Family(
    "llama",
    "LlamaConfig",
    heads=_heads("Llama"),
    weights=_LLAMA_WEIGHTS,
    fixed=_LLAMA_FIXED,
    fields={**_LLAMA_FIELDS, **same("attention_bias", "mlp_bias")},
    axes=(ROPE,),
    ignored=("pretraining_tp",),
)

DECODERS = (LLAMA,)
