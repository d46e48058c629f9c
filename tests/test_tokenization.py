"""UrformTokenizer: exactness of text and offsets, special tokens, persistence, determinism, for every kind of model."""

import gzip
import json
import lzma
import random
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from urform.tokenization.subword_training import MODELS
from urform.tokenization.tokenization_urform import UrformTokenizer

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
