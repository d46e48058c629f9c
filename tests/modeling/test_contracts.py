"""What transformers, PEFT, accelerate and torch.compile expect of every model, tried on all three architectures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import EPS, assert_within, exact, twice
from support import WIDE, gradients, make, mask_of
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, Trainer, TrainingArguments, pipeline

import urform
from urform import UrformConfig

KINDS = ("encoder", "decoder", "encoder-decoder")
HEADS = [
    (urform.UrformModel, KINDS),
    (urform.UrformForMaskedLM, KINDS[:1]),
    (urform.UrformForCausalLM, KINDS[1:2]),
    (urform.UrformForConditionalGeneration, KINDS[2:]),
    (urform.UrformForSequenceClassification, KINDS),
    (urform.UrformForTokenClassification, KINDS[:2]),
    (urform.UrformForQuestionAnswering, KINDS),
]
TYINGS = [(share, tie) for share in (True, False) for tie in (True, False)]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_head = pytest.mark.parametrize(("head", "kind"), [(head, kind) for head, kinds in HEADS for kind in kinds])
every_tying = pytest.mark.parametrize(("share", "tie"), TYINGS)


def build(kind: str, head: type[PreTrainedModel] | None = None, **fields: Any) -> PreTrainedModel:
    return make(kind, head, **{**WIDE, **fields})


def batch(kind: str, labels: bool = False) -> dict[str, Tensor]:
    """Three rows padded on the right, with targets of other lengths where there are targets."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (3, 7), generator=generator)
    mask = mask_of((4, 7, 2), "right", 7)
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    target = torch.randint(3, 99, (3, 5), generator=generator)
    real = mask_of((5, 1, 3), "right", 5).bool()
    if labels:
        inputs["labels"] = target.masked_fill(~real, -100)
        if kind != "encoder-decoder":
            inputs["labels"] = (ids * mask).masked_fill(mask == 0, -100)
    elif kind == "encoder-decoder":
        inputs.update(decoder_input_ids=target * real, decoder_attention_mask=real.long())
    return inputs


def trained(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """The gradients of a batch with labels."""
    model(**batch(kind, labels=True)).loss.backward()
    return gradients(model)


def tables(model: PreTrainedModel) -> set[int]:
    """The storages of all embedding tables and of the output projection."""
    modules = [m for name, m in model.named_modules() if name.endswith(("embed_tokens", "lm_head"))]
    return {module.weight.data_ptr() for module in modules}


# ---------------------------------------------------------------- weights: tied, saved, resized


@every_kind
@every_tying
@pytest.mark.parametrize("shard", ["1GB", "8KB"])
@torch.no_grad()
def test_saved_and_loaded_bit_by_bit(kind: str, share: bool, tie: bool, shard: str, tmp_path: Path) -> None:
    model = build(kind, share_embeddings=share, tie_word_embeddings=tie)
    expected_tables = (not tie) + (2 if kind == "encoder-decoder" and not share else 1)
    assert len(tables(model)) == expected_tables
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "8KB")
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(tables(loaded)) == expected_tables
    assert torch.equal(loaded.eval()(**batch(kind)).logits, model(**batch(kind)).logits)


@every_kind
@every_tying
@pytest.mark.parametrize("size", [80, 120])
def test_resized_vocabulary(kind: str, share: bool, tie: bool, size: int, tmp_path: Path) -> None:
    model = build(kind, share_embeddings=share, tie_word_embeddings=tie, lm_head_bias=True)
    inputs = {name: x.clamp(max=79) for name, x in batch(kind).items()}
    with torch.no_grad():
        (before, truth), count = twice(model, lambda m: m(**inputs).logits), len(tables(model))
        model.resize_token_embeddings(size, mean_resizing=False)
        after = model(**inputs).logits
    assert after.shape[-1] == model.config.vocab_size == model.lm_head.bias.shape[0] == size
    assert len(tables(model)) == count
    assert_within(after[..., :80], before[..., :80], truth[..., :80])
    labels = torch.full_like(inputs.get("decoder_input_ids", inputs["input_ids"]), size - 1)
    model(**inputs, labels=labels).loss.backward()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**inputs).logits, after)


@every_kind
@torch.no_grad()
def test_placed_by_device_map_and_offloaded(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    expected = model(**batch(kind)).logits
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    for device_map in ("cpu", "auto"):
        found = type(model).from_pretrained(tmp_path, device_map=device_map).eval()
        assert torch.equal(found(**batch(kind)).logits, expected)
    stacks = [name for name in ("encoder", "decoder") if hasattr(model.model, name)]
    names = [f"model.{stack}.{part}" for stack in stacks for part, _ in getattr(model.model, stack).named_children()]
    placed = {name: "cpu" for name in [*names, "lm_head"]}
    placed[f"model.{stacks[-1]}.layers"] = "disk"
    found = type(model).from_pretrained(tmp_path, device_map=placed, offload_folder=str(tmp_path / "offload")).eval()
    assert any(p.is_meta for p in found.parameters())
    assert torch.equal(found(**batch(kind)).logits, expected)


# ---------------------------------------------------------------- training


@every_kind
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("position", ["rope", "t5", "learned"])
def test_checkpointing_changes_no_gradient(kind: str, reentrant: bool, position: str) -> None:
    model = build(kind, position_encoding=position).train()
    expected, truth = twice(model, lambda m: trained(m, kind))
    assert expected.keys() == {name for name, _ in model.named_parameters()}  # no parameter is dead
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_within(trained(model, kind), expected, truth)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "urform"])
def test_half_precision_is_near(kind: str, dtype: torch.dtype, implementation: str) -> None:
    """Loss, logits and gradients err by a few roundings of the dtype, measured against the whole tensor's size."""
    model = build(kind, initializer_range=0.05)
    model.set_attn_implementation(implementation)
    exact = model(**batch(kind, labels=True))
    exact.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    found = model.to(dtype)(**batch(kind, labels=True))
    found.loss.backward()
    assert found.logits.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps
    for name, (a, b) in {"logits": (found.logits, exact.logits)}.items():
        assert (a.float() - b).norm() <= tolerance * b.norm(), name
    for name, gradient in gradients(model).items():
        # A key's bias moves all scores of a row alike: its gradient is zero but for rounding.
        if not name.endswith("k_proj.bias"):
            assert (gradient.float() - expected[name]).norm() <= tolerance * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize(("kind", "position"), [("encoder", "t5"), ("decoder", "alibi"), ("encoder-decoder", "rope")])
def test_compiled_in_one_graph(kind: str, position: str) -> None:
    """`fullgraph=True` over padded batches: evaluation, then loss and gradients."""
    torch._dynamo.reset()
    model = build(kind, position_encoding=position, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_within(compiled(**batch(kind)).logits, *twice(model, lambda m: m(**batch(kind)).logits))
    expected, truth = twice(model.train(), lambda m: trained(m, kind))
    model.zero_grad()
    compiled(**batch(kind, labels=True)).loss.backward()
    assert_within(gradients(model), expected, truth)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_label_smoothing_by_trainer(kind: str, tmp_path: Path) -> None:
    """The Trainer's smoothed loss against (1 - e) * nll + e * mean over the vocabulary (Szegedy et al. 2016)."""
    model, smoothing = build(kind), 0.1
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=smoothing, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments)
    inputs = batch(kind, labels=True)
    if kind == "encoder-decoder":  # as DataCollatorForSeq2Seq does it
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    with torch.no_grad():
        found = trainer.compute_loss(model, dict(inputs))
        both = twice(model, lambda m: m(**inputs).logits)
    labels = inputs["labels"]
    if kind == "decoder":
        labels = labels[:, 1:]

    def smoothed(logits: Tensor) -> Tensor:
        logits = logits[:, :-1] if kind == "decoder" else logits
        log_probability = logits.log_softmax(-1)[labels != -100]
        chosen = log_probability.gather(1, labels[labels != -100][:, None]).mean()
        return -(1 - smoothing) * chosen - smoothing * log_probability.mean()

    assert_within(found, *map(smoothed, both))


@every_kind
@torch.no_grad()
def test_lora_without_target_modules(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = build(kind), batch(kind)
    expected, truth = twice(model, lambda m: m(**inputs).logits)
    tuned = peft.get_peft_model(model, peft.LoraConfig())
    trainable = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert_within(tuned(**inputs).logits, expected, truth)  # B starts at zero
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    adapted = tuned(**inputs).logits
    assert not torch.allclose(adapted, expected, atol=1e-3)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(kind), tmp_path).eval()
    assert torch.equal(again(**inputs).logits, adapted)
    truth = exact(again)(**inputs).logits
    assert_within(again.merge_and_unload()(**inputs).logits, adapted, truth)


# ---------------------------------------------------------------- calls


@every_head
@torch.no_grad()
def test_exported_in_one_graph(head: type[PreTrainedModel], kind: str) -> None:
    model, inputs = build(kind, head), batch(kind)
    if kind != "encoder":  # caches have no pytree of their own: transformers' exporter brings one
        inputs["use_cache"] = False
    program = torch.export.export(model, (), inputs, strict=False)
    assert_within(program.module()(**inputs)[0], *twice(model, lambda m: m(**inputs)[0]))


@pytest.mark.slow
@every_head
@torch.no_grad()
def test_exported_by_transformers_and_strictly(head: type[PreTrainedModel], kind: str) -> None:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    model, inputs = build(kind, head), batch(kind)
    expected = twice(model, lambda m: m(**inputs)[0])
    for dynamic in (False, True):
        exported = DynamoExporter().export(model, dict(inputs), DynamoConfig(dynamic=dynamic))
        assert_within(getattr(exported, "program", exported).module()(**inputs)[0], *expected)
    if kind != "encoder":
        inputs["use_cache"] = False
    program = torch.export.export(model, (), inputs, strict=True)
    assert_within(program.module()(**inputs)[0], *expected)


@every_kind
@torch.no_grad()
def test_base_model_called_as_a_backend_does(kind: str) -> None:
    """vLLM's way: tuples, own positions, keywords of its own."""
    model = AutoModel.from_config(UrformConfig.from_preset(f"tiny-{kind}", **WIDE)).eval()
    ids = batch(kind)["input_ids"][1:2]
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind == "encoder-decoder":
        inputs["decoder_input_ids"] = ids
    expected = twice(model, lambda m: m(**inputs).last_hidden_state)
    found = model(**inputs, position_ids=torch.arange(7)[None], use_cache=False, return_dict=False, backend_thing={})
    assert isinstance(found, tuple)
    assert_within(found[0], *expected)


Wrong = tuple[str, dict[str, Any], str]
WRONG: list[Wrong] = [
    ("encoder", {"input_ids": torch.tensor([[5, 99]])}, "resize_token_embeddings"),
    ("encoder", {"input_ids": torch.tensor([[5, -1]])}, "outside 0..98"),
    ("decoder", {"input_ids": torch.rand(1, 3)}, "int64 or int32"),
    ("decoder", {"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "at least one token"),
    ("decoder", {"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "at least one token"),
    ("decoder", {"input_ids": torch.tensor([5, 6])}, r"\[batch, length\]"),
    ("decoder", {"input_ids": torch.full((1, 65), 5)}, "max_position_embeddings=64"),
    ("decoder", {"input_ids": torch.full((1, 2), 5), "position_ids": torch.tensor([[0, 64]])}, "position 64"),
    ("decoder", {}, "exactly one of input_ids and inputs_embeds"),
    ("decoder", {"input_ids": torch.tensor([[5]]), "inputs_embeds": torch.rand(1, 1, 32)}, "exactly one"),
    ("decoder", {"inputs_embeds": torch.rand(1, 1, 31)}, "hidden_size=32"),
    ("encoder-decoder", {"inputs_embeds": torch.rand(1, 0, 32)}, "at least one"),
    ("encoder-decoder", {"input_ids": torch.tensor([[5]]), "decoder_input_ids": torch.tensor([[99]])}, "holds 99"),
]


@pytest.mark.parametrize(("kind", "inputs", "message"), WRONG)
def test_wrong_inputs_are_named(kind: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, position_encoding="learned")(**inputs)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (urform.UrformForMaskedLM, "decoder"),
        (urform.UrformForCausalLM, "encoder"),
        (urform.UrformForConditionalGeneration, "decoder"),
        (urform.UrformForTokenClassification, "encoder-decoder"),
    ],
)
def test_head_on_the_wrong_architecture(head: Callable, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"serves architecture .* but config\.architecture='{kind}'"):
        head(UrformConfig.from_preset(f"tiny-{kind}", **WIDE))


# ---------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = ["A small house stands by the river.", "The boat goes down the river in the evening.", "Where is it?"]
    return urform.UrformTokenizer.train(texts * 4, vocab_size=300, model="bpe")


PIPELINES = [
    ("feature-extraction", urform.UrformModel, "encoder"),
    ("feature-extraction", urform.UrformModel, "decoder"),
    ("fill-mask", urform.UrformForMaskedLM, "encoder"),
    ("text-classification", urform.UrformForSequenceClassification, "encoder"),
    ("text-classification", urform.UrformForSequenceClassification, "decoder"),
    ("text-classification", urform.UrformForSequenceClassification, "encoder-decoder"),
    ("token-classification", urform.UrformForTokenClassification, "encoder"),
    ("text-generation", urform.UrformForCausalLM, "decoder"),
]


@pytest.mark.parametrize(("task", "head", "kind"), PIPELINES)
def test_pipeline_answers_alike_alone_and_in_a_batch(task: str, head: Any, kind: str, tokenizer: Any) -> None:
    model = build(kind, head, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).double()
    texts = ["A small house", "The boat goes down the river in the evening", "Where"]
    if task == "fill-mask":
        texts = [f"{text} {tokenizer.mask_token}" for text in texts]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}
    run = pipeline(task, model=model, tokenizer=tokenizer)
    if task == "text-generation":
        tokenizer.padding_side = "left"
    alone, together = [run(text, **options) for text in texts], run(texts, batch_size=3, **options)
    tokenizer.padding_side = "right"
    for one, other in zip(alone, together, strict=True):
        if task == "feature-extraction":
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other)[:, : len(one[0])], atol=1e-9, rtol=1e-9)
        else:
            answers = [x if isinstance(x, list) else [x] for x in (one, other)]
            assert [told(x) for x in answers[0]] == [told(x) for x in answers[1]]


def told(answer: dict[str, Any]) -> dict[str, Any]:
    """One answer of a pipeline, with its score as a test compares it."""
    return {key: pytest.approx(x, abs=1e-9) if key == "score" else x for key, x in answer.items()}


def test_zero_shot_pipeline(tokenizer: Any) -> None:
    labels = {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}
    labels["label2id"] = {name: i for i, name in labels["id2label"].items()}
    head = urform.UrformForSequenceClassification
    for kind in KINDS:
        model = build(kind, head, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **labels).double()
        found = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)("a boat", ["river", "house"])
        assert sorted(found["labels"]) == ["house", "river"] and abs(sum(found["scores"]) - 1) <= 4 * EPS
