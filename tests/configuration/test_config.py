"""The config: round trips, presets, what it refuses and how."""

import copy
import json
import logging
import random
import re
import time
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import urform
from urform import UrformConfig, UrformForConditionalGeneration, UrformModel, list_presets
from urform.configuration.heads_urform import architectures_of


@pytest.mark.parametrize("name", list_presets())
def test_presets_survive_json(name: str, tmp_path: Path) -> None:
    """Saved and loaded by AutoConfig, every field is what it was, and so is what is derived from it."""
    config = UrformConfig.from_preset(name)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is UrformConfig
    have, want = again.to_dict(), config.to_dict()
    for key in ("transformers_version", "_name_or_path"):
        have.pop(key), want.pop(key)
    assert have == want
    assert again.stack_sizes(True) == config.stack_sizes(True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == config.architecture


def test_presets_name_their_source() -> None:
    """Each preset but the tiny ones says a paper with its year, in words that mean something to a reader."""
    for name, source in list_presets().items():
        assert name.startswith("tiny-") or "20" in source, name
        assert "founding" not in source
    for name in ("vaswani-base", "vaswani-big", "nn-transformer", "keras-block", "bert-base", "gpt2", "t5-small"):
        assert name in list_presets()


def test_preset_overrides_do_not_leak() -> None:
    """Two configs of one preset share nothing mutable."""
    first = UrformConfig.from_preset("llama-3.2-1b")
    first.rope_parameters["factor"] = 1.0
    assert UrformConfig.from_preset("llama-3.2-1b").rope_parameters["factor"] == 32.0
    mine = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0}
    UrformConfig(rope_parameters=mine)
    assert mine == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hiden_size": 8}, r"no field 'hiden_size'.*did you mean 'hidden_size'"),
    ({"flux_capacitor": 8}, r"no field 'flux_capacitor'.*8"),
    ({"hidden_size": 30, "num_attention_heads": 4}, r"hidden_size=30.*num_attention_heads=4.*head_dim"),
    ({"num_attention_heads": 8, "num_key_value_heads": 3}, r"num_key_value_heads=3 must divide num_attention_heads=8"),
    ({"vocab_size": 0}, r"vocab_size=0 must be a positive"),
    ({"hidden_act": "reluu"}, r"hidden_act='reluu' is unknown.*'relu'"),
    ({"sliding_window": None, "layer_types": ["sliding_attention"] * 6}, r"sliding_window=None; set it"),
    ({"layer_types": ["full_attention"]}, r"layer_types"),
    ({"head_dim": 7}, r"head_dim=7 must be even under position_encoding='rope'"),
    ({"position_encoding": "learned", "rope_theta": 1.0}, r"rope_theta given, but position_encoding='learned'"),
    ({"position_encoding": "sinusoidal", "hidden_size": 21, "num_attention_heads": 3}, r"hidden_size=21 must be even"),
    ({"architecture": "decoder", "decoder_num_hidden_layers": 3}, r"decoder_num_hidden_layers=3 is for .*use num_hid"),
    ({"architecture": "decoder", "type_vocab_size": 2}, r"type_vocab_size=2 is for architecture='encoder'"),
    ({"architecture": "decoder", "lm_head_transform": True}, r"lm_head_transform=True"),
    ({"decoder_num_attention_heads": 4}, r"decoder_head_dim=128 must equal head_dim=64"),
    ({"decoder_num_attention_heads": 7}, r"decoder_num_attention_heads=7"),
    ({"attn_logit_softcapping": 0.0}, r"attn_logit_softcapping=0.0 must be positive"),
    ({"position_offset": -1}, r"position_offset=-1"),
    ({"position_counting": "columns"}, r"position_counting='columns' is for learned and sinusoidal"),
    ({"position_encoding": "learned", "position_counting": "tokens"}, r"position_offset=0 must be positive"),
    (
        {"position_encoding": "sinusoidal", "position_counting": "tokens", "pad_token_id": None},
        r"pad_token_id, which is None; set it",
    ),
    ({"norm_position": "post", "first_norm": False}, r"first_norm=False.*norm_position='post'"),
    ({"classifier_activation": None, "classifier_norm": True}, r"classifier_norm.*classifier_activation is None"),
    ({"lm_head_activation": "reluu"}, r"lm_head_activation='reluu' is unknown"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_refused(fields: dict[str, Any], message: str) -> None:
    """What cannot be is refused with the field, its value and the remedy."""
    with pytest.raises(Exception, match=r"(?s)" + message) as caught:
        UrformConfig(**fields)
    assert "Error" in type(caught.value).__name__
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "16"}, {"architecture": "both"}, {"hidden_dropout_prob": 1.5}, {"norm_type": "batch"}]
)
def test_wrong_types_and_values_are_refused_by_name(fields: dict[str, Any]) -> None:
    """The library's own validation names the field, at construction and at assignment."""
    (field,) = fields
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        UrformConfig(**fields)
    config = UrformConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        setattr(config, field, fields[field])


def test_unknown_preset_is_refused() -> None:
    """With the nearest name."""
    with pytest.raises(ValueError, match="did you mean 'vaswani-base'"):
        UrformConfig.from_preset("vaswani-bas")


def test_unknown_field_of_a_file_is_kept_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of a newer Urform still loads; nothing is dropped silently."""
    UrformConfig().save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data["from_the_future"] = 3
    (tmp_path / "config.json").write_text(json.dumps(data))
    logger = logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    try:
        config = UrformConfig.from_pretrained(tmp_path)
    finally:
        logger.propagate = before
    assert config.from_the_future == 3
    assert "no field from_the_future" in caplog.text


def test_decoder_sizes_reach_the_caches() -> None:
    """Transformers sizes caches by the decoder's view of the config."""
    config = UrformConfig.from_preset("tiny-encoder-decoder", decoder_num_hidden_layers=3, decoder_intermediate_size=8)
    view = config.get_text_config(decoder=True)
    assert (view.num_hidden_layers, view.intermediate_size, len(view.layer_types)) == (3, 8, 3)
    assert (config.num_hidden_layers, config.get_text_config().num_hidden_layers) == (2, 2)
    alike = UrformConfig.from_preset("tiny-encoder-decoder")
    assert alike.get_text_config(decoder=True) is alike


HEADS = [name for name in urform.__all__ if name.startswith("UrformFor") or name == "UrformEncoderModel"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder-decoder"])
def test_heads_refuse_what_they_cannot_serve(head: str, architecture: str) -> None:
    """The error names the head, the config's architecture and the ones that can."""
    cls = getattr(urform, head)
    config = UrformConfig.from_preset(f"tiny-{architecture}")
    if architecture in architectures_of(cls):
        cls(config)
        return
    with pytest.raises(ValueError) as caught:
        cls(config)
    for part in (head, repr(architecture), *map(repr, architectures_of(cls))):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "served"),
    [("UrformEncoder", ["encoder", "encoder-decoder"]), ("UrformDecoder", ["decoder", "encoder-decoder"])],
)
def test_stacks_refuse_what_they_cannot_serve(name: str, served: list[str]) -> None:
    """They have no Auto class; the rule of a class holds for what derives from it."""
    from urform.modeling import stack_urform

    derived = type("Mine", (getattr(stack_urform, name),), {})
    for architecture in ("encoder", "decoder", "encoder-decoder"):
        config = UrformConfig.from_preset(f"tiny-{architecture}")
        if architecture in served:
            derived(config)
        else:
            with pytest.raises(ValueError, match=f"Mine serves architecture.*{architecture}"):
                derived(config)
    with pytest.raises(ValueError, match="derives from none"):
        architectures_of(int)


@pytest.mark.parametrize(
    ("share", "tie", "distinct"), [(True, True, 1), (True, False, 2), (False, True, 2), (False, False, 3)]
)
def test_tied_tables(share: bool, tie: bool, distinct: int, tmp_path: Path) -> None:
    """Two- and three-way tying, in memory and after save and load through safetensors, bit for bit."""
    config = UrformConfig.from_preset("tiny-encoder-decoder", share_embeddings=share, tie_word_embeddings=tie)
    model = UrformForConditionalGeneration(config).eval()

    def tables(m: Any) -> set[int]:
        return {
            t.data_ptr()
            for t in (m.model.encoder.embed_tokens.weight, m.model.decoder.embed_tokens.weight, m.lm_head.weight)
        }

    assert len(tables(model)) == distinct
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert len(tables(again)) == distinct
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_decoder_head_tied_to_its_own_table() -> None:
    """Without sharing, the output projection is the decoder's table: gradients reach it from both places."""
    config = UrformConfig.from_preset("tiny-encoder-decoder", share_embeddings=False)
    model = UrformForConditionalGeneration(config)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert model.lm_head.weight is not model.model.encoder.embed_tokens.weight


@pytest.mark.parametrize(
    ("initializer", "expected"),
    [
        ("normal", {"embed": 0.02, "q": 0.02, "o": 0.02, "down": 0.02}),
        ("gpt2", {"embed": 0.02, "q": 0.02, "o": 0.02 / 8**0.5, "down": 0.02 / 8**0.5}),
        ("xavier", {"embed": 128**-0.5, "q": (2 / 256) ** 0.5, "o": (2 / 256) ** 0.5, "down": (2 / 640) ** 0.5}),
        ("t5", {"embed": 1.0, "q": (128 * 32) ** -0.5, "o": 128**-0.5, "down": 512**-0.5}),
    ],
)
def test_initial_weights(initializer: str, expected: dict[str, float]) -> None:
    """Standard deviations by the papers' formulas, also from the meta device; norms and biases at rest."""
    config = UrformConfig(
        architecture="decoder",
        vocab_size=500,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        initializer=initializer,
        norm_offset=1.0 if initializer == "gpt2" else 0.0,
    )
    torch.manual_seed(0)
    model = UrformModel(config)
    layer = model.decoder.layers[1]
    have = {
        "embed": model.decoder.embed_tokens.weight[1:],
        "q": layer.self_attn.q_proj.weight,
        "o": layer.self_attn.o_proj.weight,
        "down": layer.mlp.down_proj.weight,
    }
    for name, weight in have.items():
        assert weight.std().item() == pytest.approx(expected[name], rel=0.03), name
    assert model.decoder.embed_tokens.weight[config.pad_token_id].abs().sum() == 0
    assert torch.equal(layer.mlp_norm.weight, torch.full((128,), 1.0 - config.norm_offset))
    assert layer.self_attn.q_proj.bias.abs().sum() == 0


ONE: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 0}, r"num_attention_heads=0 must be a positive integer"),
    ({"decoder_num_attention_heads": 0}, r"decoder_num_attention_heads=0 must be a positive integer"),
    ({"num_hidden_layers": 10**7}, r"num_hidden_layers=10000000 .*at most 10,000"),
    ({"vocab_size": 10**12}, r"vocab_size=1000000000000 .*at most 10,000,000"),
    ({"num_labels": 10**12}, r"num_labels=1000000000000 .*at most"),
    ({"logit_scale": float("nan")}, r"logit_scale=nan must be a finite number"),
    ({"logit_scale": float("inf")}, r"logit_scale=inf must be a finite number"),
    ({"norm_offset": float("-inf")}, r"norm_offset=-inf must be a finite number"),
    ({"norm_eps": float("inf")}, r"norm_eps=inf must be a finite number"),
    ({"classifier_dropout": float("nan")}, r"classifier_dropout=nan must be a finite number"),
    ({"classifier_dropout": 1.5}, r"classifier_dropout=1.5 .*less than 1"),
    ({"attention_dropout": 1.0}, r"attention_dropout=1.0 .*less than 1"),
    ({"pad_token_id": 32000}, r"pad_token_id=32000 must be from 0 to 31999.*vocab_size"),
    ({"bos_token_id": -1}, r"bos_token_id=-1 must be from 0 to 31999"),
    ({"eos_token_id": [2, 40000]}, r"eos_token_id=\[2, 40000\] must be from 0 to 31999"),
    ({"decoder_start_token_id": 32000}, r"decoder_start_token_id=32000 must be from 0"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0] * 3,
                          "original_max_position_embeddings": 8}},
     r"rope_parameters\['long_factor'\] must be a list of 32 numbers.* is 3"),
    ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters of rope_type='yarn' lacks factor"),
    ({"rope_parameters": {"rope_theta": 0}}, r"rope_parameters\['rope_theta'\]=0 must be positive"),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, r"\['full_attention'\] of .* lacks factor"),
    ({"per_layer_config": {0: {"intermediate_size": 7}}}, r"per_layer_config .*leave it out"),
    ({"is_causal": False}, r"is_causal=False is no field .*transformers reads it"),
    ({"original_max_position_embeddings": 8}, r"original_max_position_embeddings=8 .*set it in rope_parameters"),
    ({"architectures": {"a": 1}}, r"(?s)architectures.*{'a': 1}"),
    ({"dtype": "int64"}, r"dtype='int64' is no dtype of a model"),
    ({"problem_type": "x"}, r"(?s)problem_type.*x"),
    ({"source_weights": {"a": ["float32", [-1]]}}, r"source_weights\['a'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), ONE)
def test_a_value_that_cannot_be_is_a_value_error(fields: dict[str, Any], message: str) -> None:
    """By field, value and remedy, in far less than a second."""
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        UrformConfig(**fields)
    assert time.process_time() - begin < 0.5


@pytest.mark.parametrize("text", ['{"x": ' + "[" * 900 + "]" * 900 + "}", "[" * 10**5 + "]" * 10**5, "[1]"])
def test_json_that_is_no_config_is_a_value_error(text: str, tmp_path: Path) -> None:
    """Nested deeply or another kind: the file is named."""
    (tmp_path / "config.json").write_text(text)
    for load in (UrformConfig.from_pretrained, UrformModel.from_pretrained, urform.from_transformers):
        with pytest.raises(ValueError, match=r"config\.json"):
            load(tmp_path)


def test_nesting_that_the_library_can_read_is_refused_through_it_too(tmp_path: Path) -> None:
    config = UrformConfig.from_preset("tiny-decoder").to_dict()
    for _ in range(100):
        config["x"] = [config.get("x")]
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "urform"}))
    with pytest.raises(ValueError, match="nested more than 50 deep"):
        AutoConfig.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------- what is accepted

NAN, INF = float("nan"), float("inf")
ODD: list[Any] = [0, 1, -1, 2, 3, 5, 7, 64, 10**7, 10**12, 10**40, True, False, None, 0.0, 0.5, 1.0, -1.0, 1e-30, 1e30,
                  1e308, NAN, INF, -INF, "", "8", "gelu", "relu", [], [1], [2, 5], [2, 10**6], ["full_attention"] * 2,
                  ["sliding_attention", "full_attention"], ["x", "y"], {}, {"a": 1}, {"rope_type": "x"}]  # fmt: skip
ROPES: list[Any] = [
    {"rope_type": kind, **more}
    for kind in ("default", "linear", "dynamic", "proportional", "yarn", "longrope", "llama3", "axial")
    for more in (
        {},
        {"factor": 2.0},
        {"factor": NAN},
        {"factor": 2.0, "original_max_position_embeddings": 8, "rope_theta": 1.0},
        {"factor": 2.0, "original_max_position_embeddings": 8, "partial_rotary_factor": 0.5},
        {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8},
        {"short_factor": [1.0] * 4, "long_factor": [2.0] * 3, "original_max_position_embeddings": 8},
        {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
        {"factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    )
] + [{"rope_theta": value} for value in (0, -1.0, NAN, INF, "x", None, 1.0, 1e6)]
LITERALS = {
    "norm_position": ("pre", "post", "sandwich", "parallel"),
    "norm_type": ("layernorm", "rmsnorm"),
    "position_encoding": ("sinusoidal", "learned", "rope", "alibi", "t5", "none"),
    "position_counting": ("mask", "columns", "tokens"),
    "sinusoidal_layout": ("interleaved", "halves", "tensor2tensor"),
    "classifier_pooling": ("first", "last", "mean"),
    "initializer": ("normal", "xavier", "gpt2", "t5"),
}
NOT_DRAWN = {"transformers_version", "source_family", "source_fields", "architecture", "return_dict", "id2label",
             "label2id", "output_hidden_states"}  # fmt: skip


def draw_config(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of a small config, and some of them that have another value, sensible or odd."""
    architecture = rng.choice(["encoder", "decoder", "encoder-decoder"])
    fields: dict[str, Any] = {"architecture": architecture, "vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2}
    fields |= {"intermediate_size": 24, "num_attention_heads": 2, "max_position_embeddings": 32}
    fields |= {name: rng.choice(values) for name, values in LITERALS.items() if rng.random() < 0.4}
    names = [field.name for field in dataclass_fields(UrformConfig) if field.name not in NOT_DRAWN]
    changed: dict[str, Any] = {}
    for name in rng.sample(names, rng.choice([0, 1, 1, 1, 2, 3])):
        if name == "rope_parameters":
            changed[name] = copy.deepcopy(rng.choice(ROPES))
        else:
            changed[name] = copy.deepcopy(rng.choice(ODD if name not in LITERALS else [*LITERALS[name], *ODD]))
        if isinstance(getattr(UrformConfig, name, None), bool) and rng.random() < 0.7:
            changed[name] = rng.random() < 0.5
    return fields, changed


def config_or_refusal(fields: dict[str, Any], changed: dict[str, Any]) -> UrformConfig | None:
    """The config; None for a ValueError that names one of the fields that it was given, within a second."""
    begin = time.process_time()
    try:
        return UrformConfig(**{**fields, **changed})
    except ValueError as error:
        given = [name for name in {*fields, *changed} if re.search(rf"\b{name}\b", str(error))]
        assert given, f"{fields} {changed}: refused without a field's name: {error}"
        assert time.process_time() - begin < 1.0, f"{fields} {changed}: refused after a second"
        return None


def run(config: UrformConfig) -> None:
    """Build, run forward and backward, in training, and generate."""
    head = {"encoder": "MaskedLM", "decoder": "CausalLM"}.get(config.architecture, "ConditionalGeneration")
    model = getattr(urform, f"UrformFor{head}")(config)
    vocab = config.vocab_size
    length = min(6, max(1, config.max_position_embeddings - 2)) if config.position_encoding == "learned" else 6
    ids = (torch.arange(2, 14).reshape(2, 6) % vocab)[:, :length]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])[:, :length]
    model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing or config.final_logit_softcapping is not None or config.logit_scale == 0, missing
    if model.can_generate():
        model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=2 if length == 6 else 1)


def try_configs(seeds: range) -> None:
    wrong, accepted = [], 0
    for seed in seeds:
        rng = random.Random(seed)
        fields, changed = draw_config(rng)
        try:
            config = config_or_refusal(fields, changed)
            if config is not None:
                accepted += 1
                torch.manual_seed(0)
                run(config)
        except Exception as error:
            wrong.append(f"{seed}: {fields} {changed}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, f"{len(wrong)} of {len(seeds)}:\n" + "\n".join(wrong[:20])
    assert accepted > len(seeds) / 5


def test_what_is_accepted_builds_runs_trains_and_generates() -> None:
    """Over all fields, with odd values: it runs, or a ValueError names a field before memory is taken."""
    try_configs(range(200))


@pytest.mark.slow
def test_many_configs_are_accepted_and_run_or_are_refused_by_name() -> None:
    try_configs(range(1000, 5000))
