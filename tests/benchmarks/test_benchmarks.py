"""The benchmarks: the harness, what it is fed with, and each script with tiny sizes."""

import gzip
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

from urform import Layout, T5Bias, UrformTokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import attention  # noqa: E402
import families  # noqa: E402
import generate  # noqa: E402
import harness  # noqa: E402
import train_step  # noqa: E402
import workloads  # noqa: E402
from harness import Bench, Contender  # noqa: E402

TINY = ["--quick", "--threads", "1", "--repeats", "2", "--warmup", "1", "--no-record"]


def make_bench(*argv: str) -> Bench:
    options = harness.arguments("", repeats=3).parse_args(["--threads", "1", *argv])
    return Bench("test", options, argv)


# --------------------------------------------------------------------------------------------------------- harness


def test_harness_alone_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(BENCHMARKS / "harness.py"), run_name="__main__")
    runpy.run_path(str(BENCHMARKS / "workloads.py"), run_name="__main__")
    assert capsys.readouterr() == ("", "")


def test_summary() -> None:
    assert harness.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "p10": 1.4, "p90": 4.6, "n": 5}


def test_rounds_rotate_and_follow_the_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SHORTEST_SAMPLE", 0.0)  # one call per sample
    bench = make_bench("--warmup", "2", "--no-record")
    seen: list[tuple[str, int]] = []
    contenders = [Contender(side, "", lambda i, side=side: seen.append((side, i))) for side in ("urform", "a", "b")]
    bench.compare("x", {}, contenders)
    assert seen[:6] == [(side, i) for side in ("urform", "a", "b") for i in (3, 4)]
    assert seen[6:] == [
        ("urform", 0),
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("b", 1),
        ("urform", 1),
        ("b", 2),
        ("urform", 2),
        ("a", 2),
    ]


def test_short_calls_are_repeated_in_a_sample() -> None:
    calls = []
    row = make_bench("--no-record", "--seconds", "0").compare("x", {}, [Contender("urform", "", calls.append)])
    times = row["measured"]["urform"]["calls"]
    assert times > 100 and len(calls) == 2 + 3 * times


def test_ratios_take_each_sides_best_within_a_group() -> None:
    samples = {
        "urform fp32": [1.0, 1.0, 1.0],
        "urform bf16": [2.0, 2.0, 2.0],
        "marian fp32": [9.0, 9.0, 9.0],
        "marian bf16": [4.0, 6.0, 5.0],
        "other": [7.0, 7.0, 7.0],
    }

    def measured(groups: dict[str, str]) -> dict[str, Any]:
        return {
            name: {
                "side": name.split()[0],
                "group": groups.get(name, ""),
                "seconds": harness.summary(s),
                "peak_bytes": int(100 * s[0]),
            }
            for name, s in samples.items()
        }

    found = harness.ratios(measured({}), samples)
    assert [(r["ours"], r["peer"]) for r in found] == [("urform fp32", "marian bf16"), ("urform fp32", "other")]
    assert found[0]["speedup"]["median"] == 5 and found[0]["speedup"]["p90"] == pytest.approx(5.8)
    assert found[0]["speedup"]["overall"] == 5 and found[0]["memory"] == 0.25
    found = harness.ratios(measured({name: name.partition(" ")[2] for name in samples}), samples)
    assert [(r["ours"], r["peer"]) for r in found] == [("urform fp32", "marian fp32"), ("urform bf16", "marian bf16")]


def test_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = make_bench("--repeats", "2", "--dirty")
    bench.results = tmp_path / "results" / "test.jsonl"

    def broken(round_: int) -> None:
        raise NotImplementedError("not on this machine\nand more")

    peers = [Contender("plain", "", lambda i: torch.ones(3)), Contender("broken", "", broken)]
    bench.compare("x", {"n": 3}, [Contender("urform", "", lambda i: torch.ones(3)), *peers], work=lambda i: 10 + i)
    bench.compare("y", {"n": 4}, [Contender("urform", "", lambda i: torch.ones(4))], memory=True)
    bench.finish()
    rows = [json.loads(line) for line in bench.results.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["x", "y"] and rows[0]["configuration"] == {"n": 3}
    assert rows[0]["errors"] == {"broken": "NotImplementedError: not on this machine"}
    entry = rows[0]["measured"]["urform"]
    assert entry["rate"]["n"] == 2 and entry["rate"]["overall"] > 0 and set(rows[0]["measured"]) == {"urform", "plain"}
    assert rows[0]["device"]["kind"] == "cpu" and rows[0]["device"]["cpu"] and "flags" in rows[0]["device"]
    assert rows[0]["versions"]["torch"] == torch.__version__ and rows[0]["threads"] == 1
    assert {"commit", "dirty", "changed", "date", "command"} <= rows[0].keys()
    assert rows[1]["measured"]["urform"]["peak_bytes"] >= 16
    shown = capsys.readouterr().out
    assert "urform / plain" in shown and "not on this machine" in shown


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clean repository that the harness takes for its own."""
    root = tmp_path / "repository"
    (root / "benchmarks" / "results").mkdir(parents=True)
    for name in ("model.py", "README.md", "benchmarks/results/test.jsonl", "benchmarks/results/README.md"):
        (root / name).write_text("x\n")
    who = ["-c", "user.name=me", "-c", "user.email=me@host", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    monkeypatch.setattr(harness, "ROOT", root)
    monkeypatch.setattr(harness, "RESULTS", root / "benchmarks" / "results")
    return root


def test_rows_say_what_was_dirty_and_do_not_make_the_next_ones_dirty(repository: Path) -> None:
    ours = [Contender("urform", "", lambda i: None)]
    for _ in range(2):  # the second run finds the first one's rows
        bench = make_bench("--repeats", "1")
        row = bench.compare("x", {}, ours)
        (repository / "README.md").write_text("edited while it runs\n")
        (repository / "benchmarks" / "results" / "README.md").write_text("edited\n")
        later = bench.compare("y", {}, ours)
        assert (row["dirty"], row["changed"], later["dirty"]) == (False, [], False)
    assert len((repository / "benchmarks" / "results" / "test.jsonl").read_text().splitlines()) == 5
    (repository / "model.py").write_text("edited\n")
    (repository / "new.py").write_text("not known to git\n")
    with pytest.raises(SystemExit, match=r"clean tree, and model\.py, new\.py differ from \w+: commit them"):
        make_bench()
    assert make_bench("--no-record").code["dirty"]
    assert make_bench("--dirty").compare("x", {}, ours)["changed"] == ["model.py", "new.py"]


def test_our_own_failure_is_raised() -> None:
    def broken(round_: int) -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        make_bench("--no-record").compare("x", {}, [Contender("urform", "", broken)])


def test_time_limit_leaves_three_rounds() -> None:
    bench = make_bench("--no-record", "--repeats", "9", "--seconds", "0")
    row = bench.compare("x", {}, [Contender("urform", "", lambda i: time.sleep(0.03))], work=lambda i: 1)
    assert row["measured"]["urform"]["seconds"]["n"] == row["measured"]["urform"]["rate"]["n"] == 3


def test_a_mask_that_is_there_before_counts_as_memory() -> None:
    contenders = [Contender("urform", "", lambda i: None), Contender("peer", "", lambda i: None, held=1 << 20)]
    row = make_bench("--no-record").compare("x", {}, contenders, memory=True)
    assert [entry["peak_bytes"] for entry in row["measured"].values()] == [0, 1 << 20]


def test_peak_counts_what_lives_at_once() -> None:
    kept = torch.ones(1 << 18)  # 1 MiB, before

    def call(round_: int) -> None:
        for _ in range(3):
            a = torch.empty(1 << 18)
            b = torch.empty(1 << 19)
            del a, b
        torch.empty(1 << 16)

    assert harness.peak_bytes(call, "cpu") == 3 << 20
    del kept


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plot", "x.png"], r"pip install -e '.*\[bench\]'"),
        (["--device", "cuda"], "--device cpu"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_wrong_use(argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        make_bench(*argv)


def test_unknown_configuration() -> None:
    with pytest.raises(SystemExit, match="--only nothing"):
        generate.main([*TINY, "--only", "nothing"])


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra (urform[bench])")
    bench = make_bench("--no-record", "--plot", str(tmp_path / "x.png"))
    bench.compare("x", {}, [Contender(side, "", lambda i: torch.ones(3)) for side in ("urform", "plain")])
    bench.finish()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------- workloads


def padding(grouped: bool, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    source = workloads.ENGLISH.draw(29_000, generator)
    target = (source + workloads.GERMAN_MORE.draw(29_000, generator)).clamp(min=4)
    batches = workloads.epoch(source.tolist(), 128, grouped, seed)
    real = sum(int(source[b].sum() + target[b].sum()) for b in batches)
    return sum(128 * int(source[b].max() + target[b].max()) for b in batches) / real


def test_generated_lengths_pad_as_the_corpus_does() -> None:
    for grouped, corpus in ((False, 2.16), (True, 1.29)):
        found = [padding(grouped, seed) for seed in range(3)]
        assert sum(found) / 3 == pytest.approx(corpus, rel=0.03), found


def test_few_grouped_batches_stand_for_the_epoch() -> None:
    lengths = workloads.ENGLISH.draw(29_000, torch.Generator().manual_seed(0)).tolist()
    chosen = workloads.choose(lengths, 128, True, 7)
    assert sum(lengths[i] for b in chosen for i in b) / (7 * 128) == pytest.approx(16.1, abs=0.5)
    assert len({i for b in chosen for i in b}) == 7 * 128


def test_batches_are_those_of_the_collator() -> None:
    texts = ["a cat sat on the mat", "a dog", "the dog ran to a cat"]
    tokenizer = UrformTokenizer.train(texts, vocab_size=300)
    workload = workloads.translators(workloads.SMALL.quick(), ("sdpa",))
    model = workload["marian", "sdpa"]
    model.config.pad_token_id = model.config.decoder_start_token_id = tokenizer.pad_token_id
    features = [{"input_ids": tokenizer(t)["input_ids"], "labels": tokenizer(t[::-1])["input_ids"]} for t in texts]
    sides = [[torch.tensor(f[key]) for f in features] for key in ("input_ids", "labels")]
    wanted = DataCollatorForSeq2Seq(tokenizer, model)([dict(f) for f in features])
    batch = workloads.seq2seq_batch(*sides)
    assert batch.keys() == wanted.keys() and tokenizer.pad_token_id == workloads.PAD
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[key], wanted[key]), key
    assert torch.equal(batch["decoder_input_ids"][:, 1:], wanted["decoder_input_ids"][:, 1:])
    assert (batch["decoder_input_ids"][:, 0] == workloads.BOS).all()
    assert workloads.real_tokens(batch) == sum(len(ids) for side in sides for ids in side)


@pytest.mark.parametrize(
    "make",
    [
        lambda size: workloads.translators(size, ("sdpa", "eager")),
        lambda size: workloads.encoders(size, True),
        lambda size: workloads.encoders(size, False),
        workloads.t5,
        workloads.bart,
    ],
    ids=["marian", "bert-mlm", "bert", "t5", "bart"],
)
def test_peers_have_as_many_parameters_as_ours(make: Any) -> None:
    models = make(workloads.SMALL.quick())
    counts = {key: sum(p.numel() for p in m.parameters() if p.requires_grad) for key, m in models.items()}
    assert {side for side, _ in counts} > {"urform"} and len(counts) == 3
    assert len(set(counts.values())) == 1, counts
    for (side, variant), model in models.items():
        assert model.config._attn_implementation == ("urform" if side == "urform" else variant)


def test_real_data(tmp_path: Path) -> None:
    for language in ("en", "de"):
        (tmp_path / f"train.{language}").write_text("two words\nand three words\n" * 3)
        with gzip.open(tmp_path / f"train.{language}.gz", "wt") as file:
            file.write(f"two words in {language}\nand three words more\n" * 3)
    source, target = workloads.multi30k(tmp_path, 300)
    assert len(source) == len(target) == 6 and all(ids[-1] == workloads.EOS for ids in [*source, *target])


# --------------------------------------------------------------------------------------------------------- scripts


def test_contenders_of_attention_compute_the_same() -> None:
    q, k, v = (torch.randn(1, 11, 2, 8, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([4, 7])
    sequence = torch.repeat_interleave(torch.arange(2), lengths)
    mask = (sequence[:, None] == sequence[None]).tril()
    layout = attention.packed_layout(lengths, "cpu")
    dense = attention.sdpa(q, k, v, attn_mask=mask).transpose(1, 2)
    assert torch.allclose(attention.eager(q, k, v, attn_mask=mask).transpose(1, 2), dense)
    assert torch.allclose(attention.ours(q[0], k[0], v[0], layout=layout, causal=True), dense[0])
    table = torch.randn(32, 2, dtype=torch.float64)
    places = torch.arange(11)
    buckets = T5Bias(table, bidirectional=True, max_distance=128).bucket(places[None] - places[:, None])
    with_bias = attention.sdpa_t5(q, k, v, table, buckets=buckets).transpose(1, 2)
    assert torch.allclose(attention.ours(q, k, v, table, layout=Layout.full(1, 11)), with_bias)


def test_passes_leave_no_gradients() -> None:
    made: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        made[:] = [q, k, v, table]
        return q * table.sum() + k * v

    attention.passes(attend, (2, 3), torch.float32, "cpu", torch.ones(4))(0)
    assert len(made) == 4 and all(leaf.requires_grad and leaf.grad is None for leaf in made)


def test_step_changes_the_weights_and_leaves_no_gradients() -> None:
    size = workloads.SMALL.quick()
    model = workloads.translators(size, ())["urform", ""]
    batch = workloads.seq2seq_batch([torch.tensor([5, 6, 2]), torch.tensor([7, 2])], [torch.tensor([8, 2])] * 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step.training(model, [batch], train_step.own_loss, bf16=True)(0)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "k_proj.bias" not in name)


SCRIPTS = {
    train_step: ["d128-default", "d512-grouped", "bert-mlm", "bert-backbone", "t5-base", "bart-base"],
    attention: ["packed-causal", "packed-full", "short-17", "short-128", "t5-1024", "full-d128-1024"],
    generate: ["d128-greedy", "d512-beam4"],
    families: ["t5-train", "roberta-train", "llama-train", "bart-generate", "gpt2-generate"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_script(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = script.main([*TINY, "--only", *SCRIPTS[script]])
    assert [row["name"] for row in rows] == SCRIPTS[script]
    for row in rows:
        assert row["quick"] and row["ratios"], row["name"]
        # on the CPU, cuDNN has no attention and FlexAttention no backward pass
        assert {name.split()[0] for name in row["errors"]} <= {"sdpa-cudnn", "flex"}, row["errors"]
        for ratio in row["ratios"]:
            assert ratio["ours"].startswith("urform") and ratio["speedup"]["n"] == 2
    assert "x as fast" in capsys.readouterr().out


def test_configurations_of_the_other_device_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    cases = {name: (device, lambda bench, name: ran.append(name)) for name, (device, _) in attention.CASES.items()}
    monkeypatch.setattr(attention, "CASES", cases)
    monkeypatch.setattr(Bench, "finish", lambda self: self.rows)
    attention.main(TINY)
    assert ran == ["packed-causal", "packed-full", "short-17", "short-128", "t5-1024"]
    ran.clear()
    monkeypatch.setattr(harness, "machine", lambda device: {"device": {"cpu": "", "flags": []}, "threads": 1})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    attention.main([*TINY, "--device", "cuda"])
    assert len(ran) == 22 and "t5-32768" in ran and "causal-d64-1024" in ran
