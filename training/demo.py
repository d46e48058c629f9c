"""The demonstration: from scratch to a trained translator of dates, amounts and names, in minutes on two cores."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import set_seed

from ..dependencies import missing_dependency
from .data_files import open_lines
from .metrics import TranslationScores, score_translations
from .model_building import build_model, train_tokenizer
from .recipe import Recipe, load_recipe
from .run import train
from .tasks import Labels, read_split
from .translation import translate

__all__ = ["DEFAULT_SENTENCES", "DemoResult", "demo"]

DEFAULT_SENTENCES = (
    "<2de> Friday, March 14, 2031",
    "<2zh> Friday, March 14, 2031",
    "<2de> 7:45 PM",
    "<2de> 1,234.50 US dollars",
    "<2zh> 86.4 square kilometers",
    "<2de> Portuguese (Brazil)",
    "<2zh> Chile, Japan, and Kenya",
)


@dataclass
class DemoResult:
    """What the demonstration measured.

    Attributes:
        before: Scores of the untrained model on (a sample of) the held-out phrases.
        after: Scores of the trained model on all of them.
        exact_match_by_kind: Percent of held-out phrases translated exactly, per kind of phrase.
        translations: (sentence, translation) by the new process.
        seconds: Wall-clock time of everything.
        num_parameters: Size of the model.
    """

    before: TranslationScores
    after: TranslationScores
    exact_match_by_kind: dict[str, float]
    translations: list[tuple[str, str]]
    seconds: float
    num_parameters: int = field(default=0)


def demo(
    sentences: Sequence[str] = (),
    *,
    output_dir: str | Path = "outputs/demo",
    overrides: Sequence[str] = (),
    train_phrases: int = 60_000,
    test_phrases: int = 600,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Make the corpus, train tokenizer and model, score them before and after, and translate in a new process.

    Args:
        sentences: English phrases with a language tag in front; without any, `DEFAULT_SENTENCES`.
        output_dir: Corpus, checkpoints and the finished model; an earlier demonstration there is replaced.
        overrides: Changes to the recipe `demo`.
        train_phrases: Size of the training corpus.
        test_phrases: Number of held-out phrases.
        seed: For the corpus.
        say: Where progress goes, line by line.

    Raises:
        ValueError: If `output_dir` holds something other than a demonstration, or babel is not installed.
    """
    start = time.monotonic()
    folder = Path(output_dir)
    _clear(folder)
    kinds = _write_corpus(folder / "data", train_phrases, test_phrases, seed)
    say(f"corpus: {train_phrases} phrases to train on, {test_phrases} held out, e.g.")
    recipe = load_recipe("demo", [f"data.data_dir={folder / 'data'}", *overrides], output_dir=folder / "model")
    test: list[tuple[str, str]] = list(read_split(recipe.data, "test"))
    for source, target in sorted(test, key=_is_copy)[:4]:
        say(f"    {source}  ->  {target}")

    before = _untrained(recipe, test[: min(200, len(test))], seed)
    say(f"before training: exact match {before.exact_match:.1f}%, chrF {before.chrf:.1f}")
    with redirect_stdout(sys.stderr), _one_thread():  # Trainer prints its log
        result = train(recipe)
    metrics = result.metrics
    say(f"trained {metrics['num_parameters']:,} parameters, {result.steps} steps, {metrics['train_runtime']:.0f} s")
    after = TranslationScores(**result.metrics["test"])
    hypotheses = open_lines(result.output_dir / "test_predictions.txt")
    by_kind: dict[str, list[bool]] = {}
    for kind, (_, target), hypothesis in zip(kinds, test, hypotheses, strict=True):
        by_kind.setdefault(kind, []).append(hypothesis == target)
    shares = {kind: 100 * sum(right) / len(right) for kind, right in sorted(by_kind.items())}
    say(f"after training, {len(test)} held-out phrases: exact match {after.exact_match:.1f}%, chrF {after.chrf:.1f}")
    say("    " + ", ".join(f"{kind} {share:.0f}%" for kind, share in shares.items()))

    wanted = list(sentences) or list(DEFAULT_SENTENCES)
    say(f"a new process loads {result.output_dir} and translates:")
    translations = list(zip(wanted, _in_new_process(result.output_dir, wanted), strict=True))
    for source, translation in translations:
        say(f"    {source}  ->  {translation}")
    seconds = time.monotonic() - start
    say(f"done in {seconds:.0f} s; what to try next:")
    say(f"    echo '{wanted[0]}' | urform predict {result.output_dir}")
    say(
        f"    urform push {result.output_dir} --bundle-only outputs/bundle    # or --repo-id NAMESPACE/NAME: publish it"
    )
    return DemoResult(before, after, shares, translations, seconds, result.metrics["num_parameters"])


def _is_copy(pair: tuple[str, str]) -> bool:
    """Return whether the target of a pair is its source without the language tag."""
    return pair[0].partition("> ")[2] == pair[1]


@contextmanager
def _one_thread() -> Iterator[None]:
    # The operations of so small a model take microseconds: a second thread gains little, and where another program
    # wants its core every one of them waits for a time slice (measured: 100 times slower).
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _clear(folder: Path) -> None:
    if folder.exists():
        strangers = {item.name for item in folder.iterdir()} - {"data", "model"}
        if strangers:
            raise ValueError(
                f"{folder} holds more than a demonstration ({min(strangers)}): choose another --output-dir"
            )
        shutil.rmtree(folder)


def _write_corpus(folder: Path, train_phrases: int, test_phrases: int, seed: int) -> list[str]:
    try:
        from .demo_corpus import generate_corpus
    except ModuleNotFoundError as error:
        raise missing_dependency(error.name or "babel", "the demonstration", "demo") from error

    folder.mkdir(parents=True)
    kinds: list[str] = []
    for split, size in (("train", train_phrases), ("test", test_phrases)):
        phrases = generate_corpus(split, size, seed)
        lines = "".join(f"{phrase.source}\t{phrase.target}\n" for phrase in phrases)
        (folder / f"{split}.tsv").write_text(lines, encoding="utf-8")
        kinds = [phrase.kind for phrase in phrases]
    return kinds


def _untrained(recipe: Recipe, pairs: Sequence[tuple[str, str]], seed: int) -> TranslationScores:
    """Score the same model with its first random weights. Most of its output never ends, so it is cut."""
    set_seed(seed)
    sample = list(read_split(recipe.data, "train"))[:5000]
    tokenizer = train_tokenizer(recipe, sample)
    model = build_model(recipe, tokenizer, Labels())
    texts = [source for source, _ in pairs]
    hypotheses = translate(model, tokenizer, texts, num_beams=1, batch_size=200, max_new_tokens=32)
    return score_translations(hypotheses, [target for _, target in pairs], "de")


def _in_new_process(model_dir: Path, sentences: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "urform.cli.main", "predict", str(model_dir), "--num-beams", "1", "--quiet"]
    lines = "".join(f"{sentence}\n" for sentence in sentences)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"the new process failed: {done.stderr.strip()}")
    return done.stdout.splitlines()
