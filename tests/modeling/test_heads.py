"""Every head on every architecture that it serves: its loss by formula, learning, saving, gradient accumulation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from numerics import assert_within, exact, twice
from support import make
from torch import Tensor

from urform.configuration.heads_urform import HEADS

CASES = [
    (auto, head, architecture)
    for auto, (head, architectures) in HEADS.items()
    for architecture in architectures
    if auto not in ("AutoModel", "AutoModelForTextEncoding")
]


def build(head: str, architecture: str, **fields: Any) -> Any:
    return make(architecture, head, **{"num_labels": 3, "hidden_size": 24, **fields})


def batch(head: str) -> dict[str, Tensor]:
    """Three rows, one padded on the right; labels for the head."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if head == "UrformForConditionalGeneration":
        labels = torch.randint(3, 99, (3, 6), generator=generator)
        labels[2, 4:] = -100
    elif head in ("UrformForCausalLM", "UrformForMaskedLM"):
        labels = ids.masked_fill(mask == 0, -100)
    elif head == "UrformForTokenClassification":
        labels = torch.randint(0, 3, (3, 8), generator=generator).masked_fill(mask == 0, -100)
    elif head == "UrformForQuestionAnswering":
        return {**inputs, "start_positions": torch.tensor([1, 0, 7]), "end_positions": torch.tensor([2, 4, 7])}
    elif head == "UrformForMultipleChoice":
        inputs = {key: torch.stack([value, value.flip(0)], dim=1) for key, value in inputs.items()}
        labels = torch.tensor([1, 0, 0])  # row 1 has the same two texts in both orders: its loss is log 2
    else:
        labels = torch.tensor([2, 0, 1])
    return {**inputs, "labels": labels}


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of every label that is not -100, one by one."""
    out = []
    for row, label in zip(logits.flatten(0, -2), labels.flatten().tolist(), strict=True):
        if label != -100:
            out.append(row.logsumexp(0) - row[label])
    return torch.stack(out)


def items(head: str, outputs: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The terms whose mean is the loss."""
    if head == "UrformForQuestionAnswering":
        ends = nll(outputs.start_logits, inputs["start_positions"]), nll(outputs.end_logits, inputs["end_positions"])
        return (ends[0] + ends[1]) / 2
    if head == "UrformForCausalLM":
        return nll(outputs.logits[:, :-1], inputs["labels"][:, 1:])
    return nll(outputs.logits, inputs["labels"])


@pytest.mark.parametrize(("auto", "head", "architecture"), CASES, ids=lambda x: x.replace("UrformFor", ""))
def test_loss_learning_and_saving(auto: str, head: str, architecture: str, tmp_path: Path) -> None:
    """The loss is its formula's mean, `num_items_in_batch` divides its sum, it falls, and a saved model is the same."""
    model, inputs = build(head, architecture).eval(), batch(head)
    outputs = model(**inputs)
    terms = twice(model, lambda m: items(head, m(**inputs), inputs))
    assert_within(outputs.loss, *(t.mean() for t in terms))
    if head != "UrformForQuestionAnswering":  # Trainer counts items in `labels` only
        loss = model(**inputs, num_items_in_batch=torch.tensor(50)).loss
        assert_within(loss, *(t.sum() / 50 for t in terms))

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    floor = 2 * torch.log(torch.tensor(2.0)).item() / 3 if head == "UrformForMultipleChoice" else 0.0
    assert model(**inputs).loss.item() < floor + 0.1 * outputs.loss.item()

    model.save_pretrained(tmp_path)
    again = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(again) is type(model)
    state = again.state_dict()
    assert all(torch.equal(value, state.pop(key)) for key, value in model.state_dict().items())
    assert not state
    # Loaded tensors lie at other addresses, and the matrix product of some CPUs rounds by alignment.
    assert_within(again(**inputs)[1], *twice(model, lambda m: m(**inputs)[1]))


@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder-decoder"])
@pytest.mark.parametrize("pooling", [None, "first", "last", "mean"])
def test_classifier_reads_real_tokens(architecture: str, pooling: str | None) -> None:
    """Left padding, right padding and none give the same class scores, from ids and from embeddings."""
    model = build("UrformForSequenceClassification", architecture, classifier_pooling=pooling).eval()
    ids = torch.randint(3, 99, (1, 5))
    with torch.no_grad():
        want = twice(model, lambda m: m(input_ids=ids).logits)
        for left, right in ((2, 0), (0, 3), (1, 2)):
            padded = torch.nn.functional.pad(ids, (left, right), value=7)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
            assert_within(model(input_ids=padded, attention_mask=mask).logits, *want)
            embeds = model.get_input_embeddings()(padded)
            have = model(inputs_embeds=embeds, attention_mask=mask).logits
            assert_within(have, *want)
            by_pad_token = torch.nn.functional.pad(ids, (0, right), value=model.config.pad_token_id)
            if architecture == "decoder":  # no mask: a decoder still finds its last real token
                assert_within(model(input_ids=by_pad_token).logits, *want)


@pytest.mark.parametrize(
    ("labels", "kind"), [(torch.tensor([0.5, -1.0, 2.0]), "regression"), (torch.rand(3, 3).round(), "multi")]
)
def test_classifier_losses_under_accumulation(labels: Tensor, kind: str) -> None:
    """Regression and several labels: two halves with the number of items of the whole add up to the whole."""
    model = build("UrformForSequenceClassification", "encoder", num_labels=1 if kind == "regression" else 3).eval()
    inputs = {key: value for key, value in batch("UrformForSequenceClassification").items() if key != "labels"}
    whole = model(**inputs, labels=labels).loss, exact(model)(**inputs, labels=labels.double()).loss
    halves = 0.0
    for part in (slice(0, 2), slice(2, 3)):
        some = {key: value[part] for key, value in inputs.items()}
        halves += model(**some, labels=labels[part], num_items_in_batch=torch.tensor(labels.numel())).loss
    assert_within(halves, *whole)


def test_left_padded_labels_are_the_labels() -> None:
    """A collator that pads targets on the left trains on the same loss."""
    model = build("UrformForConditionalGeneration", "encoder-decoder").eval()
    ids, labels = torch.randint(3, 99, (1, 6)), torch.randint(3, 99, (1, 4))
    want = twice(model, lambda m: m(input_ids=ids, labels=labels).loss)
    left = torch.nn.functional.pad(labels, (3, 0), value=-100)
    assert_within(model(input_ids=ids, labels=left).loss, *want)


def test_encoder_model_reads_a_translator(tmp_path: Path) -> None:
    """AutoModelForTextEncoding takes the encoder out of an encoder-decoder, and says nothing is missing."""
    model = build("UrformForConditionalGeneration", "encoder-decoder").eval()
    model.save_pretrained(tmp_path)
    encoder, info = transformers.AutoModelForTextEncoding.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.randint(3, 99, (2, 6))
    want = twice(model, lambda m: m.model.encoder(input_ids=ids).last_hidden_state)
    assert_within(encoder(input_ids=ids).last_hidden_state, *want)
