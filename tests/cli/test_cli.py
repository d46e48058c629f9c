"""The `urform` command: help, exit codes, clean errors, Ctrl-C, predict and evaluate as filters."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from toy_training import toy_recipe
from typer.testing import CliRunner

from urform.cli.main import app

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


def test_usage_names_the_command() -> None:
    """Also where the module is run: `accelerate launch -m urform.cli.main`."""
    for arguments in ([], ["train"], ["doctor", "kernels"]):
        assert f"Usage: {' '.join(['urform', *arguments])} [OPTIONS]" in urform(*arguments, "--help").stdout


def test_list_describes_every_recipe() -> None:
    lines = CliRunner().invoke(app, ["train", "--list"]).stdout.splitlines()
    described = dict(re.split(r"\s{2,}", line) for line in lines)
    assert {"demo", "multi30k-en-de", "translation"} <= described.keys()
    assert "`urform demo`" in described["demo"] and all(len(line) <= 130 for line in lines)


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
        (("evaluate", tmp_path, bad), "expected a name ending in .tsv or .jsonl"),
        (("evaluate", tmp_path, tmp_path / "a.txt"), "no such file"),
        (("evaluate", tmp_path, bad, tmp_path / "a.txt"), "no such file"),
        (("predict", tmp_path, tmp_path / "a.txt"), "no such file"),
        (("convert", tmp_path / "nothing", tmp_path / "r"), "no such folder"),
        (("doctor", "bundle", tmp_path / "nothing"), "no such folder"),
        (("doctor", "isolation", tmp_path / "nothing"), "no such folder"),
        (("train", "demo", f"data_dir={tmp_path}", "-o", tmp_path / "s"), "`urform demo`"),
    ):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 2, (arguments, done.stderr)
        assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        assert done.stdout == ""
    plain = urform("train", "nothing")
    assert plain.returncode == 2 and plain.stderr.count("\n") == 1
    assert "Traceback" in urform("train", "nothing", "--debug").stderr


FAULTS_OF_THE_COMMAND_LINE = (
    (["train", "--list"], 0, "multi30k-en-de"),
    (["train"], 2, "name a recipe"),
    (["train", "nothing"], 2, "no recipe 'nothing'"),
    (["train", "demo", "learnin_rate=1"], 2, "did you mean 'learning_rate'"),
    (["train", "demo", "architecture=encoder"], 2, "did you mean 'model.config.architecture'"),
    (["train", "demo", "hidden_size=33"], 2, "did you mean 'model.config.hidden_size'"),
    (["train", "demo", "model.hidden_size=33"], 2, "did you mean 'model.config.hidden_size'"),
    (["train", "demo", "data.max_steps=3"], 2, "did you mean 'training.max_steps'"),
    (["train", "demo", "traning.max_steps=3"], 2, "did you mean 'training'"),
    (["evaluate", "nothing", "nothing.tsv"], 2, "no such model folder"),
    (["evaluate", ".", "nothing"], 2, "no such file"),
    (["predict", "nothing"], 2, "no such model folder"),
    (["--version"], 0, "urform "),
    (["--help"], 0, "--install-completion"),
)


def test_faults_of_the_command_line_import_no_torch(tmp_path: Path) -> None:
    """All in one process: had one of them imported torch, it would be there at the end."""
    code = (
        "import json, sys; from typer.testing import CliRunner; from urform.cli.main import app\n"
        "for arguments, code, text in json.loads(sys.argv[1]):\n"
        "    done = CliRunner().invoke(app, arguments)\n"
        "    assert done.exit_code == code and text in done.output, (arguments, done.exit_code, done.output)\n"
        "    assert not {'torch', 'transformers'} & sys.modules.keys(), arguments\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(FAULTS_OF_THE_COMMAND_LINE)],
        capture_output=True, text=True, env=ENVIRONMENT, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_names_of_fields_that_are_read_from_source_are_the_classes() -> None:
    from transformers import Seq2SeqTrainingArguments

    from urform import UrformConfig
    from urform.training import recipe

    declared = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    assert recipe._training_fields() == declared
    assert recipe._config_fields() <= set(inspect.signature(UrformConfig).parameters)


@pytest.mark.parametrize(
    ("module", "package", "arguments"),
    [
        ("yaml", "pyyaml", ["train", "--list"]),
        ("accelerate", "accelerate", ["train", "demo"]),
        ("typer", "typer", ["--help"]),
        ("babel", "babel", ["demo"]),
    ],
)
def test_missing_packages_are_one_kind_of_hint(
    tmp_path: Path, module: str, package: str, arguments: list[str]
) -> None:  # fmt: skip
    code = f"import sys; sys.modules[{module!r}] = None; from urform.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    message = done.stderr.splitlines()[-1]
    assert f"needs {package}, which is not installed: pip install {package}" in message
    root = Path(__file__).resolve().parents[2]
    assert f"pip install -e '{root}[{'demo' if module == 'babel' else 'train'}]'" in message


def test_predict_reads_the_source_column(model: Path, tmp_path: Path) -> None:
    sources = ["red dog", "big cat house"]
    wanted = urform("predict", model, "--num-beams", "1", "-q", text="".join(f"{s}\n" for s in sources)).stdout
    files = {
        "a.tsv": ("".join(f"{s}\tirrelevant words\n" for s in sources), []),
        "b.jsonl": ("".join(json.dumps({"en": s, "de": "x"}) + "\n" for s in sources), ["--source-field", "en"]),
        "c.tsv": ("de\ten\n" + "".join(f"x\t{s}\n" for s in sources), ["--source-field", "en"]),
    }
    for name, (content, options) in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        done = CliRunner().invoke(app, ["predict", str(model), str(tmp_path / name), "--num-beams", "1", *options])
        assert done.exit_code == 0 and done.stdout == wanted, (name, done.stderr)
    (tmp_path / "d.csv").write_text("a,b\n", encoding="utf-8")
    (tmp_path / "e.jsonl").write_text('{"0": null}\n', encoding="utf-8")
    for name, message in (("d.csv", "save it as .tsv"), ("e.jsonl", "line 1: expected text, got NoneType")):
        done = CliRunner().invoke(app, ["predict", str(model), str(tmp_path / name)])
        assert done.exit_code == 2 and message in done.stderr


def test_a_reader_that_goes_away_ends_predict_quietly(model: Path) -> None:
    command = [sys.executable, "-m", "urform.cli.main", "predict", str(model), "--num-beams", "1", "-q"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stdin.write(b"red dog\n" * 50)
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_a_refusal_of_many_families_is_many_lines(tmp_path: Path) -> None:
    import urform as package

    config = package.UrformConfig(
        architecture="decoder", vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, norm_position="sandwich", position_encoding="none", gated_mlp=True, embedding_norm=True,
    )  # fmt: skip
    package.UrformForCausalLM(config).save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "model"), str(tmp_path / "out")])
    assert done.exit_code == 2
    lines = done.stderr[done.stderr.index("urform: ") :].splitlines()
    assert len(lines) > 5 and max(map(len, lines)) < 1500


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
    assert "--resume continues" in errors.splitlines()[-1] and "Traceback" not in errors
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    done = urform("train", recipe, f"max_steps={step + 2}", "-o", tmp_path / "out", "--resume", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == step + 2
