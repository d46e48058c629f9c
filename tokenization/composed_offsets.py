"""Offsets of text that normalization composes ("e" and a combining accent become "é").

The backend gives a composed character the offsets of the first character that went into it, so the others belong to no
token. Here a token's offsets reach over the characters that follow it and that no token of the whole text has.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, cast

from tokenizers import Encoding, Tokenizer
from transformers import BatchEncoding

Words = Sequence[str]


def with_composed_offsets(
    encoded: BatchEncoding, backend: Tokenizer, items: Sequence[Any], presplit: bool, return_tensors: Any, marker: str
) -> BatchEncoding:
    """Return `encoded` with offsets that cover every character of the texts.

    Args:
        encoded: What the backend made of the items.
        backend: As it was for that, truncation included. Its truncation and padding are off afterwards.
        items: Texts or pairs; of lists of words where `presplit`.
        presplit: Whether the texts are lists of words.
        return_tensors: Type of the tensors in `encoded`, or None.
        marker: A last character of words that is not part of them.
    """
    state = b"" if backend.normalizer is None else backend.normalizer.__getstate__()
    form = re.search(rb'"(NFK?C)"', state)
    if form is None or encoded.encodings is None:
        return encoded
    name = cast(Literal["NFC", "NFKC"], form[1].decode())
    texts = [_sequences(item, presplit) for item in items]
    composed = [not all(unicodedata.is_normalized(name, w) for words in text for w in words) for text in texts]
    if not any(composed):
        return encoded
    whole = encoded.encodings if backend.truncation is None else _encode_whole(backend, items, presplit)
    has_token = [
        _covered(text, e, presplit, marker) if c else {} for text, e, c in zip(texts, whole, composed, strict=True)
    ]
    sources = encoded.get("overflow_to_sample_mapping", range(len(texts)))
    encodings = [_stretched(e, has_token[int(s)], presplit) for e, s in zip(encoded.encodings, sources, strict=True)]
    return _with_encodings(encoded, encodings, return_tensors)


def _encode_whole(backend: Tokenizer, items: Sequence[Any], presplit: bool) -> Sequence[Encoding]:
    """Encode the items without truncation and padding, which are off afterwards."""
    backend.no_truncation()
    backend.no_padding()
    return backend.encode_batch(list(items), is_pretokenized=presplit)


def _with_encodings(encoded: BatchEncoding, encodings: list[Encoding], return_tensors: Any) -> BatchEncoding:
    """Return `encoded` with other encodings, whose offsets replace its own if it has any."""
    data = dict(encoded.data)
    if "offset_mapping" in data:
        offsets: Any = [encoding.offsets for encoding in encodings]
        if return_tensors is not None:
            offsets = BatchEncoding({"offset_mapping": offsets}, tensor_type=return_tensors)["offset_mapping"]
        elif not isinstance(data["input_ids"][0], list):
            offsets = offsets[0]
        data["offset_mapping"] = offsets
    return BatchEncoding(data, encodings)


def _sequences(item: Any, presplit: bool) -> list[Words]:
    """Return a text or a pair as one or two lists of words. A text that is not split is one word."""
    if not presplit:
        return [[item]] if isinstance(item, str) else [[text] for text in item]
    pair = len(item) == 2 and not any(isinstance(words, str) for words in item)
    return list(item) if pair else [item]


def _key(sequence: int, word: int | None, presplit: bool) -> tuple[int, int]:
    return sequence, (word or 0) if presplit else 0


def _covered(text: list[Words], whole: Encoding, presplit: bool, marker: str) -> dict[tuple[int, int], bytearray]:
    """Return for each character of each word whether a token has it."""
    has_token = {
        (sequence, index): bytearray(len(word.removesuffix(marker) if presplit else word))
        for sequence, words in enumerate(text)
        for index, word in enumerate(words)
    }
    for sequence, word, (start, end) in zip(whole.sequence_ids, whole.word_ids, whole.offsets, strict=True):
        if sequence is not None and end > start:
            has_token[_key(sequence, word, presplit)][start:end] = b"\1" * (end - start)
    return has_token


def _stretched(encoding: Encoding, has_token: dict[tuple[int, int], bytearray], presplit: bool) -> Encoding:
    if not has_token:
        return encoding
    offsets = []
    for sequence, word, (start, end) in zip(encoding.sequence_ids, encoding.word_ids, encoding.offsets, strict=True):
        characters = b"" if sequence is None or end == start else has_token[_key(sequence, word, presplit)]
        while end < len(characters) and not characters[end]:
            end += 1
        offsets.append([start, end])
    state = json.loads(encoding.__getstate__())
    result = Encoding()
    result.__setstate__(json.dumps({**state, "offsets": offsets}).encode())
    return result
