"""lm-eval on our folders and models, against the stock class with the same weights."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_models import need, save_pair, tokenizer

import urform
from urform.training.harness import evaluate_harness

QUESTIONS = [
    ("the cat sat on", [" the mat", " a dog ran", " blue"], 0),
    ("a dog", [" ran", " sat on the mat", " a"], 2),
]
GENERIC = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: question
target_delimiter: ""
"""
CHOICE = "task: own_choice\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n" + (
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
)
GENERATE = "task: own_generation\noutput_type: generate_until\ndoc_to_target: ' the mat'\n" + (
    "generation_kwargs: {until: ['\\n'], max_gen_toks: 6}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
)

PERPLEXITY = "task: own_perplexity\noutput_type: loglikelihood\ndoc_to_target: '{{choices[gold]}}'\n" + (
    "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "gold": g} for q, c, g in QUESTIONS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("generation", GENERATE), ("perplexity", PERPLEXITY)):
        generic = GENERIC.format(data=folder / "data.jsonl")
        (folder / f"{name}.yaml").write_text(text + generic, encoding="utf-8")
    return folder


def _run(model: Any, tasks: Path) -> dict[str, list[Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    result = simple_evaluate(
        model, tasks=["own_choice", "own_generation"], task_manager=TaskManager(include_path=str(tasks))
    )
    return {name: [row["filtered_resps"] for row in rows] for name, rows in result["samples"].items()}


@pytest.mark.parametrize(("family", "backend"), [("Llama", "causal"), ("Bart", "seq2seq")])
def test_folder_and_model_give_the_stock_class_s_likelihoods(family: str, backend: str, tmp_path: Path, tasks: Path):
    need("lm_eval")
    from lm_eval.models.huggingface import HFLM

    stock, ours = save_pair(family, tmp_path)
    options = {"device": "cpu", "batch_size": 4, "dtype": "float64"}  # in float32 the processor would decide
    expected = _run(HFLM(pretrained=str(stock), **options), tasks)
    loaded = urform.UrformForCausalLM if backend == "causal" else urform.UrformForConditionalGeneration
    model = HFLM(pretrained=loaded.from_pretrained(ours, dtype=torch.float64), tokenizer=tokenizer(), **options)
    for made in (HFLM(pretrained=str(ours), **options), model):
        assert made.backend == backend and type(made.model) is loaded
        found = _run(made, tasks)
        assert found["own_generation"] == expected["own_generation"]
        for got, wanted in zip(found["own_choice"], expected["own_choice"], strict=True):
            torch.testing.assert_close(*(torch.tensor([value for value, _ in row]) for row in (got, wanted)))
            assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("family", ["Llama", "Bart"])
def test_perplexity_is_the_one_computed_by_hand(family: str, tmp_path: Path, tasks: Path):
    """The tokenizer ends every sequence with </s>, which must not stand between a decoder's context and answer."""
    need("lm_eval")
    _, ours = save_pair(family, tmp_path)
    found = evaluate_harness(ours, ["own_perplexity"], include_path=tasks, batch_size=2)["own_perplexity"]
    tokens, answer = tokenizer(), lambda text: torch.tensor([tokens.encode(text, add_special_tokens=False)])
    bos, eos = torch.tensor([[tokens.bos_token_id]]), torch.tensor([[tokens.eos_token_id]])
    total = 0.0
    for question, choices, gold in QUESTIONS:
        context, continuation = answer(question), answer(choices[gold])
        if family == "Llama":
            model = urform.UrformForCausalLM.from_pretrained(ours, dtype=torch.float64)
            logits = model(torch.cat([bos, context, continuation], 1)).logits[0, context.shape[1] : -1]
        else:
            model = urform.UrformForConditionalGeneration.from_pretrained(ours, dtype=torch.float64)
            decoder_ids = torch.cat([bos, continuation[:, :-1]], 1)
            logits = model(torch.cat([bos, context, eos], 1), decoder_input_ids=decoder_ids).logits[0]
        total += logits.log_softmax(-1).gather(1, continuation[0, :, None]).sum().item()
    assert found["perplexity,none"] == pytest.approx(math.exp(-total / len(QUESTIONS)), rel=1e-5)


def test_command_prints_json_and_refuses_what_has_no_effect(tmp_path: Path, tasks: Path):
    need("lm_eval")
    _, ours = save_pair("Bart", tmp_path)

    def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
        run = [sys.executable, "-m", "urform.cli.main", "evaluate", *map(str, arguments)]
        return subprocess.run(run, capture_output=True, text=True, check=False)

    done = command(ours, "--lm-eval", "own_choice,own_generation", "--include-path", tasks, "--limit", "1", "-q")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["own_choice"]["acc,none"] in (0.0, 1.0) and scores["own_generation"]["exact_match,none"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", "3", "x.tsv"), "--limit has no effect without --lm-eval"),
        (("x.tsv", "--lm-eval", "a"), "SOURCE has no effect with --lm-eval; leave it out (write --lm-eval once per"),
        (("--lm-eval", "a", "--num-beams", "5"), "--num-beams has no effect with --lm-eval"),
        ((), "name a file to score the model on, or a task of lm-eval: --lm-eval TASK"),
    ],
)
def test_wrong_use_of_the_command(arguments: tuple[str, ...], message: str, tmp_path: Path):
    need("typer")
    from typer.testing import CliRunner

    from urform.cli.main import app

    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), *arguments])
    assert done.exit_code == 2 and message in done.stderr and done.stdout == ""


def test_missing_folders_are_refused(tmp_path: Path):
    for model, include in ((tmp_path / "none", None), (tmp_path, tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=f"no such folder: {tmp_path}/none"):
            evaluate_harness(model, ["a"], include_path=include)


def test_encoders_and_unknown_tasks_are_refused(tmp_path: Path):
    config = urform.UrformConfig(architecture="encoder", vocab_size=32, hidden_size=16, num_attention_heads=2)
    config.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="holds an encoder; lm-eval scores decoders and encoder-decoders"):
        evaluate_harness(tmp_path / "encoder", ["a"])
    need("lm_eval")
    urform.UrformConfig(architecture="decoder", vocab_size=32).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="lm-eval knows no task 'no_such_task'"):
        evaluate_harness(tmp_path / "decoder", ["no_such_task"])
