"""Scoring a trained translator on a parallel test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .metrics import TranslationScores, check_scorers, score_translations
from .translation import SearchOptions, predict

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Evaluation", "evaluate"]


@dataclass
class Evaluation:
    """Scores and the hypotheses they belong to."""

    scores: TranslationScores
    hypotheses: list[str] = field(repr=False)


def evaluate(
    model_dir: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    language: str = "en",
    prefix: str = "",
    **search: Unpack[SearchOptions],
) -> Evaluation:
    """Translate the sources and score the result against the references.

    Args:
        model_dir: See `predict`.
        pairs: (source, reference) pairs.
        language: Target language, chooses the metrics' tokenizers.
        prefix: Put before every source.
        **search: `num_beams`, `length_penalty`, `batch_size`, `max_new_tokens` and `progress`: see `translate`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no finished model, or if there is nothing to score.
    """
    check_scorers(language)
    sources = [source for source, _ in pairs]
    hypotheses = list(predict(model_dir, sources, prefix=prefix, window=max(1, len(pairs)), **search))
    return Evaluation(score_translations(hypotheses, [target for _, target in pairs], language), hypotheses)
