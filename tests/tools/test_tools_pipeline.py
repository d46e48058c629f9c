"""The pipelines of transformers that our heads serve, from a folder and from a model, with the model's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tool_models import tokenizer
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import urform

TEXTS = ["the cat sat on the mat", "a dog"]
CASES = [
    ("fill-mask", "encoder", "UrformForMaskedLM"),
    ("text-generation", "decoder", "UrformForCausalLM"),
    *(("text-classification", a, "UrformForSequenceClassification") for a in ("encoder", "decoder", "encoder-decoder")),
    *(("token-classification", a, "UrformForTokenClassification") for a in ("encoder", "decoder")),
    *(("feature-extraction", a, "UrformModel") for a in ("encoder", "decoder", "encoder-decoder")),
]


def _model(architecture: str, head: str) -> Any:
    tokens = tokenizer()
    config = urform.UrformConfig(
        architecture=architecture, vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.3, pad_token_id=tokens.pad_token_id, num_labels=3,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(urform, head)(config).eval()


def _check(task: str, answers: list[Any], texts: list[str], model: Any) -> None:
    for text, answer in zip(texts, answers, strict=True):
        inputs = tokenizer()(text, return_tensors="pt")
        if task == "text-generation":
            ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]
            assert answer[0]["generated_text"] == tokenizer().decode(ids, skip_special_tokens=True)
            continue
        output = model(**inputs)
        if task == "feature-extraction":
            torch.testing.assert_close(torch.tensor(answer)[0], output[0][0], rtol=1e-5, atol=1e-5)
        elif task == "text-classification":
            assert answer["score"] == pytest.approx(output.logits[0].softmax(-1).max().item(), rel=1e-5)
            assert answer["label"] == f"LABEL_{output.logits[0].argmax()}"
        elif task == "fill-mask":
            place = (inputs["input_ids"][0] == tokenizer().mask_token_id).nonzero().item()
            best = output.logits[0, place].softmax(-1)
            assert answer[0]["token"] == best.argmax() and answer[0]["score"] == pytest.approx(best.max().item())
        else:
            scores = output.logits[0].softmax(-1).amax(-1)
            assert len(answer) == len(scores) - 2  # without <s> and </s>
            for entity in answer:
                assert entity["score"] == pytest.approx(scores[entity["index"]].item(), rel=1e-5)
                assert text[entity["start"] : entity["end"]].strip() == entity["word"].strip(" Ġ▁")


@pytest.mark.parametrize(("task", "architecture", "head"), CASES)
def test_pipeline(task: str, architecture: str, head: str, tmp_path: Path):
    model = _model(architecture, head)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    texts = [f"{text} {tokenizer().mask_token} red" for text in TEXTS] if task == "fill-mask" else TEXTS
    options = {"max_new_tokens": 5, "do_sample": False} if task == "text-generation" else {}
    options |= {"ignore_labels": []} if task == "token-classification" else {}
    for run in (pipeline(task, model=str(tmp_path)), pipeline(task, model=model, tokenizer=tokenizer())):
        assert type(run.model) is type(model)
        _check(task, [run(text, **options) if task != "text-classification" else run(text, **options)[0]
                      for text in texts], texts, model)  # fmt: skip
        if task in ("text-classification", "token-classification"):  # batches, with padding
            _check(task, run(texts, batch_size=2, **options), texts, model)


def test_zero_shot_classification():
    model = _model("encoder", "UrformForSequenceClassification")
    model.config.label2id = {"entailment": 0, "neutral": 1, "contradiction": 2}
    model.config.id2label = {0: "entailment", 1: "neutral", 2: "contradiction"}
    run = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer())
    answer = run(TEXTS[0], candidate_labels=["cat", "dog"], hypothesis_template="{}")
    logits = [model(**tokenizer()(TEXTS[0], label, return_tensors="pt")).logits[0, 0] for label in answer["labels"]]
    torch.testing.assert_close(torch.tensor(answer["scores"]), torch.stack(logits).softmax(-1), rtol=1e-5, atol=1e-5)


def test_the_library_has_no_pipeline_for_encoder_decoders():
    """README.md says so; when one returns, serve it and say that."""
    gone = {"translation", "summarization", "text2text-generation", "question-answering"}
    assert not gone & set(PIPELINE_REGISTRY.get_supported_tasks())
