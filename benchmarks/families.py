"""Converted models against the stock classes that they came from: training steps and `generate`.

    python benchmarks/families.py                                       # CPU, about ten minutes
    python benchmarks/families.py --only llama t5-train

Each stock class is made small (4 layers or 4+4, 256 wide, vocabulary 8,000, random weights, dropout 0.1 where the
family has one) and converted by `urform.from_transformers`; both then do the same.

- FAMILY-train: forward, backward, clipping and fused AdamW on batches of 32 texts of natural lengths (Multi30k's, the
  source's and the target's for an encoder-decoder), padded on the right; real tokens per second.
- FAMILY-generate: greedy search, 32 new tokens for 16 prompts, padded on the left for a decoder.

float32 and bfloat16 (autocast in training), and the stock class with its default attention and with "eager": each
side's best counts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from generate import contenders
from harness import Bench, Contender, arguments
from torch import nn
from train_step import own_loss, training
from workloads import ENGLISH, GERMAN_MORE, PAD, Batch, pad, random_ids, real_tokens, seq2seq_batch

import urform

HIDDEN, LAYERS, HEADS, VOCABULARY = 256, 4, 8, 8000
IDS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    **IDS,
}
WIDE = {**SIZES, "intermediate_size": 4 * HIDDEN}
GROUPED = {**WIDE, "num_key_value_heads": 2, "intermediate_size": 2 * HIDDEN}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 4 * HIDDEN,
    "decoder_ffn_dim": 4 * HIDDEN,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **IDS,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": HIDDEN // HEADS,
    "d_ff": 4 * HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": PAD,
    **IDS,
}
MODERN = {**WIDE, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "marian": ("MarianMTModel", {**BART, "decoder_start_token_id": PAD}),
    "bart": ("BartForConditionalGeneration", BART),
    "m2m100": ("M2M100ForConditionalGeneration", {**BART, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-v1.1": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bert": ("BertForMaskedLM", WIDE),
    "roberta": ("RobertaForMaskedLM", WIDE),
    "distilbert": ("DistilBertForMaskedLM", {**SIZES, "hidden_dim": 4 * HIDDEN}),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "gpt2": ("GPT2LMHeadModel", SIZES),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 4 * HIDDEN, "word_embed_proj_dim": HIDDEN}),
    "gpt-neox": ("GPTNeoXForCausalLM", WIDE),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 16}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": HIDDEN // HEADS}),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": HIDDEN // HEADS, "sliding_window": 16}),
}


def pair(name: str, quick: bool) -> dict[tuple[str, str], nn.Module]:
    """Make the stock model with each attention, and ours of the same weights."""
    stock_name, fields = FAMILIES[name]
    fields = {**fields, **dict.fromkeys(fields.keys() & {"num_hidden_layers", "num_layers"}, 1 if quick else LAYERS)}
    stock_class = getattr(transformers, stock_name)
    models = {}
    for attention in ("", "eager"):
        torch.manual_seed(0)
        named = {"attn_implementation": attention} if attention else {}
        models["stock", attention] = stock_class._from_config(stock_class.config_class(**fields), **named)
    return {("urform", ""): urform.from_transformers(models["stock", ""]), **models}


def train(bench: Bench, name: str, family: str) -> None:
    models = pair(family, bench.options.quick)
    size = 4 if bench.options.quick else 32
    generator = torch.Generator().manual_seed(0)
    batches: list[Batch] = []
    for _ in range(bench.rounds):
        lengths = ENGLISH.draw(size, generator)
        texts = random_ids(lengths, VOCABULARY, generator)
        if models["stock", ""].config.is_encoder_decoder:
            lengths = (lengths + GERMAN_MORE.draw(size, generator)).clamp(min=4)
            batches.append(seq2seq_batch(texts, random_ids(lengths, VOCABULARY, generator)))
        else:
            mask = pad([torch.ones_like(ids) for ids in texts], 0)
            ids = pad(texts, PAD)
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    batches = [{key: x.to(bench.device) for key, x in batch.items()} for batch in batches]
    steps = [
        Contender(side, f"{variant} {precision}".strip(), training(model, batches, own_loss, precision == "bf16"))
        for (side, variant), model in models.items()
        for precision in (("fp32", "bf16") if bench.device == "cpu" else ("bf16",))
    ]
    real = [real_tokens(batch) for batch in batches]
    bench.compare(name, {"stock": FAMILIES[family][0], "batch": size}, steps, work=lambda i: real[i])


def generate(bench: Bench, name: str, family: str) -> None:
    models = pair(family, bench.options.quick)
    size, new_tokens = (3, 4) if bench.options.quick else (16, 32)
    generator = torch.Generator().manual_seed(0)
    input_ids = pad(random_ids(ENGLISH.draw(size, generator), VOCABULARY, generator), PAD)
    prompt_length = 1
    if not models["stock", ""].config.is_encoder_decoder:
        order = torch.sort(input_ids != PAD, stable=True).indices
        input_ids, prompt_length = input_ids.gather(1, order), input_ids.shape[1]
    inputs = {"input_ids": input_ids.to(bench.device), "attention_mask": (input_ids != PAD).long().to(bench.device)}
    configuration = {"stock": FAMILIES[family][0], "prompts": size, "new_tokens": new_tokens}
    ready = contenders(bench, models, inputs, new_tokens, 1, prompt_length)
    bench.compare(name, configuration, ready, work=lambda i: size * new_tokens)


MASKED = ("bert", "roberta", "distilbert", "modernbert")
CASES: dict[str, Callable[[Bench, str], None]] = {
    **{f"{family}-train": partial(train, family=family) for family in FAMILIES},
    **{f"{family}-generate": partial(generate, family=family) for family in FAMILIES if family not in MASKED},
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = arguments(__doc__, repeats=5, warmup=1, sizes=list(CASES)).parse_args(argv)
    bench = Bench("families", options, argv)
    for name, run in CASES.items():
        if bench.wants(name):
            run(bench, name)
    return bench.finish()


if __name__ == "__main__":
    main()
