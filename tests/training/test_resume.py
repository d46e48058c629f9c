"""Resuming: kills at chosen moments, damaged checkpoints, changed recipes, folders of other runs, NaN, secrets.

The independent truth is a run that nobody disturbed: a resumed one must have its losses and weights to the last bit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_training import losses, make_corpus, toy_recipe
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from urform.training.averaging import average_checkpoints
from urform.training.checkpointing import (
    MANIFEST_NAME,
    begin_manifest,
    checkpoint_fault,
    complete_checkpoints,
    finish_manifest,
    last_complete_checkpoint,
    rotate_complete,
)
from urform.training.finite import NonFiniteError
from urform.training.recipe import load_recipe
from urform.training.resuming import RunRecord, refuse_changes
from urform.training.run import train
from urform.training.trainer import CheckpointError


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# Logged every 3 steps, saved every 4: an interval of the log spans every checkpoint.
TIMES = {"max_steps": 12, "logging_steps": 3, "save_steps": 4}

# Runs `train` in a process that kills itself at a moment: before or after a call, counted from 1, of a function.
KILLER = """
import importlib, os, signal, sys
import urform
from urform.training.run import train
recipe, out, where, when, number, *overrides = sys.argv[1:]
module, _, name = where.rpartition(".")
place = importlib.import_module(module)
original, calls = getattr(place, name), 0
def killing(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(number) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if calls == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(place, name, killing)
train(recipe, overrides, output_dir=out, resume="--resume" in sys.argv)
"""


def kill(recipe: Path, out: Path, where: str, when: str, number: int, *overrides: str) -> None:
    """Run `train` in a process of its own that dies by SIGKILL at the moment named."""
    command = [sys.executable, "-c", KILLER, str(recipe), str(out), where, when, str(number), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def same_weights(one: Path, other: Path) -> bool:
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("data"), **TIMES)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that nobody disturbed."""
    return train(recipe, ["average_last=2"], output_dir=tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture
def copy(whole: Any, tmp_path: Path) -> Path:
    """A copy of the undisturbed run's folder, to be damaged."""
    return Path(shutil.copytree(whole.output_dir, tmp_path / "out"))


# --- after the end -----------------------------------------------------------------------------------------------
def test_resuming_a_run_that_has_ended_changes_nothing(whole: Any, recipe: Path, copy: Path) -> None:
    before = snapshot(copy)
    for _ in range(2):
        with pytest.warns(UserWarning, match="nothing to resume: the run .* has ended at step 12"):
            again = train(recipe, ["average_last=2"], output_dir=copy, resume=True)
    assert snapshot(copy) == before
    assert again.steps == 12 and again.log_history == whole.log_history
    assert {**again.metrics} == json.loads((whole.output_dir / "results.json").read_text(encoding="utf-8"))
    with pytest.warns(UserWarning, match=r"without effect: run.num_beams: 2 -> 3"):
        train(recipe, ["average_last=2", "num_beams=3"], output_dir=copy, resume=True)
    assert snapshot(copy) == before


@pytest.mark.parametrize(("when", "epochs"), [("before", False), ("after", True), slow("before", True)])
def test_a_kill_after_the_last_step(whole: Any, recipe: Path, tmp_path: Path, when: str, epochs: bool) -> None:
    """The rest is done, without another step: 8 batches an epoch, so 12 steps end within one, 8 at its end."""
    out, changes = tmp_path / "out", ["average_last=2"]
    if epochs:
        changes += ["max_steps=-1", "num_train_epochs=1"]
        whole = train(recipe, changes, output_dir=tmp_path / "whole")
    where = "urform.training.averaging._mean" if when == "before" else "urform.training.final_model.average_checkpoints"
    kill(recipe, out, where, when, 3 if when == "before" else 1, *changes)
    assert [path for path in out.glob(".*average*")]
    checkpoints = {path.name: snapshot(path) for path in complete_checkpoints(out)}
    for _ in range(2):
        rest = train(recipe, changes, output_dir=out, resume=True)
        assert rest.steps == whole.steps and losses(rest.log_history) == losses(whole.log_history)
    assert {path.name: snapshot(path) for path in complete_checkpoints(out)} == checkpoints
    assert same_weights(out, whole.output_dir)
    assert rest.metrics["train_loss"] == whole.metrics["train_loss"]
    assert not list(out.glob(".*"))


def test_an_ended_run_goes_on_to_more_steps(whole: Any, recipe: Path, copy: Path, tmp_path: Path) -> None:
    longer = train(recipe, ["average_last=2", "max_steps=15"], output_dir=tmp_path / "longer")
    rest = train(recipe, ["average_last=2", "max_steps=15"], output_dir=copy, resume=True)
    assert rest.steps == 15 and losses(rest.log_history) == losses(longer.log_history)
    assert same_weights(copy, longer.output_dir)
    assert rest.metrics["train_loss"] == longer.metrics["train_loss"]
    with pytest.raises(ValueError, match="has done 15 steps and the recipe asks for 12"):
        train(recipe, ["average_last=2", "max_steps=12"], output_dir=copy, resume=True)


def test_an_ended_run_without_checkpoints(recipe: Path, tmp_path: Path) -> None:
    out, changes = tmp_path / "out", ["max_steps=2", "save_strategy=no"]
    train(recipe, changes, output_dir=out)
    before = snapshot(out)
    with pytest.warns(UserWarning, match="has ended at step 2"):
        train(recipe, changes, output_dir=out, resume=True)
    with pytest.raises(ValueError, match="left no checkpoint to go on from"):
        train(recipe, ["max_steps=3", "save_strategy=no"], output_dir=out, resume=True)
    with pytest.raises(ValueError, match="holds the model of an earlier run"):
        train(recipe, changes, output_dir=out)
    assert snapshot(out) == before


# --- kills while saving ------------------------------------------------------------------------------------------
MOMENTS = [
    slow("urform.training.trainer.begin_manifest", "before"),
    slow("urform.training.trainer.begin_manifest", "after"),
    ("torch.save", "before"),
    ("urform.training.trainer.finish_manifest", "before"),
    ("urform.training.trainer.finish_manifest", "after"),
    slow("urform.training.checkpointing.remove_checkpoint", "before"),
    ("shutil.rmtree", "before"),
    slow("urform.training.trainer.rotate_complete", "after"),
]


@pytest.mark.parametrize(("where", "when"), MOMENTS)
def test_a_kill_while_saving_with_one_checkpoint(
    whole: Any, recipe: Path, tmp_path: Path, where: str, when: str
) -> None:
    """With `save_total_limit: 1` a complete checkpoint exists at every moment, and the rest is the undisturbed run."""
    out = tmp_path / "out"
    # The second checkpoint, at step 8: the first has saved three files by torch.save and deleted nothing.
    number = {"torch.save": 5, "urform.training.checkpointing.remove_checkpoint": 1}.get(where, 2)
    number = 1 if where.endswith("rmtree") else number
    kill(recipe, out, where, when, number, "save_total_limit=1", "average_last=1")
    complete = last_complete_checkpoint(out)
    assert complete is not None and complete.name in ("checkpoint-4", "checkpoint-8")
    rest = train(recipe, ["save_total_limit=1", "average_last=1"], output_dir=out, resume=True)
    assert losses(rest.log_history) == losses(whole.log_history)
    assert names(out) == ["checkpoint-12"] and not list(out.glob(".*"))
    assert same_weights(out / "checkpoint-12", whole.output_dir / "checkpoint-12")


def test_a_kill_before_the_first_checkpoint_is_complete(whole: Any, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill(recipe, out, "urform.training.trainer.finish_manifest", "before", 1, "average_last=2")
    with pytest.warns(UserWarning, match="starting from the beginning"):
        rest = train(recipe, ["average_last=2"], output_dir=out, resume=True)
    assert losses(rest.log_history) == losses(whole.log_history) and same_weights(out, whole.output_dir)


class At(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step: int, act: Callable[..., None]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.act(**kwargs)


def interrupt(**kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_interval_of_the_log_that_is_interrupted_is_exact(whole: Any, recipe: Path, tmp_path: Path) -> None:
    """Interrupted between two logs, twice."""
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="step 5"):
        train(recipe, ["average_last=2"], output_dir=out, callbacks=[At(5, interrupt)])
    with pytest.raises(RuntimeError, match="step 7"):
        train(recipe, ["average_last=2"], output_dir=out, callbacks=[At(7, interrupt)], resume=True)
    rest = train(recipe, ["average_last=2"], output_dir=out, resume=True)
    assert losses(rest.log_history) == losses(whole.log_history)
    assert rest.metrics["train_loss"] == whole.metrics["train_loss"]


def test_rotation_keeps_what_it_must(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 9):
        begin_manifest(tmp_path / f"checkpoint-{step}", step)
        if step != 2:
            finish_manifest(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-0").mkdir()  # another Trainer's
    rotate_complete(tmp_path, 4, 2, str(tmp_path / "checkpoint-1"))
    assert names(tmp_path) == ["checkpoint-0", "checkpoint-1", "checkpoint-4", "checkpoint-9"]
    rotate_complete(tmp_path, 4, 1, None)
    assert names(tmp_path) == ["checkpoint-0", "checkpoint-4", "checkpoint-9"]


def test_a_killed_average_is_cleared_away(whole: Any, tmp_path: Path) -> None:
    """Also without `train`; but not what a running process averages."""
    code = (
        "import os, signal, sys, urform.training.averaging as a\n"
        "a._mean = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "a.average_checkpoints(sys.argv[1:2], sys.argv[2])\n"
    )
    checkpoint = whole.output_dir / "checkpoint-12"
    done = subprocess.run([sys.executable, "-c", code, str(checkpoint), str(tmp_path / "mean")], check=False)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.glob(".mean.*"))) == 1
    running = tmp_path / f".mean.{os.getpid()}.01234567"
    running.mkdir()
    average_checkpoints([checkpoint], tmp_path / "mean")
    assert list(tmp_path.glob(".*")) == [running] and same_weights(tmp_path / "mean", checkpoint)


# --- damage ------------------------------------------------------------------------------------------------------
def flip(path: Path, at: int = -20) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit of a weight": (lambda p: flip(p / "model.safetensors"), "model.safetensors is damaged"),
    "zeroed weights": (
        lambda p: (p / "model.safetensors").write_bytes(bytes((p / "model.safetensors").stat().st_size)),
        "model.safetensors is damaged",
    ),
    "the header": (lambda p: flip(p / "model.safetensors", 3), "model.safetensors is damaged"),
    "the optimizer": (lambda p: flip(p / "optimizer.pt", 3000), "optimizer.pt is damaged"),
    "the schedule": (lambda p: flip(p / "scheduler.pt", 100), "scheduler.pt is damaged"),
    "the random state": (lambda p: flip(p / "rng_state.pth", 500), "rng_state.pth is damaged"),
    "the step": (lambda p: flip(p / "trainer_state.json"), "trainer_state.json is damaged"),
    "a list": (lambda p: (p / MANIFEST_NAME).write_text("[]"), "cannot be read .TypeError"),
    "a list of files": (lambda p: (p / MANIFEST_NAME).write_text('{"step": 12, "files": [1]}'), "cannot be read"),
    "sizes alone": (
        lambda p: (p / MANIFEST_NAME).write_text('{"step": 12, "files": {"model.safetensors": 144200}}'),
        "an older Urform wrote it",
    ),
    "half a manifest": (
        lambda p: (p / MANIFEST_NAME).write_text((p / MANIFEST_NAME).read_text()[:200]),
        "cannot be read .JSONDecodeError",
    ),
    "deep nesting": (lambda p: (p / MANIFEST_NAME).write_text("[" * 100_000), "cannot be read .RecursionError"),
    "a file elsewhere": (
        lambda p: (p / MANIFEST_NAME).write_text(
            json.dumps({"step": 12, "files": {"../../recipe.yaml": {"size": 1, "sha256": ""}}})
        ),
        "outside of the checkpoint",
    ),
    "another step's": (
        lambda p: shutil.copy(p.with_name("checkpoint-8") / MANIFEST_NAME, p / MANIFEST_NAME),
        "is of step 8",
    ),
    "no manifest": (lambda p: (p / MANIFEST_NAME).unlink(), f"has no {MANIFEST_NAME}"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_named(whole: Any, tmp_path: Path, what: str) -> None:
    damage, message = DAMAGE[what]
    out = Path(shutil.copytree(whole.output_dir, tmp_path / "out"))
    damage(out / "checkpoint-12")
    with pytest.warns(UserWarning, match=rf"skipping the (damaged|incomplete) checkpoint .*checkpoint-12: .*{message}"):
        assert last_complete_checkpoint(out) == out / "checkpoint-8"


@pytest.mark.parametrize("what", ["the header", slow("zeroed weights"), slow("the optimizer")])
def test_resume_takes_the_next_older_checkpoint(whole: Any, recipe: Path, copy: Path, what: str) -> None:
    DAMAGE[what][0](copy / "checkpoint-12")
    command = [sys.executable, "-m", "urform.cli.main", "train", str(recipe), "average_last=2", "--resume", "-q",
               "--output-dir", str(copy)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "skipping the damaged checkpoint" in done.stderr and DAMAGE[what][1] in done.stderr  # also with -q
    assert [path.name for path in complete_checkpoints(copy)] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert same_weights(copy, whole.output_dir)
    state = json.loads((copy / "trainer_state.json").read_text(encoding="utf-8"))
    assert losses(state["log_history"]) == losses(whole.log_history)


def test_damage_everywhere_is_refused(recipe: Path, copy: Path) -> None:
    for path in complete_checkpoints(copy):
        flip(path / "model.safetensors")
    before = snapshot(copy)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        train(recipe, ["average_last=2"], output_dir=copy, resume=True)
    assert snapshot(copy) == before


def test_trainer_itself_refuses_damage(whole: Any, copy: Path) -> None:
    import urform
    from urform.training.trainer import UrformTrainer

    model = urform.UrformForConditionalGeneration.from_pretrained(copy)
    arguments = Seq2SeqTrainingArguments(str(copy), report_to=[], use_cpu=True)
    trainer = UrformTrainer(model=model, args=arguments, train_dataset=[{"input_ids": [1], "labels": [1]}])
    flip(copy / "checkpoint-12" / "optimizer.pt", 3000)
    with pytest.raises(CheckpointError, match=r"cannot resume from .*checkpoint-12: optimizer.pt is damaged"):
        trainer.train(resume_from_checkpoint=copy / "checkpoint-12")
    for path in copy.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoints_of_another_trainer_are_left_alone(recipe: Path, tmp_path: Path, whole: Any) -> None:
    import urform

    out = tmp_path / "out"
    model = urform.UrformForConditionalGeneration.from_pretrained(whole.output_dir)
    rows = [{"input_ids": [5, 6, 2], "labels": [5, 2]}] * 4
    arguments = Seq2SeqTrainingArguments(str(out), report_to=[], use_cpu=True, max_steps=2, save_steps=1)
    Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows).train()
    before = snapshot(out)
    with (
        pytest.warns(UserWarning, match="another Trainer wrote it"),
        pytest.raises(ValueError, match="another Trainer"),
    ):
        train(recipe, output_dir=out, resume=True)
    assert snapshot(out) == before


def test_weights_alone_are_no_checkpoint_to_resume_from(recipe: Path, tmp_path: Path) -> None:
    out, changes = tmp_path / "out", ["save_only_model=true", "average_last=1"]
    train(recipe, changes, output_dir=out)
    (out / "results.json").unlink()
    with pytest.raises(CheckpointError, match="save_only_model"):
        train(recipe, changes, output_dir=out, resume=True)


# --- another recipe ----------------------------------------------------------------------------------------------
CHANGES = {
    "model.config.num_attention_heads=4": r"num_attention_heads: 2 -> 4.*--allow-change model.config.num_attention",
    "model.config.hidden_size=64": "model.config.hidden_size: 32 -> 64",
    "model.config.position_encoding=alibi": r"model.config.position_encoding: \(not set\) -> alibi",
    "model.config.hidden_dropout_prob=0.0": "model.config.hidden_dropout_prob: 0.1 -> 0.0",
    "training.seed=7": "training.seed: 42 -> 7",
    "data_seed=7": "training.data_seed: None -> 7",
    "optim=adafactor": r"training.optim: .*adamw_torch.* -> .*adafactor.*A checkpoint decides training.optim",
    "learning_rate=0.1": r"training.learning_rate: 0.003 -> 0.1.*A checkpoint decides",
    "tokens_per_batch=500": "data.tokens_per_batch: 600 -> 500",
    "max_train_examples=100": r"data.max_train_examples: None -> 100.*data.train: sha256 .* -> sha256",
    "tokenizer.vocab_size=400": r"tokenizer.vocab_size: 420 -> 400.*A checkpoint decides",
    "label_smoothing_factor=0.2": "training.label_smoothing_factor: 0.1 -> 0.2",
    "gradient_accumulation_steps=2": "training.gradient_accumulation_steps: 1 -> 2",
    "bf16=true": "training.bf16: False -> True",
    "task=causal-lm": "data.task: seq2seq -> causal-lm",
}


@pytest.fixture(scope="module")
def stopped(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run interrupted at step 5."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(RuntimeError, match="step 5"):
        train(recipe, output_dir=out, callbacks=[At(5, interrupt)])
    return out


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_by_name_and_value(recipe: Path, stopped: Path, change: str) -> None:
    extra = ["train_target=null", "train_source=null", "train_file=train.src", "tokens_per_batch=null"]
    before = snapshot(stopped)
    with pytest.raises(ValueError, match=f"(?s)cannot be resumed with another recipe.*{CHANGES[change]}"):
        train(recipe, [change, *(extra if "causal" in change else [])], output_dir=stopped, resume=True)
    assert snapshot(stopped) == before


def test_other_data_under_the_same_name(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path / "data", max_steps=4, save_steps=2, save_total_limit=1)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="step 3"):
        train(recipe, output_dir=out, callbacks=[At(3, interrupt)])
    shutil.move(tmp_path / "data", tmp_path / "moved")
    moved = tmp_path / "moved" / "recipe.yaml"
    place = f"data_dir={tmp_path / 'moved'}"
    make_corpus(tmp_path / "data", seed=1)
    with pytest.raises(ValueError, match=r"(?s)data.train: sha256 \w+… -> sha256 \w+….*--allow-change data.train"):
        train(moved, output_dir=out, resume=True)  # the same names, another content
    assert train(moved, [place], output_dir=out, resume=True).steps == 4  # another name, the same content


def test_a_change_can_be_allowed_and_free_ones_are_said(
    recipe: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="urform")  # a command with --quiet, run in this process, leaves it at ERROR
    out = Path(shutil.copytree(stopped, tmp_path / "out"))
    overrides = ["max_grad_norm=0.1", "save_steps=3", "max_steps=6"]
    with pytest.raises(ValueError, match=r"--allow-change training\.max_grad_norm"):
        train(recipe, overrides, output_dir=out, resume=True)
    overrides.append("hub_token=plain-secret-word")
    result = train(recipe, overrides, output_dir=out, resume=True, allow_changes=["training.max_grad_norm"])
    assert "plain-secret-word" not in caplog.text
    assert result.steps == 6
    assert "training.max_grad_norm: 1.0 -> 0.1" in caplog.text and "training.save_steps: 4 -> 3" in caplog.text
    assert load_recipe(out / "recipe.yaml").training.max_grad_norm == 0.1
    out = Path(shutil.copytree(stopped, tmp_path / "second"))
    with pytest.raises(ValueError, match=r"lm_head|embed.*has shape|model.*has shape"):
        train(recipe, ["model.config.intermediate_size=48"], output_dir=out, resume=True, allow_changes=["model"])


def test_the_tokenizer_of_a_run_is_not_exchanged(recipe: Path, stopped: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(stopped, tmp_path / "out"))
    path = out / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("dog", "god"), encoding="utf-8")
    with pytest.raises(ValueError, match="not the tokenizer that the run began with"):
        train(recipe, output_dir=out, resume=True)
    shutil.rmtree(out / "tokenizer")  # trained again, from the same data
    assert train(recipe, output_dir=out, resume=True).steps == 12


# --- a folder that was used before -------------------------------------------------------------------------------
def test_a_second_run_trusts_nothing_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy_recipe(tmp_path / "data", max_steps=2, save_strategy="no")
    out = tmp_path / "out"
    import urform.training.run as run_module

    with monkeypatch.context() as patch:  # the first dies before it has saved anything
        patch.setattr(run_module.UrformTrainer, "train", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipe, output_dir=out)
    assert {"tokenizer", "recipe.yaml", "run_record.json"} <= {path.name for path in out.iterdir()}
    for resume in (False, True):
        make_corpus(tmp_path / "data", seed=5 + resume)
        changes = [f"tokenizer.vocab_size={410 + resume}"]
        if resume:
            shutil.rmtree(out)
            with monkeypatch.context() as patch:
                patch.setattr(run_module.UrformTrainer, "train", lambda *args, **kwargs: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    train(recipe, output_dir=out)
            with pytest.warns(UserWarning, match="starting from the beginning"):
                train(recipe, changes, output_dir=out, resume=True)
        else:
            train(recipe, changes, output_dir=out)
        fresh = train(recipe, changes, output_dir=tmp_path / f"fresh-{resume}")
        for name in ("tokenizer.json", "tokenizer/tokenizer.json", "recipe.yaml", "run_record.json"):
            expected = (fresh.output_dir / name).read_text(encoding="utf-8")
            found = (out / name).read_text(encoding="utf-8")
            assert found.replace(str(out), "") == expected.replace(str(fresh.output_dir), "")
        assert same_weights(out, fresh.output_dir)


def test_a_tokenizer_that_no_run_wrote_is_kept(tmp_path: Path, whole: Any) -> None:
    """A user's folder in the run's place is refused; named by the recipe, it is read before it is replaced."""
    recipe = toy_recipe(tmp_path / "data", max_steps=1, save_strategy="no")
    out = tmp_path / "out"
    shutil.copytree(whole.output_dir / "tokenizer", out / "tokenizer")
    before = snapshot(out)
    with pytest.raises(ValueError, match="no run wrote it"):
        train(recipe, output_dir=out)
    assert snapshot(out) == before
    shutil.copy(recipe, out / "recipe.yaml")
    train(out / "recipe.yaml", [f"tokenizer.from_pretrained={out / 'tokenizer'}"], output_dir=out)
    text = (out / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    assert text == (whole.output_dir / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")


# --- not finite --------------------------------------------------------------------------------------------------
def poison(value: float, name: str) -> Callable[..., None]:
    def act(model: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            dict(model.named_parameters())[name].view(-1)[0] = value

    return act


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(recipe: Path, tmp_path: Path, accumulation: int) -> None:
    out = tmp_path / "out"
    import urform

    probe = urform.UrformForConditionalGeneration(load_config(recipe))
    weight = next(name for name, parameter in probe.named_parameters() if parameter.dim() == 2 and "layers" in name)
    changes = ["average_last=2", f"gradient_accumulation_steps={accumulation}"]
    with pytest.raises(NonFiniteError, match="stopped at step 7, before the update: the loss is nan") as info:
        train(recipe, changes, output_dir=out, callbacks=[At(7, poison(float("nan"), weight))])
    assert f"weights are not finite in {weight}" in str(info.value) and "parameter group 0" in str(info.value)
    assert "checkpoint-4" in str(info.value) and info.value.step == 7
    report = json.loads((out / "non-finite-step-7" / "report.json").read_text(encoding="utf-8"))
    assert report["losses"] == ["nan"] * accumulation and report["weights"] == [weight]
    batch = load_file(out / "non-finite-step-7" / "batch.safetensors")
    assert batch["0.input_ids"].dim() == 2 and f"{accumulation - 1}.labels" in batch
    assert names(out) == ["checkpoint-4"] and not (out / "model.safetensors").exists()
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert all(loss > 0 for loss in losses(state["log_history"]).values())
    assert train(recipe, changes, output_dir=out, resume=True).steps == 12  # from the last good one


def load_config(recipe: Path) -> Any:
    import urform

    return urform.UrformConfig(architecture="encoder-decoder", vocab_size=420, **load_recipe(recipe).model.config)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_named_alone(recipe: Path, tmp_path: Path, clip: float) -> None:
    """The loss is finite and one parameter's gradient is not: it is named before clipping makes all of them NaN."""

    def bend(model: Any, **kwargs: Any) -> None:
        name, parameter = next((n, p) for n, p in model.named_parameters() if p.dim() == 1)
        bent.append(name)
        parameter.register_hook(lambda gradient: gradient * float("inf"))

    bent: list[str] = []
    with pytest.raises(NonFiniteError) as info:
        train(recipe, [f"max_grad_norm={clip}"], output_dir=tmp_path / "out", callbacks=[At(2, bend)])
    assert f"gradients are not finite in {bent[0]};" in str(info.value)
    assert "parameter group 1" in str(info.value) and "parameter group 0" not in str(info.value)
    assert "all weights are finite" in str(info.value) and "there is no complete checkpoint" in str(info.value)


@pytest.mark.parametrize("step", [8, 12])
def test_weights_that_overflow_are_not_saved(recipe: Path, tmp_path: Path, step: int) -> None:
    """An update with finite gradients makes weights infinite, at a step that saves, the last one among them."""

    class Explode(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == step - 1:
                poison(float("inf"), next(iter(dict(model.named_parameters()))))(model)

    out = tmp_path / "out"
    with pytest.raises(NonFiniteError, match=rf"after step {step}: weights are not finite in .*checkpoint-{step - 4}"):
        train(recipe, ["save_total_limit=1"], output_dir=out, callbacks=[Explode()])
    assert names(out) == [f"checkpoint-{step - 4}"] and checkpoint_fault(out / f"checkpoint-{step - 4}") is None
    if step == 12:
        out = tmp_path / "unsaved"
        with pytest.raises(NonFiniteError, match="nothing was saved"):
            train(recipe, ["save_strategy=no"], output_dir=out, callbacks=[Explode()])
        assert not (out / "model.safetensors").exists()


def test_a_learning_rate_that_explodes_ends_the_command(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "urform.cli.main", "train", str(recipe), "learning_rate=1e30", "warmup_steps=0",
               "max_grad_norm=0", "-q", "--output-dir", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "training stopped" in done.stderr and "step" in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


# --- secrets -----------------------------------------------------------------------------------------------------
def test_no_secret_is_written(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path / "data", max_steps=2, save_steps=1)
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["training"]["hub_token"] = "plain-secret-word"
    content["tokenizer"]["options"] = {"pad_token": "<pad>", "api_key": "plain-secret-word"}
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    loaded = load_recipe(recipe, ["data.dataset_config=hf_" + "A" * 34])
    assert loaded.training.hub_token == "plain-secret-word" and "plain-secret-word" not in repr(loaded.training)
    loaded.tokenizer.options = {}
    loaded.training.output_dir = str(tmp_path / "out")
    result = train(loaded)
    for path in result.output_dir.rglob("*"):
        if path.is_file():
            content_bytes = path.read_bytes()
            assert b"plain-secret-word" not in content_bytes and b"hf_AAAA" not in content_bytes, path
    text = (result.output_dir / "recipe.yaml").read_text(encoding="utf-8")
    assert "# left out, as they are secrets: data.dataset_config, tokenizer.options.api_key, training.hub_token" in text
    saved = load_recipe(result.output_dir / "recipe.yaml")
    assert saved.training.hub_token is None and saved.tokenizer.options == {"pad_token": "<pad>"}


def test_the_batch_of_all_processes_is_compared(tmp_path: Path) -> None:
    """22 examples may come from one process or from two."""
    examples = ["tokens_per_batch=null"]
    recipe = toy_recipe(tmp_path)
    for processes, size, now in ((2, 11, 22), (1, 22, 22), (2, 11, 11)):
        out = tmp_path / f"{processes}-{size}-{now}"
        out.mkdir()
        load_recipe(recipe, [*examples, f"per_device_train_batch_size={size}"]).save(out / "recipe.yaml")
        RunRecord("a", "b", processes).save(out)
        changed = load_recipe(recipe, [*examples, f"per_device_train_batch_size={now}"])
        if processes * size == now:
            assert refuse_changes(out, changed, RunRecord("a", "b", 1)).keys() <= {"training.output_dir"}
        else:
            with pytest.raises(ValueError, match="per_device_train_batch_size x processes: 11 x 2 -> 11 x 1"):
                refuse_changes(out, changed, RunRecord("a", "b", 1))


# --- many processes ----------------------------------------------------------------------------------------------
DISTRIBUTED = """
import json, os, sys, warnings
import urform
from urform.training.run import train
from urform.training import trainer as module
if os.environ.get("STOP"):
    module.InterruptCallback.on_step_begin = lambda self, args, state, control, **kwargs: (
        self._handle(15, None) if state.global_step == 4 else None)
try:
    result = train(sys.argv[1], sys.argv[3:], output_dir=sys.argv[2], resume=bool(os.environ.get("RESUME")))
except module.TrainingInterruptedError:
    sys.exit(0)
if int(os.environ.get("RANK", 0)) == 0:
    json.dump([result.log_history, result.metrics["train_loss"]], open(sys.argv[2] + ".json", "w"))
"""


def distributed(recipe: Path, out: Path, *overrides: str, processes: int = 2, **environment: str) -> str:
    script = out.parent / "script.py"
    script.write_text(DISTRIBUTED, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend",
               "c10d", "--rdzv-endpoint", "localhost:0", str(script), str(recipe), str(out), *overrides]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_resume_exactly_and_one_goes_on(recipe: Path, tmp_path: Path) -> None:
    distributed(recipe, tmp_path / "whole")
    distributed(recipe, tmp_path / "out", STOP="1")
    shutil.copytree(tmp_path / "out", tmp_path / "one")
    distributed(recipe, tmp_path / "out", RESUME="1")
    one, other = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("whole", "out"))
    assert losses(one[0]) == losses(other[0]) and len(losses(one[0])) == 4
    assert same_weights(tmp_path / "out", tmp_path / "whole")
    # One process takes over: the same batches, other dropout; it says so.
    with pytest.warns(UserWarning, match=r"has no rng_state.pth: it was saved by another number of processes"):
        rest = train(recipe, output_dir=tmp_path / "one", resume=True)
    curve = losses(rest.log_history)
    assert curve[3] == losses(one[0])[3] and abs(curve[6] - losses(one[0])[6]) < 0.05
    examples = ["tokens_per_batch=null", "per_device_train_batch_size=11"]
    with pytest.raises(ValueError, match=r"data.tokens_per_batch: 600 -> None"):
        train(recipe, examples, output_dir=tmp_path / "one", resume=True)
