"""Presets against what is published: the stock config of that size, converted, and the number of parameters."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conversion_cases import close, config_of, padded, same_state, shake
from tokenizers import Tokenizer, models, pre_tokenizers

import urform
from urform import UrformConfig, list_presets
from urform.conversion.configs import choose_family, urform_config

_BART_BASE = {"layers": 6, "ffn_dim": 3072, "attention_heads": 12}
_OPUS_MT = {"layers": 6, "ffn_dim": 2048, "attention_heads": 8}
_T5_BASE = {"d_model": 768, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}

# Stock class, and the published config's fields where they are not the class's defaults.
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("BertForMaskedLM", {}),
    "roberta-base": ("RobertaForMaskedLM", _ROBERTA),
    "xlm-roberta-base": ("XLMRobertaForMaskedLM", {**_ROBERTA, "vocab_size": 250002}),
    "distilbert-base": ("DistilBertForMaskedLM", {}),
    "modernbert-base": ("ModernBertForMaskedLM", {"classifier_pooling": "mean"}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "opt-125m": ("OPTForCausalLM", {}),
    "pythia-160m": (
        "GPTNeoXForCausalLM",
        {
            "vocab_size": 50304,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "bloom-560m": (
        "BloomForCausalLM",
        {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880, "pad_token_id": 3},
    ),
    "llama-2-7b": ("LlamaForCausalLM", {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
    "llama-3.2-1b": (
        "LlamaForCausalLM",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "mistral-7b": ("MistralForCausalLM", {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5}),
    "qwen2-0.5b": (
        "Qwen2ForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "max_position_embeddings": 131072,
            "sliding_window": 131072,
            "max_window_layers": 24,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "rope_theta": 1000000.0,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
        },
    ),
    "qwen3-0.6b": (
        "Qwen3ForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "tie_word_embeddings": True,
            "rope_theta": 1000000,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
    ),
    "gemma2-2b": ("Gemma2ForCausalLM", {}),
    "gemma3-1b": (
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
    ),
    "bart-base": (
        "BartForConditionalGeneration",
        {
            **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _BART_BASE.items()},
            "d_model": 768,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
            "num_labels": 2,
        },
    ),
    "bart-large": (
        "BartForConditionalGeneration",
        {"attention_dropout": 0.1, "activation_dropout": 0.1, "num_labels": 2},
    ),
    "mbart-large-50": (
        "MBartForConditionalGeneration",
        {"vocab_size": 250054, "scale_embedding": True, "decoder_start_token_id": 2},
    ),
    "m2m100-418m": ("M2M100ForConditionalGeneration", {}),
    "nllb-200-distilled-600m": ("M2M100ForConditionalGeneration", {"vocab_size": 256206}),
    "opus-mt-en-de": (
        "MarianMTModel",
        {
            **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _OPUS_MT.items()},
            "d_model": 512,
            "max_position_embeddings": 512,
            "activation_function": "swish",
            "scale_embedding": True,
            "bos_token_id": 0,
        },
    ),
    "t5-small": ("T5ForConditionalGeneration", {"decoder_start_token_id": 0}),
    "t5-base": ("T5ForConditionalGeneration", {**_T5_BASE, "d_ff": 3072}),
    "flan-t5-base": (
        "T5ForConditionalGeneration",
        {**_T5_BASE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5-small": ("MT5ForConditionalGeneration", {}),
}
# What the published weights say and the config does not: a `final_logits_bias` of zeros, an untied output projection.
WEIGHTS = {
    **{name: {"lm_head_bias": False} for name in ("bart-base", "bart-large", "mbart-large-50")},
    **{name: {"tie_word_embeddings": False} for name in ("flan-t5-base", "mt5-small")},
}
PUBLISHED = {
    "bert-base": 109_514_298,
    "roberta-base": 124_697_433,
    "xlm-roberta-base": 278_295_186,
    "distilbert-base": 66_985_530,
    "modernbert-base": 149_655_232,
    "gpt2": 124_439_808,
    "opt-125m": 125_239_296,
    "pythia-160m": 162_322_944,
    "bloom-560m": 559_214_592,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952,
    "bart-base": 139_420_416,
    "bart-large": 406_291_456,
    "mbart-large-50": 610_879_488,
    "m2m100-418m": 483_905_536,
    "nllb-200-distilled-600m": 615_073_792,
    "opus-mt-en-de": 74_410_496 - 2 * 512 * 512 + 58_101,  # constant sinusoids are published, the trained bias is not
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "flan-t5-base": 247_577_856,
    "mt5-small": 300_176_768,
    "vaswani-base": 63_082_496,
    "vaswani-big": 214_245_376,
}
_KINDS = {"encoder": "MaskedLM", "decoder": "CausalLM", "encoder-decoder": "ConditionalGeneration"}


def published(name: str) -> Any:
    """The stock config of a preset."""
    stock, fields = STOCK[name]
    config = getattr(hf, stock).config_class(**fields)
    config.architectures = [stock]
    return config


def fields_of(config: UrformConfig) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ("source_fields", "transformers_version")}


@pytest.mark.parametrize("name", STOCK)
def test_presets_are_the_published_configs(name: str) -> None:
    """Every field is what conversion makes of the stock config, and the way back gives the stock config again."""
    stock, preset = published(name), UrformConfig.from_preset(name)
    assert fields_of(preset) == {**fields_of(urform_config(stock)), **WEIGHTS.get(name, {})}
    ours = f"UrformFor{_KINDS[preset.architecture]}"
    family, _, again = choose_family(preset, ours)
    assert family.model_type == preset.source_family == stock.model_type
    assert fields_of(urform_config(again)) == fields_of(preset)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    """Of the published checkpoint's class, and of the stock class built from the published config.

    Vaswani et al. give 65M and 213M in table 3; the numbers here are those of their architecture with 37,000 tokens.
    """
    config = UrformConfig.from_preset(name)
    with torch.device("meta"):
        ours = getattr(urform, f"UrformFor{_KINDS[config.architecture]}")(config)
        counts = [sum(p.numel() for p in ours.parameters())]
        if name in STOCK:
            stock = getattr(hf, STOCK[name][0])(published(name))
            if not config.tie_word_embeddings:
                stock.lm_head.weight = torch.nn.Parameter(torch.empty_like(stock.lm_head.weight))
            trained = [p for p in stock.parameters() if p.requires_grad]
            trained += [stock.final_logits_bias] if name == "opus-mt-en-de" else []
            counts.append(sum(p.numel() for p in trained))
    assert set(counts) == {PUBLISHED[name]}


def test_every_preset_of_a_family_is_held_to_its_publication() -> None:
    of_families = {name for name in list_presets() if UrformConfig.from_preset(name).source_family is not None}
    assert of_families == STOCK.keys() and of_families <= PUBLISHED.keys()


# What is overridden here and there, and the fields of ours that derive from it.
OVERRIDDEN: list[tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ("t5-small", {"hidden_size": 256}, {"d_model": 256}, ("logit_scale",)),
    ("t5-small", {"d_model": 64}, {"d_model": 64}, ("logit_scale", "hidden_size")),
    ("t5-base", {"hidden_size": 64}, {"d_model": 64}, ("logit_scale",)),
    ("flan-t5-base", {"hidden_size": 64}, {"d_model": 64}, ("logit_scale",)),
    ("mt5-small", {"hidden_size": 64}, {"d_model": 64}, ("logit_scale",)),
    ("m2m100-418m", {"pad_token_id": 0}, {"pad_token_id": 0}, ("position_offset",)),
    ("nllb-200-distilled-600m", {"pad_token_id": 5}, {"pad_token_id": 5}, ("position_offset",)),
    ("roberta-base", {"pad_token_id": 3}, {"pad_token_id": 3, "max_position_embeddings": 516}, ("position_offset",)),
    ("xlm-roberta-base", {"pad_token_id": 0}, {"pad_token_id": 0, "max_position_embeddings": 513},
     ("position_offset",)),
    ("gpt2", {"hidden_size": 96}, {"n_embd": 96}, ("intermediate_size", "head_dim")),
    ("bloom-560m", {"hidden_size": 64}, {"hidden_size": 64}, ("intermediate_size", "head_dim")),
    ("llama-3.2-1b", {"hidden_size": 1024}, {"hidden_size": 1024, "head_dim": None}, ("head_dim",)),
    ("mistral-7b", {"num_hidden_layers": 3}, {"num_hidden_layers": 3}, ("layer_types",)),
    ("mistral-7b", {"sliding_window": None}, {"sliding_window": None}, ("layer_types",)),
    ("gemma2-2b", {"num_hidden_layers": 5}, {"num_hidden_layers": 5}, ("layer_types",)),
    ("gemma3-1b", {"num_hidden_layers": 13}, {"num_hidden_layers": 13, "layer_types": None}, ("layer_types",)),
    ("modernbert-base", {"num_hidden_layers": 7}, {"num_hidden_layers": 7}, ("layer_types",)),
    ("opus-mt-en-de", {"vocab_size": 320}, {"vocab_size": 320, "pad_token_id": 319, "decoder_start_token_id": 319},
     ("pad_token_id", "decoder_start_token_id")),
    ("gpt2", {"vocab_size": 320}, {"vocab_size": 320, "bos_token_id": 319, "eos_token_id": 319}, ("eos_token_id",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ours", "theirs", "derived"), OVERRIDDEN)
def test_derived_fields_follow_what_they_derive_from(
    name: str, ours: dict[str, Any], theirs: dict[str, Any], derived: tuple[str, ...]
) -> None:
    """As the stock config of the same override says, and so the preset can still leave to its family."""
    have = UrformConfig.from_preset(name, **ours)
    model_class, fields = STOCK[name]
    want = urform_config(getattr(hf, model_class).config_class(**{**fields, **theirs}))
    for field in derived:
        assert getattr(have, field) == getattr(want, field), field
    ours_class = {"encoder": "UrformForMaskedLM", "decoder": "UrformForCausalLM"}
    choose_family(have, ours_class.get(have.architecture, "UrformForConditionalGeneration"))


@pytest.mark.parametrize("name", [name for name in list_presets() if UrformConfig.from_preset(name).source_family])
def test_a_shrunken_preset_can_leave(name: str) -> None:
    """Fewer layers and tokens, another pad token: it still is one of its family."""
    config = UrformConfig.from_preset(name, num_hidden_layers=2, vocab_size=320)
    ours_class = {"encoder": "UrformForMaskedLM", "decoder": "UrformForCausalLM"}
    family, _, _ = choose_family(config, ours_class.get(config.architecture, "UrformForConditionalGeneration"))
    assert family.model_type == config.source_family


WAVES = {"position_encoding": "sinusoidal", "hidden_act": "relu", "scale_embedding": True}


def test_what_is_given_is_not_derived() -> None:
    assert UrformConfig.from_preset("t5-small", hidden_size=256, logit_scale=0.5).logit_scale == 0.5
    assert UrformConfig.from_preset("m2m100-418m", pad_token_id=0, position_offset=7).position_offset == 7
    with pytest.raises(ValueError, match="pad_token_id=400"):
        UrformConfig.from_preset("opus-mt-en-de", vocab_size=320, pad_token_id=400)


@pytest.mark.parametrize(
    ("preset", "family"), [("vaswani-base", "marian"), ("vaswani-big", "marian"), ("transformer-tiny", "pegasus")]
)
def test_the_presets_of_the_readme_leave_exactly(preset: str, family: str) -> None:
    """Interleaved sinusoids become halves in another order of the features: same logits, same tokens, and back.

    Positions by the mask are positions by columns where rows are padded on the right, which the warning says.
    """
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    ours = urform.UrformForConditionalGeneration(UrformConfig.from_preset(preset, **sizes, intermediate_size=48))
    shake(ours.eval())
    with pytest.warns(UserWarning, match=f"{family} counts padding as positions.*pad on the right"):
        stock = urform.to_transformers(ours)
    assert stock.config.model_type == family
    ids, mask = padded("right", 320, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    labels = padded("none", 320, 0, 7)[0]
    truth = copy.deepcopy(stock).double()(**inputs, labels=labels).logits
    close(ours(**inputs, labels=labels).logits, stock(**inputs, labels=labels).logits, truth, "logits")
    for beams in (1, 4):
        settings: dict[str, Any] = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False}
        assert ours.generate(**inputs, **settings).tolist() == stock.generate(**inputs, **settings).tolist()
    again = urform.from_transformers(stock)
    same_state(again, ours)
    assert config_of(again) == config_of(ours)


def test_hidden_states_in_another_order_are_no_backbone() -> None:
    """Without an output layer the order of the features is the result: refused by name."""
    backbone = urform.UrformModel(UrformConfig.from_preset("tiny-encoder-decoder", **WAVES))
    with pytest.raises(ValueError, match=r"sinusoidal_layout='interleaved' \(there 'halves'\)"):
        urform.to_transformers(backbone, "pegasus")


def test_an_encoder_with_positions_by_mask_is_no_family_that_counts_columns() -> None:
    """There, padding on the left is usual and would move the positions."""
    learned = {**WAVES, "position_encoding": "learned", "position_offset": 2, "embedding_norm": True}
    model = urform.UrformModel(UrformConfig.from_preset("tiny-encoder-decoder", **learned, norm_position="post"))
    with pytest.raises(ValueError, match=r"position_counting='mask' \(there 'columns'\)"):
        urform.to_transformers(model, "bart")


@pytest.mark.slow
def test_ctranslate2_reads_what_left(tmp_path: Path) -> None:
    """Where it is installed: greedy and beam search give our tokens."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 320))]
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    ours = urform.UrformForConditionalGeneration(UrformConfig.from_preset("transformer-tiny", **sizes))
    shake(ours.eval())
    urform.to_transformers(ours).save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path)
    ctranslate2.converters.TransformersConverter(str(tmp_path)).convert(str(tmp_path / "made"))
    path = tmp_path / "made" / "config.json"  # its loader starts Pegasus' decoder with the pad token, whatever it is
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder_start_token": "</s>"}))
    translator = ctranslate2.Translator(str(tmp_path / "made"), compute_type="float32")
    ids, mask = padded("right", 320, 0)
    sources = [[words[i] for i in row[real].tolist()] for row, real in zip(ids, mask.bool(), strict=True)]
    for beams in (1, 4):
        length = {"min_new_tokens": 10, "max_new_tokens": 10}
        have = ours.generate(input_ids=ids, attention_mask=mask, num_beams=beams, do_sample=False, **length)
        want = translator.translate_batch(sources, beam_size=beams, min_decoding_length=10, max_decoding_length=10)
        assert [[words[i] for i in row] for row in have[:, 1:].tolist()] == [row.hypotheses[0] for row in want]
