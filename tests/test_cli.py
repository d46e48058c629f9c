"""The `urform` command: help, exit codes, clean errors, Ctrl-C, predict and evaluate as filters."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from urform.cli.main import app

_spec = importlib.util.spec_from_file_location("training_fixtures", Path(__file__).with_name("test_training.py"))
assert _spec is not None and _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)
toy_recipe = _fixtures.toy_recipe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}


def urform(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "urform.cli.main", *map(str, arguments)],
        input=text, capture_output=True, text=True, encoding="utf-8", env=ENVIRONMENT, check=False, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    recipe = toy_recipe(folder / "data", save_strategy="no", max_steps=3)
    done = urform("train", recipe, "seed=3", "--output-dir", folder / "out", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    return folder / "out"


@pytest.mark.parametrize("verb", ["", "demo", "train", "evaluate", "predict"])
def test_help_is_quick_and_imports_no_torch(verb: str) -> None:
    code = (
        "import sys; from urform.cli.main import app; sys.argv = ['urform'] + sys.argv[1:]\n"
        "try: app()\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    start = time.monotonic()
    arguments = [verb, "--help"] if verb else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert time.monotonic() - start < 10


def test_user_errors_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({"data": {"train_sourc": "x"}}), encoding="utf-8")
    recipe = toy_recipe(tmp_path / "data")
    for arguments, message in (
        (("train", bad), "did you mean 'train_source'"),
        (("train", "nothing"), "no recipe 'nothing'"),
        (("train", recipe, "train_source=missing.txt", "-o", tmp_path / "o"), "no such file"),
        (("train", recipe, "tokenizer.vocab_size=10", "-o", tmp_path / "p"), "vocab_size"),
        (("train", recipe, "model.config.hidden_size=33", "-o", tmp_path / "q"), "hidden_size"),
        (("predict", tmp_path / "nothing"), "no such model folder"),
        (("evaluate", tmp_path, tmp_path / "a.txt"), "expected a name ending in .tsv or .jsonl"),
    ):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 2, (arguments, done.stderr)
        assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        assert done.stdout == ""
    plain = urform("train", "nothing")
    assert plain.returncode == 2 and plain.stderr.count("\n") == 1
    assert "Traceback" in urform("train", "nothing", "--debug").stderr


def test_predict_is_a_filter(model: Path, tmp_path: Path) -> None:
    text = "red dog\n\nbig cat house\n"
    done = urform("predict", model, "--num-beams", "1", text=text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 3 and done.stdout.split("\n")[1] == ""
    file = tmp_path / "in.txt"
    file.write_text(text, encoding="utf-8")
    again = urform("predict", model, file, "--num-beams", "1", "--batch-size", "1", "-q")
    assert again.stdout == done.stdout and again.stderr == ""


def test_evaluate_prints_json(model: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("red dog\tder gad\nbig\tgib\n", encoding="utf-8")
    done = urform("evaluate", model, pairs, "--num-beams", "1", "--output", tmp_path / "hyp.txt", "-q")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["examples"] == 2 and "nrefs:1" in scores["bleu_signature"]
    assert len((tmp_path / "hyp.txt").read_text(encoding="utf-8").splitlines()) == 2


def test_ctrl_c_exits_130_and_resume_goes_on(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path / "data", max_steps=100_000, save_steps=100_000, logging_steps=1)
    command = [sys.executable, "-m", "urform.cli.main", "train", str(recipe), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr is not None
    for line in process.stderr:
        if "'loss'" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume goes on" in errors.splitlines()[-1] and "Traceback" not in errors
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    done = urform("train", recipe, f"max_steps={step + 2}", "-o", tmp_path / "out", "--resume", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == step + 2
