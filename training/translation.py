"""Translating with a trained encoder-decoder: a list of texts, or a stream line by line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..tokenization.text_files import unencodable
from .preflight import position_limits

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LineError", "SearchOptions", "load_translator", "predict", "translate"]


class SearchOptions(TypedDict, total=False):
    """The keyword arguments of `translate`, where the defaults and their meaning stand."""

    num_beams: int
    length_penalty: float
    batch_size: int
    max_new_tokens: int | None
    progress: Callable[[int], None] | None


class LineError(ValueError):
    """A text that cannot be translated: its index, and why."""

    def __init__(self, index: int, why: str, where: str = "") -> None:
        super().__init__(f"{where}line {index + 1} {why}")
        self.index, self.why = index, why


def _one_line(text: str) -> str:
    return " ".join(part for part in re.split(r"[\r\n]+", text.strip()) if part)


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    num_beams: int = 5,
    length_penalty: float = 1.0,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Generate one line per text, in the order of the texts. An empty text gives an empty line.

    Args:
        model: Any encoder-decoder.
        tokenizer: Its tokenizer.
        texts: Sources; a language tag goes in front.
        num_beams: 1 is greedy.
        length_penalty: As in transformers: the exponent of the length that divides a beam's score.
        batch_size: Sources per batch. Sources of similar length share a batch.
        max_new_tokens: Limit of a translation; None allows twice the source's tokens plus 20.
        progress: Called with the number of texts finished, batch by batch.

    Raises:
        LineError: If a text is too long for the model or is not valid Unicode. Nothing is translated then.
    """
    limits = position_limits(model)
    encoded = _token_ids(tokenizer, texts, limits.source)
    results = [""] * len(texts)
    order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -len(encoded[i]))
    model.eval()
    generate: Any = model.generate
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = {"input_ids": [encoded[i] for i in chosen]}
        batch = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(model.device)
        room = max_new_tokens or 2 * batch["input_ids"].shape[1] + 20
        with torch.inference_mode():
            generated = generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_beams=num_beams,
                do_sample=False,
                length_penalty=length_penalty,
                early_stopping=num_beams > 1,
                max_new_tokens=min(room, limits.target - 1) if limits.target else room,
            )
        for i, text in zip(chosen, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
            results[i] = _one_line(text)
        if progress:
            progress(len(chosen))
    return results


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int | None) -> list[list[int]]:
    """Return the token ids of each text.

    Raises:
        LineError: If a text is not valid Unicode or has more than `limit` tokens.
    """
    for index, text in enumerate(texts):
        if wrong := unencodable(text):
            raise LineError(index, f"is not valid Unicode: {wrong}")
    encoded: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    for index, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        if limit is not None and len(ids) > limit and text.strip():
            raise LineError(index, f"has {len(ids)} tokens and the model takes at most {limit}: split the line")
    return encoded


def load_translator(model_dir: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder-decoder, on the GPU if there is one, and its tokenizer from a folder.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no finished model.
    """
    if not Path(model_dir).is_dir():
        raise FileNotFoundError(f"no such model folder: {model_dir}")
    if not Path(model_dir, "config.json").is_file():
        raise ValueError(f"{model_dir} holds no finished model (no config.json); name a checkpoint in it, or --resume")
    model = AutoModelForSeq2SeqLM.from_pretrained(model_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), AutoTokenizer.from_pretrained(model_dir)


def predict(
    model_dir: str | Path,
    lines: Iterable[str],
    *,
    prefix: str = "",
    window: int = 1024,
    name: str | Path | None = None,
    **search: Unpack[SearchOptions],
) -> Iterator[str]:
    """Translate a stream: one line out per line in, in order, `window` lines in memory at a time.

    An error, in a line or in reading the lines, is raised after the translations of all earlier lines were yielded.

    Args:
        model_dir: A folder that `train` wrote, or any encoder-decoder with its tokenizer.
        lines: Sources without line ends.
        prefix: Put before every line, e.g. `"<2de> "`.
        window: Lines read before the first is translated. Each window is sorted by length.
        name: What errors call the stream, e.g. its file.
        **search: `num_beams`, `length_penalty`, `batch_size`, `max_new_tokens` and `progress`: see `translate`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no finished model, or if a line is too long for it (named by its number in the stream).
    """
    model, tokenizer = load_translator(model_dir)

    def translated(block: list[str]) -> list[str]:
        return translate(model, tokenizer, [prefix + line if line.strip() else "" for line in block], **search)

    done = 0
    for block in _blocks(lines, window):
        try:
            yield from translated(block)
        except LineError as error:
            yield from translated(block[: error.index])
            raise LineError(done + error.index, error.why, f"{name}, " if name else "") from None
        done += len(block)


def _blocks(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield blocks of lines. If reading fails, yield the lines read so far as a block, then raise the error."""
    block: list[str] = []
    remaining = iter(lines)
    while True:
        try:
            block.append(next(remaining))
        except StopIteration:
            break
        except (ValueError, OSError):
            yield block
            raise
        if len(block) == size:
            yield block
            block = []
    yield block
