"""One reader for every text file and stream: what it reads, and what it refuses by file and line."""

import bz2
import gzip
import io
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction
from typer.testing import CliRunner

from urform import UrformConfig, UrformForConditionalGeneration, UrformTokenizer
from urform.cli.main import app
from urform.tokenization.text_files import decode_lines, open_lines
from urform.training.data_files import read_records
from urform.training.metrics import metric_function
from urform.training.recipe import DataArguments, load_recipe
from urform.training.run import predict, translate
from urform.training.tasks import read_split

LINES = ["the quick brown fox", "", "jumps over\u2028the lazy dog\x0b", "über \x00 \ufeffnull", "今天天气", "a\rb"]
TEXT = "\n".join(LINES) + "\n"
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def read(path: Path) -> list[str]:
    return list(open_lines(path))


def train_on(path: Path) -> list[str]:
    UrformTokenizer.train(files=path, vocab_size=300)
    return read(path)


def train_on_texts(path: Path) -> list[str]:
    UrformTokenizer.train([path], vocab_size=300)
    return read(path)


READERS = [read, train_on, train_on_texts]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", [*PACK, ".GZ"])
def test_what_is_read(tmp_path: Path, suffix: str, reader: Callable[[Path], list[str]]) -> None:
    pack = PACK[suffix.lower()]
    for name, data in {
        "plain": TEXT.encode(),
        "no-end": TEXT.removesuffix("\n").encode(),
        "bom": TEXT.encode("utf-8-sig"),
        "crlf": TEXT.replace("\n", "\r\n").encode(),
        "both": TEXT.replace("\n", "\r\n").encode("utf-8-sig"),
    }.items():
        path = tmp_path / f"{name}.txt{suffix}"
        path.write_bytes(pack(data))
        assert reader(path) == LINES, name
    (tmp_path / f"two.txt{suffix}").write_bytes(pack(b"one\n") + pack(b"two\n"))  # archives one after the other
    assert reader(tmp_path / f"two.txt{suffix}") == ["one", "two"]


def test_a_byte_order_mark_and_the_archive_do_not_change_the_vocabulary(tmp_path: Path) -> None:
    expected = UrformTokenizer.train(LINES, vocab_size=400).get_vocab()
    for suffix, pack in PACK.items():
        path = tmp_path / f"text{suffix}"
        path.write_bytes(pack(TEXT.replace("\n", "\r\n").encode("utf-8-sig")))
        assert UrformTokenizer.train(files=path, vocab_size=400).get_vocab() == expected


WIDE = "abc\ndef\n"
BAD: dict[str, tuple[bytes, str]] = {
    "torn.gz": (gzip.compress(TEXT.encode() * 99)[:-20], "line .*damaged"),
    "torn.xz": (lzma.compress(TEXT.encode() * 99)[:-40], "line .*damaged"),
    "torn.bz2": (bz2.compress(TEXT.encode() * 99)[:-20], "line .*damaged"),
    "spoilt.gz": (gzip.compress(TEXT.encode())[:-8] + b"12345678", "line .*damaged"),
    "spoilt.bz2": (bz2.compress(TEXT.encode())[:20] + b"12345678" * 9, "line .*damaged"),
    "fake.gz": (TEXT.encode(), r"line 1: not a \.gz file"),
    "fake.xz": (TEXT.encode(), r"line 1: not a \.xz file"),
    "fake.bz2": (TEXT.encode(), r"line 1: not a \.bz2 file"),
    "empty.gz": (b"", r"line 1: not a \.gz file"),
    "hidden.txt": (gzip.compress(TEXT.encode()), r"line 1: not text but \.gz"),
    "utf16.txt": (WIDE.encode("utf-16"), "line 1: not UTF-8 but UTF-16"),
    "utf16be.txt": (b"\xfe\xff" + WIDE.encode("utf-16-be"), "line 1: not UTF-8 but UTF-16"),
    "utf32.txt": (WIDE.encode("utf-32"), "line 1: not UTF-8 but UTF-16"),
    "utf16-without-mark.txt": (WIDE.encode("utf-16-le"), "line 1: not text"),
    "zeroed.txt": (b"good\n" + bytes(4096), "line 2: not text"),
    "latin.txt": ("gut\nüber".encode("latin-1"), "line 2: not UTF-8 .*byte 0"),
    "surrogate.txt": (b"gut\ngut\n\xed\xa0\xbd cut emoji\n", "line 3: not UTF-8"),
    "latin.txt.gz": (gzip.compress("gut\nüber".encode("latin-1")), "line 2: not UTF-8"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_by_file_and_line(tmp_path: Path, name: str, reader: Callable[[Path], list[str]]) -> None:
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}, (after )?{message}"):
        reader(tmp_path / name)


@pytest.mark.parametrize("reader", READERS)
def test_folders_and_missing_files(tmp_path: Path, reader: Callable[[Path], list[str]]) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path.name} is a folder"):
        reader(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        reader(tmp_path / "absent.txt")


def test_the_machines_own_errors_are_not_the_archives() -> None:
    class Broken(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        list(decode_lines(Broken(), "broken"))


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("character", ["a", "é", "語"])
def test_the_longest_line(tmp_path: Path, character: str, end: str) -> None:
    path, size = tmp_path / "long.txt", len(character.encode())
    path.write_bytes(f"short\n{character * 100}{end}".encode())
    assert list(open_lines(path, 100 * size)) == ["short", character * 100] == list(open_lines(path, None))
    for limit in (100 * size - 1, 50 * size + 1, 7):
        with pytest.raises(ValueError, match=rf"long\.txt, line 2: .* max_line_bytes={limit}: .*raise the limit"):
            list(open_lines(path, limit))
    with pytest.raises(ValueError, match="max_line_bytes=0 must be positive"):
        list(open_lines(path, 0))


@pytest.mark.parametrize("suffix", PACK)
def test_ten_megabytes_in_one_line_are_refused_at_once(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"long.txt{suffix}"
    path.write_bytes(PACK[suffix](b"good\n" + b"0123456789" * 1_000_000))
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"long\.txt{suffix}, line 2: longer than max_line_bytes=1000000"):
        UrformTokenizer.train(files=path, vocab_size=300)
    for data in (DataArguments(train_file=str(path), task="causal-lm"), DataArguments(train_source=str(path),
                 train_target=str(path))):  # fmt: skip
        with pytest.raises(ValueError, match=r"line 2: longer than max_line_bytes=1000000"):
            list(read_split(data, "train"))
    assert time.monotonic() - start < 10
    data = DataArguments(train_file=str(path), task="causal-lm", max_line_bytes=None)
    assert [len(text) for (text,) in read_split(data, "train")] == [4, 10_000_000]


def test_a_long_word_does_not_stop_training() -> None:
    """The time grew with the square of a word's length: 100 s were not enough for this one."""
    start = time.monotonic()
    for model in ("bpe", "byte-bpe", "wordpiece"):
        tokenizer = UrformTokenizer.train(["the quick brown fox", "a" * 300_000], vocab_size=400, model=model)
        assert tokenizer.decode(tokenizer("the fox" + "a" * 700)["input_ids"], skip_special_tokens=True).endswith("aaa")
    assert time.monotonic() - start < 20


# --- records -----------------------------------------------------------------------------------------------------
GOOD = '{"s": "one", "t": "eins"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"s": "cut \ud83d emoji", "t": "x"}', r"'\\ud83d' at character 4"),
        ('{"s": null, "t": "x"}', "expected text, got NoneType"),
        ('{"s": 5, "t": "x"}', "expected text, got int: 5"),
        ('{"s": NaN, "t": "x"}', "expected text, got float"),
        ('{"s": ["a"], "t": "x"}', "expected text, got list"),
        ('{"s": "a", "t": ' + "9" * 5000 + "}", "expected text, got int|not usable as JSON"),
        ('{"s": ' + "[" * 100_000, "not usable as JSON|not valid JSON"),
        ('{"s": "a"}', "no field 't'; the line has: s"),
        ('"s"', "expected a JSON object, got str"),
        ("{'s': 'a'}", "not valid JSON"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(GOOD * 3 + "\n" + line + "\n" + GOOD, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"odd\.jsonl, line 5: ({message})"):
        list(read_records(path, ["s", "t"]))


def test_odd_records_that_are_right(tmp_path: Path) -> None:
    path = tmp_path / "odd.JSONL"
    records = [
        {"s": "n\x00ul", "t": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")},
        {"s": "", "t": "\xa0"},
    ]
    lines = [json.dumps(record) for record in records]
    path.write_bytes("\r\n".join([lines[0], "", lines[1], "  ", ""]).encode("utf-8-sig"))
    assert list(read_records(path, ["s", "t"])) == [("n\x00ul", "😀"), ("", "\xa0")]
    (tmp_path / "a.tsv").write_bytes('s\tt\r\n"q" \'\t b\t\r\n'.encode("utf-8-sig"))
    assert list(read_records(tmp_path / "a.tsv", ["s", "t"])) == [('"q" \'', " b")]


@pytest.mark.parametrize(
    ("task", "line", "expected"),
    [
        ("token-classification", "paid 10\xa0000  euros\tO NUM O", (["paid", "10\xa0000", "euros"], ["O", "NUM", "O"])),
        ("token-classification", {"0": ["10\xa0000", "\u3000"], "1": [1, "O"]}, (["10\xa0000", "\u3000"], ["1", "O"])),
        ("token-classification", "one two three\tO O", "3 words but 2 tags"),
        ("token-classification", {"0": ["one", ""], "1": ["O", "B"]}, "word 2 is empty and has the tag 'B'"),
        ("token-classification", {"0": ["one", None], "1": ["O", "B"]}, "expected text, got NoneType"),
        ("token-classification", {"0": ["one", "two"], "1": ["O", None]}, "expected a label, got NoneType"),
        ("token-classification", {"0": ["one"], "1": 3}, "expected words and tags, got int"),
        ("text-classification", {"0": "one", "1": 3}, ("one", "3")),
        ("text-classification", {"0": "one", "1": None}, "expected a label, got NoneType"),
        ("text-classification", {"0": None, "1": "good"}, "expected text, got NoneType"),
        ("causal-lm", {"0": None}, "expected text, got NoneType"),
        ("seq2seq", {"0": "one", "1": 2}, "expected text, got int"),
    ],
)  # fmt: skip
def test_every_task_names_the_line(tmp_path: Path, task: str, line: str | dict[str, Any], expected: Any) -> None:
    path = tmp_path / ("data.tsv" if isinstance(line, str) else "data.jsonl")
    good = {"0": ["a"], "1": ["O"]} if task == "token-classification" else {"0": "a", "1": "b"}
    first, text = ("a\tO", line) if isinstance(line, str) else (json.dumps(good), json.dumps(line))
    path.write_text(f"{first}\n{text}\n", encoding="utf-8")
    examples = read_split(DataArguments(task=task, train_file=str(path)), "train")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=rf"{path.name}, line 2: {expected}"):
            list(examples)
    else:
        assert list(examples)[1] == expected


# --- streams -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = UrformTokenizer.train(["a b c", "the quick brown fox"] * 5, vocab_size=300, add_bos=False)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = UrformConfig(vocab_size=len(tokenizer), max_position_embeddings=24, **sizes)
    UrformForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bad", [0, 3, 4, 9, 14])
@pytest.mark.parametrize("text", ["long " * 60, "cut \ud83d"])
def test_an_error_in_a_line_names_it_after_all_before_came_out(model_dir: Path, bad: int, text: str) -> None:
    lines = [f"a {i}" for i in range(15)]
    options: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 2}
    right = list(predict(model_dir, lines, **options))
    lines[bad], came = text, []
    lines.append(text)
    with pytest.raises(ValueError, match=rf"here, line {bad + 1} (has|is)"):
        for line in predict(model_dir, lines, window=4, name="here", **options):
            came.append(line)
    assert came == right[:bad]


def test_an_error_in_reading_comes_after_what_was_read(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"a b\n" * 6 + b"\xff\n" + b"a b\n" * 3)
    options = ["--num-beams", "1", "--max-new-tokens", "2", "-q"]
    for arguments, data, name in (([str(path)], None, "in.txt"), ([], path.read_bytes(), "standard input")):
        done = CliRunner().invoke(app, ["predict", str(model_dir), *arguments, *options], input=data)
        assert done.exit_code == 2 and f"{name}, line 7: not UTF-8" in done.stderr
        lines = done.stdout.split("\n")
        assert len(lines) == 7 and len(set(lines[:6])) == 1 and lines[6] == ""  # the mark is not part of line 1
    path.write_bytes(b"a b\n" + b"c" * 2000)
    done = CliRunner().invoke(app, ["predict", str(model_dir), str(path), *options, "--max-line-bytes", "1000"])
    assert done.exit_code == 2 and "in.txt, line 2: longer than max_line_bytes=1000" in done.stderr


def test_a_translation_is_one_line(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    tokenizer = UrformTokenizer.from_pretrained(model_dir)
    monkeypatch.setattr(tokenizer, "batch_decode", lambda ids, **_: ["a\nb\r\nc\u2028d\x85e "] * len(ids))
    model = AutoModelForSeq2SeqLM.from_pretrained(model_dir)
    assert translate(model, tokenizer, ["a"], num_beams=1, max_new_tokens=2) == ["a b c\u2028d\x85e"]


def test_reserved_tokens_come_out_of_predictions_and_metrics(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    options: dict[str, Any] = {"special_tokens": ["<ph1>"], "languages": ["de"], "add_bos": False}
    tokenizer = UrformTokenizer.train(["a b c"] * 5, vocab_size=300, **options)
    made = [1, *tokenizer("<2de>a <ph1> b")["input_ids"], 0]
    model = UrformForConditionalGeneration.from_pretrained(model_dir)
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.tensor([made] * len(input_ids)))
    assert translate(model, tokenizer, ["x"], num_beams=1) == ["a <ph1> b"]
    recipe = load_recipe("translation", ["predict_with_generate=true", "eval_strategy=no"])
    metrics = metric_function(recipe, tokenizer)
    labels = [*tokenizer(text_target="a <ph1> b")["input_ids"], -100, -100]
    assert metrics is not None
    scores = metrics(EvalPrediction(predictions=np.array([made]), label_ids=np.array([labels])))
    assert scores["exact_match"] == 100
    labels[labels.index(tokenizer.convert_tokens_to_ids("<ph1>"))] = -100
    assert metrics(EvalPrediction(predictions=np.array([made]), label_ids=np.array([labels])))["exact_match"] == 0
