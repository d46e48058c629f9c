"""Encoder-decoder families in both directions: random stock configs over each family's space, the stock classes."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conversion_cases import check_parity, check_round_trip, close, padded, random_stock, same_state, shake
from numerics import exact, twice
from safetensors.torch import load_file, save_file

import urform
from urform import UrformConfig
from urform.conversion.configs import find_family, find_head, urform_config
from urform.conversion.families_encoder_decoder import ENCODER_DECODERS

HEADS = [(family.model_type, head.stock) for family in ENCODER_DECODERS for head in family.heads]
GENERATORS = {
    "bart": "BartForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "m2m_100": "M2M100ForConditionalGeneration",
    "marian": "MarianMTModel",
    "pegasus": "PegasusForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*only training depends")
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "quick_gelu", "gelu_pytorch_tanh", "tanh")


def draw(name: str, stock: str, seed: int) -> dict[str, Any]:
    """Fields of a random config of a family, over all that it has."""
    rng = random.Random(f"{stock} {seed}")
    fields = draw_t5(rng) if name in ("t5", "mt5") else draw_bart(rng, name)
    if name == "mbart":
        fields["decoder_start_token_id"] = rng.choice([None, fields["decoder_start_token_id"]])
    if "QuestionAnswering" not in stock:
        fields["id2label"] = {i: f"L{i}" for i in range(rng.choice([1, 2, 5]))}
    return fields


def draw_bart(rng: random.Random, name: str) -> dict[str, Any]:
    vocab = rng.choice([37, 61, 83])
    pad = vocab - 1 if name == "marian" else rng.choice([0, 1, 2, 5])
    eos = 0 if name == "marian" else rng.choice([token for token in (1, 2, 3) if token != pad])
    fields: dict[str, Any] = {
        "vocab_size": vocab,
        "d_model": 12 * rng.choice([2, 3, 4]),
        "max_position_embeddings": rng.choice([24, 40]),
        "activation_function": rng.choice(ACTIVATIONS),
        "scale_embedding": rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.7,
        "dropout": rng.choice([0.0, 0.1, 0.3]),
        "attention_dropout": rng.choice([0.0, 0.1]),
        "activation_dropout": rng.choice([0.0, 0.2]),
        "init_std": rng.choice([0.02, 0.1]),
        "pad_token_id": pad,
        "eos_token_id": eos,
        "bos_token_id": rng.choice([0, 3]),
        "decoder_start_token_id": pad if name == "marian" else rng.choice([eos, pad, 0]),
    }
    for side in ("encoder", "decoder"):
        fields[f"{side}_layers"] = rng.choice([1, 2, 3])
        fields[f"{side}_attention_heads"] = rng.choice([1, 2, 3, 4, 6])
        fields[f"{side}_ffn_dim"] = rng.choice([7, 20, 33])
        fields[f"{side}_layerdrop"] = rng.choice([0.0, 0.1])
    if name in ("bart", "mbart"):
        fields["classifier_dropout"] = rng.choice([0.0, 0.1])
    if name == "marian":
        fields["share_encoder_decoder_embeddings"] = rng.random() < 0.6
    return fields


def draw_t5(rng: random.Random) -> dict[str, Any]:
    gated = ("gated-gelu", "gated-silu", "gated-relu", "gated-gelu_new")
    return {
        "vocab_size": rng.choice([37, 61, 83]),
        "d_model": rng.choice([24, 30, 41]),
        "d_kv": rng.choice([3, 5, 8]),
        "d_ff": rng.choice([7, 20, 33]),
        "num_layers": rng.choice([1, 2, 3]),
        "num_decoder_layers": rng.choice([None, 1, 2, 3]),
        "num_heads": rng.choice([1, 3, 4]),
        "relative_attention_num_buckets": rng.choice([8, 10, 32]),
        "relative_attention_max_distance": rng.choice([18, 20, 128]),
        "dropout_rate": rng.choice([0.0, 0.1]),
        "layer_norm_epsilon": rng.choice([1e-6, 1e-5]),
        "feed_forward_proj": rng.choice(("relu", "gelu", "gelu_new", *gated)),
        "tie_word_embeddings": rng.random() < 0.5,
        "decoder_start_token_id": rng.choice([0, 4]),
        "pad_token_id": rng.choice([0, 2]),
        "eos_token_id": 1,
        "classifier_dropout": rng.choice([0.0, 0.2]),
        "initializer_factor": rng.choice([1.0, 0.5]),
    }


def stock_model(name: str, stock: str, seed: int = 0, **fields: Any) -> Any:
    """A random stock model; half of the T5s have an output projection of their own, as T5 v1.1 and mT5 do."""
    model = random_stock(stock, seed, **{**draw(name, stock, seed), **fields})
    if name not in ("t5", "mt5"):
        return model
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("Attention.q.weight"):  # T5 has the scale of the scores in its weights
                parameter.mul_(model.config.d_kv**-0.5)
    if stock == GENERATORS[name] and seed % 2 == 0:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / model.config.d_model**0.5)
        del model.all_tied_weights_keys["lm_head.weight"]  # as when it has been loaded from such a checkpoint
    return model


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("name", "stock"), HEADS)
def test_every_class_both_ways(name: str, stock: str, seed: int) -> None:
    check_parity(stock_model(name, stock, seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
@pytest.mark.parametrize(("name", "stock"), HEADS)
def test_many_configs_both_ways(name: str, stock: str, seed: int) -> None:
    check_parity(stock_model(name, stock, seed))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_is_forced_as_there(name: str, side: str) -> None:
    """The generation config comes along: forced tokens, the start token, beams; sources padded on either side."""
    stock = stock_model(name, GENERATORS[name], 1)
    config = stock.generation_config
    config.forced_bos_token_id, config.forced_eos_token_id, config.decoder_start_token_id = 7, 2, 9
    config.eos_token_id, config.num_beams, config.max_length, config.no_repeat_ngram_size = 2, 3, 9, 2
    ours = urform.from_transformers(stock)
    ids, mask = padded(side, stock.config.vocab_size, stock.config.pad_token_id)
    plain = {"use_cache": False} if "t5" in name else {}  # stock T5's cache has as many layers as its encoder
    want = stock.generate(input_ids=ids, attention_mask=mask, **plain)
    have = ours.generate(input_ids=ids, attention_mask=mask)
    assert have.tolist() == want.tolist()
    assert (have[:, :2] == torch.tensor([9, 7])).all()


@pytest.mark.parametrize("name", GENERATORS)
def test_targets_piece_by_piece_through_a_cache(name: str) -> None:
    """With pad tokens among them, which M2M-100 counts otherwise with a cache than without."""
    stock = stock_model(name, GENERATORS[name], 3, **({"num_decoder_layers": 1} if "t5" in name else {}))
    ours = urform.from_transformers(stock)
    vocab, pad = stock.config.vocab_size, stock.config.pad_token_id
    ids, mask = padded("right", vocab, pad)
    target = padded("none", vocab, pad)[0]
    target[0, 2], target[1, 5] = pad, pad
    caches: dict[Any, Any] = {}
    models = (ours, stock, exact(stock))
    with torch.no_grad():
        for piece in target.split([4, 1, 4], dim=1):
            logits = []
            for model in models:
                output = model(
                    input_ids=ids,
                    attention_mask=mask,
                    decoder_input_ids=piece,
                    past_key_values=caches.get(model),
                    use_cache=True,
                )
                caches[model] = output.past_key_values
                logits.append(output.logits)
            close(*logits, "logits through the cache")


@pytest.mark.parametrize("name", GENERATORS)
def test_fine_tuned_here_and_used_there(name: str, tmp_path: Path) -> None:
    """Trained a step here, saved in the stock form, loaded by the stock class."""
    stock = stock_model(name, GENERATORS[name], 4)
    ours = urform.from_transformers(stock)
    ids, mask = padded("right", stock.config.vocab_size, stock.config.pad_token_id)
    labels = padded("none", stock.config.vocab_size, stock.config.pad_token_id, 6)[0]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    before = ours(**batch).loss
    before.backward()
    optimizer.step()
    urform.to_transformers(ours).save_pretrained(tmp_path)
    loaded = type(stock).from_pretrained(tmp_path)
    after = ours(**batch)
    assert after.loss < before
    truth = exact(loaded)(**batch).logits
    close(after.logits, loaded(**batch).logits, truth, "logits")
    close(urform.from_transformers(str(tmp_path))(**batch).logits, loaded(**batch).logits, truth, "logits")


@pytest.mark.parametrize("name", GENERATORS)
def test_a_training_step_is_the_same_step(name: str) -> None:
    """Without dropout every parameter is the same after it, but for the bias of the logits, a constant there."""
    fields = draw(name, GENERATORS[name], 2)
    stock = stock_model(name, GENERATORS[name], 2, **{key: 0.0 for key in fields if "drop" in key}).train()
    ours = urform.from_transformers(stock)
    ids, mask = padded("right", stock.config.vocab_size, stock.config.pad_token_id)
    labels = padded("none", stock.config.vocab_size, stock.config.pad_token_id, 6)[0]
    precise = exact(stock)
    for model in (stock, ours, precise):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.0 if parameter.grad is None else parameter.grad, alpha=-1)
    have, (want, truth) = ours.state_dict(), (urform.from_transformers(m).state_dict() for m in (stock, precise))
    for key in have.keys() - {"lm_head.bias"}:
        close(have[key], want[key], truth[key], key)


def test_labels_that_end_in_pad_tokens_begin_with_the_language_as_in_mbart() -> None:
    stock = stock_model("mbart", GENERATORS["mbart"], 0)
    ours = urform.from_transformers(stock)
    pad = stock.config.pad_token_id
    ids, mask = padded("right", stock.config.vocab_size, pad)
    labels = padded("none", stock.config.vocab_size, pad, 6)[0]
    labels[1, 4:] = pad
    models = (ours, stock, exact(stock))
    outputs = [model(input_ids=ids, attention_mask=mask, labels=labels) for model in models]
    close(*(output.logits for output in outputs), "logits")
    close(*(output.loss for output in outputs), "loss")


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_a_classified_text_does_not_depend_on_padding(name: str) -> None:
    """Stock T5 shifts padding on the left into the decoder and attends to it; ours is the stock one without padding."""
    stock = stock_model(name, f"{name.upper()}ForSequenceClassification", 0, id2label={0: "a", 1: "b"})
    ours = urform.from_transformers(stock)
    ids, mask = padded("left", stock.config.vocab_size, stock.config.pad_token_id)
    ids[:, -1] = stock.config.eos_token_id
    have = ours(input_ids=ids, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        alone = ids[row][real][None]
        close(have[row], *twice(stock, lambda m, alone=alone: m(input_ids=alone).logits[0]), "logits")


SMALL = {
    "bart": {"vocab_size": 37, "d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "pad_token_id": 1},
    "t5": {"vocab_size": 37, "d_model": 12, "num_layers": 1, "d_ff": 8, "num_heads": 2, "d_kv": 4}
    | {"decoder_start_token_id": 0},
}


@pytest.mark.parametrize(
    ("stock", "fields", "named"),
    [
        (
            "MarianMTModel",
            {"decoder_vocab_size": 41, "share_encoder_decoder_embeddings": False},
            ["decoder_vocab_size=41"],
        ),
        (
            "BartForConditionalGeneration",
            {"gradient_checkpointing_ratio": 0.5, "quantization_config": {"a": 1}},
            ["quan"],
        ),
        ("BartForConditionalGeneration", {"is_encoder_decoder": False}, ["is_encoder_decoder=False"]),
        ("BartModel", {"is_decoder": True, "use_bfloat16": True}, ["is_decoder=True"]),
        ("T5EncoderModel", {"is_decoder": True}, ["is_decoder=True"]),
        ("M2M100Model", {"pad_token_id": None}, ["pad_token_id"]),
        ("M2M100ForConditionalGeneration", {"d_model": 13, "encoder_attention_heads": 1}, ["hidden_size=13"]),
        ("T5ForConditionalGeneration", {"relative_attention_max_distance": 16}, ["relative_attention_max_distance=16"]),
        ("T5ForConditionalGeneration", {"relative_attention_num_buckets": 2}, ["relative_attention_num_buckets=2"]),
    ],
)
def test_a_config_that_cannot_be_expressed_is_refused(stock: str, fields: dict[str, Any], named: list[str]) -> None:
    config_class = getattr(hf, stock).config_class
    config = config_class(**{**SMALL["t5" if "T5" in stock else "bart"], **fields})
    with pytest.raises(ValueError) as error:
        urform_config(config, find_head(find_family(config), stock=stock))
    for name in named:
        assert name in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        hf.SwitchTransformersConfig(num_layers=1, num_decoder_layers=1),
        hf.NllbMoeConfig(),
        hf.UMT5Config(),
        hf.BlenderbotConfig(),
    ],
)
def test_mixtures_of_experts_and_strangers_are_refused_by_name(config: Any) -> None:
    with pytest.raises(ValueError, match=config.model_type):
        urform_config(config)


def test_classes_without_a_counterpart_are_refused_with_those_that_have_one() -> None:
    with pytest.raises(ValueError, match=r"BartForCausalLM has no counterpart.*BartForConditionalGeneration"):
        urform.from_transformers(hf.BartForCausalLM(hf.BartConfig(**SMALL["bart"])))


def test_tables_that_a_class_makes_are_checked_and_made() -> None:
    """Marian's sinusoids: another table is refused, none is needed, and what comes back has them."""
    stock = random_stock("MarianMTModel", **SMALL["bart"], decoder_start_token_id=1)
    ours = urform.from_transformers(stock)
    assert not any("embed_positions" in name for name in ours.state_dict())
    same_state(urform.to_transformers(ours), stock)
    with torch.no_grad():
        stock.model.decoder.embed_positions.weight[3] += 0.01
    with pytest.raises(ValueError, match=r"decoder\.embed_positions"):
        urform.from_transformers(stock)


def test_checkpoints_without_the_bias_of_the_logits(tmp_path: Path) -> None:
    """Early ones have none; transformers takes zeros."""
    stock = random_stock("BartForConditionalGeneration", **SMALL["bart"])
    stock.final_logits_bias.zero_()
    stock.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["final_logits_bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same_state(urform.from_transformers(str(tmp_path)), urform.from_transformers(stock))


def test_tables_that_are_one_by_the_config_but_differ_are_refused() -> None:
    stock = random_stock("T5Model", **SMALL["t5"])
    stock.decoder.embed_tokens.weight = torch.nn.Parameter(stock.shared.weight + 1)
    with pytest.raises(ValueError, match=r"decoder\.embed_tokens\.weight are one tensor by the config but differ"):
        urform.from_transformers(stock)


BASE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "decoder_num_hidden_layers": 1,
    "max_position_embeddings": 32,
}
BART = {**BASE, "position_encoding": "learned", "position_offset": 2, "position_counting": "columns"}
BART |= {"embedding_norm": True, "norm_position": "post"}
T5 = {**BASE, "position_encoding": "t5", "norm_type": "rmsnorm", "attention_bias": False, "mlp_bias": False}
T5 |= {"attention_scale": 1.0, "head_dim": 7, "norm_eps": 1e-6, "logit_scale": 24**-0.5}
WAVES = {**BASE, "position_encoding": "sinusoidal"}
CONFIGS = {
    "bart": ("bart", {**BART, "initializer": "xavier"}),
    "bart, own tables": ("bart", {**BART, "share_embeddings": False, "tie_word_embeddings": False}),
    "mbart": (
        "mbart",
        {**BART, "norm_position": "pre", "decoder_start_from_labels": True, "decoder_num_attention_heads": 2},
    ),
    "m2m_100": (
        "m2m_100",
        {**WAVES, "sinusoidal_layout": "tensor2tensor", "position_counting": "tokens", "position_offset": 1},
    ),
    "marian": (
        "marian",
        {**WAVES, "sinusoidal_layout": "halves", "position_counting": "columns", "norm_position": "post"}
        | {"share_embeddings": False, "lm_head_bias": True},
    ),
    "marian, interleaved": ("marian", {**WAVES, "position_counting": "columns", "norm_position": "post"}),
    "pegasus": (
        "pegasus",
        {**WAVES, "sinusoidal_layout": "halves", "position_counting": "columns", "share_embeddings": False}
        | {"tie_word_embeddings": False},
    ),
    "pegasus, interleaved": ("pegasus", {**WAVES, "position_counting": "columns", "lm_head_bias": True}),
    "t5": ("t5", {**T5, "hidden_act": "gelu_new", "gated_mlp": True, "activation_dropout": 0.3}),
    "t5, own output": ("t5", {**T5, "hidden_act": "relu", "tie_word_embeddings": False, "logit_scale": 1.0}),
    "mt5": ("mt5", {**T5, "hidden_act": "silu", "gated_mlp": True, "logit_scale": 1.0, "tie_word_embeddings": False}),
}


WITHOUT_CLASSIFIERS = ("marian", "m2m_100", "pegasus")
LANGUAGE, CLASSIFIERS = ("Model", "ForConditionalGeneration"), ("ForSequenceClassification", "ForQuestionAnswering")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        (name, head)
        for name in CONFIGS
        for head in (
            *LANGUAGE["interleaved" in name :],
            *(() if CONFIGS[name][0] in WITHOUT_CLASSIFIERS else CLASSIFIERS),
        )
    ],
)
def test_a_model_of_urform_survives_the_way_there_and_back(name: str, head: str) -> None:
    family, fields = CONFIGS[name]
    torch.manual_seed(0)
    ours = getattr(urform, f"Urform{head}")(UrformConfig(**fields, classifier_dropout=0.3)).eval()
    shake(ours)
    stock = check_round_trip(ours, family).eval()
    ids, mask = padded("right", 37, 0)
    ids[:, -1] = ours.config.eos_token_id  # stock classifiers read what stands where the source has it
    target = padded("none", 37, 0)[0]
    models = (ours, stock, exact(stock))
    close(*(m(input_ids=ids, attention_mask=mask, decoder_input_ids=target)[0] for m in models), "logits")


def test_an_encoder_of_either_architecture_is_t5s() -> None:
    torch.manual_seed(0)
    whole = urform.UrformModel(UrformConfig(**T5)).eval()
    part = urform.UrformEncoderModel(whole.config).eval()
    part.encoder.load_state_dict(whole.encoder.state_dict())
    fields = {name: value for name, value in T5.items() if not name.startswith("decoder_")}
    own = urform.UrformEncoderModel(UrformConfig(**fields, architecture="encoder")).eval()
    ids, mask = padded("left", 37, 0)
    for ours in (part, own):
        stock = check_round_trip(ours)
        assert type(stock) is hf.T5EncoderModel
        states = (m(input_ids=ids, attention_mask=mask)[0] for m in (ours, stock.eval(), exact(stock)))
        close(*states, "hidden states", mask.bool())


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("bart", {"norm_position": "pre"}, ["norm_position", "final_norm"]),
        ("bart", {"head_dim": 5, "norm_eps": 1e-6}, ["head_dim", "norm_eps"]),
        ("bart", {"tie_word_embeddings": False}, ["share_embeddings"]),
        ("bart", {"num_key_value_heads": 2}, ["num_key_value_heads"]),
        ("bart", {"position_counting": "mask"}, ["position_counting"]),
        ("mbart", {"norm_position": "pre"}, ["decoder_start_from_labels"]),
        ("t5", {}, ["norm_type", "position_encoding", "attention_scale"]),
    ],
)
def test_what_a_family_cannot_express_is_refused_with_its_fields(
    family: str, changes: dict[str, Any], named: list[str]
) -> None:
    ours = urform.UrformForConditionalGeneration(UrformConfig(**{**BART, **changes}))
    with pytest.raises(ValueError) as error:
        urform.to_transformers(ours, family)
    for name in named:
        assert name in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["marian", "t5"])
def test_half_precision_is_one_dtype(name: str, dtype: torch.dtype) -> None:
    """Stock T5 in float16 keeps some weights in float32, which Urform has not; Marian's tables are in the model's."""
    stock = stock_model(name, GENERATORS[name], 3).to(dtype)
    if name == "t5" and dtype == torch.float16:
        for block in (*stock.encoder.block, *stock.decoder.block):
            block.layer[-1].DenseReluDense.wo.float()
    ours = urform.from_transformers(stock)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {dtype}
    ids, mask = padded("right", stock.config.vocab_size, stock.config.pad_token_id)
    assert ours(input_ids=ids, attention_mask=mask, labels=ids).loss.isfinite()
    assert {tensor.dtype for tensor in urform.to_transformers(ours).state_dict().values()} == {dtype}
