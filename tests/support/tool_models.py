"""Small stock models, and the same weights as ours, in folders that the tools of other people read."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import urform

TEXTS = ["the cat sat on the mat", "a dog ran in the park", "red and green and blue", "user says hello"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} says {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant says{% endif %}"
)
# Large initial weights: outputs that differ from token to token.
SIZES: dict[str, dict[str, Any]] = {
    "Llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48, "initializer_range": 0.3, "tie_word_embeddings": False},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
    "Bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3,
             "dropout": 0.0, "forced_eos_token_id": None},
    "Marian": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
               "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3,
               "dropout": 0.0, "forced_eos_token_id": None},
    "T5": {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_ff": 48,
           "dropout_rate": 0.0, "initializer_factor": 2.0},
    "Bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
             "initializer_range": 0.3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}  # fmt: skip
SIZES["Roberta"] = SIZES["Bert"]
HEADS = {"Llama": "ForCausalLM", "GPT2": "LMHeadModel", "Bart": "ForConditionalGeneration", "Marian": "MTModel",
         "T5": "ForConditionalGeneration", "Bert": "ForMaskedLM"}  # fmt: skip


def need(*modules: str) -> None:
    """Skip the test, with the reason, where a tool is not installed (`make test-tools` installs them)."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            pytest.skip(f"{name} is not installed: make test-tools")


def tokenizer() -> urform.UrformTokenizer:
    made = urform.UrformTokenizer.train(TEXTS * 9, vocab_size=300)
    made.chat_template = CHAT
    return made


def stock_model(family: str, head: str | None = None, **changes: Any) -> transformers.PreTrainedModel:
    """A stock model of the family, random weights, the same for every call."""
    torch.manual_seed(0)
    tokens = tokenizer()
    ids = {"pad_token_id": tokens.pad_token_id, "bos_token_id": tokens.bos_token_id,
           "eos_token_id": tokens.eos_token_id}  # fmt: skip
    if family in ("Bart", "Marian", "T5"):
        ids["decoder_start_token_id"] = tokens.bos_token_id
    length = {"T5": {}, "GPT2": {"n_positions": 128}}.get(family, {"max_position_embeddings": 128})
    config = getattr(transformers, f"{family}Config")(
        **{"vocab_size": len(tokens), **SIZES[family], **ids, **length, **changes}
    )
    return getattr(transformers, family + (head or HEADS[family]))(config).eval()


def save_pair(family: str, folder: Path) -> tuple[Path, Path]:
    """Write a stock model and the same weights as ours, each with the tokenizer; return the two folders."""
    stock = stock_model(family)
    ours = urform.from_transformers(stock)
    for name, model in (("stock", stock), ("ours", ours)):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder / "stock", folder / "ours"
