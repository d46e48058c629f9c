"""UrformTokenizer: exactness of text and offsets, special tokens, persistence, determinism, for every kind of model."""

import copy
import gzip
import json
import lzma
import pickle
import random
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, TokenizersBackend

from urform.tokenization.subword_training import MODELS
from urform.tokenization.tokenization_urform import UrformTokenizer
from urform.training.encoding import encode_pairs
from urform.training.recipe import DataArguments
from urform.training.tasks import Labels, build_dataset

EXACT = [model for model in MODELS if model != "wordpiece"]
CHINESE = "我喜欢学习新的语言"
NASTY = [
    "",
    " ",
    "  two  before and after  ",
    "tab\tline\n\n  indented\r\nwindows\r",
    "▁ is ▁▁a▁ character",
    "<0x41> and <0xE2><0x96>",
    "##not ## a piece #",
    "👩‍👩‍👧 😀 e\u0301 n\u0303 \u0301",
    "漢字かなカナー混じり 文。中文 5 个",
    "שלום עולם مرحبا \u202bx\u202c ภาษาไทย",
    "\x00\x01\x1f\x7f\x85\u2028\u3000\xa0",
    "Ġ Ċ ï»¿ \ufeff \ufdd0 \U0010ffff",
    "a" * 700 + " " * 700 + "=" * 700,
]


def make_corpus(lines: int = 300) -> list[str]:
    rng = random.Random(0)
    syllables = ["ba", "ke", "lo", "mi", "run", "st", "ing", "haus", "über", "ñu"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(200)]
    corpus = [" ".join(rng.choices(words, k=8)).capitalize() + f", {rng.randint(0, 2100)}." for _ in range(lines)]
    return [*corpus, *[CHINESE + "。"] * 20, *["日本語のテストです、カタカナも。"] * 20]


CORPUS = make_corpus()
CACHE: dict[Any, UrformTokenizer] = {}


def trained(model: str, **options: Any) -> UrformTokenizer:
    """A tokenizer that tests only read."""
    options = {"vocab_size": 500, "languages": ["de", "zh"], "normalization": None, **options}
    key = (model, repr(sorted(options.items())))
    if key not in CACHE:
        CACHE[key] = UrformTokenizer.train(CORPUS, model=model, **options)
    return CACHE[key]


def roundtrip(tokenizer: UrformTokenizer, text: str) -> str:
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert isinstance(decoded, str)
    return decoded


@pytest.mark.parametrize("model", MODELS)
def test_special_tokens_have_fixed_ids_and_vocab_size_is_kept(model: str) -> None:
    tokenizer = trained(model, special_tokens=["<x>"])
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<2de>", "<2zh>", "<x>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(8))
    assert tokenizer.cls_token_id == tokenizer.bos_token_id == 1
    assert tokenizer.sep_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.languages == ["de", "zh"]
    assert len(tokenizer) <= 500 if model in ("char", "wordpiece") else len(tokenizer) == 500  # the corpus runs out
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


@pytest.mark.parametrize("size", [265, 300, 333])
@pytest.mark.parametrize("model", MODELS)
def test_vocab_size_is_never_exceeded(model: str, size: int) -> None:
    assert len(trained(model, vocab_size=size)) <= size


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("model", EXACT)
def test_roundtrip_of_nasty_text(model: str, text: str) -> None:
    assert roundtrip(trained(model), text) == text
    assert roundtrip(trained(model, normalization="nfc"), text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("model", EXACT)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text())
@example(text="ba\u0301ke")
def test_roundtrip_and_offsets_of_any_text(model: str, text: str) -> None:
    tokenizer = trained(model)
    assume(not any(token in text for token in tokenizer.all_special_tokens))
    assert roundtrip(tokenizer, text) == text
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans: dict[tuple[int, int], list[int]] = {}
    for token, span in zip(encoding.input_ids, encoding.offset_mapping, strict=True):
        spans.setdefault(tuple(span), []).append(token)
    assert all(start < end for start, end in spans)
    if model == "byte-bpe":  # a token may hold parts of two characters
        assert {i for start, end in spans for i in range(start, end)} == set(range(len(text)))
        return
    assert "".join(text[start:end] for start, end in spans) == text  # the bytes of a character share its span
    for (start, end), ids in spans.items():
        assert tokenizer.decode(ids) == text[start:end]


@given(words=st.lists(st.sampled_from([*"abeghiklmnorstuñü,. 0123456789", "bake", "  ", "haus"])))
@settings(max_examples=100, deadline=None)
def test_wordpiece_restores_text_over_its_alphabet(words: list[str]) -> None:
    tokenizer, text = trained("wordpiece"), "".join(words)
    if tokenizer.unk_token_id not in tokenizer(text).input_ids:
        assert roundtrip(tokenizer, text) == text


def test_wordpiece_loses_only_the_unknown_character() -> None:
    tokenizer = trained("wordpiece")
    encoding = tokenizer("bake☃bake", add_special_tokens=False, return_offsets_mapping=True)
    unknown = encoding.input_ids.index(tokenizer.unk_token_id)
    assert encoding.offset_mapping[unknown] == (4, 5)
    assert encoding.input_ids.count(tokenizer.unk_token_id) == 1


def test_normalization_and_lowercase() -> None:
    tokenizer = trained("bpe", normalization="nfkc", lowercase=True)
    assert roundtrip(tokenizer, "ﬁne ÜBER ①") == "fine über 1"
    assert not tokenizer.clean_up_tokenization_spaces
    assert roundtrip(tokenizer, "so , it 's") == "so , it 's"


@pytest.mark.parametrize("model", MODELS)
def test_template_pairs_and_type_ids(model: str) -> None:
    tokenizer = trained(model)
    a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in ("bake", "milo haus"))
    pair = tokenizer("bake", "milo haus", return_token_type_ids=True)
    assert pair.input_ids == [1, *a, 2, *b, 2]
    assert pair.token_type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert pair.sequence_ids() == [None, *[0] * len(a), None, *[1] * len(b), None]
    assert tokenizer.num_special_tokens_to_add() == 2


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_bos_and_eos_survive_saving_and_can_be_switched(bos: bool, eos: bool, tmp_path: Path) -> None:
    tokenizer = UrformTokenizer.train(CORPUS, vocab_size=300, add_bos=bos, add_eos=eos)
    tokenizer.save_pretrained(tmp_path)
    loaded = UrformTokenizer.from_pretrained(tmp_path)
    bare = tokenizer("bake", add_special_tokens=False).input_ids
    for it in (tokenizer, loaded):
        assert it("bake").input_ids == [*[1] * bos, *bare, *[2] * eos]
        assert (it.add_bos_token, it.add_eos_token) == (bos, eos)
    loaded.add_eos_token = not eos
    assert loaded("bake").input_ids == [*[1] * bos, *bare, *[2] * (not eos)]
    assert UrformTokenizer.from_pretrained(tmp_path, add_bos_token=True)("bake").input_ids[0] == 1


@pytest.mark.parametrize("model", MODELS)
def test_language_tags(model: str, tmp_path: Path) -> None:
    tokenizer = UrformTokenizer.train(CORPUS, vocab_size=500, model=model, languages=["de", "zh"])
    bare = tokenizer("bake milo", add_special_tokens=False).input_ids
    for text in ("<2de> bake milo", "<2de>bake milo"):
        assert tokenizer(text).input_ids == [1, 5, *bare, 2]
        assert roundtrip(tokenizer, text) == "bake milo"
    tokenizer.tgt_lang = "zh"
    with pytest.raises(ValueError):
        tokenizer("bake", text_target=3)
    batch = tokenizer("bake milo", text_target="bake milo")
    assert (batch["input_ids"], batch["labels"]) == ([1, 6, *bare, 2], [*bare, 2])
    tokenizer.save_pretrained(tmp_path)
    loaded = UrformTokenizer.from_pretrained(tmp_path)
    assert loaded.tgt_lang == "zh"
    assert loaded("<2de> bake milo", text_target="x")["input_ids"] == [1, 6, 5, *bare, 2]
    loaded.tgt_lang = None
    assert loaded("bake milo").input_ids == [1, *bare, 2]
    with pytest.raises(ValueError, match=r"tgt_lang='fr'.*de"):
        loaded.tgt_lang = "fr"


@pytest.mark.parametrize("model", MODELS)
def test_chinese_sentences_are_not_tokens(model: str) -> None:
    tokenizer = trained(model)
    pieces = tokenizer(CHINESE, return_offsets_mapping=True).offset_mapping
    assert max(end - start for start, end in pieces) <= 4
    assert len(tokenizer(CHINESE[::-1], add_special_tokens=False).input_ids) <= 3 * len(CHINESE)
    assert roundtrip(tokenizer, CHINESE) == CHINESE


@pytest.mark.parametrize("model", MODELS)
def test_presplit_words(model: str) -> None:
    tokenizer = trained(model)
    words = ["Bake", "milo", ",", "haus", "12", "语言"]
    encoding = tokenizer(words, is_split_into_words=True, return_offsets_mapping=True)
    assert [word for word in dict.fromkeys(encoding.word_ids()) if word is not None] == list(range(len(words)))
    assert tokenizer.decode(encoding.input_ids, skip_special_tokens=True) == "Bake milo, haus12语言"
    assert encoding.input_ids == tokenizer("Bake milo, haus12语言").input_ids
    for word, (_, end) in zip(encoding.word_ids(), encoding.offset_mapping, strict=True):
        assert word is None or 0 < end <= len(words[word])
    pairs = tokenizer([["bake", "milo"]], [["haus"]], is_split_into_words=True)
    assert pairs.input_ids == tokenizer(["bake milo"], ["haus"]).input_ids
    assert tokenizer("bake milo").input_ids == tokenizer(["bake", "milo"], is_split_into_words=True).input_ids
    assert tokenizer([], is_split_into_words=True).input_ids == [1, 2]


def test_padding_truncation_overflow_and_char_to_token() -> None:
    tokenizer = trained("bpe")
    batch = tokenizer(["bake", "bake milo haus"], padding=True, pad_to_multiple_of=8, padding_side="left")
    assert {len(ids) for ids in batch.input_ids} == {8} or len(batch.input_ids[0]) % 8 == 0
    assert batch.input_ids[0][0] == 0 and batch.attention_mask[0][0] == 0 and batch.input_ids[0][-1] == 2
    assert tokenizer("bake " * 50, truncation=True, max_length=7).input_ids[-1] == 2
    context = " ".join(CORPUS[:5])
    windows = tokenizer(
        "bake?",
        context,
        truncation="only_second",
        max_length=40,
        stride=10,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    seen: set[int] = set()
    for i, ids in enumerate(windows.input_ids):
        assert len(ids) <= 40
        for sequence, (start, end) in zip(windows.sequence_ids(i), windows.offset_mapping[i], strict=True):
            seen.update(range(start, end) if sequence == 1 else ())
    assert seen == set(range(len(context)))
    text = "bake 語 milo"
    encoding = tokenizer(text)
    assert tokenizer.decode(encoding.input_ids[encoding.char_to_token(text.index("m"))]).startswith(" m")


def test_mask_takes_the_space_before_it_and_special_text_can_be_split() -> None:
    tokenizer = trained("bpe")
    assert tokenizer("bake <mask> milo").input_ids == [
        1,
        *tokenizer("bake").input_ids[1:-1],
        4,
        *tokenizer(" milo", add_special_tokens=False).input_ids,
        2,
    ]
    ids = tokenizer("<s>bake", split_special_tokens=True, add_special_tokens=False).input_ids
    assert 1 not in ids and tokenizer.decode(ids) == "<s>bake"


def test_chat_template(tmp_path: Path) -> None:
    tokenizer = UrformTokenizer.train(CORPUS, vocab_size=500, chat_template="default")
    tokenizer.save_pretrained(tmp_path)
    tokenizer = UrformTokenizer.from_pretrained(tmp_path)
    chat = [
        {"role": "system", "content": "bake"},
        {"role": "user", "content": " milo"},
        {"role": "assistant", "content": "haus\n"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|system|>bake</s><|user|> milo</s><|assistant|>haus\n</s><|assistant|>"
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, on in zip(out["input_ids"], out["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(learnt) == "haus\n</s>"
    assert tokenizer.decode(out["input_ids"]) == text.removesuffix("<|assistant|>")
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("model", MODELS)
def test_saving_is_stable_and_loads_in_a_fresh_process(model: str, tmp_path: Path) -> None:
    tokenizer = trained(model)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "UrformTokenizer"
    UrformTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    texts = [text for text in NASTY if text]
    script = (
        "import json, sys; from urform.tokenization.tokenization_urform import UrformTokenizer as T;"
        "t = T.from_pretrained(sys.argv[1]); print(json.dumps(t(json.load(sys.stdin)).input_ids))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], input=json.dumps(texts), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tokenizer(texts).input_ids


def test_training_is_deterministic_across_processes() -> None:
    script = (
        "import hashlib, json, sys; from urform.tokenization.tokenization_urform import UrformTokenizer as T;"
        "c = json.load(sys.stdin);"
        "print([T.train(c, vocab_size=450, model=m).backend_tokenizer.to_str() for m in sys.argv[1:]])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script, *MODELS],
            input=json.dumps(CORPUS),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("model", MODELS)
def test_train_new_from_iterator_keeps_everything_but_the_vocabulary(model: str) -> None:
    old = UrformTokenizer.train(
        CORPUS, vocab_size=400, model=model, languages=["de"], add_bos=False, lowercase=True, chat_template="default"
    )
    old.tgt_lang = "de"

    def batches() -> Iterator[list[str]]:
        yield ["Completely other words, other words"] * 10

    new = old.train_new_from_iterator(batches(), 400, new_special_tokens=["<new>"], special_tokens_map={"<s>": "<bos>"})
    assert type(new) is UrformTokenizer and new.bos_token == "<bos>" and new.bos_token_id == 1
    assert new.languages == ["de"] and new.tgt_lang == "de" and new.chat_template == old.chat_template
    assert new("Other words<new>").input_ids[0] == 5 and new("Other words<new>").input_ids[-1] == 2
    assert new.decode(new("Other words").input_ids, skip_special_tokens=True) == "other words"
    assert new.convert_tokens_to_ids("<new>") == 9 and "<new>" in new.all_special_tokens
    assert len(old.train_new_from_iterator(["word"], 5)) <= 270


def test_texts_files_and_iterators_are_one_corpus(tmp_path: Path) -> None:
    text = "\n".join(CORPUS) + "\r\n"
    (tmp_path / "plain.txt").write_bytes(text.encode())
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "zipped.xz").write_bytes(lzma.compress(text.encode()))
    expected = UrformTokenizer.train(CORPUS, vocab_size=400).get_vocab()
    for name in ("plain.txt", "zipped.gz", "zipped.xz"):
        assert UrformTokenizer.train(files=str(tmp_path / name), vocab_size=400).get_vocab() == expected
    assert UrformTokenizer.train(tmp_path / "plain.txt", vocab_size=400).get_vocab() == expected
    assert UrformTokenizer.train([tmp_path / "zipped.gz"], vocab_size=400).get_vocab() == expected
    assert UrformTokenizer.train(iter(CORPUS), vocab_size=400).get_vocab() == expected
    assert UrformTokenizer.train([CORPUS[:9], CORPUS[9:]], vocab_size=400).get_vocab() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "word"}, "model='word'.*byte-bpe"),
        ({"normalization": "nfq"}, "normalization='nfq'.*nfkc"),
        ({"vocab_size": 100}, "vocab_size=100.*at least 262"),
        ({"vocab_size": 5, "model": "wordpiece"}, "vocab_size=5.*at least 6"),
        ({"vocab_size": 260, "model": "byte-bpe"}, "vocab_size=260.*at least 261"),
        ({"texts": []}, "empty"),
        ({"texts": ["", ""]}, "empty"),
        ({"texts": ["good", 3]}, "item 1 is a int"),
        ({"texts": ["good", None]}, "item 1 is a NoneType"),
        ({"texts": "a path or a text"}, "single string"),
        ({"texts": 5}, "texts is a int"),
        ({"texts": None}, "both missing"),
        ({"languages": ["de", "de"]}, "<2de>.*more than once"),
        ({"languages": ["d e"]}, "'d e' is no language code"),
        ({"languages": "de"}, r"pass a list, \['de'\]"),
        ({"special_tokens": ["<s>"]}, "<s>.*more than once"),
        ({"special_tokens": [""]}, "non-empty"),
        ({"padding_side": "up"}, "up"),
    ],
)
def test_errors_name_argument_value_and_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UrformTokenizer.train(**{"texts": CORPUS, **arguments})


@pytest.mark.parametrize("model", MODELS)
def test_the_smallest_vocabulary_works(model: str) -> None:
    with pytest.raises(ValueError) as error:
        UrformTokenizer.train(CORPUS, vocab_size=1, model=model)
    least = int(str(error.value).split()[-1])
    tokenizer = UrformTokenizer.train(CORPUS, vocab_size=least, model=model)
    assert len(tokenizer) == least
    assert model == "wordpiece" or roundtrip(tokenizer, CORPUS[0]) == CORPUS[0]


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        UrformTokenizer.train(files=[tmp_path / "absent.txt"])
    with pytest.raises(FileNotFoundError, match="absent"):
        UrformTokenizer.train(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes("gut\nüber".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt, line 2: not UTF-8"):
        UrformTokenizer.train(files=tmp_path / "latin.txt")


def test_targets_begin_without_bos(tmp_path: Path) -> None:
    """The decoder's start token stands there; sources keep theirs, also after saving in between."""
    tokenizer = UrformTokenizer.train(["a b c", "c b a"] * 3, vocab_size=300)
    for add_bos in (True, False):
        tokenizer.add_bos_token = add_bos
        for _ in range(2):
            batch = tokenizer("a b", text_target="a b")
            assert batch["labels"] == tokenizer("a b", add_special_tokens=False)["input_ids"] + [2]
            assert batch["input_ids"] == ([1] if add_bos else []) + batch["labels"]
        tokenizer.save_pretrained(tmp_path)
        assert UrformTokenizer.from_pretrained(tmp_path)("a b", text_target="a b").data == batch.data


# --- offsets of composed characters ----------------------------------------------------------------------------------
CLUSTERS = [
    "b",
    "e\u0301",
    "n\u0303",
    "A\u030a",
    "カ\u3099",
    "\u1112\u1161\u11ab",
    "a\u0323\u0302",
    " ",
    "語",
    "x\u0301",
]


def composed(form: str, clusters: list[str]) -> list[str]:
    return [unicodedata.normalize(form.upper(), cluster) for cluster in clusters]


@pytest.mark.parametrize("form", ["nfc", "nfkc"])
@pytest.mark.parametrize("model", EXACT)
@settings(max_examples=60, deadline=None)
@given(clusters=st.lists(st.sampled_from(CLUSTERS), min_size=1, max_size=12))
def test_a_token_has_every_character_that_was_composed_into_it(model: str, form: str, clusters: list[str]) -> None:
    tokenizer, text = trained(model, normalization=form), "".join(clusters)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = list(dict.fromkeys(encoding.offset_mapping))
    assert [encoding.char_to_token(i) is None for i in range(len(text))] == [False] * len(text)
    if model == "byte-bpe":  # a token may hold parts of two characters
        return
    assert "".join(text[start:end] for start, end in spans) == text
    for span in spans:
        ids = [token for token, own in zip(encoding.input_ids, encoding.offset_mapping, strict=True) if own == span]
        assert tokenizer.decode(ids) == unicodedata.normalize(form.upper(), text[slice(*span)])


def test_offsets_of_composed_characters_in_every_kind_of_call() -> None:
    tokenizer = trained("bpe", normalization="nfc")
    text = "bake e\u0301n\u0303 mi\u0308lo \u1112\u1161\u11ab " * 6
    for tensors in ("pt", "np", None):
        windows = tokenizer(
            ["bake", text],
            truncation=True,
            max_length=12,
            stride=3,
            return_overflowing_tokens=True,
            padding="max_length",
            padding_side="left",
            return_offsets_mapping=True,
            return_tensors=tensors,
        )
        seen: set[int] = set()
        for i, source in enumerate(windows["overflow_to_sample_mapping"]):
            spans = [tuple(map(int, span)) for span in windows["offset_mapping"][i]]
            assert spans == windows.encodings[i].offsets
            seen.update(*(range(*span) for span in spans if source == 1))
        assert seen == set(range(len(text)))
    pair = tokenizer("e\u0301", "bo\u0308", return_offsets_mapping=True)
    ends = {s: end for s, (_, end) in zip(pair.sequence_ids(), pair.offset_mapping, strict=True) if s is not None}
    assert ends == {0: 2, 1: 3} and pair.char_to_token(2, sequence_index=1) == pair.char_to_token(1, sequence_index=1)
    words = tokenizer(["bake", "e\u0301", "語", "o\u0308"], is_split_into_words=True, return_offsets_mapping=True)
    lengths = {w: end for w, (_, end) in zip(words.word_ids(), words.offset_mapping, strict=True) if w is not None}
    assert lengths == {0: 4, 1: 2, 2: 1, 3: 2}
    batch = tokenizer([["e\u0301"], ["bake", "o\u0308"]], is_split_into_words=True, return_offsets_mapping=True)
    assert [spans[-2][1] for spans in batch.offset_mapping] == [2, 2]


# --- what a call leaves behind -------------------------------------------------------------------------------------
LONG = " ".join(CORPUS[:3])
CALLS: dict[str, Any] = {
    "truncation": lambda t: t(LONG, truncation=True, max_length=4),
    "padding": lambda t: t(["bake", LONG], padding=True, padding_side="left", pad_to_multiple_of=8),
    "max_length": lambda t: t("bake", padding="max_length", truncation=True, max_length=9),
    "overflow": lambda t: t(LONG, truncation=True, max_length=9, stride=2, return_overflowing_tokens=True),
    "split": lambda t: t("<s>", split_special_tokens=True),
    "words": lambda t: t([["bake", "milo"]], is_split_into_words=True, truncation=True, max_length=3, padding=True),
    "target": lambda t: t(LONG, text_target=[LONG], truncation=True, max_length=3),
    "composed": lambda t: t("e\u0301 " * 20, truncation=True, max_length=3),
    "tokenize": lambda t: t.tokenize(LONG, truncation=True, max_length=3),
    "chat": lambda t: t.apply_chat_template([{"role": "user", "content": LONG}], truncation=True, max_length=3),
    "error": lambda t: t(["bake", None], truncation=True, max_length=3, padding=True, split_special_tokens=True),
    "error in words": lambda t: t([["bake"], ["milo", None]], is_split_into_words=True, padding=True),
    "error in the target": lambda t: t(text_target=["bake", None], truncation=True, max_length=3),
    "wrong target": lambda t: t("bake", text_target=5),
    "half a character": lambda t: t("bake", text_target="\ud83d", truncation=True, max_length=3),
    "no padding token": lambda t: t(["bake"], padding=True, max_length="x", truncation=True),
}


def state_of(tokenizer: UrformTokenizer) -> tuple[str, bool]:
    return tokenizer.backend_tokenizer.to_str(), tokenizer.backend_tokenizer.encode_special_tokens


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_nothing_behind(call: str, tmp_path: Path) -> None:
    tokenizer = UrformTokenizer.train(CORPUS, vocab_size=300, languages=["de"], chat_template="default")
    tokenizer.tgt_lang = "de"
    before, ids = state_of(tokenizer), tokenizer(LONG).input_ids
    tokenizer.save_pretrained(tmp_path / "before")
    try:
        CALLS[call](tokenizer)
    except (TypeError, ValueError):
        assert "error" in call or call in ("wrong target", "half a character", "no padding token")
    assert state_of(tokenizer) == before
    for copied in (copy.deepcopy(tokenizer), copy.copy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert state_of(copied) == before and copied(LONG).input_ids == ids
    tokenizer.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes(), file.name
    assert Tokenizer.from_file(str(tmp_path / "after/tokenizer.json")).encode(LONG).ids == ids
    assert tokenizer.tokenize("bake", add_special_tokens=True)[:2] == ["<s>", "<2de>"]  # not those of a target


def test_what_the_user_sets_on_the_backend_stays() -> None:
    tokenizer = UrformTokenizer.train(CORPUS, vocab_size=300)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    before = state_of(tokenizer)
    assert len(tokenizer(LONG).input_ids) > 9
    tokenizer(LONG, truncation=True, max_length=3)
    assert state_of(tokenizer) == before


def test_threads_share_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = UrformTokenizer.train(CORPUS, vocab_size=300, normalization=None)
    calls = [
        lambda: tokenizer(LONG).input_ids,
        lambda: tokenizer(LONG, truncation=True, max_length=5).input_ids,
        lambda: tokenizer(["bake", LONG], padding=True).input_ids,
        lambda: tokenizer(["bake", "milo"], is_split_into_words=True).input_ids,
        lambda: tokenizer(text_target=LONG)["input_ids"],
        lambda: pickle.loads(pickle.dumps(tokenizer)).backend_tokenizer.to_str(),
        lambda: [
            Path(file).read_bytes() for file in tokenizer.save_pretrained(tmp_path / threading.current_thread().name)
        ],
    ]
    expected = [call() for call in calls]
    wrong: list[int] = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(60) if calls[index]() != expected[index])

    threads = [threading.Thread(target=work, args=(i,), name=f"thread-{i}") for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_encoding_a_corpus_leaves_nothing_on_other_tokenizers_either() -> None:
    backend = UrformTokenizer.train(CORPUS, vocab_size=300).backend_tokenizer
    other = TokenizersBackend(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    before = other.backend_tokenizer.to_str()
    encode_pairs(other, [(LONG, LONG)], max_source_length=4, max_target_length=4, over_length="truncate")
    assert other.backend_tokenizer.to_str() == before
    data = DataArguments(task="token-classification", max_source_length=3, over_length="truncate")
    build_dataset(data, "train", other, Labels(), [(["bake", "milo", "haus"], ["O", "O", "B"])])
    assert other.backend_tokenizer.to_str() == before


# --- reserved tokens --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", MODELS)
def test_reserved_tokens_are_text_and_the_tokenizers_own_are_control(model: str, tmp_path: Path) -> None:
    reserved = ["<ph1>", "<2x>", "{0}", "<日本>"]
    tokenizer = UrformTokenizer.train(CORPUS, vocab_size=500, model=model, languages=["de"], special_tokens=reserved)
    text = "bake <ph1> milo<ph1>, <2x> <日本>  {0}"
    source = f"<2de>{text}<mask>"
    tokenizer.save_pretrained(tmp_path)
    again = tokenizer.train_new_from_iterator(CORPUS, 500)
    again.save_pretrained(tmp_path / "again")
    loaded = [AutoTokenizer.from_pretrained(folder) for folder in (tmp_path, tmp_path / "again")]
    for it in (tokenizer, again, *loaded, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        ids = it(source).input_ids
        assert [it.convert_tokens_to_ids(token) for token in reserved] == [6, 7, 8, 9]
        assert it.decode(ids, skip_special_tokens=True) == text
        assert it.batch_decode([ids, [0, *ids]], skip_special_tokens=True) == [text, text]
        assert it.decode(ids) == f"<s><2de>{text}<mask></s>"
        assert it.convert_ids_to_tokens([0, 1, 5, 6, 4], skip_special_tokens=True) == ["<ph1>"]
        assert not set(reserved) & set(it.all_special_tokens) and "<2de>" in it.all_special_tokens
        assert it.languages == ["de"]
        lengths = [len(it(token, add_special_tokens=False, split_special_tokens=True).input_ids) for token in reserved]
        assert (
            lengths == [1] * 4 and len(it("<2de>", add_special_tokens=False, split_special_tokens=True).input_ids) > 1
        )
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # what other software gives, without a line of ours
    assert raw.decode(raw.encode(source).ids, skip_special_tokens=True) == text


def test_reserved_tokens_of_a_chat_template_are_control() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    tokens = ["<|im_start|>", "<|im_end|>", "<ph>"]
    tokenizer = UrformTokenizer.train(CORPUS, vocab_size=400, special_tokens=tokens, chat_template=template)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "bake <ph>"}], return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>bake <ph><|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "bake <ph>"
    assert tokenizer.convert_tokens_to_ids(tokens) == [5, 6, 7]


def test_a_reserved_token_that_cannot_be_decoded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"special_tokens: '<é>' would be decoded as .*ASCII"):
        UrformTokenizer.train(CORPUS, vocab_size=400, model="byte-bpe", special_tokens=["<é>"])
    UrformTokenizer.train(CORPUS, vocab_size=400, special_tokens=["<é>"])
