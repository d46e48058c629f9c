"""Metrics: of translations sacreBLEU on raw text, BLEU on tokenized lower-cased text, chrF, exact match; accuracy.

Published results on Multi30k are nearly always BLEU on text that was lower-cased, had its punctuation normalised and
was tokenized by the Moses scripts (`*.lc.norm.tok.*`), not sacreBLEU on raw text. `tokenized_lowercased_bleu` computes
that number with sacremoses, a port of those scripts. Chinese is tokenized as sacreBLEU does, Japanese, Korean and other
text whose words are not divided by spaces (Thai, Lao, Khmer, Burmese, Tibetan …) by characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dependencies import missing_dependency
from .languages import normalize_language, script_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .recipe import Recipe

__all__ = [
    "TranslationScores",
    "accuracy",
    "check_scorers",
    "metric_function",
    "score_translations",
    "tokenized_lowercased_bleu",
]


# sacreBLEU's tokenizer by script; all other scripts divide words by spaces.
_TOKENIZERS = {
    **dict.fromkeys("Hani Hans Hant Hanb".split(), "zh"),
    **dict.fromkeys("Bopo Jpan Hira Kana Hrkt Kore Hang Yiii".split(), "char"),
    **dict.fromkeys("Thai Laoo Khmr Mymr Tibt Lana Tale Talu Tavt Java Bali Cham Cakm".split(), "char"),
}


@dataclass(frozen=True)
class TranslationScores:
    """Scores of a list of hypotheses, in percent.

    Attributes:
        bleu: sacreBLEU, cased, on the raw text.
        bleu_signature: sacreBLEU's signature of it.
        bleu_tok_lc: BLEU on tokenized, lower-cased text.
        bleu_tok_lc_tokenizer: Which tokenizer that was.
        chrf: chrF2.
        chrf_signature: sacreBLEU's signature of it.
        exact_match: Hypotheses equal to their reference.
        examples: Number of hypotheses.
    """

    bleu: float
    bleu_signature: str
    bleu_tok_lc: float
    bleu_tok_lc_tokenizer: str
    chrf: float
    chrf_signature: str
    exact_match: float
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as a dict for JSON."""
        return asdict(self)


def _moses(language: str) -> tuple[Callable[[str], str], str]:
    from sacremoses import MosesPunctNormalizer, MosesTokenizer, __version__

    language = normalize_language(language).split("-")[0]
    normalizer, tokenizer = MosesPunctNormalizer(lang=language), MosesTokenizer(lang=language)
    return (
        lambda text: str(tokenizer.tokenize(normalizer.normalize(text.lower()), return_str=True, escape=False)),
        f"moses-{language} (sacremoses {__version__})",
    )


def _default_tokenizer(language: str) -> str:
    return _TOKENIZERS.get(script_of(language) or "", "13a")


def check_scorers(language: str) -> None:
    """Raise a ValueError if what scores text in this language is not installed, or if the language is unknown."""
    try:
        import sacrebleu  # noqa: F401

        if _default_tokenizer(language) == "13a":
            import sacremoses  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_dependency(error.name or "sacrebleu", "scoring translations") from error


def tokenized_lowercased_bleu(
    hypotheses: Sequence[str], references: Sequence[str], language: str = "en"
) -> tuple[float, str]:
    """Return BLEU on lower-cased, tokenized text, and the tokenizer's name.

    Args:
        hypotheses: Detokenized system output.
        references: Raw references.
        language: Language of the text: any code that `normalize_language` knows. Chooses the tokenizer.

    Raises:
        ValueError: The language is unknown.
    """
    check_scorers(language)
    from sacrebleu.metrics import BLEU

    if (sacrebleu_name := _default_tokenizer(language)) != "13a":
        score = BLEU(tokenize=sacrebleu_name, lowercase=True).corpus_score(list(hypotheses), [list(references)]).score
        return score, f"{sacrebleu_name} (sacrebleu)"
    tokenize, name = _moses(language)
    metric = BLEU(tokenize="none", force=True)
    score = metric.corpus_score([tokenize(h) for h in hypotheses], [[tokenize(r) for r in references]]).score
    return score, name


def score_translations(
    hypotheses: Sequence[str], references: Sequence[str], language: str = "en", bleu_tokenizer: str | None = None
) -> TranslationScores:
    """Return all the scores.

    Args:
        hypotheses: System output, one per reference.
        references: One reference each.
        language: Target language: any code that `normalize_language` knows, such as "de", "zho_Hans" or "pt-BR".
        bleu_tokenizer: sacreBLEU's tokenizer for `bleu`; None takes "zh" for Chinese, "char" for Japanese, Korean and
            other scripts without spaces (no extra package is needed), else "13a".

    Raises:
        ValueError: If the numbers differ, if there is nothing to score, or if the language is unknown.
    """
    check_scorers(language)
    from sacrebleu.metrics import BLEU, CHRF

    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses and {len(references)} references")
    if not references:
        raise ValueError("nothing to score")
    if bleu_tokenizer is None:
        bleu_tokenizer = _default_tokenizer(language)
    bleu, chrf = BLEU(tokenize=bleu_tokenizer), CHRF()
    bleu_score = bleu.corpus_score(list(hypotheses), [list(references)]).score
    chrf_score = chrf.corpus_score(list(hypotheses), [list(references)]).score
    lowercased, tokenizer_name = tokenized_lowercased_bleu(hypotheses, references, language)
    return TranslationScores(
        bleu=bleu_score,
        bleu_signature=str(bleu.get_signature()),
        bleu_tok_lc=lowercased,
        bleu_tok_lc_tokenizer=tokenizer_name,
        chrf=chrf_score,
        chrf_signature=str(chrf.get_signature()),
        exact_match=100 * sum(h == r for h, r in zip(hypotheses, references, strict=True)) / len(references),
        examples=len(references),
    )


# --- during training ---------------------------------------------------------------------------------------------
def metric_function(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], dict[str, float]] | None:
    """Return Trainer's `compute_metrics` for the task of a recipe, None where evaluation measures the loss alone."""
    if recipe.data.task in ("text-classification", "token-classification"):
        return accuracy
    if recipe.data.task != "seq2seq" or not recipe.training.predict_with_generate:
        return None

    def decoded(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def generation_metrics(prediction: Any) -> dict[str, float]:
        hypotheses, references = decoded(prediction.predictions), decoded(prediction.label_ids)
        scores = score_translations(hypotheses, references, recipe.data.target_language)
        return {"bleu": scores.bleu, "chrf": scores.chrf, "exact_match": scores.exact_match}

    return generation_metrics


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of labels predicted right; labels of -100 do not count."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = np.asarray(prediction.label_ids)
    counted = labels != -100
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels)[counted].mean())}
