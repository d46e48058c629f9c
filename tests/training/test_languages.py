"""Language codes against CLDR (babel), against NLLB's list in transformers, and against sacreBLEU's own tokenizers."""

import pytest
from babel.core import get_global
from sacrebleu.metrics import BLEU
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from urform.training.languages import _CANONICAL, normalize_language, script_of
from urform.training.metrics import _TOKENIZERS, score_translations
from urform.training.recipe import DataArguments

TEXTS = {
    "zh": (["今天天气很好我们去公园", "他喜欢读书和写字"], ["今天天气真好我们去公园玩", "他很喜欢读书写字"]),
    "ja": (["私は本を読みます", "今日は天気がいいです"], ["私は毎日本を読みます", "今日はいい天気です"]),
    "ko": (["나는 책을 읽는다"], ["나는 매일 책을 읽습니다"]),
    "th": (["วันนี้อากาศดีมาก"], ["วันนี้อากาศดีมากเลย"]),
    "de": (["Die Katze saß z.B. auf dem Dach."], ["Die Katze saß gestern auf dem Dach."]),
}


@pytest.mark.parametrize(
    ("codes", "language", "tokenizer"),
    [
        ("zh ZH zho cmn chi zh-CN zh_TW zh-Hans zho_Hans ZHO_HANT zh-cmn yue yue_Hant zh-yue nan lzh", "zh", "zh"),
        ("ja JA jpn jpn_Jpan ja_JP ja-jp", "ja", "char"),
        ("ko KO kor kor_Hang ko_KR", "ko", "char"),
        ("th TH tha tha_Thai th-TH", "th", "char"),
        ("de DE deu ger deu_Latn de_DE de-AT-1996 zh-Latn ja-Latn-x-hepburn", "de", "13a"),
    ],
)
def test_bleu_is_that_of_sacrebleus_tokenizer_however_the_language_is_spelt(
    codes: str, language: str, tokenizer: str
) -> None:
    hypotheses, references = TEXTS[language]
    wanted = BLEU(tokenize=tokenizer).corpus_score(hypotheses, [references]).score
    for code in codes.split():
        scores = score_translations(hypotheses, references, code)
        assert scores.bleu == pytest.approx(wanted, abs=1e-9), code
        assert f"tok:{tokenizer}|" in scores.bleu_signature
        assert scores.bleu_tok_lc_tokenizer.startswith(("moses-", f"{tokenizer} "))
    assert "moses-de" in score_translations(*TEXTS["de"], "deu_Latn").bleu_tok_lc_tokenizer


@pytest.mark.parametrize(
    ("code", "tag"),
    [
        ("pt_br", "pt-BR"),
        ("ZHO_hans", "zh-Hans"),
        ("zh-Hant-TW-x-note", "zh-Hant-TW"),
        ("zh-yue", "yue"),
        ("zh-TW", "zh-TW"),
        ("en_XX", "en-XX"),
        ("es-419", "es-419"),
        ("sl-rozaj-biske", "sl"),
        ("de-u-co-phonebk", "de"),
        ("iw", "he"),
        ("hsb", "hsb"),
        ("rki_Mymr", "rki-Mymr"),  # not in the list, but its script says how to score it
    ],
)
def test_canonical_tags(code: str, tag: str) -> None:
    assert normalize_language(code) == tag == normalize_language(tag)


@pytest.mark.parametrize(
    "code",
    [
        *("", "d", "deutsch", "english", "xx", "cn", "jp", "xyz", "rki", "zz-Latn", "zh-Hanz", "en_", "-en", " de"),
        *("de\n", "ja_JP.UTF-8", "ｄｅ", "en-yue", "en/de", None, 5),
    ],
)
def test_what_is_unknown_is_refused(code: object) -> None:
    with pytest.raises(ValueError, match=r"language=.*: use |or none"):
        normalize_language(code)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        score_translations(["a"], ["a"], code)  # type: ignore[arg-type]


def test_a_recipe_with_an_unknown_language_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"data\.target_language: language='deutsch'"):
        DataArguments(target_language="deutsch")


def test_the_tables_agree_with_cldr_and_nllb() -> None:
    aliases, likely = get_global("language_aliases"), get_global("likely_subtags")
    differ = {"tgl": "tl", "twi": "tw", "hbs": "sh"}  # here ISO 639's word counts
    differ |= {"tl": "tl", "tw": "tw", "sh": "sh", "prs": "prs", "quy": "qu"}
    for code, language in _CANONICAL.items():
        assert language == differ.get(code, aliases.get(code, code)), code
    for code in FAIRSEQ_LANGUAGE_CODES:
        language, script = code.split("_")
        assert normalize_language(code) == f"{normalize_language(language)}-{script}"
        assert (script in _TOKENIZERS) == (script_of(language) in _TOKENIZERS), code
    for language in set(_CANONICAL.values()) & set(likely):
        usual = likely[language].split("_")[1]
        if language not in ("cpx", "mnp"):  # CLDR has the Latin script of missionaries for two languages of China
            assert (usual in _TOKENIZERS) == (script_of(language) in _TOKENIZERS), language
