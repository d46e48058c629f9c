"""What a run settles before its first step: files, lengths, precision, packages; and what it says of its duration."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_training import toy_recipe
from transformers import AutoConfig, AutoModel, AutoTokenizer, TrainerCallback, pipeline

import urform
from urform.training import preflight
from urform.training.preflight import position_limits, product_time_ratio, settle_precision
from urform.training.recipe import DataArguments, load_recipe
from urform.training.run import evaluate, train
from urform.training.tasks import place_of

BART = dict(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=20,
)  # fmt: skip
BERT = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=20
)
URFORM = {**BERT, "architecture": "encoder"}
FAMILIES = [
    ("bert", BERT, True),
    ("roberta", BERT, True),  # two rows fewer than the table has
    ("distilbert", dict(dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=20), True),
    ("gpt2", dict(n_embd=16, n_layer=1, n_head=2, n_positions=20), True),
    ("opt", {**BERT, "ffn_dim": 32, "word_embed_proj_dim": 16}, True),
    ("bart", BART, True),
    ("marian", BART, True),
    ("t5", dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2), False),
    ("llama", BERT, False),
    ("urform", {**URFORM, "position_encoding": "learned"}, True),
    ("urform", {**URFORM, "position_encoding": "learned", "position_offset": 2, "position_counting": "tokens"}, True),
    ("urform", {**BERT, "architecture": "encoder-decoder", "position_encoding": "learned"}, True),
    ("urform", {**URFORM, "position_encoding": "rope"}, False),
    ("urform", {**URFORM, "position_encoding": "sinusoidal"}, False),
]


@pytest.mark.parametrize(("family", "fields", "has_table"), FAMILIES)
def test_limits_are_the_lengths_that_run(family: str, fields: dict[str, Any], has_table: bool) -> None:
    """The truth is the model: it runs at the limit, and one token more fails."""
    config = AutoConfig.for_model(
        family, vocab_size=32, pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, **fields
    )
    model = AutoModel.from_config(config).eval()

    def runs(source: int, target: int) -> bool:
        inputs = {"input_ids": torch.full((1, source), 5)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.full((1, target), 5)
        try:
            model(**inputs)
        except (IndexError, ValueError, RuntimeError):
            return False
        return True

    limits = position_limits(model)
    assert (limits.source_table is not None) == has_table
    if limits.source_table is None:
        assert runs(50, 50)
        return
    assert runs(limits.source_table, 5) and not runs(limits.source_table + 1, 5)
    if config.is_encoder_decoder:
        assert limits.target_table is not None
        assert runs(5, limits.target_table) and not runs(5, limits.target_table + 1)


class NoStep(TrainerCallback):
    """Fails a test whose run reaches a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise AssertionError("a step was made")


LEARNED = ["model.config.position_encoding=learned", "model.config.max_position_embeddings=24"]
LONG = "dog " * 40


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_too_long_pairs_are_named_before_the_first_step(tmp_path: Path, split: str, side: str) -> None:
    recipe = toy_recipe(tmp_path / "data", eval_strategy="steps", eval_steps=6, save_strategy="no")
    file = tmp_path / "data" / f"{'val' if split == 'validation' else split}.{'src' if side == 'source' else 'tgt'}"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[6] = LONG
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    options = [*LEARNED, "test_source=test.src", "test_target=test.tgt", "max_source_length=200"]
    if (split, side) == ("test", "target"):  # references are never given to the model
        assert train(recipe, options, output_dir=tmp_path / "out").metrics["test"]["examples"] == 20
        return
    with pytest.raises(ValueError, match=rf"example 7 of the {split} data \(.*, line 7\) is too long.*{side}.*24") as e:
        train(recipe, options, output_dir=tmp_path / "out", callbacks=[NoStep()])
    assert "raise model.config.max_position_embeddings" in str(e.value)


@pytest.mark.parametrize("kind", ["text", "tsv with a header", "jsonl"])
def test_too_long_texts_are_named_by_their_line(tmp_path: Path, kind: str) -> None:
    texts = ["red dog", "big cat", *["small tree bird"] * 30]
    texts[20] = LONG
    labelled = [(text, "xy"[number % 2]) for number, text in enumerate(texts)]
    fields = {} if kind == "text" else {"source_field": "text", "target_field": "label"}
    if kind == "text":  # a blank line is no example
        file, content, line = "a.txt", "\n\n".join(texts), 41
    elif kind == "jsonl":
        file, content, line = "a.jsonl", "\n".join(f'{{"text": "{t}", "label": "{c}"}}' for t, c in labelled), 21
    else:
        file, content, line = "a.tsv", "text\tlabel\n" + "\n".join(f"{t}\t{c}" for t, c in labelled), 22
    (tmp_path / file).write_text(content + "\n", encoding="utf-8")
    recipe = {
        "data": {"task": "masked-lm" if kind == "text" else "text-classification", "train_file": file, **fields,
                 "data_dir": str(tmp_path)},
        "tokenizer": {"vocab_size": 330, "options": {"min_frequency": 1}},
        "model": {"config": {**BERT, "position_encoding": "learned"}},
        "training": {"max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"example 21 of the train data \(.*{file}, line {line}\) is too long"):
        train(path, output_dir=tmp_path / "out", callbacks=[NoStep()])
    result = train(path, ["max_source_length=20"], output_dir=tmp_path / "out2")  # the remedy that the message names
    assert result.metrics["examples_too_long"] == 1


def test_the_tokenizer_that_is_written_cuts_at_the_models_end(tmp_path: Path, caplog: Any) -> None:
    recipe = toy_recipe(tmp_path / "data", max_steps=2, save_strategy="no")
    options = ["model.config.position_encoding=learned", "data.max_source_length=40"]
    train(recipe, options, output_dir=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 128
    # A tokenizer that is loaded gets the limit too, and one of its own that is lower stays.
    for limit, wanted in ((1_000_000, 128), (30, 30)):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        tokenizer.model_max_length = limit
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        train(
            recipe, [*options, f"tokenizer.from_pretrained={tmp_path / 'tokenizer'}"], output_dir=tmp_path / f"{limit}"
        )
        assert AutoTokenizer.from_pretrained(tmp_path / f"{limit}").model_max_length == wanted
    with pytest.raises(ValueError, match="model_max_length=129, but the model has 128 positions"):
        train(recipe, [*options, "tokenizer.options={model_max_length: 129}"], output_dir=tmp_path / "more")
    # Rotary positions have no end: nothing is refused, and what the name of the limit means is said.
    options = ["model.config.max_position_embeddings=8", "tokenizer.options={model_max_length: 300}"]
    with caplog.at_level(logging.WARNING, "urform"):
        train(recipe, options, output_dir=tmp_path / "rope")
    assert AutoTokenizer.from_pretrained(tmp_path / "rope").model_max_length == 300
    assert "training examples are longer than max_position_embeddings=8" in caplog.text


def test_pipeline_cuts(tmp_path: Path) -> None:
    text = "".join(f"red dog\t{'x' if n % 2 else 'y'}\n" for n in range(40))
    (tmp_path / "a.tsv").write_text(text, encoding="utf-8")
    recipe = {
        "data": {"task": "text-classification", "train_file": str(tmp_path / "a.tsv")},
        "tokenizer": {"vocab_size": 330},
        "model": {"config": {**BERT, "position_encoding": "learned"}},
        "training": {"max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train(path, output_dir=tmp_path / "out")
    pipe = pipeline("text-classification", model=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="beyond the learned table"):
        pipe(LONG)
    assert pipe(LONG, truncation=True)[0]["label"] in ("x", "y")


def classifier_recipe(folder: Path, task: str, content: str, **model: Any) -> Path:
    (folder / "a.tsv").write_text(content, encoding="utf-8")
    recipe = {
        "data": {"task": task, "train_file": str(folder / "a.tsv"), "max_source_length": 20},
        "tokenizer": {"vocab_size": 330},
        "model": {"config": {**BERT}, **model},
        "training": {"max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize(("task", "label"), [("text-classification", "x"), ("token-classification", "x x")])
def test_a_single_class_is_refused(tmp_path: Path, task: str, label: str) -> None:
    """Before a tokenizer is trained. Also where every text of the other class is too long."""
    recipe = classifier_recipe(tmp_path, task, f"red dog\t{label}\n" * 40)
    with pytest.raises(ValueError, match=rf"every label .* is 'x', and task {task} needs at least two .*target_field"):
        train(recipe, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if task == "text-classification":
        recipe = classifier_recipe(tmp_path, task, f"red dog\t{label}\n" * 40 + f"{LONG}\ty\n")
        with pytest.raises(ValueError, match="every label of the training data is 'x'"):
            train(recipe, output_dir=tmp_path / "out", callbacks=[NoStep()])


def test_a_model_of_a_regression_becomes_a_classifier(tmp_path: Path) -> None:
    """Labels are names of classes whatever the model was made for: the loss is that of two classes, about log 2."""
    content = "".join(f"red dog\t{'x' if n % 2 else 'y'}\n" for n in range(40))
    first = train(classifier_recipe(tmp_path, "text-classification", content), output_dir=tmp_path / "first")
    config = AutoConfig.from_pretrained(first.output_dir, problem_type="regression")
    config.save_pretrained(first.output_dir)
    recipe = classifier_recipe(
        tmp_path, "text-classification", content, from_pretrained=str(first.output_dir), config={}
    )
    second = train(recipe, [f"tokenizer.from_pretrained={first.output_dir}"], output_dir=tmp_path / "second")
    assert AutoConfig.from_pretrained(second.output_dir).problem_type == "single_label_classification"
    assert 0.3 < second.metrics["train_loss"] < 1.5


def test_generation_beyond_the_table_is_refused(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path / "data", eval_strategy="steps", eval_steps=2, predict_with_generate=True)
    options = [*LEARNED, "max_source_length=24", "max_target_length=24", "generation_max_length=25"]
    with pytest.raises(ValueError, match="generation_max_length=25, but the decoder has 24 positions"):
        train(recipe, options, output_dir=tmp_path / "out", callbacks=[NoStep()])


# --- precision ---------------------------------------------------------------------------------------------------
def _ratio(value: float) -> Any:
    return lambda device, dtype=torch.bfloat16, seconds=1.0: value


def test_precision_is_chosen_by_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load_recipe("multi30k-en-de", output_dir=tmp_path)
    assert recipe.run.precision == "auto" and not recipe.training.bf16
    for ratio, name in ((0.5, "bf16"), (25.0, "no")):
        monkeypatch.setattr(preflight, "product_time_ratio", _ratio(ratio))
        chosen = settle_precision(recipe)
        named = load_recipe("multi30k-en-de", [f"bf16={str(name == 'bf16').lower()}"], output_dir=tmp_path).training
        assert chosen.mixed_precision == name and chosen.to_dict() == named.to_dict()
        assert not recipe.training.bf16
    # A resumed run goes on as its checkpoint began.
    (tmp_path / "training_args.json").write_text('{"bf16": true}', encoding="utf-8")
    assert settle_precision(recipe, tmp_path).bf16
    with pytest.raises(ValueError, match=r"run\.precision must be auto or null, got 'bf16'"):
        load_recipe("multi30k-en-de", ["precision=bf16"])


def test_who_insists_is_warned_with_the_factor(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(preflight, "product_time_ratio", _ratio(25.0))
    with caplog.at_level(logging.WARNING, "urform"):
        assert settle_precision(load_recipe("multi30k-en-de", ["bf16=true"])).bf16
    assert "takes 25 times as long as in float32" in caplog.text and "run.precision=auto" in caplog.text
    caplog.clear()
    monkeypatch.setattr(preflight, "product_time_ratio", _ratio(0.5))
    with caplog.at_level(logging.WARNING, "urform"):
        assert settle_precision(load_recipe("multi30k-en-de", ["bf16=true"])).bf16
        assert not settle_precision(load_recipe("multi30k-en-de", ["bf16=false"])).bf16
    assert not caplog.text


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN plays another processor on x86 only")
def test_a_processor_without_bfloat16_units_is_slow_in_it() -> None:
    code = (
        "import torch; from urform.training.preflight import product_time_ratio; torch.set_num_threads(1)\n"
        "print(product_time_ratio(torch.device('cpu')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert float(done.stdout) > 2
    assert 0.5 < product_time_ratio(torch.device("cpu"), torch.float32, seconds=0.2) < 2


def test_a_run_trains_in_the_precision_that_was_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path / "data", max_steps=2, save_strategy="no")
    losses = {}
    for name, ratio, option in (
        ("auto", 0.5, "run.precision=auto"),
        ("bf16", 0.5, "bf16=true"),
        ("32", 9, "bf16=false"),
    ):
        monkeypatch.setattr(preflight, "product_time_ratio", _ratio(ratio))
        history = train(recipe, [option], output_dir=tmp_path / name).log_history
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
    assert losses["auto"] == losses["bf16"] != losses["32"]


# --- files, checkpoints, duration, packages ----------------------------------------------------------------------
def test_missing_files_are_named_with_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*train\.tsv.*`urform demo`"):
        train("demo", [f"data_dir={tmp_path}"], output_dir=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"train\.en\.gz, nor 5 more.*github\.com/multi30k/dataset.*data_dir"):
        train("multi30k-en-de", [f"data_dir={tmp_path}"], output_dir=tmp_path / "out")
    recipe = toy_recipe(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing"):  # of the test set: before training
        train(recipe, ["test_source=nothing", "test_target=test.tgt"], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_cannot_be_built_is_refused_before_data_are_read(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="hidden_size=33"):
        train(toy_recipe(tmp_path / "data"), ["model.config.hidden_size=33"], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("save", "found"), [("steps", 3), ("no", 0)])
def test_fewer_checkpoints_than_are_to_be_averaged(tmp_path: Path, caplog: Any, save: str, found: int) -> None:
    recipe = toy_recipe(tmp_path / "data", save_strategy=save)
    with caplog.at_level(logging.WARNING, "urform"):
        result = train(recipe, ["average_last=5"], output_dir=tmp_path / "out")
    assert f"run.average_last=5, and {tmp_path / 'out'} has {found} complete checkpoints" in caplog.text
    states = [load_file(path / "model.safetensors") for path in sorted((tmp_path / "out").glob("checkpoint-*"))]
    assert len(states) == found
    for name, tensor in load_file(result.output_dir / "model.safetensors").items() if states else ():
        torch.testing.assert_close(tensor, torch.stack([s[name] for s in states]).double().mean(0).float())
    assert urform.UrformForConditionalGeneration.from_pretrained(result.output_dir).num_parameters() > 0


def test_the_duration_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(preflight.EstimateCallback, "SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "urform"):
        train(toy_recipe(tmp_path / "data", save_strategy="no"), output_dir=tmp_path / "out")
    assert caplog.text.count("more steps will take about") == 1 and "10 more steps" in caplog.text
    seconds = {59.4: "59 s", 300: "5 min", 8 * 3600 + 60: "8 h 1 min"}
    assert {value: preflight._duration(value) for value in seconds} == seconds


@pytest.mark.parametrize("package", ["sacrebleu", "sacremoses"])
def test_scorers_are_looked_for_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}, which is not installed: pip install {package}"):
        train(
            toy_recipe(tmp_path / "data"), ["test_source=test.src", "test_target=test.tgt"],
            output_dir=tmp_path / "out", callbacks=[NoStep()],
        )  # fmt: skip
    with pytest.raises(ValueError, match=rf"pip install {package}.*\[train\]"):
        evaluate(tmp_path, [("a", "b")])


def test_a_place_counts_the_lines_of_the_file(tmp_path: Path) -> None:
    """Blank lines of JSON Lines are no examples, and are lines all the same."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n\n{"text": "b"}\n', encoding="utf-8")
    data = DataArguments(task="causal-lm", train_file=str(path), source_field="text")
    assert place_of(data, "train", 2) == f"example 2 of the train data ({path}, line 4)"
