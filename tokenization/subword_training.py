"""Subword models for `UrformTokenizer`: reading a corpus, splitting it into words, training on it.

Nothing here knows transformers. Three decisions carry the round trip (`decode(encode(x)) == x`):

- A space stays a space. It belongs to the word that follows (" word"), as in Radford et al. 2019 and in Wu et al.
  2016's "_word", but is never rewritten to a "▁" that the text itself could hold; decoding is concatenation.
- Characters outside the alphabet become the UTF-8 bytes `<0x00>`..`<0xFF>` ("byte fallback", as in SentencePiece and
  Llama). `WORDS` keeps digits apart from letters and punctuation, so no piece learnt from text can look like a byte.
- Scripts written without spaces are runs of their own, and no learnt piece spans more than 4 ideographs (8 kana or
  letters of Thai, Lao, Khmer, Burmese): a sentence cannot become a token.

Training is deterministic. The trainers of the `tokenizers` library for WordPiece and Unigram are not (they follow the
order of a seeded hash map), so WordPiece takes the vocabulary of a BPE and Unigram is estimated here.
"""

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .text_files import MAX_LINE_BYTES, open_lines, unencodable

Texts = Iterable[str | Path | Sequence[str]] | Path
Files = str | Path | Sequence[str | Path]

MODELS = ("bpe", "unigram", "wordpiece", "byte-bpe", "char")
NORMALIZATIONS = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC, None: None}
UNKNOWN = "<unk>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

_SYLLABIC = r"\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
SPACED_LETTER = rf"[\p{{L}}\p{{M}}&&[^\p{{Han}}{_SYLLABIC}]]"
WORDS = "|".join(
    (
        r"\p{N}",  # one digit at a time: numbers generalise
        r"\p{Han}+",
        r"[\p{Hiragana}ー]+",
        r"[\p{Katakana}ー]+",
        r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+",
        rf" ?{SPACED_LETTER}+",
        r" ?[^\s\p{L}\p{M}\p{N}]+",  # punctuation, symbols, emoji, controls
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
LONGEST_WORD = 256  # characters that training, Unigram and WordPiece look at together: time grows with its square
LONGEST_PART = rf"[\s\S]{{1,{LONGEST_WORD}}}"
LONGEST_PIECE = rf"\p{{Han}}{{1,4}}|[{_SYLLABIC}]{{1,8}}"


class Corpus:
    """Texts that can be read more than once: strings, batches of strings, and text files line by line.

    Args:
        texts: Strings, lists of strings, or `Path` objects (files); a lone `Path` is a file. A one-shot iterator is
            kept in memory; give files where the corpus is too large for that.
        files: Paths, as `str` or `Path`: UTF-8 text, plain or compressed, one text per line (see `open_lines`).
        max_line_bytes: Longest line of a file that is accepted; None for no limit.

    Raises:
        ValueError: `texts` is a lone string, both arguments are missing, an item is none of the above, or a file is not
            readable as text.
        FileNotFoundError: A file does not exist (all are looked for at once, before anything is read).
    """

    def __init__(
        self, texts: Texts | None = None, files: Files | None = None, max_line_bytes: int | None = MAX_LINE_BYTES
    ) -> None:
        """Check what can be checked without reading."""
        if isinstance(texts, (str, bytes)):
            raise ValueError(f"texts={texts[:40]!r} is a single string: pass [text], or files=... if it is a path")
        if texts is None and files is None:
            raise ValueError("texts and files are both missing: pass an iterable of strings or paths of text files")
        if texts is not None and not isinstance(texts, (Path, Iterable)):
            raise ValueError(f"texts is a {type(texts).__name__}: pass an iterable of strings")
        items: Iterable[object] = () if texts is None else [texts] if isinstance(texts, Path) else texts
        self.items = list(items) if isinstance(items, Iterator) else items
        self.files = [Path(f) for f in ([files] if isinstance(files, (str, Path)) else files or ())]
        self.max_line_bytes = max_line_bytes
        for file in self.files:
            if not file.exists():
                raise FileNotFoundError(f"files: no such file: {file}")
            if not file.is_file():
                raise ValueError(f"files: {file} is a folder or a pipe: name files, which can be read more than once")

    def __iter__(self) -> Iterator[str]:
        """Yield every text."""
        for index, item in enumerate(self.items):
            if isinstance(item, Path):
                yield from open_lines(item, self.max_line_bytes)
                continue
            batch = item if isinstance(item, (list, tuple)) else [item]
            for text in batch:
                if not isinstance(text, str):
                    raise ValueError(
                        f"texts: item {index} is a {type(item).__name__} ({item!r:.60}), expected a string"
                    )
                if wrong := unencodable(text):
                    raise ValueError(f"texts: item {index}: {wrong}")
                yield text
        for file in self.files:
            yield from open_lines(file, self.max_line_bytes)


def smallest_vocab(model: str, n_special: int) -> int:
    """Return the smallest `vocab_size` that a kind of model works with.

    Args:
        model: One of `MODELS`.
        n_special: How many special tokens there are.
    """
    return n_special + {"wordpiece": 1, "byte-bpe": 256}.get(model, 257)


def normalizer(normalization: str | None, lowercase: bool) -> normalizers.Normalizer:
    """Return the normalizer for `normalization` and `lowercase` (possibly one that does nothing).

    Args:
        normalization: "nfc", "nfkc" or None.
        lowercase: Whether to lower-case.

    Raises:
        ValueError: `normalization` is unknown.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization={normalization!r} is unknown: use one of {list(NORMALIZATIONS)}")
    unicode = NORMALIZATIONS[normalization]
    return normalizers.Sequence([*([unicode()] if unicode else []), *([normalizers.Lowercase()] if lowercase else [])])


def train_backend(
    corpus: Iterable[str],
    model: str,
    vocab_size: int,
    special_tokens: Sequence[str],
    normalizer: normalizers.Normalizer,
    min_frequency: int = 2,
    unk_token: str = UNKNOWN,
) -> Tokenizer:
    """Train a model and put a whole fast tokenizer around it (without added tokens and post-processor).

    Ids are the special tokens in the order given, then the bytes, then what was learnt. Of the room that remains after
    special tokens and bytes, single characters take at most half (the most frequent ones; all of it for "char").

    Args:
        corpus: The texts, readable more than once.
        model: One of `MODELS`.
        vocab_size: Upper bound for the size of the vocabulary.
        special_tokens: Contents of the special tokens, `unk_token` among them.
        normalizer: What every text goes through first.
        min_frequency: How often a pair must occur to be merged.
        unk_token: The special token for unknown characters.

    Raises:
        ValueError: The corpus holds no text.
    """
    byte_level = model == "byte-bpe"
    head = [*special_tokens, *(BYTES if model in ("bpe", "unigram", "char") else [])]
    room = vocab_size - len(head)
    characters = _common_characters(corpus, normalizer, room if model == "char" else max(room // 2, 1))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet() if byte_level else characters)
    words, pieces = _splitters(model, alphabet)
    trainee = Tokenizer(models.BPE())
    trainee.normalizer = normalizer
    trainee.pre_tokenizer = pre_tokenizers.Sequence(pieces)

    learnt: models.Model
    if model == "char":
        learnt = models.BPE(_ids(head, alphabet), [], unk_token=unk_token, byte_fallback=True)
    elif model == "unigram":
        seeds, _ = _learn_bpe(trainee, corpus, alphabet, 4 * room, min_frequency)
        found = _learn_unigram(trainee, corpus, seeds, room)
        vocab = [*((token, 0.0) for token in head), *found]
        learnt = models.Unigram(vocab, unk_id=head.index(unk_token), byte_fallback=True)
    else:
        tokens, merges = _learn_bpe(trainee, corpus, alphabet, room, min_frequency)
        if model == "wordpiece":  # a word's first piece holds its space: no prefix is needed to tell the others
            options = {"max_input_chars_per_word": LONGEST_WORD, "continuing_subword_prefix": ""}
            learnt = models.WordPiece(_ids(head, tokens), unk_token=unk_token, **options)
        else:
            learnt = models.BPE(_ids(head, tokens), merges, unk_token=unk_token, byte_fallback=not byte_level)
    backend = Tokenizer(learnt)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    fuse = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.decoder = decoders.ByteLevel() if byte_level else fuse
    return backend


def _common_characters(corpus: Iterable[str], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """Return the most frequent characters of a corpus, `limit` at most.

    Raises:
        ValueError: The corpus holds no text.
    """
    counts: Counter[str] = Counter()
    for text in corpus:
        counts.update(normalizer.normalize_str(text))
    if not counts:
        raise ValueError("texts: the corpus is empty: pass at least one non-empty string")
    common = heapq.nsmallest(limit, counts.items(), key=lambda item: (-item[1], item[0]))
    return [character for character, _ in common]


def _splitters(
    model: str, alphabet: list[str]
) -> tuple[list[pre_tokenizers.PreTokenizer], list[pre_tokenizers.PreTokenizer]]:
    """Return how a text is split before it is encoded, and how before the trainer of a model sees it."""
    known = "".join(f"\\x{{{ord(char):x}}}" for char in alphabet)
    words: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(WORDS), "isolated")]
    pieces = [*words, *(pre_tokenizers.Split(Regex(part), "isolated") for part in (LONGEST_PIECE, LONGEST_PART))]
    if model == "byte-bpe":
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return [*words, to_bytes], [*pieces, to_bytes]
    pieces.append(pre_tokenizers.Split(Regex(f"[^{known}]"), "removed"))
    if model in ("unigram", "wordpiece"):  # one unknown character must not take its neighbours, or the word, with it
        words.append(pre_tokenizers.Split(Regex(f"[^{known}]|[{known}]{{1,{LONGEST_WORD}}}"), "isolated"))
    return words, pieces


def _ids(head: list[str], learnt: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate([*head, *learnt])}


def _learn_bpe(
    trainee: Tokenizer, corpus: Iterable[str], alphabet: list[str], size: int, min_frequency: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the pieces in the order learnt, alphabet first, and the merges (Sennrich et al. 2016, algorithm 1)."""
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=min_frequency, initial_alphabet=alphabet, show_progress=False
    )
    trainee.train_from_iterator(iter(corpus), trainer)
    state = json.loads(trainee.to_str())["model"]
    return sorted(state["vocab"], key=state["vocab"].__getitem__), [(left, right) for left, right in state["merges"]]


def _learn_unigram(trainee: Tokenizer, corpus: Iterable[str], seeds: list[str], size: int) -> list[tuple[str, float]]:
    """Return pieces with their log-probabilities (Kudo 2018, section 3.2).

    The seed is a BPE of four times the size. Two rounds of Viterbi EM re-estimate the probabilities, then the fifth
    of the pieces whose removal costs the likelihood least goes, until `size` are left; single characters stay.
    """
    words: Counter[str] = Counter()
    for text in corpus:
        normal = trainee.normalizer.normalize_str(text)
        words.update(word for word, _ in trainee.pre_tokenizer.pre_tokenize_str(normal))
    scores = _log_probabilities(seeds, _count_substrings(words, set(seeds)))
    while True:
        for _ in range(2):
            counts = _count_best_pieces(words, scores)
            scores = _log_probabilities(scores, counts)
        if len(scores) <= size:
            return sorted(((piece, round(score, 6)) for piece, score in scores.items()), key=lambda p: (-p[1], p[0]))
        loss = {p: counts[p] * (s - _best_split(p, scores)) if len(p) > 1 else math.inf for p, s in scores.items()}
        kept = heapq.nsmallest(max(size, len(scores) * 4 // 5), scores, key=lambda p: (-loss[p], p))
        scores = {piece: scores[piece] for piece in sorted(kept)}


def _count_substrings(words: Counter[str], known: set[str]) -> Counter[str]:
    """Count how often each known piece occurs in the words, overlaps included."""
    longest = max(map(len, known))
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for i in range(len(word)):
            for j in range(i + 1, min(i + longest, len(word)) + 1):
                if word[i:j] in known:
                    counts[word[i:j]] += n
    return counts


def _count_best_pieces(words: Counter[str], scores: dict[str, float]) -> Counter[str]:
    """Count the pieces in the most probable segmentation of each word."""
    segment = models.Unigram(list(scores.items())).tokenize
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for token in segment(word):
            counts[token.value] += n
    return counts


def _log_probabilities(pieces: Iterable[str], counts: Counter[str]) -> dict[str, float]:
    total = math.log(sum(counts.values()))
    return {piece: math.log(counts[piece] or 0.5) - total for piece in pieces}


def _best_split(piece: str, scores: dict[str, float]) -> float:
    """Return the log-probability of the best segmentation of a piece into two or more others."""
    best = [0.0] + [-math.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for start in range(end):
            part = piece[start:end]
            if part != piece and part in scores:
                best[end] = max(best[end], best[start] + scores[part])
    return best[-1]
