# Copyright 2026 The Urform authors. Licensed under the Apache License, Version 2.0.
"""Named Transformers as data: name -> the fields that differ from `UrformConfig`'s defaults, and their source."""

import copy
from typing import Any, NamedTuple

_TOKEN_IDS = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}


class Preset(NamedTuple):
    """One named Transformer. A function among the fields makes its value of the others: what it derives from."""

    source: str
    fields: dict[str, Any]

    def resolved(self, **overrides: Any) -> dict[str, Any]:
        """Return the fields with `overrides`; what is derived from an overridden field follows it."""
        fields = {**copy.deepcopy(self.fields), **overrides}
        vocab_size = fields.get("vocab_size")
        if "vocab_size" in self.fields and isinstance(vocab_size, int):
            for name in _TOKEN_IDS - overrides.keys():
                value = fields.get(name)
                if isinstance(value, int) and value >= vocab_size:
                    moved = value - int(self.fields["vocab_size"]) + vocab_size
                    fields[name] = moved if moved >= 0 else None
        for name, value in fields.items():
            if callable(value):
                fields[name] = value(fields)
        return fields


def _behind_pad(fields: dict[str, Any]) -> int:
    """Return the row of the table where fairseq's texts begin: the one after the pad token's."""
    return 0 if fields["pad_token_id"] is None else fields["pad_token_id"] + 1


def _every(period: int, place: int, other: str) -> Any:
    """`layer_types` in which the layer at `place` of every `period` has full attention and the others have `other`."""
    return lambda fields: [
        "full_attention" if i % period == place else other for i in range(fields["num_hidden_layers"])
    ]


_VASWANI: dict[str, Any] = {
    "architecture": "encoder-decoder",
    "vocab_size": 37000,
    "hidden_act": "relu",
    "norm_position": "post",
    "position_encoding": "sinusoidal",
    "scale_embedding": True,
    "initializer": "xavier",
}

_BERT: dict[str, Any] = {
    "architecture": "encoder",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "norm_position": "post",
    "position_encoding": "learned",
    "max_position_embeddings": 512,
    "position_counting": "columns",
    "embedding_norm": True,
    "lm_head_bias": True,
    "lm_head_transform": True,
    "classifier_pooling": "first",
    "attention_dropout": 0.1,
}

_ROBERTA: dict[str, Any] = {
    **_BERT,
    "position_counting": "tokens",
    "position_offset": _behind_pad,
    "type_vocab_size": 1,
    "lm_head_activation": "gelu",
    "pad_token_id": 1,
    "bos_token_id": 0,
}

_DECODER: dict[str, Any] = {
    "architecture": "decoder",
    "classifier_pooling": "last",
    "classifier_activation": None,
    "classifier_dropout": 0.0,
}

_LLAMA: dict[str, Any] = {
    **_DECODER,
    "norm_type": "rmsnorm",
    "hidden_act": "silu",
    "gated_mlp": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_dropout_prob": 0.0,
    "pad_token_id": None,
}

_GEMMA: dict[str, Any] = {
    **_LLAMA,
    "hidden_act": "gelu_pytorch_tanh",
    "norm_eps": 1e-6,
    "norm_position": "sandwich",
    "norm_offset": 1.0,
    "scale_embedding": True,
    "attention_scale": 256**-0.5,
    "head_dim": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

_PAIR: dict[str, Any] = {
    "architecture": "encoder-decoder",
    "classifier_pooling": "last",
    "pad_token_id": 1,
    "bos_token_id": 0,
}

_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}

_BART: dict[str, Any] = {
    **_PAIR,
    "source_fields": {"normalize_before": False, "normalize_embedding": True},  # as published, read by CTranslate2
    "position_encoding": "learned",
    "position_offset": 2,
    "position_counting": "columns",
    "embedding_norm": True,
    "classifier_dropout": 0.0,
}

_M2M_100: dict[str, Any] = {
    **_PAIR,
    **_LARGE,
    "source_family": "m2m_100",
    "hidden_act": "relu",
    "final_norm": True,
    "position_encoding": "sinusoidal",
    "sinusoidal_layout": "tensor2tensor",
    "position_offset": _behind_pad,
    "position_counting": "tokens",
    "scale_embedding": True,
    "attention_dropout": 0.1,
}


def _t5_scale(fields: dict[str, Any]) -> float:
    """T5 v1.0 scales its logits."""
    return float(fields["hidden_size"] ** -0.5)


def _four_times(fields: dict[str, Any]) -> int:
    """The feed-forward layer of GPT-2 and BLOOM, which their configs do not name."""
    return 4 * int(fields["hidden_size"])


_T5: dict[str, Any] = {
    **_PAIR,
    "source_family": "t5",
    "vocab_size": 32128,
    "head_dim": 64,
    "norm_type": "rmsnorm",
    "norm_eps": 1e-6,
    "position_encoding": "t5",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_scale": 1.0,
    "freeze_pad_embedding": False,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "classifier_dropout": 0.0,
    "initializer": "t5",
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

_T5_1_1: dict[str, Any] = {**_T5, "hidden_act": "gelu_new", "gated_mlp": True, "tie_word_embeddings": False}

_TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
}


PRESETS: dict[str, Preset] = {
    "vaswani-base": Preset(
        "Vaswani et al. 2017, Attention Is All You Need, table 3, base (arXiv:1706.03762)", _VASWANI
    ),
    "vaswani-big": Preset(
        "Vaswani et al. 2017, table 3, big (arXiv:1706.03762)",
        {
            **_VASWANI,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "hidden_dropout_prob": 0.3,
        },
    ),
    "transformer-tiny": Preset(
        "Wu et al. 2021, Good for Misconceived Reasons, Transformer-Tiny for Multi30k (arXiv:2105.14462)",
        {
            **_VASWANI,
            "vocab_size": 10000,
            "norm_position": "pre",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "hidden_dropout_prob": 0.3,
        },
    ),
    "nn-transformer": Preset(
        "torch.nn.Transformer with PyTorch's defaults (Vaswani et al. 2017, and a final norm), learned positions and "
        "an output layer, as tutorials build a translator with it",
        {
            "architecture": "encoder-decoder",
            "norm_position": "post",
            "final_norm": True,
            "position_encoding": "learned",
            "hidden_act": "relu",
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
            "tie_word_embeddings": False,
            "lm_head_bias": True,
            "initializer": "xavier",
        },
    ),
    "keras-block": Preset(
        "the encoder of Keras' TransformerBlock tutorials (Vaswani et al. 2017): sinusoidal positions, post-norm with "
        "eps 1e-6, embeddings times sqrt(d_model)",
        {
            "architecture": "encoder",
            "hidden_act": "relu",
            "norm_position": "post",
            "norm_eps": 1e-6,
            "position_encoding": "sinusoidal",
            "scale_embedding": True,
            "tie_word_embeddings": False,
            "lm_head_bias": True,
            "initializer": "xavier",
        },
    ),
    "bert-base": Preset(
        "Devlin et al. 2019, BERT base uncased (arXiv:1810.04805)",
        {
            **_BERT,
            "source_family": "bert",
            "vocab_size": 30522,
            "norm_eps": 1e-12,
            "type_vocab_size": 2,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "roberta-base": Preset(
        "Liu et al. 2019, RoBERTa base (arXiv:1907.11692)",
        {**_ROBERTA, "source_family": "roberta", "vocab_size": 50265},
    ),
    "xlm-roberta-base": Preset(
        "Conneau et al. 2020, XLM-R base (arXiv:1911.02116)",
        {**_ROBERTA, "source_family": "xlm-roberta", "vocab_size": 250002},
    ),
    "distilbert-base": Preset(
        "Sanh et al. 2019, DistilBERT base uncased (arXiv:1910.01108)",
        {
            **_BERT,
            "source_family": "distilbert",
            "vocab_size": 30522,
            "num_hidden_layers": 6,
            "norm_eps": 1e-12,
            "classifier_activation": "relu",
            "classifier_dropout": 0.2,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "modernbert-base": Preset(
        "Warner et al. 2024, ModernBERT base (arXiv:2412.13663)",
        {
            "architecture": "encoder",
            "source_family": "modernbert",
            "vocab_size": 50368,
            "hidden_size": 768,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "intermediate_size": 1152,
            "gated_mlp": True,
            "norm_bias": False,
            "first_norm": False,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_norm": True,
            "max_position_embeddings": 8192,
            "sliding_window": 64,
            "layer_types": _every(3, 0, "sliding_attention"),
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "lm_head_bias": True,
            "lm_head_transform": True,
            "lm_head_activation": "gelu",
            "classifier_pooling": "mean",
            "classifier_activation": "gelu",
            "classifier_norm": True,
            "token_classifier_dense": True,
            "transform_bias": False,
            "hidden_dropout_prob": 0.0,
            "classifier_dropout": 0.0,
            "initializer": "gpt2",
            "pad_token_id": 50283,
            "bos_token_id": 50281,
            "eos_token_id": 50282,
        },
    ),
    "gpt2": Preset(
        "Radford et al. 2019, GPT-2 small",
        {
            **_DECODER,
            "source_family": "gpt2",
            "vocab_size": 50257,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": _four_times,
            "hidden_act": "gelu_new",
            "position_encoding": "learned",
            "position_counting": "columns",
            "freeze_pad_embedding": False,
            "attention_dropout": 0.1,
            "initializer": "gpt2",
            "pad_token_id": None,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
    ),
    "llama-2-7b": Preset(
        "Touvron et al. 2023, Llama 2 7B (arXiv:2307.09288)",
        {
            **_LLAMA,
            "source_family": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    ),
    "llama-3.2-1b": Preset(
        "Grattafiori et al. 2024, The Llama 3 Herd of Models; Llama 3.2 1B (arXiv:2407.21783)",
        {
            **_LLAMA,
            "source_family": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "mistral-7b": Preset(
        "Jiang et al. 2023, Mistral 7B v0.1 (arXiv:2310.06825)",
        {
            **_LLAMA,
            "source_family": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "layer_types": lambda fields: (
                ["full_attention" if fields["sliding_window"] is None else "sliding_attention"]
                * fields["num_hidden_layers"]
            ),
            "tie_word_embeddings": False,
        },
    ),
    "qwen2-0.5b": Preset(
        "Yang et al. 2024, Qwen2 0.5B (arXiv:2407.10671)",
        {
            **_LLAMA,
            "source_family": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "norm_eps": 1e-6,
            "attention_bias": True,
            "attention_out_bias": False,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "bos_token_id": 151643,
            "eos_token_id": 151643,
        },
    ),
    "qwen3-0.6b": Preset(
        "Qwen Team 2025, Qwen3 technical report (arXiv:2505.09388)",
        {
            **_LLAMA,
            "source_family": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "norm_eps": 1e-6,
            "qk_norm": True,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
    ),
    "gemma2-2b": Preset(
        "Gemma Team 2024, Gemma 2 (arXiv:2408.00118)",
        {
            **_GEMMA,
            "source_family": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 9216,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "layer_types": _every(2, 1, "sliding_attention"),
        },
    ),
    "gemma3-1b": Preset(
        "Gemma Team 2025, Gemma 3 (arXiv:2503.19786), text model",
        {
            **_GEMMA,
            "source_family": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "qk_norm": True,
            "sliding_window": 512,
            "layer_types": _every(6, 5, "sliding_attention"),
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "pythia-160m": Preset(
        "Biderman et al. 2023, Pythia (arXiv:2304.01373), a GPT-NeoX",
        {
            **_DECODER,
            "source_family": "gpt_neox",
            "vocab_size": 50304,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "norm_position": "parallel",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            "max_position_embeddings": 2048,
            "freeze_pad_embedding": False,
            "tie_word_embeddings": False,
            "hidden_dropout_prob": 0.0,
            "classifier_dropout": 0.1,
            "pad_token_id": None,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "bloom-560m": Preset(
        "BigScience 2022, BLOOM (arXiv:2211.05100), ALiBi",
        {
            **_DECODER,
            "source_family": "bloom",
            "vocab_size": 250880,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": _four_times,
            "hidden_act": "gelu_pytorch_tanh",
            "position_encoding": "alibi",
            "embedding_norm": True,
            "freeze_pad_embedding": False,
            "hidden_dropout_prob": 0.0,
            "pad_token_id": 3,
        },
    ),
    "opt-125m": Preset(
        "Zhang et al. 2022, OPT (arXiv:2205.01068)",
        {
            **_DECODER,
            "source_family": "opt",
            "vocab_size": 50272,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "relu",
            "final_norm": True,
            "position_encoding": "learned",
            "max_position_embeddings": 2048,
            "position_offset": 2,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
    ),
    "bart-base": Preset(
        "Lewis et al. 2020, BART base (arXiv:1910.13461)",
        {
            **_BART,
            "source_family": "bart",
            "vocab_size": 50265,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "norm_position": "post",
            "final_norm": False,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
        },
    ),
    "bart-large": Preset(
        "Lewis et al. 2020, BART large (arXiv:1910.13461)",
        {
            **_BART,
            **_LARGE,
            "source_family": "bart",
            "vocab_size": 50265,
            "norm_position": "post",
            "final_norm": False,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
        },
    ),
    "mbart-large-50": Preset(
        "Tang et al. 2020, mBART-50 (arXiv:2008.00401)",
        {
            **_BART,
            **_LARGE,
            "source_fields": {"normalize_before": True, "normalize_embedding": True},
            "source_family": "mbart",
            "vocab_size": 250054,
            "final_norm": True,
            "scale_embedding": True,
            "decoder_start_from_labels": True,
        },
    ),
    "m2m100-418m": Preset(
        "Fan et al. 2020, M2M-100 with 418M parameters (arXiv:2010.11125)",
        {**_M2M_100, "vocab_size": 128112},
    ),
    "nllb-200-distilled-600m": Preset(
        "NLLB Team 2022, NLLB-200 distilled 600M (arXiv:2207.04672), an M2M-100", {**_M2M_100, "vocab_size": 256206}
    ),
    "opus-mt-en-de": Preset(
        "Tiedemann & Thottingal 2020, OPUS-MT; Junczys-Dowmunt et al. 2018, Marian (arXiv:1804.00344)",
        {
            **_PAIR,
            "source_family": "marian",
            "vocab_size": 58101,
            "hidden_act": "swish",
            "norm_position": "post",
            "final_norm": False,
            "position_encoding": "sinusoidal",
            "sinusoidal_layout": "halves",
            "position_counting": "columns",
            "max_position_embeddings": 512,
            "scale_embedding": True,
            "lm_head_bias": True,
            "pad_token_id": 58100,
            "eos_token_id": 0,
            "decoder_start_token_id": lambda fields: fields["pad_token_id"],
        },
    ),
    "t5-small": Preset(
        "Raffel et al. 2020, T5 v1.0 small (arXiv:1910.10683)",
        {**_T5, "hidden_act": "relu", "hidden_size": 512, "logit_scale": _t5_scale},
    ),
    "t5-base": Preset(
        "Raffel et al. 2020, T5 v1.0 base (arXiv:1910.10683)",
        {
            **_T5,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "relu",
            "logit_scale": _t5_scale,
        },
    ),
    "flan-t5-base": Preset(
        "Chung et al. 2022, Flan-T5 base (arXiv:2210.11416), a T5 v1.1",
        {**_T5_1_1, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "mt5-small": Preset(
        "Xue et al. 2021, mT5 small (arXiv:2010.11934)",
        {
            **_T5_1_1,
            "source_family": "mt5",
            "vocab_size": 250112,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "intermediate_size": 1024,
        },
    ),
    "tiny-encoder": Preset("for tests", {**_TINY, "architecture": "encoder"}),
    "tiny-decoder": Preset("for tests", {**_TINY, "architecture": "decoder"}),
    "tiny-encoder-decoder": Preset("for tests", {**_TINY, "architecture": "encoder-decoder"}),
}
