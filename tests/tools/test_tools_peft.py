"""PEFT's methods by their defaults, prefixes, trainable tokens and AutoPeftModel, against the stock classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tool_models import need, stock_model

import urform

IDS = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0
SPANS = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([1, 2, 3])}
CLASSES = {"labels": torch.tensor([0, 1, 1])}
TOKENS = {"labels": torch.where(MASK == 0, -100, IDS)}
TAGS = {"labels": torch.where(MASK == 0, -100, IDS % 2)}


@pytest.fixture(autouse=True)
def _needs_peft() -> None:
    need("peft")


def _prefix(model: Any, task: str) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    made = get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=4))
    torch.manual_seed(5)
    torch.nn.init.normal_(made.prompt_encoder["default"].embedding.weight)
    return made.eval()


@pytest.mark.parametrize("attention", ["urform", "sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "head", "task", "labels"),
    [
        ("Bert", "ForSequenceClassification", "SEQ_CLS", CLASSES),
        ("Bert", "ForTokenClassification", "TOKEN_CLS", TAGS),
        ("Bert", "ForQuestionAnswering", "QUESTION_ANS", SPANS),
        ("Bert", "ForMaskedLM", "FEATURE_EXTRACTION", TOKENS),
        ("Roberta", "ForMaskedLM", "FEATURE_EXTRACTION", TOKENS),
        ("GPT2", "LMHeadModel", "CAUSAL_LM", TOKENS),
        ("GPT2", "ForSequenceClassification", "SEQ_CLS", CLASSES),
        ("GPT2", "ForTokenClassification", "TOKEN_CLS", TAGS),
        ("Llama", "ForCausalLM", "CAUSAL_LM", TOKENS),
    ],
)
@pytest.mark.parametrize("padding", ["none", "right"])
def test_prefix_gives_the_stock_class_s_loss(
    family: str, head: str, task: str, labels: dict[str, Any], padding: str, attention: str
):
    stock = stock_model(family, head)
    ours = urform.from_transformers(stock).eval()
    ours.set_attn_implementation(attention)
    mask = MASK if padding == "right" else torch.ones_like(MASK)
    inputs = {"input_ids": IDS.masked_fill(mask == 0, stock.config.pad_token_id), "attention_mask": mask, **labels}
    prefixed = _prefix(ours, task)
    found = prefixed(**inputs)
    assert abs(found.loss.item() - ours(**inputs).loss.item()) > 1e-3, "the prefix has no effect"
    found.loss.backward()
    assert prefixed.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0
    try:
        expected = _prefix(stock, task)(**inputs)
    except ValueError as error:  # PEFT 0.21 does not know that transformers 5.24 says `cache`
        pytest.skip(f"PEFT gives the stock class no prefix under this transformers: {error}")
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=2e-6)


@pytest.mark.parametrize(
    ("family", "task"),
    [("Bert", "FEATURE_EXTRACTION"), ("Llama", "CAUSAL_LM"), ("Bart", "SEQ_2_SEQ_LM"), ("T5", "SEQ_2_SEQ_LM")],
)
def test_prompt_tuning_gives_the_stock_class_s_logits(family: str, task: str):
    """PEFT's own part of the mask is float."""
    from peft import PromptTuningConfig, get_peft_model

    stock = stock_model(family)
    ours, logits = urform.from_transformers(stock), []
    extra = {"decoder_input_ids": IDS[:, :4]} if task == "SEQ_2_SEQ_LM" else {}
    for model in (stock, ours):
        made = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=4)).eval()
        torch.manual_seed(5)
        torch.nn.init.normal_(made.prompt_encoder["default"].embedding.weight)
        logits.append(made(input_ids=IDS, attention_mask=MASK, **extra).logits)
    real = torch.ones_like(MASK).bool() if extra else torch.cat([MASK.new_ones(3, 4), MASK], 1).bool()
    real = real[:, : logits[0].shape[1]]
    torch.testing.assert_close(logits[1][real], logits[0][real], rtol=1e-4, atol=1e-4)


def test_prefix_of_an_encoder_with_position_biases_sees_itself_first():
    """A prefix made from the first tokens of a sentence, whose keys and values do not depend on the rest: one layer."""
    from transformers import DynamicCache

    config = urform.UrformConfig(
        architecture="encoder", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        position_encoding="alibi",
    )  # fmt: skip
    torch.manual_seed(0)
    model = urform.UrformModel(config).eval()
    for attention in ("urform", "sdpa", "eager"):
        model.set_attn_implementation(attention)
        whole = model(IDS).last_hidden_state
        cache = DynamicCache(config=config)
        model(IDS[:, :3], past_key_values=cache)
        assert cache.get_seq_length() == 3
        rest = model(IDS[:, 3:], past_key_values=cache).last_hidden_state
        torch.testing.assert_close(rest, whole[:, 3:], rtol=1e-5, atol=1e-5)


# Sizes for layers of width 32.
_OPTIONS: dict[str, dict[str, int]] = {
    "FourierFT": {"n_frequency": 10}, "BOFT": {"boft_block_size": 4}, "Shira": {"r": 4}, "Miss": {"r": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", ["Llama", "Bart", "T5"])
@pytest.mark.parametrize(
    "method", ["IA3", "LNTuning", "LoHa", "LoKr", "Vera", "BOFT", "OFT", "HRA", "FourierFT", "Shira", "Miss", "OSF"]
)
def test_methods_by_their_defaults_train_what_they_train_in_the_stock_class(family: str, method: str):
    import peft

    if not hasattr(peft, f"{method}Config"):
        pytest.skip(f"this PEFT has no {method}Config")
    counts, options = [], _OPTIONS.get(method, {})
    stock = stock_model(family)
    if method == "OSF" and family != "Llama":
        pytest.skip("PEFT has no default targets for OSF on this family")
    for model in (stock, urform.from_transformers(stock_model(family))):
        wrapped = peft.get_peft_model(model, getattr(peft, f"{method}Config")(**options))
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        counts.append(sum(p.numel() for p in trained))
    assert counts[0] == counts[1] > 0


def test_every_default_for_llama_is_there_for_urform():
    from peft.utils import constants

    tables = [v for k, v in vars(constants).items() if k.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in v]
    assert len(tables) >= 10 and all("urform" in table for table in tables)


@pytest.mark.parametrize("targets", [["embed_tokens"], None, ["encoder.embed_tokens"]])
@pytest.mark.parametrize("family", ["Bart", "T5", "Llama"])
def test_trainable_tokens_change_the_shared_rows(family: str, targets: Any, tmp_path: Path):
    """Truth: the stock class with those rows of its one shared table replaced."""
    from peft import PeftModel, TrainableTokensConfig, get_peft_model

    if family == "Llama" and targets == ["encoder.embed_tokens"]:
        targets = ["decoder.embed_tokens"]
    tied = {"tie_word_embeddings": True} if family == "Llama" else {}
    stock, rows = stock_model(family, **tied), torch.tensor([5, 9])
    config = TrainableTokensConfig(token_indices=rows.tolist(), target_modules=targets)
    wrapped = get_peft_model(urform.from_transformers(stock), config)
    deltas = {id(p): p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert len(deltas) == 1, "one delta, which all that is tied shares"
    (delta,) = deltas.values()
    assert delta.shape == (2, 32)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    assert delta.grad.abs().sum() > 0
    new = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        delta.copy_(new)
        stock.get_input_embeddings().weight[rows] = new
    expected = stock(input_ids=IDS, labels=IDS).loss.item()
    assert wrapped.eval()(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(expected, rel=2e-6)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(urform.from_transformers(stock_model(family, **tied)), tmp_path).eval()
    assert again(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    ("family", "head"),
    [("Bert", "ForMaskedLM"), ("Bert", "ForSequenceClassification"), ("Llama", None), ("Bart", None)],
)
def test_auto_peft_model_without_a_task_type(family: str, head: str | None, tmp_path: Path):
    from peft import AutoPeftModel, LoraConfig, get_peft_model

    urform.from_transformers(stock_model(family, head)).save_pretrained(tmp_path / "base")
    made = urform.from_transformers(stock_model(family, head))
    base = type(made).from_pretrained(tmp_path / "base")
    adapter = get_peft_model(base, LoraConfig(init_lora_weights=False)).eval()
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert type(loaded.base_model.model) is type(base)
    torch.testing.assert_close(loaded(input_ids=IDS)[0], adapter(input_ids=IDS)[0])
