"""The pipelines that transformers 5 still has for text, on our heads: each gives what the model itself gives."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, pipeline
from transformers.pipelines import SUPPORTED_TASKS

import urform
from urform import UrformConfig, UrformTokenizer

TEXTS = ["a small cat sleeps on the warm mat", "two birds sing in the old tree", "rain falls on green hills today"]
TASKS = {
    "text-generation": ("CausalLM", "decoder"),
    "fill-mask": ("MaskedLM", "encoder"),
    "text-classification": ("SequenceClassification", "encoder"),
    "token-classification": ("TokenClassification", "encoder"),
    "feature-extraction": ("Model", "encoder"),
    "zero-shot-classification": ("SequenceClassification", "encoder"),
}
LABELS = {0: "contradiction", 1: "neutral", 2: "entailment"}
GONE = ("translation", "summarization", "text2text-generation", "question-answering")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Save a model and its tokenizer for each task; give the folder of one."""
    tokenizer = UrformTokenizer.train(TEXTS * 4, vocab_size=300)

    def save(task: str) -> Any:
        head, architecture = TASKS[task]
        config = UrformConfig(
            architecture=architecture, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
            num_attention_heads=4, intermediate_size=48, max_position_embeddings=64, initializer_range=0.3,
            id2label=LABELS, label2id={label: i for i, label in LABELS.items()},
        )  # fmt: skip
        torch.manual_seed(0)
        model = getattr(urform, "UrformModel" if head == "Model" else f"UrformFor{head}")(config)
        path = tmp_path_factory.mktemp(task)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path, model.eval()

    return save


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_gives_what_the_model_gives(task: str, folder: Any) -> None:
    path, model = folder(task)
    pipe = pipeline(task, model=str(path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "two birds sing in the " + (tokenizer.mask_token if task == "fill-mask" else "tree")
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    if task == "text-generation":
        made = pipe(text, max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
        want = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert made == tokenizer.decode(want, skip_special_tokens=True)
    elif task == "fill-mask":
        at = inputs.input_ids[0].tolist().index(tokenizer.mask_token_id)
        best = outputs.logits[0, at].softmax(-1).max(-1)
        made = pipe(text)[0]
        assert made["token"] == int(best.indices) and made["score"] == pytest.approx(float(best.values), rel=1e-4)
    elif task == "text-classification":
        best = outputs.logits[0].softmax(-1).max(-1)
        made = pipe(text)[0]
        assert made["label"] == model.config.id2label[int(best.indices)]
        assert made["score"] == pytest.approx(float(best.values), rel=1e-4)
    elif task == "token-classification":
        made = {entity["index"]: entity["entity"] for entity in pipe(text)}
        for index, label in enumerate(outputs.logits[0].argmax(-1).tolist()):
            assert made.get(index, model.config.id2label[label]) == model.config.id2label[label]
        assert made
    elif task == "feature-extraction":
        torch.testing.assert_close(torch.tensor(pipe(text)[0]), outputs.last_hidden_state[0], atol=1e-5, rtol=1e-4)
    else:
        made = pipe(text, candidate_labels=["nature", "sports"], hypothesis_template="this is {}", multi_label=True)
        pair = tokenizer(text, "this is nature", return_tensors="pt")
        with torch.no_grad():
            logits = model(**pair).logits[0]
        want = float(logits[[0, 2]].softmax(-1)[1])
        assert dict(zip(made["labels"], made["scores"], strict=True))["nature"] == pytest.approx(want, rel=1e-4)


def test_readme_names_no_pipeline_that_is_gone() -> None:
    """transformers 5 has none for these; should one come back, README and this list are to say so."""
    assert not set(GONE) & set(SUPPORTED_TASKS)
