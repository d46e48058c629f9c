# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Decoder families as tables; see `family.py` for the format."""

import copy
from collections.abc import Mapping
from typing import Any

from ..configuration.configuration_urform import UrformConfig
from .family import INTERLEAVED, PARTS, TRANSPOSED, TRANSPOSED_PARTS, Axis, Family, Head, Rule, modules, same


def _heads(
    name: str,
    *kinds: str,
    model: str | None = None,
    language: str | None = None,
    tokens: str = "score",
    token_axes: tuple[Axis, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> tuple[Head, ...]:
    """Return the usual classes of a decoder; `kinds` are those that it has besides model and language model.

    The sequence classifier's layer is `score`, without a bias; `tokens` names the token classifier's.
    """
    heads = {
        "ForSequenceClassification": (
            modules("", "", {"score": "classifier.out_proj"}),
            {"classifier_bias": False},
            (),
        ),
        "ForTokenClassification": (modules("", "", {tokens: "classifier.out_proj"}), {}, token_axes),
        "ForQuestionAnswering": (modules("", "", {"qa_outputs": "qa_outputs"}), {}, ()),
    }
    return (
        Head("UrformModel", model or f"{name}Model"),
        Head(
            "UrformForCausalLM",
            language or f"{name}ForCausalLM",
            modules("", "", {"lm_head": "lm_head"}),
            renamed=renamed or {},
        ),
        *(Head(f"Urform{kind}", f"{name}{kind}", heads[kind][0], heads[kind][1], heads[kind][2]) for kind in kinds),
    )


_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
_ALL = (*_CLASSIFIERS, "ForQuestionAnswering")


def _rope_to_urform(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary fields. Where frequencies follow a length, it is the batch's longest, as in stock classes."""
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    follows = {"rope_length": "batch"} if kinds & {"dynamic", "longrope"} else {}
    return {"rope_parameters": copy.deepcopy(rope), **follows}


def _rope_to_stock(config: UrformConfig) -> dict[str, Any]:
    return {"rope_parameters": copy.deepcopy(config.rope_parameters)}


def _as_read(rope: dict[str, Any], per_layer_type: bool = False) -> dict[str, Any]:
    """Return rotary parameters without those that transformers overlooks.

    They are a `partial_rotary_factor` other than 1, and within a dict per layer type `truncate=False`.
    """
    overlooked = {"partial_rotary_factor": 1.0, **({"truncate": True} if per_layer_type else {})}
    return {
        name: _as_read(value, True) if isinstance(value, dict) else value
        for name, value in rope.items()
        if overlooked.get(name, value) == value
    }


PARTIAL_ROPE = Axis(lambda stock: _rope_to_urform(stock.rope_parameters), _rope_to_stock)
# For classes whose attention rotates whole heads, whatever `partial_rotary_factor` says. What is overlooked does not
# survive the way there and back, and so is refused.
ROPE = Axis(lambda stock: _rope_to_urform(_as_read(stock.rope_parameters)), _rope_to_stock)


def classifier_rate(config: UrformConfig) -> float:
    """Return the dropout before the classifier, None resolved."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _token_rate(stock: Any) -> float:
    """Return the dropout before transformers' token classifiers, from the first of two fields that the config has."""
    rates = (getattr(stock, name, None) for name in ("classifier_dropout", "hidden_dropout"))
    return next((rate for rate in rates if rate is not None), 0.1)


_TOKEN_DROPOUT = Axis(
    lambda stock: {"classifier_dropout": _token_rate(stock)},
    lambda config: {} if (rate := classifier_rate(config)) == 0.1 else {"classifier_dropout": rate},
)
# GPT-NeoX and ModernBERT cut their heads from `hidden_size`, but rotate `head_dim` features where a config has it.
USUAL_HEAD_DIM = {"head_dim": lambda stock: stock.head_dim in (None, stock.hidden_size // stock.num_attention_heads)}
_DECODER = {
    "architecture": "decoder",
    "norm_position": "pre",
    "classifier_pooling": "last",
    "classifier_activation": None,
    "classifier_dropout": 0.0,
}
_SIZES = same("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")


# --------------------------------------------------------------------------------- learned positions, ALiBi, GPT-NeoX

_FOUR_TIMES = Axis(lambda stock: {"intermediate_size": 4 * stock.hidden_size}, lambda config: {})
_NEOX_LAYER = {
    "input_layernorm": "self_attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}


def _fused(stock: str, weight: Any, bias: Any) -> tuple[Rule, ...]:
    """Return the rules of one layer for queries, keys and values: `stock` in the layer there, three here."""
    return tuple(
        Rule(f"{stock}.{kind}", tuple(f"decoder.layers.{{i}}.self_attn.{x}_proj.{kind}" for x in "qkv"), op)
        for kind, op in (("weight", weight), ("bias", bias))
    )


def _gpt2_to_stock(config: UrformConfig) -> dict[str, Any]:
    return {
        "n_inner": config.intermediate_size,
        "embd_pdrop": config.hidden_dropout_prob,
        "scale_attn_weights": config.attention_scale != 1.0,
    }


GPT2 = Family(
    "gpt2",
    "GPT2Config",
    heads=_heads("GPT2", *_ALL, language="GPT2LMHeadModel", tokens="classifier", token_axes=(_TOKEN_DROPOUT,)),
    weights=(
        Rule("wte.weight", "decoder.embed_tokens.weight"),
        Rule("wpe.weight", "decoder.embed_positions.weight"),
        *modules("", "decoder.", {"ln_f": "norm"}),
        *modules("h.{i}.", "decoder.layers.{i}.", {"ln_1": "self_attn_norm", "ln_2": "mlp_norm"}),
        *modules(
            "h.{i}.",
            "decoder.layers.{i}.",
            {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
            TRANSPOSED,
        ),
        *_fused("h.{i}.attn.c_attn", TRANSPOSED_PARTS, PARTS),
    ),
    fixed={
        **_DECODER,
        "position_encoding": "learned",
        "position_counting": "columns",
        "initializer": "gpt2",
        "freeze_pad_embedding": False,
    },
    fields={
        **_SIZES,
        **same("max_position_embeddings"),
        "hidden_act": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "hidden_dropout_prob": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
    },
    axes=(
        Axis(
            lambda stock: {
                "intermediate_size": stock.n_inner or 4 * stock.n_embd,
                "attention_scale": None if stock.scale_attn_weights else 1.0,
            },
            _gpt2_to_stock,
        ),
    ),
    training_only=("embd_pdrop",),
    ignored=(
        *("n_inner", "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation"),
        *("summary_proj_to_labels", "summary_first_dropout"),
    ),
)

OPT = Family(
    "opt",
    "OPTConfig",
    heads=_heads("OPT", "ForSequenceClassification", "ForQuestionAnswering"),
    weights=(
        Rule("decoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        Rule("decoder.embed_positions.weight", "decoder.embed_positions.weight"),
        *modules("decoder.", "decoder.", {"final_layer_norm": "norm"}),
        *modules(
            "decoder.layers.{i}.",
            "decoder.layers.{i}.",
            {
                **{f"self_attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"},
                "self_attn.out_proj": "self_attn.o_proj",
                "self_attn_layer_norm": "self_attn_norm",
                "final_layer_norm": "mlp_norm",
                "fc1": "mlp.up_proj",
                "fc2": "mlp.down_proj",
            },
        ),
    ),
    fixed={**_DECODER, "norm_eps": 1e-5, "position_encoding": "learned", "position_offset": 2},
    fields={
        **{ours: theirs for ours, theirs in _SIZES.items() if ours != "initializer_range"},
        **same("max_position_embeddings", "attention_dropout"),
        "initializer_range": "init_std",
        "intermediate_size": "ffn_dim",
        "hidden_act": "activation_function",
        "hidden_dropout_prob": "dropout",
    },
    axes=(
        Axis(  # OPT 350m normalises after each sublayer; checkpoints before transformers 4.20 have no final norm
            lambda stock: {
                "norm_position": "pre" if stock.do_layer_norm_before else "post",
                "final_norm": stock.do_layer_norm_before and not stock._remove_final_layer_norm,
                "attention_bias": stock.enable_bias,
                "mlp_bias": stock.enable_bias,
            },
            lambda config: {
                "do_layer_norm_before": config.norm_position == "pre",
                "_remove_final_layer_norm": config.norm_position == "pre" and config.final_norm is False,
                "enable_bias": config.attention_bias,
            },
        ),
    ),
    training_only=("layerdrop",),
    idle={"_remove_final_layer_norm": lambda stock: not stock.do_layer_norm_before},
)

GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXConfig",
    heads=_heads("GPTNeoX", *_ALL, tokens="classifier", renamed={"embed_out.weight": "lm_head.weight"}),
    weights=(
        Rule("embed_in.weight", "decoder.embed_tokens.weight"),
        *modules("", "decoder.", {"final_layer_norm": "norm"}),
        *modules("layers.{i}.", "decoder.layers.{i}.", {**_NEOX_LAYER, "attention.dense": "self_attn.o_proj"}),
        *_fused("layers.{i}.attention.query_key_value", INTERLEAVED, INTERLEAVED),
    ),
    fixed={**_DECODER, "position_encoding": "rope", "freeze_pad_embedding": False},
    fields={
        **_SIZES,
        **same("intermediate_size", "hidden_act", "max_position_embeddings"),
        **same("attention_bias", "attention_dropout", "classifier_dropout"),
        "norm_eps": "layer_norm_eps",
        "hidden_dropout_prob": "hidden_dropout",
    },
    axes=(
        PARTIAL_ROPE,
        Axis(
            lambda stock: {"norm_position": "parallel" if stock.use_parallel_residual else "pre"},
            lambda config: {
                "use_parallel_residual": config.norm_position == "parallel",
                "classifier_dropout": classifier_rate(config),
            },
        ),
    ),
    ignored=("is_decoder",),
    idle=USUAL_HEAD_DIM,
)

BLOOM = Family(
    "bloom",
    "BloomConfig",
    heads=_heads(
        "Bloom",
        *_ALL,
        tokens="classifier",
        token_axes=(
            Axis(
                lambda stock: {"classifier_dropout": _token_rate(stock)},
                lambda config: (
                    {}
                    if (rate := classifier_rate(config)) == config.hidden_dropout_prob
                    else {"classifier_dropout": rate}
                ),
            ),
        ),
    ),
    weights=(
        Rule("word_embeddings.weight", "decoder.embed_tokens.weight"),
        *modules("", "decoder.", {"word_embeddings_layernorm": "embed_norm", "ln_f": "norm"}),
        *modules("h.{i}.", "decoder.layers.{i}.", {**_NEOX_LAYER, "self_attention.dense": "self_attn.o_proj"}),
        *_fused("h.{i}.self_attention.query_key_value", INTERLEAVED, INTERLEAVED),
    ),
    fixed={
        **_DECODER,
        "position_encoding": "alibi",
        "embedding_norm": True,
        "hidden_act": "gelu_pytorch_tanh",
        "freeze_pad_embedding": False,
    },
    fields={
        **_SIZES,
        **same("attention_dropout"),
        "norm_eps": "layer_norm_epsilon",
        "hidden_dropout_prob": "hidden_dropout",
    },
    axes=(_FOUR_TIMES,),
    ignored=("pretraining_tp",),
    idle={"slow_but_exact": lambda stock: stock.pretraining_tp == 1},  # else it leaves biases out
)


# ------------------------------------------------------------------------------------------------- Llama and its kin

_LLAMA = {**_DECODER, "norm_type": "rmsnorm", "position_encoding": "rope", "gated_mlp": True}
_LLAMA_FIELDS = {
    **_SIZES,
    **same("intermediate_size", "num_key_value_heads", "max_position_embeddings", "attention_dropout"),
    "norm_eps": "rms_norm_eps",
}
_LLAMA_LAYER = {
    **{f"self_attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    "input_layernorm": "self_attn_norm",
}
_QK_NORMS = {f"self_attn.{x}_norm": f"self_attn.{x}_norm" for x in "qk"}


def _llama_weights(**layer: str) -> tuple[Rule, ...]:
    names = {**_LLAMA_LAYER, **_QK_NORMS, **(layer or {"post_attention_layernorm": "mlp_norm"})}
    return (
        Rule("embed_tokens.weight", "decoder.embed_tokens.weight"),
        Rule("norm.weight", "decoder.norm.weight"),
        *modules("layers.{i}.", "decoder.layers.{i}.", names),
    )


LLAMA = Family(
    "llama",
    "LlamaConfig",
    heads=_heads("Llama", *_ALL, token_axes=(_TOKEN_DROPOUT,)),
    weights=_llama_weights(),
    fixed=_LLAMA,
    fields={**_LLAMA_FIELDS, **same("hidden_act", "head_dim", "attention_bias", "mlp_bias")},
    axes=(ROPE,),
    ignored=("pretraining_tp",),
)

MISTRAL = Family(
    "mistral",
    "MistralConfig",
    heads=_heads("Mistral", *_ALL, token_axes=(_TOKEN_DROPOUT,)),
    weights=_llama_weights(),
    fixed={**_LLAMA, "attention_bias": False, "mlp_bias": False},
    fields={**_LLAMA_FIELDS, **same("hidden_act", "head_dim")},
    axes=(
        ROPE,
        Axis(  # one window for all layers
            lambda stock: {
                "sliding_window": stock.sliding_window,
                "layer_types": stock.num_hidden_layers
                * ["full_attention" if stock.sliding_window is None else "sliding_attention"],
            },
            lambda config: {
                "sliding_window": config.sliding_window if "sliding_attention" in config.layer_types else None
            },
        ),
    ),
)

# Which layers have the window: the list says it; the older spellings are read when a config is made.
_QWEN_WINDOW = Axis(
    lambda stock: {"sliding_window": stock.sliding_window, "layer_types": list(stock.layer_types)},
    lambda config: {
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "layer_types": list(config.layer_types),
    },
)
_QWEN = {**_LLAMA, "mlp_bias": False}
_QWEN_FIELDS = {**_LLAMA_FIELDS, **same("hidden_act")}
_QWEN_IGNORED = ("max_window_layers", "use_sliding_window")

QWEN2 = Family(
    "qwen2",
    "Qwen2Config",
    heads=_heads("Qwen2", *_ALL, token_axes=(_TOKEN_DROPOUT,)),
    weights=_llama_weights(),
    fixed={**_QWEN, "attention_bias": True, "attention_out_bias": False},
    fields=_QWEN_FIELDS,
    axes=(
        ROPE,
        _QWEN_WINDOW,
        Axis(  # no field, but its attention looks for one
            lambda stock: {"head_dim": getattr(stock, "head_dim", None)},
            lambda config: (
                {}
                if config.head_dim * config.num_attention_heads == config.hidden_size
                else {"head_dim": config.head_dim}
            ),
        ),
    ),
    ignored=_QWEN_IGNORED,
)

QWEN3 = Family(
    "qwen3",
    "Qwen3Config",
    heads=_heads("Qwen3", *_ALL, token_axes=(_TOKEN_DROPOUT,)),
    weights=_llama_weights(),
    fixed={**_QWEN, "qk_norm": True},
    fields={**_QWEN_FIELDS, **same("head_dim", "attention_bias")},
    axes=(ROPE, _QWEN_WINDOW),
    ignored=_QWEN_IGNORED,
)


def _query_scalar(config: UrformConfig) -> int:
    """Return `query_pre_attn_scalar`, an integer whose root divides the scores."""
    return config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)


_GEMMA = {
    **_LLAMA,
    "norm_position": "sandwich",
    "norm_offset": 1.0,
    "scale_embedding": True,
    "mlp_bias": False,
}
_GEMMA_FIELDS = {
    **_LLAMA_FIELDS,
    **same("head_dim", "attention_bias", "sliding_window", "layer_types", "final_logit_softcapping"),
    "hidden_act": "hidden_activation",
}
_GEMMA_WEIGHTS = _llama_weights(
    post_attention_layernorm="self_attn_post_norm",
    pre_feedforward_layernorm="mlp_norm",
    post_feedforward_layernorm="mlp_post_norm",
)
_QUERY_SCALAR = Axis(
    lambda stock: {"attention_scale": stock.query_pre_attn_scalar**-0.5},
    lambda config: {"query_pre_attn_scalar": _query_scalar(config)},
)

GEMMA2 = Family(
    "gemma2",
    "Gemma2Config",
    heads=_heads("Gemma2", *_CLASSIFIERS, token_axes=(_TOKEN_DROPOUT,)),
    weights=_GEMMA_WEIGHTS,
    fixed=_GEMMA,
    fields={**_GEMMA_FIELDS, **same("attn_logit_softcapping")},
    axes=(ROPE, _QUERY_SCALAR),
)


def rope_per_type(config: UrformConfig) -> dict[str, Any]:
    """Return the stock field `rope_parameters` with one entry per layer type."""
    parameters: dict[str, Any] = config.rope_parameters or {}
    if parameters and not config.rope_is_per_layer_type:
        parameters = dict.fromkeys(("full_attention", "sliding_attention"), parameters)
    return {"rope_parameters": copy.deepcopy(parameters)}


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3TextConfig",
    heads=(
        *_heads("Gemma3", model="Gemma3TextModel"),
        *_heads("Gemma3Text", "ForSequenceClassification")[2:],
    ),
    weights=_GEMMA_WEIGHTS,
    fixed={**_GEMMA, "qk_norm": True},
    fields=_GEMMA_FIELDS,
    axes=(Axis(ROPE.to_urform, rope_per_type), _QUERY_SCALAR),
    ignored=("attn_logit_softcapping",),  # a field that its attention does not read
)

DECODERS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, GPT_NEOX, GPT2, OPT, BLOOM)
