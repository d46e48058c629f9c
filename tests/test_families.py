"""The axes of the config against the classes of transformers that use them: same weights, same numbers.

Each family is a small random stock model, the fields that describe it here, and a table of renames. Weights, biases
and norms are all non-zero. Together the families use every option of the config.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor

import urform
from urform import UrformConfig

VOCAB = 61
DECODER_NORMS = {"input_layernorm": "self_attn_norm", "post_attention_layernorm": "mlp_norm"}
SANDWICH = {
    "input_layernorm": "self_attn_norm",
    "post_attention_layernorm": "self_attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
LLAMA = {"^model.": "model.decoder.", **{f"\\b{k}\\b": v for k, v in DECODER_NORMS.items()}}
GEMMA = {"^model.": "model.decoder.", **{f"\\b{k}\\b": v for k, v in SANDWICH.items()}}
LLAMA_FIELDS = {
    "architecture": "decoder",
    "norm_type": "rmsnorm",
    "norm_eps": 1e-6,
    "hidden_act": "silu",
    "gated_mlp": True,
    "attention_bias": False,
    "mlp_bias": False,
}
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4}


class Family(NamedTuple):
    """How a stock model is made, and what it is here."""

    stock: str
    config: dict[str, Any]
    fields: dict[str, Any]
    renames: dict[str, str]
    split: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state
    drop: str = "^$"


def split_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 stores transposed weights, queries, keys and values in one."""
    out = {}
    for name, value in state.items():
        if "attn" in name or "mlp" in name:
            value = value.T.contiguous() if value.ndim == 2 else value
        parts = value.chunk(3) if "c_attn" in name else [value]
        for letter, part in zip("qkv", parts, strict=False):
            out[name.replace("c_attn", f"{letter}_proj")] = part
    return out


def split_interleaved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BLOOM and GPT-NeoX store (head, q|k|v, width) in one."""
    out = {}
    for name, value in state.items():
        if "query_key_value" not in name:
            out[name] = value
            continue
        parts = value.view(4, 3, 6, *value.shape[1:])
        for i, letter in enumerate("qkv"):
            out[name.replace("query_key_value", f"{letter}_proj")] = parts[:, i].reshape(24, *value.shape[1:])
    return out


FAMILIES = {
    "bert": Family(
        "BertForMaskedLM",
        {"intermediate_size": 40, "max_position_embeddings": 32, "hidden_act": "gelu"},
        {
            "architecture": "encoder",
            "norm_position": "post",
            "norm_eps": 1e-12,
            "position_encoding": "learned",
            "embedding_norm": True,
            "type_vocab_size": 2,
            "lm_head_bias": True,
            "lm_head_transform": True,
        },
        {
            r"^bert\.embeddings\.word_embeddings": "model.encoder.embed_tokens",
            r"^bert\.embeddings\.position_embeddings": "model.encoder.embed_positions",
            r"^bert\.embeddings\.token_type_embeddings": "model.encoder.embed_token_types",
            r"^bert\.embeddings\.LayerNorm": "model.encoder.embed_norm",
            r"^bert\.encoder\.layer\.": "model.encoder.layers.",
            r"attention\.self\.query": "self_attn.q_proj",
            r"attention\.self\.key": "self_attn.k_proj",
            r"attention\.self\.value": "self_attn.v_proj",
            r"attention\.output\.dense": "self_attn.o_proj",
            r"attention\.output\.LayerNorm": "self_attn_norm",
            r"intermediate\.dense": "mlp.up_proj",
            r"(\d)\.output\.dense": r"\1.mlp.down_proj",
            r"(\d)\.output\.LayerNorm": r"\1.mlp_norm",
            r"^cls\.predictions\.transform\.dense": "transform.dense",
            r"^cls\.predictions\.transform\.LayerNorm": "transform.norm",
            r"^cls\.predictions\.decoder": "lm_head",
        },
        drop=r"position_ids|cls\.predictions\.bias",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"n_inner": 40, "n_positions": 32},
        {"architecture": "decoder", "hidden_act": "gelu_new", "position_encoding": "learned"},
        {
            r"^transformer\.wte": "model.decoder.embed_tokens",
            r"^transformer\.wpe": "model.decoder.embed_positions",
            r"^transformer\.ln_f": "model.decoder.norm",
            r"^transformer\.h\.": "model.decoder.layers.",
            r"\.attn\.c_proj": ".self_attn.o_proj",
            r"\.attn\.": ".self_attn.",
            r"\.ln_1": ".self_attn_norm",
            r"\.ln_2": ".mlp_norm",
            r"mlp\.c_fc": "mlp.up_proj",
            r"mlp\.c_proj": "mlp.down_proj",
        },
        split_gpt2,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "head_dim": 8,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            },
        },
        {**LLAMA_FIELDS, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False},
        LLAMA,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 2, "intermediate_size": 40, "sliding_window": 4},
        {
            **LLAMA_FIELDS,
            "num_key_value_heads": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention"] * 3,
            "tie_word_embeddings": False,
        },
        LLAMA,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 2, "intermediate_size": 40, "head_dim": 8, "tie_word_embeddings": True},
        {**LLAMA_FIELDS, "num_key_value_heads": 2, "head_dim": 8, "qk_norm": True},
        LLAMA,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {
            **LLAMA_FIELDS,
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 2,
            "head_dim": 8,
            "norm_position": "sandwich",
            "norm_offset": 1.0,
            "scale_embedding": True,
            "attention_scale": 0.25,
            "sliding_window": 4,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        GEMMA,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        {
            "num_key_value_heads": 1,
            "intermediate_size": 40,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
        {
            **LLAMA_FIELDS,
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 1,
            "head_dim": 8,
            "norm_position": "sandwich",
            "norm_offset": 1.0,
            "qk_norm": True,
            "scale_embedding": True,
            "attention_scale": 0.25,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        GEMMA,
    ),
    "gpt-neox": Family(
        "GPTNeoXForCausalLM",
        {"intermediate_size": 40, "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.34}},
        {
            "architecture": "decoder",
            "norm_position": "parallel",
            "tie_word_embeddings": False,
        },
        {
            r"^gpt_neox\.embed_in": "model.decoder.embed_tokens",
            r"^gpt_neox\.final_layer_norm": "model.decoder.norm",
            r"^gpt_neox\.": "model.decoder.",
            r"\battention\.dense\b": "self_attn.o_proj",
            r"\battention\.": "self_attn.",
            r"\binput_layernorm\b": "self_attn_norm",
            r"\bpost_attention_layernorm\b": "mlp_norm",
            r"mlp\.dense_h_to_4h": "mlp.up_proj",
            r"mlp\.dense_4h_to_h": "mlp.down_proj",
            r"^embed_out": "lm_head",
        },
        split_interleaved,
    ),
    "bloom": Family(
        "BloomForCausalLM",
        {"n_layer": 3, "n_head": 4},
        {
            "architecture": "decoder",
            "intermediate_size": 96,
            "hidden_act": "gelu_pytorch_tanh",
            "position_encoding": "alibi",
            "embedding_norm": True,
        },
        {
            r"^transformer\.word_embeddings_layernorm": "model.decoder.embed_norm",
            r"^transformer\.word_embeddings": "model.decoder.embed_tokens",
            r"^transformer\.ln_f": "model.decoder.norm",
            r"^transformer\.h\.": "model.decoder.layers.",
            r"self_attention\.dense": "self_attn.o_proj",
            r"self_attention\.": "self_attn.",
            r"\binput_layernorm\b": "self_attn_norm",
            r"\bpost_attention_layernorm\b": "mlp_norm",
            r"mlp\.dense_h_to_4h": "mlp.up_proj",
            r"mlp\.dense_4h_to_h": "mlp.down_proj",
        },
        split_interleaved,
    ),
    "opt": Family(
        "OPTForCausalLM",
        {"ffn_dim": 40, "max_position_embeddings": 32, "word_embed_proj_dim": 24},
        {
            "architecture": "decoder",
            "hidden_act": "relu",
            "position_encoding": "learned",
            "position_offset": 2,
        },
        {
            r"final_layer_norm\.(?=weight|bias)": "FINAL.",
            r"^model\.decoder\.FINAL\.": "model.decoder.norm.",
            r"\bFINAL\.": "mlp_norm.",
            r"self_attn_layer_norm": "self_attn_norm",
            r"out_proj": "o_proj",
            r"\bfc1\b": "mlp.up_proj",
            r"\bfc2\b": "mlp.down_proj",
        },
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        {
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 56,
            "max_position_embeddings": 32,
            "scale_embedding": True,
            "forced_eos_token_id": None,
        },
        {
            "architecture": "encoder-decoder",
            "num_hidden_layers": 2,
            "decoder_num_hidden_layers": 3,
            "num_attention_heads": 2,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 56,
            "norm_position": "post",
            "position_encoding": "learned",
            "position_offset": 2,
            "embedding_norm": True,
            "scale_embedding": True,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        {
            r"layernorm_embedding": "embed_norm",
            r"self_attn_layer_norm": "self_attn_norm",
            r"encoder_attn_layer_norm": "cross_attn_norm",
            r"final_layer_norm": "mlp_norm",
            r"encoder_attn": "cross_attn",
            r"out_proj": "o_proj",
            r"\bfc1\b": "mlp.up_proj",
            r"\bfc2\b": "mlp.down_proj",
        },
        drop=r"final_logits_bias|shared",
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        {
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 2,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
        },
        {
            "architecture": "encoder-decoder",
            "num_hidden_layers": 2,
            "head_dim": 8,
            "hidden_act": "relu",
            "norm_type": "rmsnorm",
            "norm_eps": 1e-6,
            "position_encoding": "t5",
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_scale": 1.0,
            "logit_scale": 24**-0.5,
            "decoder_start_token_id": 0,
        },
        {
            r"^(en|de)coder\.": r"model.\1coder.",
            r"block\.0\.layer\.0\.SelfAttention\.relative_attention_bias": "position_bias.table",
            r"final_layer_norm": "norm",
            r"\bblock\b": "layers",
            r"layer\.0\.SelfAttention\.(.)\b": r"self_attn.\1_proj",
            r"layer\.0\.layer_norm": "self_attn_norm",
            r"layer\.1\.EncDecAttention\.(.)\b": r"cross_attn.\1_proj",
            r"(decoder.*)layer\.1\.layer_norm": r"\1cross_attn_norm",
            r"layer\.\d\.layer_norm": "mlp_norm",
            r"layer\.\d\.DenseReluDense\.wi": "mlp.up_proj",
            r"layer\.\d\.DenseReluDense\.wo": "mlp.down_proj",
        },
        drop="shared",
    ),
    "t5-v1.1": Family(
        "T5ForConditionalGeneration",
        {"d_kv": 4, "d_ff": 40, "num_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {
            "architecture": "encoder-decoder",
            "num_hidden_layers": 2,
            "head_dim": 4,
            "hidden_act": "gelu_new",
            "gated_mlp": True,
            "norm_type": "rmsnorm",
            "norm_eps": 1e-6,
            "position_encoding": "t5",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_scale": 1.0,
            "tie_word_embeddings": False,
            "share_embeddings": True,
            "decoder_start_token_id": 0,
        },
        {
            r"^(en|de)coder\.": r"model.\1coder.",
            r"block\.0\.layer\.0\.SelfAttention\.relative_attention_bias": "position_bias.table",
            r"final_layer_norm": "norm",
            r"\bblock\b": "layers",
            r"layer\.0\.SelfAttention\.(.)\b": r"self_attn.\1_proj",
            r"layer\.0\.layer_norm": "self_attn_norm",
            r"layer\.1\.EncDecAttention\.(.)\b": r"cross_attn.\1_proj",
            r"(decoder.*)layer\.1\.layer_norm": r"\1cross_attn_norm",
            r"layer\.\d\.layer_norm": "mlp_norm",
            r"layer\.\d\.DenseReluDense\.wi_0": "mlp.gate_proj",
            r"layer\.\d\.DenseReluDense\.wi_1": "mlp.up_proj",
            r"layer\.\d\.DenseReluDense\.wo": "mlp.down_proj",
        },
        drop="shared",
    ),
}


def build(name: str) -> tuple[Any, Any]:
    """The stock model with random weights, and ours with the same."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    stock_class = getattr(hf, family.stock)
    sizes = dict(SIZES)
    for alias, size in (("encoder_layers", "num_hidden_layers"), ("num_layers", "num_hidden_layers")):
        if alias in family.config:  # the stock config takes both for one, and the common name wins
            del sizes[size]
    if "encoder_attention_heads" in family.config:
        del sizes["num_attention_heads"]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name in ("t5", "t5-v1.1"):
        ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    stock_config = stock_class.config_class(**{**sizes, **ids, **family.config})
    stock_config._attn_implementation = "eager"
    stock = stock_class(stock_config).eval()
    if name == "t5-v1.1":  # transformers unties it when a checkpoint brings both, never in a new model
        stock.lm_head.weight = torch.nn.Parameter(stock.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(0.0, 0.4)
    fields = {"intermediate_size": 40, "max_position_embeddings": 32, **SIZES, **family.fields}
    if "rope_parameters" in family.config:
        fields["rope_parameters"] = stock_config.rope_parameters
        fields["max_position_embeddings"] = stock_config.max_position_embeddings
    config = UrformConfig(**{**ids, **fields})
    state = {}
    for key, value in family.split(dict(stock.state_dict())).items():
        if not re.search(family.drop, key):
            for old, new in family.renames.items():
                key = re.sub(old, new, key)
            state[key] = value
    kind = {"encoder": "MaskedLM", "decoder": "CausalLM", "encoder-decoder": "ConditionalGeneration"}
    ours = getattr(urform, f"UrformFor{kind[config.architecture]}")(config).eval()
    ours.load_state_dict(state, strict=True)
    return stock, ours


@pytest.mark.parametrize("name", FAMILIES)
def test_same_numbers_as_the_stock_model(name: str) -> None:
    """Logits, loss, every hidden state, gradient of the embeddings, greedy and beam generation."""
    stock, ours = build(name)
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    mask[1, 4:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    labels = torch.randint(3, VOCAB, (3, 7)) if stock.config.is_encoder_decoder else ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "output_hidden_states": True}
    want, have = stock(**inputs), ours(**inputs)
    real = torch.ones(labels.shape, dtype=torch.bool) if stock.config.is_encoder_decoder else mask.bool()
    scale = 1e-5 * want.logits.abs().max().item()
    torch.testing.assert_close(have.logits[real], want.logits[real], rtol=1e-5, atol=scale)
    torch.testing.assert_close(have.loss, want.loss, rtol=1e-5, atol=1e-5)
    for kind in ("hidden_states", "decoder_hidden_states", "encoder_hidden_states"):
        if getattr(want, kind, None) is not None:
            where = mask.bool() if kind != "decoder_hidden_states" else real
            pairs = list(zip(getattr(have, kind), getattr(want, kind), strict=True))
            for a, b in pairs:
                torch.testing.assert_close(a[where], b[where], rtol=1e-5, atol=1e-5 * b.abs().max().item())
    want.loss.backward()
    have.loss.backward()
    grad = ours.get_input_embeddings().weight.grad
    want_grad = stock.get_input_embeddings().weight.grad
    torch.testing.assert_close(grad[3:], want_grad[3:], rtol=1e-4, atol=1e-5 * want_grad.abs().max().item())
    if not ours.can_generate():
        return
    left = mask.flip(1)
    prompt = ids.flip(1)
    for extra in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **extra}
        a = ours.generate(input_ids=prompt, attention_mask=left, **settings)
        assert a.tolist() == stock.generate(input_ids=prompt, attention_mask=left, **settings).tolist()
