"""Decoder families in both directions: random stock configs over each family's space, against the stock classes."""

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conversion_cases import check_parity, check_round_trip, random_stock, shake
from drawn_configs import draw
from numerics import assert_within, twice

import urform
from urform import UrformConfig
from urform.conversion.configs import urform_config
from urform.conversion.families import FAMILIES
from urform.conversion.families_decoder import DECODERS

NAMES = [family.model_type for family in DECODERS]
HEADS = [(family.model_type, head.stock) for family in DECODERS for head in family.heads]


@pytest.mark.parametrize("name", NAMES)
def test_language_models(name: str) -> None:
    """Random configs of a family's language model: the same numbers, the same tokens, and back."""
    for seed in range(4):
        check_parity(random_stock(FAMILIES[name].heads[1].stock, seed, **draw(name, seed, padless=True)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 40))
@pytest.mark.parametrize("name", NAMES)
def test_many_language_models(name: str, seed: int) -> None:
    check_parity(random_stock(FAMILIES[name].heads[1].stock, seed, **draw(name, seed, padless=True)))


@pytest.mark.parametrize(("name", "stock"), [pair for pair in HEADS if "LM" not in pair[1]])
def test_other_heads(name: str, stock: str) -> None:
    """Backbones and classifiers, in every class that transformers has for the family."""
    check_parity(random_stock(stock, 100, **draw(name, 100)))


@pytest.mark.parametrize(("name", "stock"), [pair for pair in HEADS if "Sequence" in pair[1]])
@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_losses_of_classifiers(name: str, stock: str, problem: str) -> None:
    model = random_stock(stock, 101, **{**draw(name, 101), "problem_type": problem, "id2label": {0: "a", 1: "b"}})
    check_parity(model)


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "pad_token_id": 0}
REFUSED = [
    ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
    ("GPT2LMHeadModel", {"add_cross_attention": True}),
    ("OPTForCausalLM", {"word_embed_proj_dim": 12, "ffn_dim": 40}),
    ("OPTForCausalLM", {"layer_norm_elementwise_affine": False, "ffn_dim": 40}),
    ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}),
    ("BloomForCausalLM", {"slow_but_exact": True, "pretraining_tp": 2}),
    (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    ("LlamaForCausalLM", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}),
    ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}),
]


@pytest.mark.parametrize(("name", "fields"), REFUSED)
def test_a_config_that_cannot_be_expressed_is_refused_with_its_fields(name: str, fields: dict[str, Any]) -> None:
    """And before a weight is read: there are none."""
    config = getattr(hf, name).config_class(**SMALL, **fields)
    config.architectures = [name]
    with pytest.raises(ValueError, match="cannot be expressed in Urform") as error:
        urform_config(config)
    assert f"{next(iter(fields))}=" in str(error.value)


def test_every_obstacle_is_listed_at_once() -> None:
    config = hf.GPT2Config(add_cross_attention=True, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(
        ValueError, match=r"add_cross_attention=True; .*scale_attn|scale_attn.*; add_cross_attention=True"
    ):
        urform_config(config)


def test_families_and_classes_that_there_are_not() -> None:
    mixtral = hf.MixtralConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        num_local_experts=2,
    )
    with pytest.raises(ValueError, match=r"'mixtral'.*there are: .*llama"):
        urform.from_transformers(hf.MixtralForCausalLM(mixtral))
    with pytest.raises(ValueError, match=r"GPT2DoubleHeadsModel has no counterpart.*GPT2LMHeadModel"):
        urform.from_transformers(hf.GPT2DoubleHeadsModel(hf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)))
    ours = urform.UrformForCausalLM(UrformConfig.from_preset("tiny-decoder"))
    with pytest.raises(ValueError, match="family='llamma' is unknown"):
        urform.to_transformers(ours, "llamma")
    with pytest.raises(ValueError, match="GPT2LMHeadModel, not one of Urform's"):
        urform.to_transformers(hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"norm_position": "sandwich"}),
        ("llama", {"qk_norm": True}),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8}),
        (
            "mistral",
            {"num_hidden_layers": 2, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        ("qwen2", {"attention_out_bias": True}),
        ("gemma2", {"attention_scale": 0.3}),
        ("gemma2", {"logit_scale": 0.3}),
        ("gpt2", {"position_counting": "mask"}),
        ("gpt2", {"num_key_value_heads": 1}),
        ("opt", {"position_offset": 0}),
        ("bloom", {"intermediate_size": 95}),
        ("gpt_neox", {"norm_position": "sandwich"}),
    ],
)
def test_what_a_family_cannot_express_is_refused(family: str, changes: dict[str, Any]) -> None:
    fields = {**draw(family, 0), "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    fields = {**fields, **{k: v for k, v in {"num_key_value_heads": 2, "head_dim": 6}.items() if k in fields}}
    fields = {k: v for k, v in fields.items() if k not in ("rope_parameters", "layer_types")}
    config = urform_config(getattr(hf, FAMILIES[family].stock_config)(**fields)).to_dict()
    config.update(layer_types=None)
    ours = urform.UrformForCausalLM(UrformConfig(**{**config, **changes}))
    with pytest.raises(ValueError, match=rf"cannot be expressed in {family}; in the way stand: .*") as error:
        urform.to_transformers(ours)
    assert any(f"{field}=" in str(error.value) for field in changes) or "not a multiple" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_urform_survives_the_way_there_and_back(name: str) -> None:
    """Random Urform models that a family can express, with settings that it cannot hold and that change no numbers."""
    for seed in (200, 201):
        stock = random_stock(FAMILIES[name].heads[1].stock, seed, **draw(name, seed))
        fields = {**urform_config(stock.config).to_dict(), "source_family": None, "source_fields": None}
        rng = random.Random(seed)
        fields.update(
            hidden_dropout_prob=rng.choice([0.0, 0.1]),
            activation_dropout=0.2,
            attention_dropout=0.3,
            initializer=rng.choice(["normal", "xavier", "gpt2"]),
            classifier_activation="gelu",
            relative_attention_num_buckets=7,
            freeze_pad_embedding=rng.random() < 0.5,
        )
        ours = urform.UrformForCausalLM(UrformConfig(**fields)).eval()
        shake(ours)
        with pytest.warns(UserWarning, match="only training depends on .*activation_dropout=0.2"):
            back = check_round_trip(ours, name)
        back.set_attn_implementation("eager")  # transformers 5.17 drops Gemma's softcap under sdpa, its default
        with torch.no_grad():
            ids = torch.randint(3, 37, (2, 9))
            assert_within(ours(ids).logits, *twice(back, lambda m, ids=ids: m(ids).logits))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = urform.to_transformers(ours)
        found.set_attn_implementation("eager")
        want = twice(found, lambda m, ids=ids: m(ids).logits)
        assert_within(ours(ids).logits, *want, found.config.model_type)


def test_no_family_for_a_config_names_what_stands_in_the_way_of_each() -> None:
    ours = urform.UrformForCausalLM(UrformConfig.from_preset("tiny-decoder", norm_position="post", qk_norm=True))
    with pytest.raises(ValueError, match="no family can express") as error:
        urform.to_transformers(ours)
    assert all(f"\n{name}: " in str(error.value) for name in NAMES)


def test_fine_tuned_here_and_used_there(tmp_path: Path) -> None:
    """What the family's config held beside survives, and the stock class loads what comes back."""
    stock = random_stock("OPTForCausalLM", 0, **{**draw("opt", 0), "layerdrop": 0.1, "enable_bias": True})
    stock.config.custom_note = "kept"
    stock.generation_config.max_new_tokens = 7
    with pytest.warns(UserWarning, match=r"only training depends on layerdrop=0\.1"):
        ours = urform.from_transformers(stock)
    assert ours.generation_config.max_new_tokens == 7
    optimizer = torch.optim.SGD(ours.train().parameters(), lr=0.1)
    ids = torch.randint(3, 37, (2, 9))
    ours(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    ours.save_pretrained(tmp_path / "ours")
    ours = urform.UrformForCausalLM.from_pretrained(tmp_path / "ours")
    urform.to_transformers(ours).save_pretrained(tmp_path / "stock")
    again = hf.OPTForCausalLM.from_pretrained(tmp_path / "stock")
    assert again.config.layerdrop == 0.1 and again.config.custom_note == "kept"
    assert again.generation_config.max_new_tokens == 7
    with torch.no_grad():
        assert_within(ours(ids).logits, *twice(again, lambda m: m(ids).logits))
        assert (again(ids).logits - stock(ids).logits).abs().max() > 1e-3


def test_a_changed_config_is_not_overruled_by_what_came_with_it() -> None:
    """`source_fields` hold n_inner=None, which stands for 4 * n_embd; the new model's layer is another."""
    stock = random_stock("GPT2LMHeadModel", 0, **SMALL, n_inner=None)
    config = urform.from_transformers(stock).config.to_dict()
    ours = urform.UrformForCausalLM(UrformConfig(**{**config, "intermediate_size": 50}))
    assert urform.to_transformers(ours).config.n_inner == 50


def test_what_came_with_a_config_never_changes_a_number() -> None:
    """Neither the attribute `urform` of a stock config nor `source_fields` of ours, whoever wrote them."""
    stock = random_stock("GPT2LMHeadModel", 0, **SMALL)
    stock.config.urform = {"norm_position": "post", "classifier_activation": "tanh", "hidden_dropout_prob": 0.3}
    ours = urform.from_transformers(stock)
    assert ours.config.norm_position == "pre" and ours.config.classifier_activation == "tanh"
    ids = torch.randint(3, 61, (2, 9))
    want = twice(stock, lambda m: m(ids).logits)
    assert_within(ours(ids).logits, *want)
    ours.config.source_fields = {"scale_attn_by_inverse_layer_idx": True, "n_inner": 96}
    back = urform.to_transformers(ours)
    assert not back.config.scale_attn_by_inverse_layer_idx
    assert_within(back(ids).logits, *want)
    classifier = random_stock("GPT2ForSequenceClassification", 0, **SMALL)
    classifier.config.urform = {"classifier_activation": "tanh"}  # the language model's, where it meant nothing
    assert urform.from_transformers(classifier).config.classifier_activation is None


def test_dtype_mode_and_independence() -> None:
    """Bit-equal in bfloat16; in training if it was; no tensor is shared with the source."""
    stock = random_stock("LlamaForCausalLM", 0, **draw("llama", 0)).to(torch.bfloat16).train()
    ours = urform.from_transformers(stock)
    assert ours.dtype == torch.bfloat16 and ours.training
    theirs = {tensor.data_ptr() for tensor in stock.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in ours.state_dict().values()}
    assert ours.model.decoder.rotary_emb["full_attention"].inv_freq.dtype == torch.float32
    back = urform.to_transformers(ours)
    assert back.dtype == torch.bfloat16 and back.training
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
