"""Training: data, recipes, global batches, the smoothed loss, averaging, checkpoints, resuming, many processes."""

from __future__ import annotations

import errno
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within, twice
from safetensors.torch import load_file, save_file
from support import gradients
from toy_training import WORDS, losses, toy_recipe
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

import urform
from urform.training import run as run_module
from urform.training.averaging import average_checkpoints, last_checkpoints
from urform.training.batching import GlobalBatchSampler, padding_share
from urform.training.data_files import open_lines, read_dataset, read_parallel, read_records
from urform.training.encoding import encode_pairs
from urform.training.metrics import score_translations
from urform.training.recipe import list_recipes, load_recipe
from urform.training.run import evaluate, predict, train
from urform.training.trainer import (
    CheckpointError,
    SmoothedCrossEntropy,
    TrainingInterruptedError,
    UrformTrainer,
    complete_checkpoints,
    last_complete_checkpoint,
)


# --- data files --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_every_compression_reads_the_same(tmp_path: Path, suffix: str) -> None:
    text = "eins\nzwei\u2028drei\r\n\nvier"
    path = tmp_path / f"text.txt{suffix}"
    data = text.encode()
    path.write_bytes({"": lambda d: d, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](data))
    assert list(open_lines(path)) == ["eins", "zwei\u2028drei", "", "vier"]


def test_a_malformed_json_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"a": "x", "b": "y"}\n{"a": "x", \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not valid JSON"):
        list(read_records(path, ["a", "b"]))
    path.write_text('{"a": "x"}\n[1]\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object, got list"):
        list(read_records(path, ["a"]))
    with pytest.raises(ValueError, match=r"line 1: no field 'c'; the line has: a"):
        list(read_records(path, ["c"]))


def test_other_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        list(open_lines(tmp_path / "nowhere.txt"))
    (tmp_path / "three").write_text("1\n2\n3\n", encoding="utf-8")
    (tmp_path / "two").write_text("1\n2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"three has 3 lines, .*two has 2"):
        list(read_parallel(tmp_path / "three", tmp_path / "two"))
    (tmp_path / "empty").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no data: .*empty"):
        list(read_parallel(tmp_path / "empty", tmp_path / "empty"))
    (tmp_path / "t.tsv").write_text("a\tb\nc\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"t\.tsv, line 2: 1 column"):
        list(read_records(tmp_path / "t.tsv", ["0", "1"]))
    with pytest.raises(ValueError, match=r"no column 'x' in the header; it has: a, b"):
        list(read_records(tmp_path / "t.tsv", ["x", "b"]))
    (tmp_path / "torn.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-500])
    with pytest.raises(ValueError, match=r"torn\.gz.*damaged"):
        list(open_lines(tmp_path / "torn.gz"))
    (tmp_path / "latin").write_bytes(b"gut\n\xe4\n")
    with pytest.raises(ValueError, match=r"latin.*not UTF-8"):
        list(open_lines(tmp_path / "latin"))


def test_a_dataset_name_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        list(read_dataset("some/name", None, "train", ["a"]))


# --- recipes -----------------------------------------------------------------------------------------------------
def test_every_recipe_of_the_package_loads() -> None:
    assert {"demo", "multi30k-en-de", "translation"} <= set(list_recipes())
    for name in list_recipes():
        recipe = load_recipe(name)
        assert recipe.training.output_dir == f"outputs/{name}"
        assert recipe.training.report_to == []


def test_overrides_and_unknown_keys(tmp_path: Path) -> None:
    path = toy_recipe(tmp_path)
    recipe = load_recipe(
        path, ["learning_rate=1e-4", "eval_strategy=no", "model.config.hidden_size=64", "target_language=no"]
    )
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.eval_strategy == "no"
    assert recipe.model.config["hidden_size"] == 64
    assert recipe.data.target_language == "no"
    for bad, message in (
        ("learnin_rate=1", "did you mean 'learning_rate'"),
        ("data.tokens_per_bach=1", "unknown key data.tokens_per_bach .did you mean 'tokens_per_batch'"),
        ("from_pretrained=x", "ambiguous: say tokenizer.from_pretrained or model.from_pretrained"),
        ("max_steps", "expected key=value"),
        ("learning_rate=fast", "training.learning_rate must be float, got 'fast'"),
        ("task=sequence", "data.task must be one of"),
        ("over_length=cut", "data.over_length"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(path, [bad])
    with pytest.raises(FileNotFoundError, match="did you mean 'multi30k-en-de'"):
        load_recipe("multi30k-en-fr")
    with pytest.raises(ValueError, match="keeps fewer"):
        load_recipe(path, ["average_last=10", "save_total_limit=3"])
    path.write_text("data: {task: seq2seq, task: causal-lm}", encoding="utf-8")
    with pytest.raises(ValueError, match="'task' is given twice"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vocab_size=x", r"tokenizer\.vocab_size must be int, got 'x'"),
        ("max_source_length=12.5", r"data\.max_source_length must be int or null, got 12\.5"),
        ("languages=de", r"tokenizer\.languages must be list\[str\], got 'de'"),
        ("languages=[de, [zh]]", r"tokenizer\.languages must be list\[str\], got \['de', \['zh'\]\]"),
        ("model.config=[1]", r"model\.config must be dict\[str, Any\], got \[1\]"),
        ("training.seed=true", r"training\.seed must be int, got True"),
        ("training.logging_steps=often", r"training\.logging_steps must be float, got 'often'"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(toy_recipe(tmp_path), [change])


def test_numbers_become_what_the_field_wants(tmp_path: Path) -> None:
    """YAML has no quotes around a column's number and no point after a whole number."""
    changes = ["source_field=2", "length_penalty=1", "max_target_length=null", "training.debug=[underflow_overflow]"]
    recipe = load_recipe(toy_recipe(tmp_path), changes)
    assert recipe.data.source_field == "2" and recipe.data.max_target_length is None
    assert recipe.run.length_penalty == 1.0 and isinstance(recipe.run.length_penalty, float)
    with pytest.raises(StrictDataclassFieldValidationError, match="num_beams"):
        recipe.run.num_beams = "five"  # type: ignore[assignment]


# --- global batches ----------------------------------------------------------------------------------------------
lengths_strategy = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=8, max_size=300)


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, st.integers(160, 2000), st.integers(1, 8), st.integers(0, 3))
def test_token_budget_batches(lengths: list[tuple[int, int]], tokens: int, pool: int, epoch: int) -> None:
    sampler = GlobalBatchSampler(lengths, tokens=tokens, pool_batches=pool, seed=3)
    sizes = []
    for number in (0, epoch):
        sampler.set_epoch(number)
        batches = [batch.tolist() for batch in sampler.global_batches()]
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            cost = len(batch) * (max(lengths[i][0] for i in batch) + max(lengths[i][1] for i in batch))
            assert batch and cost <= tokens
        again = GlobalBatchSampler(lengths, tokens=tokens, pool_batches=pool, seed=3)
        again.set_epoch(number)
        assert [batch.tolist() for batch in again.global_batches()] == batches
        sizes.append(len(batches))
    assert sizes[0] == sizes[1] == sampler.num_global_batches


@settings(max_examples=40, deadline=None)
@given(lengths_strategy, st.integers(2, 4), st.booleans())
def test_ranks_share_the_global_batch_of_one_process(
    lengths: list[tuple[int, int]], ranks: int, by_tokens: bool
) -> None:
    size: dict[str, Any] = {"tokens": 80 * 2 * ranks} if by_tokens else {"examples": 2 * ranks}
    one = GlobalBatchSampler(lengths, **size)
    try:
        many = GlobalBatchSampler(lengths, num_splits=ranks, **size)
    except ValueError as error:
        assert "cannot be dealt" in str(error)
        assert min(map(len, one)) < ranks
        return
    parts = list(many)
    assert len(parts) == len(many) == len(one) * ranks
    assert all(parts)
    for number, batch in enumerate(one):
        assert [index for part in parts[number * ranks : (number + 1) * ranks] for index in part] == batch


def test_batches_are_shuffled_and_tight() -> None:
    rng = np.random.default_rng(0)
    source = rng.poisson(14, 20000) + 2
    lengths = list(zip(source.tolist(), (source + rng.integers(-3, 4, 20000)).clip(1).tolist(), strict=True))
    sampler = GlobalBatchSampler(lengths, tokens=4096)
    assert padding_share(sampler) < 0.1
    first = {frozenset(batch) for batch in sampler}
    sampler.set_epoch(1)
    assert len(first & {frozenset(batch) for batch in sampler}) < len(first) // 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 10}, "longest example has 40 tokens"),
        ({"examples": 1, "num_splits": 2}, "cannot be dealt to 2 processes"),
        ({}, "exactly one of tokens and examples"),
        ({"examples": 0}, "examples must be at least 1"),
    ],
)
def test_impossible_batches(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler([(20, 20), (3, 3), (4, 4)], **arguments)


# --- loss --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [False, True])
def test_smoothed_loss_and_gradient_against_the_formula(shift: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 1001, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 1001, (3, 7), generator=generator)
    labels[0, 3:] = -100
    labels[2] = -100
    smoothing, items = 0.1, 23
    loss = SmoothedCrossEntropy(smoothing, shift=shift)({"logits": logits}, labels, torch.tensor(items))
    (3 * loss).backward()
    actual, logits.grad = logits.grad, None
    x, y = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    log_p = x - torch.log(torch.exp(x).sum(-1, keepdim=True))
    expected = torch.zeros((), dtype=torch.float64)
    for row, column in zip(*torch.nonzero(y != -100, as_tuple=True), strict=True):
        target = torch.full((1001,), smoothing / 1001, dtype=torch.float64)
        target[y[row, column]] += 1 - smoothing
        expected = expected - (target * log_p[row, column]).sum() / items
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual, logits.grad, rtol=1e-12, atol=1e-14)


def test_evaluation_loss_is_not_smoothed() -> None:
    logits, labels = torch.randn(2, 5, 11, dtype=torch.float64), torch.randint(0, 11, (2, 5))
    with torch.no_grad():
        loss = SmoothedCrossEntropy(0.3)((logits,), labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    half = SmoothedCrossEntropy(0.1)((logits.bfloat16(),), labels)
    torch.testing.assert_close(half, SmoothedCrossEntropy(0.1)((logits.bfloat16().float(),), labels))


def lm_batch(head: str) -> dict[str, torch.Tensor]:
    """Three rows, padded on the right, with labels as the collators make them."""
    ids = torch.randint(3, 99, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if head == "UrformForMaskedLM":
        labels[:, ::2] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def cross_entropies(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> list[torch.Tensor]:
    """PyTorch's own loss of the logits in float32 and in float64."""
    return [
        torch.nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
        for x in (logits.detach(), logits.detach().double())
    ]


@pytest.mark.parametrize("head", ["UrformForConditionalGeneration", "UrformForCausalLM", "UrformForMaskedLM"])
@pytest.mark.parametrize("adapter", [None, "q_proj", "lm_head"])
def test_urforms_heads_smooth_their_loss(tmp_path: Path, head: str, adapter: str | None) -> None:
    """What the trainer asks of the model is `SmoothedCrossEntropy` of its logits; with an adapter on lm_head it is."""
    kind = {"UrformForCausalLM": "decoder", "UrformForMaskedLM": "encoder"}.get(head, "encoder-decoder")
    model = getattr(urform, head)(urform.UrformConfig.from_preset(f"tiny-{kind}", tie_word_embeddings=False))
    if adapter is not None:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[adapter], init_lora_weights=False))
    arguments = Seq2SeqTrainingArguments(str(tmp_path), label_smoothing_factor=0.2, report_to=[], use_cpu=True)
    trainer = UrformTrainer(model=model, args=arguments)
    by_model = adapter != "lm_head"
    assert trainer.label_smoother is None and (trainer.compute_loss_func is None) == by_model
    inputs, causal = lm_batch(head), head == "UrformForCausalLM"
    if kind == "encoder-decoder":  # as DataCollatorForSeq2Seq does it
        base = model if adapter is None else model.get_base_model()
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(inputs["labels"])
    counted = trainer._get_num_items_in_batch([inputs, inputs], torch.device("cpu"))
    assert counted == 2 * (inputs["labels"][:, int(causal) :] != -100).sum()

    model.train()
    loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True, num_items_in_batch=counted)
    assert (outputs.logits is None) == by_model
    loss.backward()
    found = gradients(model)

    def of_logits(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(**inputs, skip_logits=False).logits
        want = SmoothedCrossEntropy(0.2, shift=causal)((logits,), inputs["labels"], counted)
        want.backward()
        return want, gradients(model)

    assert_within((loss, found), *twice(model, of_logits))

    model.eval()
    with torch.no_grad():
        plain = trainer.compute_loss(model, dict(inputs), num_items_in_batch=counted)
        smoothed = SmoothedCrossEntropy(0.2, shift=causal)
        want = twice(model, lambda m: smoothed((m(**inputs).logits,), inputs["labels"], counted))
    assert_within(plain, *want)


@pytest.mark.parametrize("family", ["urform", "bart"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("trains", [True, False])
def test_labels_become_decoder_inputs_before_they_are_taken_away(
    tmp_path: Path, family: str, padding: str, trains: bool
) -> None:
    """A collator without `decoder_input_ids`, and a loss outside the model."""
    arguments = Seq2SeqTrainingArguments(str(tmp_path), label_smoothing_factor=0.2, report_to=[], use_cpu=True)
    if family == "urform":
        model: Any = urform.UrformForConditionalGeneration(urform.UrformConfig.from_preset("tiny-encoder-decoder"))
        trainer = UrformTrainer(model=model, args=arguments, compute_loss_func=SmoothedCrossEntropy(0.2))
        options = {"skip_logits": False}
    else:
        config = BartConfig(
            vocab_size=99, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, dropout=0.0,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        )  # fmt: skip
        model, options = BartForConditionalGeneration(config), {}
        trainer = UrformTrainer(model=model, args=arguments)
    inputs = lm_batch("UrformForConditionalGeneration")
    if padding == "left":
        inputs["labels"][1] = inputs["labels"][1].roll(3)
    model.eval()  # without dropout
    with torch.set_grad_enabled(trains):
        found = trainer.compute_loss(model, dict(inputs))
    assert_within(found, *cross_entropies(model(**inputs, **options).logits, inputs["labels"], 0.2 if trains else 0.0))


@pytest.mark.parametrize("trains", [True, False])
def test_labels_that_a_plain_trainer_takes_away_are_missed(tmp_path: Path, trains: bool) -> None:
    """Trainer pops the labels: with `decoder_input_ids` its loss is right, without the model refuses."""
    model = urform.UrformForConditionalGeneration(urform.UrformConfig.from_preset("tiny-encoder-decoder"))
    arguments = Seq2SeqTrainingArguments(str(tmp_path), label_smoothing_factor=0.2, report_to=[], use_cpu=True)
    inputs = lm_batch("UrformForConditionalGeneration")
    trainer = Seq2SeqTrainer(model=model, args=arguments)
    counted = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"label_smoothing_factor.*DataCollatorForSeq2Seq"):
        if trains:
            trainer.training_step(model, dict(inputs), counted)
        else:
            trainer.prediction_step(model, dict(inputs), prediction_loss_only=True)
    model.eval()
    given = {**inputs, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(inputs["labels"])}
    found = trainer.compute_loss(model, dict(given), num_items_in_batch=counted)
    assert_within(found, *cross_entropies(model(**inputs, skip_logits=False).logits, inputs["labels"], 0.2))


def test_a_loss_function_of_ones_own_and_other_models(tmp_path: Path) -> None:
    """A `compute_loss_func` stays; models of the library get `SmoothedCrossEntropy`, shifted for a causal one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    arguments = Seq2SeqTrainingArguments(str(tmp_path), label_smoothing_factor=0.2, report_to=[], use_cpu=True)
    own = urform.UrformForCausalLM(urform.UrformConfig.from_preset("tiny-decoder"))
    trainer = UrformTrainer(model=own, args=arguments, compute_loss_func=lambda outputs, labels, **_: labels.sum())
    inputs = lm_batch("UrformForCausalLM")
    assert trainer.compute_loss(own, dict(inputs)) == inputs["labels"].sum()

    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=99, n_positions=16, **tokens)).eval()
    trainer = UrformTrainer(model=model, args=arguments)
    loss = trainer.compute_loss(model, dict(inputs))
    logits, labels = model(**inputs).logits[:, :-1], inputs["labels"][:, 1:]
    assert_within(loss, *cross_entropies(logits, labels, 0.2))
    assert trainer._get_num_items_in_batch([inputs], torch.device("cpu")) == (labels != -100).sum()


# --- encoding ----------------------------------------------------------------------------------------------------
def test_over_long_examples_are_counted(tmp_path: Path) -> None:
    from urform import UrformTokenizer

    tokenizer = UrformTokenizer.train(WORDS, vocab_size=400, add_bos=False, min_frequency=1)
    pairs = [("red dog", "big cat"), ("red " * 30, "cat"), ("dog", "cat " * 30)]
    dropped = encode_pairs(tokenizer, pairs, max_source_length=20, max_target_length=20)
    assert (len(dropped), dropped.over_length.examples, dropped.over_length.too_long) == (1, 3, 2)
    cut = encode_pairs(tokenizer, pairs, max_source_length=20, max_target_length=20, over_length="truncate")
    assert len(cut) == 3 and len(cut[1]["input_ids"]) == 20
    assert cut[1]["input_ids"][-1] == cut[2]["labels"][-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="example 2 is longer"):
        encode_pairs(tokenizer, pairs, max_source_length=20, over_length="error")
    with pytest.raises(ValueError, match="no example is left of 3"):
        encode_pairs(tokenizer, pairs, max_source_length=1)


# --- averaging ---------------------------------------------------------------------------------------------------
def test_average_by_hand_also_sharded(tmp_path: Path) -> None:
    states = [
        {
            "a": torch.randn(5, 3),
            "half": torch.randn(4).to(torch.bfloat16),
            "count": torch.tensor([3, 4]),
        }
        for _ in range(3)
    ]
    for number, state in enumerate(states):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
        save_file({"a": state["a"]}, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
        rest = {"half": state["half"], "count": state["count"]}
        save_file(rest, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
        weight_map = {"a": "model-00001-of-00002.safetensors"}
        weight_map |= dict.fromkeys(rest, "model-00002-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    folders = sorted(tmp_path.glob("checkpoint-*"))
    out = average_checkpoints(folders, tmp_path / "average")
    first = load_file(out / "model-00001-of-00002.safetensors")
    second = load_file(out / "model-00002-of-00002.safetensors")
    torch.testing.assert_close(first["a"], torch.stack([s["a"] for s in states]).double().mean(0).float())
    expected = torch.stack([s["half"].float() for s in states]).mean(0).to(torch.bfloat16)
    assert torch.equal(second["half"], expected) and torch.equal(second["count"], states[0]["count"])
    assert not (out / "trainer_state.json").exists() and (out / "config.json").exists()

    save_file({"a": torch.zeros(5, 4)}, folders[0] / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="not checkpoints of one run"):
        average_checkpoints(folders, tmp_path / "average")
    assert torch.equal(load_file(out / "model-00001-of-00002.safetensors")["a"], first["a"])


# --- a run, its checkpoints, and what can go wrong with them -----------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """One uninterrupted run that others are compared with."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = toy_recipe(folder / "data", eval_strategy="steps", eval_steps=6)
    result = train(
        recipe,
        ["average_last=3", "test_source=test.src", "test_target=test.tgt"],
        output_dir=folder / "out",
    )
    return recipe, result


def test_a_run_leaves_a_model_that_loads(finished: tuple[Path, Any]) -> None:
    _, result = finished
    assert result.steps == 12
    curve = losses(result.log_history)
    assert len(curve) == 12 and curve[12] < curve[1]
    assert [path.name for path in complete_checkpoints(result.output_dir)] == [f"checkpoint-{n}" for n in (4, 8, 12)]
    model = AutoModelForSeq2SeqLM.from_pretrained(result.output_dir)
    assert model.config.use_cache is True
    assert AutoModelForSeq2SeqLM.from_pretrained(result.output_dir / "checkpoint-4").config.use_cache is True
    assert AutoTokenizer.from_pretrained(result.output_dir)("red dog")["input_ids"][-1] == model.config.eos_token_id
    states = [load_file(path / "model.safetensors") for path in last_checkpoints(result.output_dir, 3)]
    average = load_file(result.output_dir / "model.safetensors")
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, torch.stack([s[name] for s in states]).double().mean(0).float())
    assert result.metrics["test"]["examples"] == 20
    assert "nrefs:1|case:mixed" in result.metrics["test"]["bleu_signature"]
    # What was scored is what predict gives.
    lines = list(open_lines(Path(load_recipe(finished[0]).data.data_dir or "", "test.src")))
    scored = list(open_lines(result.output_dir / "test_predictions.txt"))
    assert list(predict(result.output_dir, lines, num_beams=2)) == scored
    streamed = list(predict(result.output_dir, ["", *lines, "  "], num_beams=2, window=7, batch_size=3))
    assert streamed == ["", *scored, ""]


def test_evaluate_scores_pairs(finished: tuple[Path, Any]) -> None:
    _, result = finished
    lines = ["red dog", "big cat"]
    outputs = list(predict(result.output_dir, lines, num_beams=1))
    scores = evaluate(result.output_dir, list(zip(lines, outputs, strict=True)), num_beams=1).scores
    assert scores.exact_match == 100
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        list(predict(result.output_dir / "nothing", lines))
    with pytest.raises(ValueError, match=r"line 2 has .* tokens and the model takes at most 128"):
        list(predict(result.output_dir, ["red", "red dog " * 200]))


class StopAt(TrainerCallback):
    """Sends the process Ctrl-C in the middle of a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def test_ctrl_c_then_resume_is_the_uninterrupted_run(finished: tuple[Path, Any], tmp_path: Path) -> None:
    recipe, whole = finished
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in a shell's background
    with pytest.raises(TrainingInterruptedError, match="step 6") as info:
        train(recipe, ["average_last=3"], output_dir=tmp_path / "out", callbacks=[StopAt(6)])
    assert info.value.checkpoint == tmp_path / "out" / "checkpoint-6" and info.value.signal_number == 2
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="go on with --resume"):
        train(recipe, output_dir=tmp_path / "out")
    rest = train(recipe, ["average_last=3"], output_dir=tmp_path / "out", resume=True)
    assert losses(rest.log_history) == losses(whole.log_history)  # dropout included, to the last bit
    name = "checkpoint-12/model.safetensors"
    one, other = load_file(whole.output_dir / name), load_file(rest.output_dir / name)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("what", ["safetensors", "optimizer"])
def test_a_full_disk_spares_the_last_checkpoint(
    finished: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    recipe, whole = finished
    out = tmp_path / "out"
    original = torch.save

    def full(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-8" in str(f):
            Path(f).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(f))
        original(obj, f, *args, **kwargs)

    with monkeypatch.context() as patch:
        if what == "optimizer":
            patch.setattr(torch, "save", full)
        else:
            import transformers.modeling_utils as modeling_utils

            saver = modeling_utils.safe_save_file

            def full_weights(tensors: Any, filename: Any, metadata: Any = None) -> None:
                if "checkpoint-8" in str(filename):
                    raise OSError(errno.ENOSPC, "No space left on device", str(filename))
                saver(tensors, filename, metadata=metadata)

            patch.setattr(modeling_utils, "safe_save_file", full_weights)
        with pytest.raises(CheckpointError, match=r"No space left on device.*last complete checkpoint is .*-4"):
            train(recipe, output_dir=out)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]
    rest = train(recipe, output_dir=out, resume=True)
    assert losses(rest.log_history) == losses(whole.log_history)


def test_a_torn_checkpoint_is_skipped(finished: tuple[Path, Any], tmp_path: Path) -> None:
    import shutil

    recipe, whole = finished
    out = tmp_path / "out"
    shutil.copytree(whole.output_dir, out)
    weights = out / "checkpoint-12" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (out / "checkpoint-8" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match=r"incomplete checkpoint .*checkpoint-(12|8)"):
        assert last_complete_checkpoint(out) == out / "checkpoint-4"
    with pytest.warns(UserWarning):
        rest = train(recipe, output_dir=out, resume=True)
    assert losses(rest.log_history) == losses(whole.log_history)
    assert [path.name for path in last_checkpoints(out, 3)] == [f"checkpoint-{step}" for step in (4, 8, 12)]
    assert len(last_checkpoints(out, 9)) == 3


def test_best_checkpoint_by_a_task_metric(tmp_path: Path) -> None:
    recipe = toy_recipe(
        tmp_path / "data",
        max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, predict_with_generate=True,
        generation_max_length=20, load_best_model_at_end=True, metric_for_best_model="chrf", greater_is_better=True,
    )  # fmt: skip
    result = train(recipe, output_dir=tmp_path / "out")
    scores = {int(entry["step"]): entry["eval_chrf"] for entry in result.log_history if "eval_chrf" in entry}
    assert set(scores) == {2, 4}
    best = max(scores, key=lambda step: (scores[step], -step))
    saved = load_file(result.output_dir / f"checkpoint-{best}" / "model.safetensors")
    final = load_file(result.output_dir / "model.safetensors")
    assert all(torch.equal(saved[name], final[name]) for name in final)


def test_any_model_of_the_library_trains(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path / "data", max_steps=6, save_strategy="no", gradient_accumulation_steps=2)
    config = (
        "model.config={d_model: 16, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, "
        "decoder_attention_heads: 2, encoder_ffn_dim: 32, decoder_ffn_dim: 32, max_position_embeddings: 64, "
        "decoder_start_token_id: 2, forced_eos_token_id: null}"
    )
    result = train(recipe, ["model.model_type=bart", config], output_dir=tmp_path / "out")
    curve = losses(result.log_history)
    assert curve[6] < curve[1]
    assert type(AutoModelForSeq2SeqLM.from_pretrained(result.output_dir)).__name__ == "BartForConditionalGeneration"


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm", "text-classification", "token-classification"])
def test_the_other_tasks_learn(tmp_path: Path, task: str) -> None:
    recipe = toy_recipe(tmp_path, max_steps=25, save_strategy="no", label_smoothing_factor=0.0)
    rng = random.Random(1)
    if task.endswith("-lm"):
        name, fields = "text.txt", []
        text = "".join(" ".join(rng.choice(WORDS[:4]) for _ in range(8)) + "\n" for _ in range(60))
    else:
        name, fields = "text.jsonl", ["source_field=text", "target_field=label"]
        records = []
        for _ in range(60):
            words = [rng.choice(WORDS) for _ in range(6)]
            tags = ["ANIMAL" if word in ("dog", "cat", "bird") else "O" for word in words]
            one = {"text": " ".join(words), "label": str("ANIMAL" in tags)}
            records.append(one if task == "text-classification" else {"text": words, "label": tags})
        text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / name).write_text(text, encoding="utf-8")
    metric = [] if task.endswith("-lm") else ["eval_strategy=steps", "eval_steps=25", f"validation_file={name}"]
    files = ["train_source=null", "train_target=null", "validation_source=null", "validation_target=null"]
    result = train(
        recipe,
        [f"task={task}", f"train_file={name}", *files, *fields, *metric, "tokens_per_batch=400",
         "tokenizer.vocab_size=330", "tokenizer.options={min_frequency: 1}"],
        output_dir=tmp_path / "out",
    )  # fmt: skip
    curve = losses(result.log_history)
    assert np.mean([curve[step] for step in range(21, 26)]) < 0.9 * np.mean([curve[step] for step in range(1, 6)])
    if metric:
        accuracy = next(entry["eval_accuracy"] for entry in result.log_history if "eval_accuracy" in entry)
        assert accuracy > 0.6


# --- metrics -----------------------------------------------------------------------------------------------------
def test_scores() -> None:
    hypotheses = ["Ein Hund läuft.", "Eine Katze schläft auf dem Sofa!"]
    same = score_translations(hypotheses, hypotheses, "de")
    assert same.bleu == pytest.approx(100) and same.bleu_tok_lc == pytest.approx(100) and same.exact_match == 100
    cased = score_translations([text.lower() for text in hypotheses], hypotheses, "de")
    assert cased.bleu < 90 and cased.bleu_tok_lc == pytest.approx(100) and cased.exact_match == 0
    assert "moses-de" in same.bleu_tok_lc_tokenizer
    assert "tok:zh" in score_translations(["今天天气好"], ["今天天气好"], "zh").bleu_signature
    with pytest.raises(ValueError, match="2 hypotheses and 1 references"):
        score_translations(hypotheses, hypotheses[:1])


# --- many processes ----------------------------------------------------------------------------------------------
@pytest.mark.timeout(240)
@pytest.mark.parametrize("by_tokens", [True, False])
def test_two_processes_follow_the_curve_of_one(tmp_path: Path, by_tokens: bool) -> None:
    recipe = toy_recipe(tmp_path / "data", max_steps=30, save_strategy="no")
    common = ["model.config.hidden_dropout_prob=0.0"]
    sizes = [[], []] if by_tokens else [
        ["tokens_per_batch=null", "per_device_train_batch_size=22"],
        ["tokens_per_batch=null", "per_device_train_batch_size=11"],
    ]  # fmt: skip
    try:  # in float32 the processor would decide how far rounding carries the curves apart
        torch.set_default_dtype(torch.float64)
        one = train(recipe, [*common, *sizes[0]], output_dir=tmp_path / "one")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in load_file(tmp_path / "one/model.safetensors").values()} == {torch.float64}
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys, torch, urform\n"
        "from urform.training.run import train\n"
        "torch.set_default_dtype(torch.float64)\n"
        "result = train(sys.argv[1], sys.argv[3:], output_dir=sys.argv[2])\n"
        "assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == 'gloo'\n"
        "if torch.distributed.get_rank() == 0:\n"
        "    json.dump(result.log_history, open(sys.argv[2] + '.json', 'w'))\n",
        encoding="utf-8",
    )
    # accelerate 1.15 starts a single process for `--cpu --num_processes 2` without mpirun; --multi_gpu starts two.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--main_process_port", "0", str(script), str(recipe),
               str(tmp_path / "two"), *common, *sizes[1]]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    curve = losses(one.log_history)
    other = losses(json.loads((tmp_path / "two.json").read_text(encoding="utf-8")))
    assert len(curve) == len(other) == 30
    assert max(abs(curve[step] - other[step]) for step in curve) < 1e-12
    assert curve[30] < curve[1]
    assert run_module.last_complete_checkpoint(tmp_path / "two") is None


def test_recipe_in_bfloat16_runs_without_an_accelerator(tmp_path: Path) -> None:
    """Transformers wants to be told `use_cpu` then; the saved recipe stays fit for a GPU."""
    recipe = load_recipe("multi30k-en-de", ["bf16=true"], output_dir=tmp_path)
    assert recipe.training.use_cpu is not torch.accelerator.is_available()
    assert "use_cpu" not in recipe.raw["training"]
    assert load_recipe("multi30k-en-de", ["bf16=false", "use_cpu=true"], output_dir=tmp_path).training.use_cpu
