"""Language codes: BCP 47, ISO 639-1 and 639-3, and the codes of NLLB and FLORES, each as one canonical tag.

ISO 639-1 is complete here. Of ISO 639-3 there are the codes that corpora for translation use; any other code of three
letters is accepted together with its script ("hsb-Latn"), since the script is what decides how text is scored.
"""

from __future__ import annotations

import re

__all__ = ["normalize_language", "script_of"]

# ISO 639-1 and the code of ISO 639-3 for the same language.
_ISO_639_1 = dict(
    pair.split(":")
    for pair in """
    aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara as:asm av:ava ay:aym az:aze ba:bak be:bel bg:bul bi:bis
    bm:bam bn:ben bo:bod br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre cs:ces cu:chu cv:chv cy:cym da:dan de:deu
    dv:div dz:dzo ee:ewe el:ell en:eng eo:epo es:spa et:est eu:eus fa:fas ff:ful fi:fin fj:fij fo:fao fr:fra fy:fry
    ga:gle gd:gla gl:glg gn:grn gu:guj gv:glv ha:hau he:heb hi:hin ho:hmo hr:hrv ht:hat hu:hun hy:hye hz:her ia:ina
    id:ind ie:ile ig:ibo ii:iii ik:ipk io:ido is:isl it:ita iu:iku ja:jpn jv:jav ka:kat kg:kon ki:kik kj:kua kk:kaz
    kl:kal km:khm kn:kan ko:kor kr:kau ks:kas ku:kur kv:kom kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao
    lt:lit lu:lub lv:lav mg:mlg mh:mah mi:mri mk:mkd ml:mal mn:mon mr:mar ms:msa mt:mlt my:mya na:nau nb:nob nd:nde
    ne:nep ng:ndo nl:nld nn:nno no:nor nr:nbl nv:nav ny:nya oc:oci oj:oji om:orm or:ori os:oss pa:pan pi:pli pl:pol
    ps:pus pt:por qu:que rm:roh rn:run ro:ron ru:rus rw:kin sa:san sc:srd sd:snd se:sme sg:sag sh:hbs si:sin sk:slk
    sl:slv sm:smo sn:sna so:som sq:sqi sr:srp ss:ssw st:sot su:sun sv:swe sw:swa ta:tam te:tel tg:tgk th:tha ti:tir
    tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso tt:tat tw:twi ty:tah ug:uig uk:ukr ur:urd uz:uzb ve:ven vi:vie vo:vol
    wa:wln wo:wol xh:xho yi:yid yo:yor za:zha zh:zho zu:zul
    """.split()
)
# Bibliographic codes of ISO 639-2, withdrawn codes, and members of a macrolanguage for which its code is the usual one.
_ALIASES = dict(
    pair.split(":")
    for pair in """
    alb:sq arm:hy baq:eu bur:my chi:zh cze:cs dut:nl fre:fr geo:ka ger:de gre:el ice:is mac:mk mao:mi may:ms per:fa
    rum:ro slo:sk tib:bo wel:cy in:id iw:he ji:yi jw:jv mo:ro
    ajp:apc als:sq arb:ar ayr:ay azj:az bxr:bua cmn:zh dgo:doi dik:din ekk:et gaz:om gom:kok khk:mn kmr:ku
    knc:kr lvs:lv npi:ne ory:or pes:fa plt:mg quy:qu swh:sw uzn:uz ydd:yi zsm:ms
    """.split()
)
_ISO_639_3 = frozenset(
    """
    ace acm acq aeb apc ars ary arz ast awa azb ban bem bho bjn bug ceb chr cjk ckb crh din dsb dyu fil fon fur fuv
    gsw haw hne hsb ilo kab kac kam kbp kea kmb lij lmo ltg lua luo lus mag mai min mni mos nds nqo nso nus pag
    pap pbt prs sat scn shn szl taq tpi tum tyv tzm umb vec war
    yue wuu nan hak gan hsn cjy cpx cdo mnp czh czo cnp csp lzh
    bua cop doi kok mfe myv mwl pcm sah smj sma smn sms tet tlh udm vmw xal zgh
    """.split()
)
_CANONICAL = {
    **{two: two for two in _ISO_639_1},
    **{three: two for two, three in _ISO_639_1.items()},
    **{three: three for three in _ISO_639_3},
    **_ALIASES,
}
# ISO 15924: the scripts in use today, and those that a few languages above need.
_SCRIPTS = frozenset(
    """
    Adlm Arab Aran Armn Bali Beng Bopo Bugi Cakm Cans Cham Cher Copt Cyrl Deva Ethi Geor Goth Grek Gujr Guru Hanb Hang
    Hani Hans Hant Hebr Hira Hrkt Java Jpan Kali Kana Khmr Knda Kore Lana Laoo Latf Latg Latn Lepc Limb Lisu Mand Mlym
    Mong Mtei Mymr Nkoo Olck Orya Osge Piqd Rohg Runr Samr Sinh Sund Sylo Syrc Syre Syrj Syrn Tale Talu Taml Tavt Telu
    Tfng Thaa Thai Tibt Vaii Yiii
    """.split()
)
# The usual script of the languages above where words are not, or not only, divided by spaces.
_USUAL_SCRIPT = {
    **dict.fromkeys("zh yue wuu nan hak gan hsn cjy cpx cdo mnp czh czo cnp csp lzh".split(), "Hani"),
    **{"ja": "Jpan", "ko": "Kore", "th": "Thai", "lo": "Laoo", "km": "Khmr", "my": "Mymr", "shn": "Mymr"},
    **{"bo": "Tibt", "dz": "Tibt", "ii": "Yiii"},
}
_TAG = re.compile(
    r"(?:(?:ar|ms|zh)-(?=[a-z]{3}(?:-|$)))?"  # zh-yue is yue
    r"(?P<language>[a-z]{2,3})(?:-(?P<script>[a-z]{4}))?(?:-(?P<region>[a-z]{2}|\d{3}))?"
    r"(?:-(?:[a-z\d]{5,8}|\d[a-z\d]{3}))*(?:-[a-wyz\d](?:-[a-z\d]{2,8})+)*(?:-x(?:-[a-z\d]{1,8})+)?",
    re.ASCII,
)


def normalize_language(code: str) -> str:
    """Return the canonical BCP 47 tag of a language code, in any case and with `-` or `_`.

    The language becomes its ISO 639-1 code where it has one, else its ISO 639-3 code. Script and region are kept, other
    subtags are not: `"zho_Hans"` is `"zh-Hans"`, `"JPN"` is `"ja"`, `"pt_br"` is `"pt-BR"`.

    Args:
        code: BCP 47 ("zh-Hant-TW"), ISO 639-1 ("zh"), ISO 639-3 ("cmn"), or a code of NLLB and FLORES ("zho_Hans").

    Raises:
        ValueError: `code` is no well-formed tag, or its language or script is unknown.
    """
    match = _TAG.fullmatch(code.replace("_", "-").lower()) if isinstance(code, str) else None
    if match is None:
        raise ValueError(f"language={code!r} is not a language code: use a code such as de, pt-BR, cmn or zho_Hans")
    subtag, script, region = match["language"], match["script"], match["region"]
    if script is not None and script.title() not in _SCRIPTS:
        raise ValueError(f"language={code!r}: the script {script.title()!r} is unknown: use an ISO 15924 code, or none")
    language = _CANONICAL.get(subtag, subtag if script is not None and len(subtag) == 3 else None)
    if language is None:
        raise ValueError(
            f"language={code!r} is unknown: use the language's code in ISO 639 (de for German, zh for Chinese, ja for "
            "Japanese), or a code of three letters with its script (hsb-Latn)"
        )
    return "-".join([language, *([script.title()] if script else []), *([region.upper()] if region else [])])


def script_of(code: str) -> str | None:
    """Return the script of a language code: the one it names, or the usual one of a language without spaces.

    None stands for a script that divides words by spaces.

    Raises:
        ValueError: As for `normalize_language`.
    """
    language, _, rest = normalize_language(code).partition("-")
    named = rest.partition("-")[0]
    return named if len(named) == 4 else _USUAL_SCRIPT.get(language)
