"""Every field of a config.json written by hand, and every field that transformers looks for: equal to stock or refused.

The stock class that transformers loads from the same folder is the truth. `PreTrainedConfig.__getattr__` tells which
names the library looks for that a config does not have, so a new one of a later release is met by a test.
"""

import json
import re
import warnings
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conversion_cases import shake
from numerics import compare, exact, finite_masks
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

import urform
from urform.conversion.checkpoints import convert_checkpoint
from urform.conversion.families import FAMILIES

WIDTH, LAYERS = 32, 3
SIZES = {"vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZES, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
GROUPED = {**DECODER, "num_key_value_heads": 2, "intermediate_size": 48, "rope_theta": 500.0}
BERT = {**DECODER, "intermediate_size": 48}
BART: dict[str, Any] = {**SIZES, "d_model": WIDTH, "decoder_start_token_id": 2, "is_encoder_decoder": True}
BART |= {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
}
T5 = {
    "vocab_size": 60,
    "d_model": WIDTH,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "d_ff": 48,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
}
# Small configs as config.json spells them, by model type.
BASES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2"), GROUPED),
    **{key: {**GROUPED, "head_dim": 8} for key in ("qwen3", "gemma2", "gemma3_text")},
    "gpt2": {**SIZES, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**BERT, "rotary_pct": 0.5},
    "opt": {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "bloom": {**SIZES, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4},
    "bert": BERT,
    **{key: {**BERT, "pad_token_id": 1, "bos_token_id": 0} for key in ("roberta", "xlm-roberta")},
    "distilbert": {**SIZES, "dim": WIDTH, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48},
    "modernbert": {**BERT, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 12},
    **dict.fromkeys(("bart", "mbart", "m2m_100", "marian", "pegasus"), BART),
    **dict.fromkeys(("t5", "mt5"), T5),
}
LONG = 40  # beyond `original_max_position_embeddings` and every window below


def language_model(family: str) -> Any:
    """The stock class of a family that gives logits for tokens."""
    names = [head.stock for head in FAMILIES[family].heads if head.ours.startswith("UrformFor")]
    return getattr(hf, names[0])


def write(folder: Path, family: str, fields: dict[str, Any], model_class: Any) -> None:
    """A checkpoint of a stock class whose config.json is these fields, as written by hand."""
    folder.mkdir(exist_ok=True)
    text = json.dumps({"model_type": family, "architectures": [model_class.__name__], **fields})
    (folder / "config.json").write_text(text, encoding="utf-8")
    torch.manual_seed(3)
    model = model_class(AutoConfig.from_pretrained(folder))
    shake(model)
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text, encoding="utf-8")


def numbers(model: Any) -> list[Tensor]:
    """Logits of a short and a long text, of a text through a cache, and the last hidden states."""
    torch.manual_seed(4)
    found = []
    with torch.no_grad():
        for length in (7, LONG):
            ids = torch.randint(5, 60, (2, length))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_hidden_states": True}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = ids.flip(1)
            output = model(**inputs, **({"use_cache": False} if "use_cache" in vars(model.config) else {}))
            states = output.get("hidden_states") or output.get("decoder_hidden_states")
            found += [output.logits, states[-1]]
        if not model.config.is_encoder_decoder and model.can_generate():
            cache = None
            for piece in ids.split([20, 1, 19], dim=1):
                output = model(input_ids=piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                found.append(output.logits)
    return found


def loads(load: Any) -> Any:
    """What `load` gives, None where the library itself refuses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load()
        except Exception:
            return None


def differences(folder: Path, family: str, fields: dict[str, Any], model_class: Any = None) -> list[float] | None:
    """How far our numbers are from those of the stock class of the same folder; above 1 is too far.

    None: stock cannot be loaded or run, or ours is refused by the name of a field that is not in `BASES`.
    """
    model_class = model_class or language_model(family)
    if loads(lambda: (write(folder, family, fields, model_class), True)) is None:
        return None
    stock = loads(lambda: model_class.from_pretrained(folder, attn_implementation="eager").eval())
    want = None if stock is None else loads(lambda: numbers(stock))
    if want is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            have = numbers(urform.from_transformers(folder))
    except ValueError as error:
        base = BASES[family]
        new = [name for name in fields if name not in base or base[name] != fields[name]]
        names = {*new, *(LIKE.get(name, name) for name in new)}
        assert any(re.search(rf"\b{name}\b", str(error)) for name in names), error
        return None
    with finite_masks():
        truth = numbers(exact(model_class.from_pretrained(folder).eval()))  # a new one: some remember what they saw
    return [error / bound for _, error, bound in compare(have, want, truth)]


# How the refusal calls a field that has another name there.
LIKE = {
    "rope_scaling": "rope_parameters",
    "init_std": "initializer_range",
    "layer_types": "ministral",
    "hidden_size": "word_embed_proj_dim",
    "d_model": "scale_decoder_outputs",
    "local_attention": "sliding_window",
    **dict.fromkeys(("n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers"), "num_hidden_layers"),
}
SCALINGS: dict[str, dict[str, Any]] = {
    "longrope": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 4.0]},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
# What a config may have though its class declares none of it, with values that matter to some family.
UNDECLARED: list[tuple[str, Any]] = [
    ("is_causal", False),
    ("is_causal", True),
    ("attention_chunk_size", 4),
    ("sliding_window", 4),
    ("head_dim", 4),
    ("tie_last_hidden_states", False),
    ("partial_rotary_factor", 0.5),
]
# Names that transformers looks for and that change no number of these families: outputs that are asked for, labels,
# initialisation, training, what other models have; and what generation is configured with.
HARMLESS = set(
    "auto_map decoder generator gradient_checkpointing init_std initializer_range mlp_layer_types mtp_layer_types "
    "num_decoder_layers num_heads output_cross_attentions quantization_config rope_parameters use_cache "
    "vision_aspect_ratio vision_feature_layer vision_feature_select_strategy max_position_embeddings "
    "gguf_file vocab_size tie_word_embeddings".split()
) | set(GenerationConfig._get_default_generation_params())
HANDLED = set(
    "classifier_dropout head_dim hidden_dropout is_causal attention_chunk_size kv_sharing_modes num_kv_shared_layers "
    "layer_types original_max_position_embeddings partial_rotary_factor rope_theta sliding_window text_config "
    "text_encoder tie_last_hidden_states token_classification_bias fusion_config transformers_weights".split()
)


def equal(family: str, fields: dict[str, Any], folder: Path) -> None:
    found = differences(folder, family, {**BASES[family], **fields})
    assert found is None or max(found) <= 1, f"{family} {fields}: {found}"


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_a_class_does_not_declare(family: str, tmp_path: Path) -> None:
    """Each is refused by name, or our numbers are those of the stock class that reads it."""
    found = differences(tmp_path / "base", family, BASES[family])
    assert found is not None and max(found) <= 1
    for number, (name, value) in enumerate(UNDECLARED):
        equal(family, {name: value}, tmp_path / str(number))


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox"])
def test_the_trained_length_beside_the_scaling(family: str, kind: str, tmp_path: Path) -> None:
    """`original_max_position_embeddings` at the top level wins: there, here, in a converted folder, on the way back."""
    scaling = dict(SCALINGS[kind])
    if family == "gpt_neox" and kind == "longrope":  # half of each head is rotated
        scaling |= {"short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
    fields = {**BASES[family], "original_max_position_embeddings": 16, "rope_scaling": scaling}
    found = differences(tmp_path / "stock", family, fields)
    assert found is not None and max(found) <= 1, found
    convert_checkpoint(tmp_path / "stock", tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    assert saved["rope_parameters"]["original_max_position_embeddings"] == 16
    assert "original_max_position_embeddings" not in saved
    convert_checkpoint(tmp_path / "ours", tmp_path / "back")
    model_class = language_model(family)
    load = model_class.from_pretrained
    models = (load(tmp_path / name, attn_implementation="eager").eval() for name in ("stock", "back"))
    for a, b in zip(*(numbers(model) for model in models), strict=True):
        assert torch.equal(a, b)


def test_a_trained_length_that_was_changed_here_is_the_one_that_goes_back(tmp_path: Path) -> None:
    """What came at the top level does not overrule it."""
    fields = {**BASES["llama"], "original_max_position_embeddings": 16, "rope_scaling": SCALINGS["yarn"]}
    write(tmp_path / "stock", "llama", fields, hf.LlamaForCausalLM)
    ours = urform.from_transformers(tmp_path / "stock")
    ours.config.rope_parameters["original_max_position_embeddings"] = 32
    stock = urform.to_transformers(ours)
    assert stock.config.rope_parameters["original_max_position_embeddings"] == 32
    assert getattr(stock.config, "original_max_position_embeddings", 32) == 32


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "bloom"])
@pytest.mark.parametrize("name", ["hidden_dropout", "classifier_dropout"])
def test_token_classifiers_drop_at_the_rate_that_the_library_finds(family: str, name: str, tmp_path: Path) -> None:
    """Two fields of no declaration give the rate; the stock module says which."""
    model_class = getattr(hf, next(h.stock for h in FAMILIES[family].heads if "ForToken" in h.stock))
    write(tmp_path / "stock", family, {**BASES[family], name: 0.4}, model_class)
    stock = model_class.from_pretrained(tmp_path / "stock")
    rate = next(module.p for key, module in stock.named_children() if "dropout" in key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = urform.from_transformers(tmp_path / "stock")
    assert ours.config.classifier_dropout == rate
    back = urform.to_transformers(ours)
    assert next(module.p for key, module in back.named_children() if "dropout" in key) == rate


def test_a_token_classifier_without_a_bias_is_refused_by_name(tmp_path: Path) -> None:
    """A field that the generic head looks for, where the library has it."""
    write(
        tmp_path / "s", "llama", {**BASES["llama"], "token_classification_bias": False}, hf.LlamaForTokenClassification
    )
    if hf.LlamaForTokenClassification.from_pretrained(tmp_path / "s").score.bias is not None:
        pytest.skip("this transformers does not look for token_classification_bias")
    with pytest.raises(ValueError, match="token_classification_bias=False"):
        urform.from_transformers(tmp_path / "s")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_library_looks_for_is_known(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a config lacks and the library asks for while a model is made, run and generates."""
    asked: set[str] = set()

    def look(config: Any, name: str) -> Any:
        asked.add(name)
        raise AttributeError(name)

    model_class = language_model(family)
    write(tmp_path / "stock", family, BASES[family], model_class)
    monkeypatch.setattr(hf.PreTrainedConfig, "__getattr__", look, raising=False)
    model = model_class.from_pretrained(tmp_path / "stock")
    numbers(model.train())
    numbers(model.eval())
    if model.can_generate():
        start = {"decoder_start_token_id": 2} if model.config.is_encoder_decoder else {}
        model.generate(input_ids=torch.full((1, 4), 7), max_new_tokens=2, pad_token_id=0, **start)
    strange = {name for name in asked if not name.startswith("_")} - HARMLESS - HANDLED
    assert not strange, f"see whether {sorted(strange)} change numbers of {model_class.__name__}: _LOOKED_FOR, HARMLESS"


VALUES = [
    None,
    True,
    False,
    0,
    1,
    2,
    16,
    0.5,
    "gelu",
    "relu",
    ["sliding_attention"] * LAYERS,
    ["full_attention", "sliding_attention", "full_attention"],
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0},
]
OLDER = set(
    "rope_scaling rotary_pct rotary_emb_base rope_local_base_freq global_rope_theta local_rope_theta n_embed "
    "sliding_window_pattern global_attn_every_n_layers num_key_value_heads attention_bias mlp_bias is_decoder "
    "add_cross_attention position_embedding_type logit_scale use_bidirectional_attention tie_encoder_decoder".split()
)
NO_NUMBERS = set("transformers_version architectures dtype id2label label2id return_dict output_hidden_states".split())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_with_odd_values(family: str, tmp_path: Path) -> None:
    """Declared, looked for or of an older spelling: the stock class's numbers, or a refusal that names it."""
    declared = {field.name for field in dataclass_fields(getattr(hf, FAMILIES[family].stock_config))}
    wrong = []
    for name in sorted((declared | HANDLED | OLDER) - NO_NUMBERS):
        for number, value in enumerate(VALUES):
            try:
                equal(family, {name: value}, tmp_path / f"{name}{number}")
            except AssertionError as error:
                wrong.append(str(error).splitlines()[0])
    assert not wrong, "\n".join(wrong)
