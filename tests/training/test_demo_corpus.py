"""The CLDR corpus: what is held out is held out, and the demonstration runs from end to end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from babel.dates import format_date, format_datetime

from urform.training.demo import demo
from urform.training.demo_corpus import LANGUAGES, generate_corpus, language_tag, split_of


def test_the_corpus_is_deterministic_and_different_per_seed() -> None:
    assert generate_corpus("train", 300, seed=5) == generate_corpus("train", 300, seed=5)
    assert generate_corpus("train", 300, seed=5) != generate_corpus("train", 300, seed=6)
    with pytest.raises(ValueError, match="split must be"):
        generate_corpus("validation", 3)


def test_no_number_date_or_minute_of_the_test_occurs_in_training() -> None:
    # Read back from the written text, not from the generator's own bookkeeping.
    seen: dict[str, dict[str, set[str]]] = {}
    for split in ("train", "test"):
        atoms = seen.setdefault(split, {"number": set(), "date": set(), "minute": set()})
        for phrase in generate_corpus(split, 8000 if split == "train" else 1500):
            text = phrase.source.split(" ", 1)[1]
            if phrase.kind in ("number", "percent", "currency", "currency_name", "unit"):
                digits = "".join(re.findall(r"[\d.,]*\d", text)).replace(",", "")
                atoms["number"].add(digits.rstrip("0").rstrip(".") if "." in digits else digits)
            if phrase.kind in ("time", "datetime"):
                clock = re.search(r"(\d+:\d\d)(?::\d\d)? ([AP]M)", text)
                assert clock is not None
                atoms["minute"].add(f"{clock[1]} {clock[2]}")
            if phrase.kind in ("date", "datetime") and phrase.language == "zh":
                numbers = re.findall(r"\d+", phrase.target)[:3]
                atoms["date"].add("-".join(numbers))
    for kind in ("number", "date", "minute"):
        assert len(seen["test"][kind]) > 100
        assert not seen["test"][kind] & seen["train"][kind], kind


def test_names_are_all_seen_but_their_combinations_are_not() -> None:
    corpora = {split: generate_corpus(split, size) for split, size in (("train", 20000), ("test", 1500))}
    parts: dict[str, set[str]] = {}
    combinations: dict[str, set[frozenset[str]]] = {}
    for split, phrases in corpora.items():
        for phrase in phrases:
            if phrase.kind in ("language_in_territory", "territory_list", "language_list"):
                text = phrase.source.split(" ", 1)[1]
                names = frozenset(re.split(r", and |, or | and | or |, | \(|\)", text)) - {""}
                parts.setdefault(split, set()).update(names)
                combinations.setdefault(split, set()).add(names)
    assert parts["test"] <= parts["train"]
    assert not combinations["test"] & combinations["train"]


def test_targets_are_what_cldr_says() -> None:
    import datetime

    day = datetime.date(2031, 3, 14)
    targets = {phrase.source: phrase.target for split in ("train", "test") for phrase in generate_corpus(split, 5000)}
    assert all(source.startswith(tuple(map(language_tag, LANGUAGES))) for source in targets)
    assert not any("\u00a0" in text or "\u202f" in text for pair in targets.items() for text in pair)
    assert split_of("date", day.isoformat()) in ("train", "test")
    full = {s: t for s, t in targets.items() if re.search(r"> \w+day, \w+ \d+, \d{4}$", s)}
    assert len(full) > 100
    for source, target in full.items():
        value = datetime.datetime.strptime(source.split(" ", 1)[1], "%A, %B %d, %Y")
        assert target == format_date(value, "full", locale=source[2:4])
        assert format_datetime(value, "EEEE, MMMM d, y", locale="en") == source.split(" ", 1)[1]


@pytest.mark.timeout(180)
def test_the_demonstration_runs(tmp_path: Path) -> None:
    lines: list[str] = []
    result = demo(
        ["<2de> 7:45 PM", "<2zh> 12 kilometers"],
        output_dir=tmp_path / "demo",
        overrides=["max_steps=20", "model.config.hidden_size=32", "use_cpu=true", "disable_tqdm=true"],
        train_phrases=400,
        test_phrases=20,
        say=lines.append,
    )
    assert [source for source, _ in result.translations] == ["<2de> 7:45 PM", "<2zh> 12 kilometers"]
    assert result.after.examples == 20 and result.num_parameters < 5_000_000
    assert any("before training: exact match" in line for line in lines)
    (tmp_path / "demo" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        demo(output_dir=tmp_path / "demo")
