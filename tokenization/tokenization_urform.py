"""`UrformTokenizer`: a fast tokenizer that is trained in one call and restores every text exactly.

The whole state is tokenizer.json (the class has no `__init__`, so the file is loaded as it is), and what belongs to
the model's use of it, such as `tgt_lang`, tokenizer_config.json.
"""

# First of all, for it says which transformers is needed where that one is too old for the imports below.
from ..configuration.bundle_urform import BundledCodeMixin

# isort: split
import copy
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, processors
from transformers import BatchEncoding, TokenizersBackend
from transformers.utils import logging

from .composed_offsets import with_composed_offsets
from .subword_training import (
    MODELS,
    SPACED_LETTER,
    UNKNOWN,
    Corpus,
    Files,
    Texts,
    normalizer,
    smallest_vocab,
    train_backend,
)
from .text_files import MAX_LINE_BYTES, unencodable

logger = logging.get_logger(__name__)

# Ids 0 to 4. The mask takes the place of a word, and a word's space belongs to it.
RESERVED = {"<pad>": "pad_token", "<s>": "bos_token", "</s>": "eos_token", UNKNOWN: "unk_token", "<mask>": "mask_token"}
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% else %}"
    "{{ raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_encodes_target: ContextVar[bool] = ContextVar("_encodes_target", default=False)
_SPACE_BEFORE = "\ufdd0"  # a noncharacter: marks a pre-split word that a space precedes


class UrformTokenizer(BundledCodeMixin, TokenizersBackend):
    """Fast tokenizer for Urform, and for any model: BPE, Unigram, WordPiece, byte-level BPE or characters.

    Special tokens and ids: `<pad>` 0, `<s>` 1 (bos, cls), `</s>` 2 (eos, sep), `<unk>` 3, `<mask>` 4, then the
    language tags (`<2de>`: Johnson et al. 2017), then those of the caller and of the chat template. What the tokenizer
    itself adds is control, and `skip_special_tokens=True` leaves it out. What the caller reserved is text.

    `decode(encode(text), skip_special_tokens=True)` is the normalised text, character by character, and the text
    itself with `normalization=None`, for every kind but "wordpiece", which has `<unk>` for characters that are not in
    its vocabulary. Text that spells a reserved token is that token (`split_special_tokens=True` prevents it for control
    tokens).

    Offsets cover exactly the characters of a token, with those that normalization composes ("e" and a combining
    accent). A word's offsets include the space before it. Pre-split words (`is_split_into_words=True`) become the
    tokens they have in running text: after the first, a word that begins with a letter of a script with spaces gets its
    space, outside its offsets. A call leaves no trace on the backend. Calls from several threads wait for each other;
    use copies to encode in parallel.
    """

    vocab_files_names: dict[str, str] = {"tokenizer_file": "tokenizer.json"}
    model_input_names: list[str] = ["input_ids", "attention_mask"]
    _lock: threading.RLock
    _tokenizer: Tokenizer

    def __new__(cls, *args: Any, **kwargs: Any) -> "UrformTokenizer":
        """Make a tokenizer with its own lock. Copies and unpickled tokenizers get their own, too."""
        self = super().__new__(cls)
        self._lock = threading.RLock()
        return self

    @classmethod
    def train(  # noqa: PLR0913  # public: every option of a training is named
        cls,
        texts: Texts | None = None,
        *,
        files: Files | None = None,
        vocab_size: int = 8000,
        model: str = "bpe",
        min_frequency: int = 2,
        languages: Sequence[str] = (),
        special_tokens: Sequence[str] = (),
        lowercase: bool = False,
        normalization: str | None = "nfc",
        add_bos: bool = True,
        add_eos: bool = True,
        chat_template: str | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        max_line_bytes: int | None = MAX_LINE_BYTES,
    ) -> "UrformTokenizer":
        """Train a tokenizer. The same corpus and arguments give the same tokenizer.json, byte by byte.

        Args:
            texts: Strings, or batches (lists) of strings. A `str` is always text, a `pathlib.Path` always a file.
            files: Paths (`str` or `Path`, one or many) of UTF-8 files, one text per line; `.gz`, `.xz` and `.bz2` are
                unpacked. With `texts`, both are read.
            vocab_size: Upper bound for `len(tokenizer)`, special tokens included. Reached unless the corpus runs out
                of pairs that occur `min_frequency` times (of characters, for "char").
            model: "bpe" (Sennrich et al. 2016), "unigram" (Kudo 2018), "wordpiece" (greedy longest match, Wu et al.
                2016), "byte-bpe" (Radford et al. 2019) or "char". All but "wordpiece" fall back to, or consist of,
                bytes and know every text.
            min_frequency: How often a pair of pieces must occur to be merged.
            languages: Language codes; "de" becomes the special token `<2de>`, which swallows spaces after it.
            special_tokens: Further tokens that are never split, such as placeholders. They are text: decoding keeps
                them, also with `skip_special_tokens=True`. Those that `chat_template` writes are control tokens, as all
                that the tokenizer itself adds: decoding can skip them.
            lowercase: Whether to lower-case the text (decoding cannot undo it).
            normalization: "nfc", "nfkc" or None.
            add_bos: Whether every sequence begins with `<s>`.
            add_eos: Whether every sequence ends with `</s>`; pairs are `<s> A </s> B </s>` with type ids 0 and 1.
            chat_template: A Jinja template, or "default" for `<|user|>text</s><|assistant|>text</s>` with the roles
                system, user and assistant.
            model_max_length: Where `truncation=True` cuts.
            padding_side: "right" or "left".
            max_line_bytes: Longest line of a file that is accepted; None for no limit.

        Raises:
            ValueError: Unknown model, normalization or side; odd or repeated languages or special tokens;
                `vocab_size` too small (the message says which works); empty corpus; an item that is not a string; a
                file that is not text, damaged, or has a longer line (named, with the line).
            FileNotFoundError: A file does not exist.
        """
        if model not in MODELS:
            raise ValueError(f"model={model!r} is unknown: use one of {', '.join(MODELS)}")
        _check_names(languages, special_tokens)
        roles = [f"<|{role}|>" for role in ROLES] if chat_template == "default" else []
        extra = [*(f"<2{language}>" for language in languages), *special_tokens, *roles]
        tokens = [*RESERVED, *extra]
        text_tokens = {token for token in special_tokens if token not in (chat_template or "")}
        _check_vocabulary(tokens, model, vocab_size)
        if chat_template == "default":
            chat_template = _default_template(add_bos)
        corpus = Corpus(texts, files, max_line_bytes)
        backend = train_backend(corpus, model, vocab_size, tokens, normalizer(normalization, lowercase), min_frequency)
        for token in tokens:  # in the order of their ids
            _add_token(backend, token, tokens.index(token), special=token not in text_tokens)
        return cls(
            tokenizer_object=backend,
            subword_model=model,
            **{name: _added(token) for token, name in RESERVED.items()},
            cls_token="<s>",
            sep_token="</s>",
            extra_special_tokens=[token for token in extra if token not in text_tokens],
            add_bos_token=add_bos,
            add_eos_token=add_eos,
            padding_side=padding_side,
            **({"chat_template": chat_template} if chat_template else {}),
            **({"model_max_length": model_max_length} if model_max_length else {}),
        )

    def train_new_from_iterator(  # type: ignore[override]
        self,
        text_iterator: Texts,
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[str | AddedToken] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        min_frequency: int = 2,
    ) -> "UrformTokenizer":
        """Train a tokenizer of the same kind, with this one's added tokens, template and settings, on new text.

        Args:
            text_iterator: Strings or batches of strings.
            vocab_size: As in `train`; raised, with a warning, to the smallest that works.
            length: Not needed.
            new_special_tokens: Control tokens to add.
            special_tokens_map: New names for special tokens, by old name.
            min_frequency: How often a pair of pieces must occur to be merged.

        Raises:
            ValueError: The corpus is empty or holds something other than strings.
        """
        renamed = dict(special_tokens_map or {})
        extra = [renamed.get(str(token), str(token)) for token in self.extra_special_tokens]
        tokens = [
            _added(renamed.get(token.content, token.content), like=token, special=token.special)
            for _, token in sorted(self.added_tokens_decoder.items())
        ]
        for new in new_special_tokens or ():
            tokens.append(_added(str(new), like=new if isinstance(new, AddedToken) else None))
            extra.append(str(new))
        names = [token.content for token in tokens]
        model = self.init_kwargs["subword_model"]
        least = smallest_vocab(model, len(names))
        if vocab_size < least:
            logger.warning(f"vocab_size={vocab_size} is too small for model={model!r}: taking the smallest, {least}")
        backend = train_backend(
            Corpus(text_iterator),
            model,
            max(vocab_size, least),
            names,
            self._tokenizer.normalizer,
            min_frequency,
            renamed.get(str(self.unk_token), str(self.unk_token)),
        )
        for token in tokens:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        named = {key: renamed.get(str(token), str(token)) for key, token in self.special_tokens_map.items()}
        settings = {
            **self.init_kwargs,
            **named,
            "tokenizer_object": backend,
            "extra_special_tokens": extra,
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "chat_template": self.chat_template,
        }
        for stale in ("tokenizer_file", "added_tokens_decoder"):
            settings.pop(stale, None)
        return type(self)(**settings)

    @property
    def languages(self) -> list[str]:
        """Return the codes of the languages that have a tag."""
        return [token[2:-1] for token in map(str, self.extra_special_tokens) if re.fullmatch(r"<2[\w-]+>", token)]

    @property
    def tgt_lang(self) -> str | None:
        """The target language, whose tag begins every source, after `<s>`, but not `text_target` (Johnson et al. 2017).

        Kept when saved; None (the default) adds no tag.
        """
        language: str | None = self.init_kwargs.get("tgt_lang")
        return language

    @tgt_lang.setter
    def tgt_lang(self, language: str | None) -> None:
        if language is not None and language not in self.languages:
            raise ValueError(f"tgt_lang={language!r} has no tag: this tokenizer was trained with {self.languages}")
        self.init_kwargs["tgt_lang"] = language
        self.update_post_processor()

    @property
    def add_bos_token(self) -> bool:
        """Whether sequences begin with the bos token. Can be set."""
        return self._adds("add_bos_token", self.bos_token_id)

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self.init_kwargs["add_bos_token"] = value
        self.update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        """Whether sequences end with the eos token. Can be set."""
        return self._adds("add_eos_token", self.eos_token_id)

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self.init_kwargs["add_eos_token"] = value
        self.update_post_processor()

    def _adds(self, name: str, token_id: Any) -> bool:
        """Return what was asked for, or what tokenizer.json does: transformers forgets the former in loading."""
        if token_id is None:
            return False
        if name in self.init_kwargs:
            return bool(self.init_kwargs[name])
        template = self._tokenizer.post_processor
        return template is not None and token_id in template.process(Encoding()).ids

    def update_post_processor(self) -> None:
        """Rebuild the template that adds bos, language tag and eos: `<s> <2de> A </s>`, `<s> <2de> A </s> B </s>`."""
        with self._lock:
            self._tokenizer.post_processor = self._template()

    def _template(self, target: bool = False) -> processors.PostProcessor:
        """Return the template. Targets are `A </s>`: the decoder's start token replaces what comes first."""
        tag = f"<2{self.tgt_lang}>" if self.tgt_lang else None
        before = [token for token in (self.bos_token if self.add_bos_token else None, tag) if token and not target]
        after = [self.eos_token] if self.add_eos_token and self.eos_token else []
        return processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, "$B:1", *(f"{token}:1" for token in after)],
            special_tokens=[(token, self.convert_tokens_to_ids(token)) for token in dict.fromkeys([*before, *after])],
        )

    def _switch_to_input_mode(self) -> None:
        _encodes_target.set(False)

    def _switch_to_target_mode(self) -> None:
        _encodes_target.set(True)  # for the one call of `_encode_plus` that follows

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, is_split_into_words: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        target = _encodes_target.get()
        _encodes_target.set(False)
        if is_split_into_words:
            text, text_pair = _mark(text), _mark(text_pair)
        with self._lock, settings_kept(self._tokenizer) as backend:
            if target:
                backend.post_processor = self._template(target=True)
            if is_split_into_words:
                backend.normalizer = _presplit_normalizer(backend.normalizer)
            try:
                encoded = super()._encode_plus(text, text_pair, is_split_into_words=is_split_into_words, **kwargs)
            except TypeError as error:
                if wrong := _unencodable((text, text_pair)):
                    raise ValueError(f"text: {wrong}") from error
                raise
            items = _items(text, text_pair, is_split_into_words)
            tensors = kwargs.get("return_tensors")
            return with_composed_offsets(encoded, backend, items, is_split_into_words, tensors, _SPACE_BEFORE)

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        with self._lock:  # not in the middle of another thread's call
            return super()._save_pretrained(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = {**self.__dict__, "_tokenizer": copy.deepcopy(self._tokenizer)}
        del state["_lock"]
        return state


def _default_template(add_bos: bool) -> str:
    return ("{{ bos_token }}" if add_bos else "") + CHAT_TEMPLATE


def _check_names(languages: Sequence[str], special_tokens: Sequence[str]) -> None:
    """Raise a ValueError for what is not a list of language codes, or not a list of tokens."""
    if isinstance(languages, str):
        raise ValueError(f"languages={languages!r} is a string: pass a list, [{languages!r}]")
    for language in languages:
        if not (isinstance(language, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", language)):
            raise ValueError(f"languages: {language!r} is no language code: use letters, digits, - and _")
    if isinstance(special_tokens, str) or not all(isinstance(token, str) and token for token in special_tokens):
        raise ValueError(f"special_tokens={special_tokens!r}: pass a list of non-empty strings")


def _check_vocabulary(tokens: Sequence[str], model: str, vocab_size: int) -> None:
    """Raise a ValueError for special tokens that repeat, or that leave no room for what is learnt."""
    repeated = sorted({token for token in tokens if tokens.count(token) > 1})
    if repeated:
        raise ValueError(f"languages or special_tokens: {repeated} occur more than once: name each token once")
    least = smallest_vocab(model, len(tokens))
    if not isinstance(vocab_size, int) or vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size!r} is too small for model={model!r} with {len(tokens)} special tokens: "
            f"use at least {least}"
        )


def _add_token(backend: Tokenizer, token: str, token_id: int, special: bool) -> None:
    """Add a token that is never split.

    Raises:
        ValueError: Decoding would not restore it.
    """
    (backend.add_special_tokens if special else backend.add_tokens)([_added(token, special=special)])
    if (restored := backend.decode([token_id], skip_special_tokens=False)) != token:
        raise ValueError(f"special_tokens: {token!r} would be decoded as {restored!r}: use letters of ASCII")


@contextmanager
def settings_kept(backend: Tokenizer) -> Iterator[Tokenizer]:
    """Restore what a call sets on the backend, also after an error. Otherwise it would be saved."""
    truncation, padding, split = backend.truncation, backend.padding, backend.encode_special_tokens
    normalizer, post_processor = backend.normalizer, backend.post_processor
    try:
        yield backend
    finally:
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.no_padding() if padding is None else backend.enable_padding(**padding)
        backend.encode_special_tokens = split
        backend.normalizer, backend.post_processor = normalizer, post_processor


def _items(text: Any, text_pair: Any, presplit: bool) -> list[Any]:
    """Return the texts or pairs of a call, one or a batch, by the rules of transformers."""
    batched = isinstance(text, (list, tuple))
    if presplit:
        batched = batched and len(text) > 0 and isinstance(text[0], (list, tuple))
    if not batched:
        return [(text, text_pair)] if text_pair else [text]
    return list(text) if text_pair is None else list(zip(text, text_pair, strict=True))


def _presplit_normalizer(usual: normalizers.Normalizer | None) -> normalizers.Normalizer:
    """Give marked words a space where they begin with a letter of a script with spaces. Remove the marks."""
    return normalizers.Sequence(
        [
            normalizers.Prepend(" "),
            normalizers.Replace(Regex(rf"\A (?!{SPACED_LETTER}(?m:.*){_SPACE_BEFORE}\z)"), ""),
            normalizers.Replace(Regex(rf"{_SPACE_BEFORE}\z"), ""),
            *([usual] if usual is not None else []),
        ]
    )


def _unencodable(texts: Any) -> str | None:
    """Say what is wrong with the first text, in any nesting of lists, that UTF-8 cannot hold. None: nothing."""
    if isinstance(texts, str):
        return unencodable(texts)
    return next(filter(None, map(_unencodable, texts)), None) if isinstance(texts, (list, tuple)) else None


def _mark(words: Any) -> Any:
    """Mark every word but the first of each sequence, in a sequence of words or any nesting of such sequences."""
    if not isinstance(words, (list, tuple)) or not words:
        return words
    if isinstance(words[0], str):
        return [words[0], *(word + _SPACE_BEFORE if isinstance(word, str) else word for word in words[1:])]
    return type(words)(_mark(inner) for inner in words)


def _added(token: str, like: AddedToken | None = None, special: bool = True) -> AddedToken:
    """Return a token that is never split. A mask takes the spaces before it, a language tag those after it."""
    if like is None:
        like = AddedToken(token, lstrip=token == "<mask>", rstrip=special and token.startswith("<2"), normalized=False)
    strips = {"single_word": like.single_word, "lstrip": like.lstrip, "rstrip": like.rstrip}
    return AddedToken(token, **strips, normalized=like.normalized, special=special)
