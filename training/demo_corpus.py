"""A real multilingual corpus made on the spot from CLDR (the Unicode locale data, through the `babel` package).

An English phrase and a language tag go in, the phrase as CLDR writes it in that language comes out::

    <2de> Wednesday, March 5, 1986   ->  Mittwoch, 5. März 1986
    <2zh> 1,234.50 US dollars        ->  1,234.50美元

**What is held out.** Every phrase is built from *atoms*: a calendar date, a minute of the day, a number, a
(language, territory) pair or a set of territories or languages. An atom belongs to exactly one split, decided by a
hash of its canonical value alone (`split_of`). A held-out phrase uses held-out atoms only and a training phrase
training atoms only. Hence a date in the test set occurs in training in no format, in no language and in no date-time;
the same goes for a minute of the day with or without seconds, and for a number whether it counts euros, kilometres or
nothing (`12.5` and `12.50` are the same number). Digits inside dates and times are not numbers in this sense.

Names of languages and territories cannot be guessed from other names, so every name occurs in training; held out are
their combinations: a pair such as "Spanish (Mexico)" or the set of a list such as "Chile, Peru, and Japan", whatever
its order. Names of currencies and units are likewise all seen; what is new at test time is the amount in front of them.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, TypeVar

from babel import Locale, dates, lists, numbers, units

__all__ = ["HELD_OUT_SHARE", "LANGUAGES", "Phrase", "generate_corpus", "language_tag", "split_of"]

_T = TypeVar("_T")
_Render = Callable[[str], str]

LANGUAGES = ("de", "zh")
SOURCE_LANGUAGE = "en"
# One atom in `HELD_OUT_SHARE` goes to the test split.
HELD_OUT_SHARE = 10

_CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CNY", "CHF", "INR", "CAD", "AUD", "SEK", "NOK", "PLN", "BRL", "MXN", "KRW")
_UNITS = (
    "length-meter length-kilometer length-centimeter length-mile length-foot mass-kilogram mass-gram mass-tonne "
    "mass-pound volume-liter volume-milliliter duration-second duration-minute duration-hour duration-day "
    "duration-week duration-month duration-year temperature-celsius energy-kilowatt-hour power-watt power-kilowatt "
    "speed-kilometer-per-hour area-square-meter area-square-kilometer area-hectare digital-megabyte digital-gigabyte "
    "frequency-hertz electric-volt"
).split()
_DATE_STYLES: tuple[Literal["full", "long", "medium", "short"], ...] = ("full", "long", "medium", "short")
_TIME_STYLES: tuple[Literal["medium", "short"], ...] = ("medium", "short")
_KIND_WEIGHTS = {
    "date": 18,
    "time": 8,
    "datetime": 12,
    "number": 10,
    "percent": 5,
    "currency": 12,
    "currency_name": 10,
    "unit": 12,
    "language_in_territory": 6,
    "territory_list": 5,
    "language_list": 2,
}
_TERRITORIES = (
    "DE FR IT ES PT GB IE NL BE AT CH DK SE NO FI IS PL CZ HU RO BG GR TR UA EE LV LT HR RS SI US CA MX BR AR CL PE CO "
    "VE CU CN JP KR IN ID TH VN MY PH SG PK IR IQ IL SA EG MA DZ TN ET KE NG GH ZA AU NZ"
).split()
_LANGUAGE_CODES = (
    "en de fr it es pt nl da sv no fi is pl cs hu ro bg el tr uk ru et lv lt hr sr zh ja ko hi id th vi ms fa ar he sw"
).split()


@dataclass(frozen=True)
class Phrase:
    """One pair: `source` starts with the tag of the target language, `kind` says what it is."""

    source: str
    target: str
    language: str
    kind: str


def language_tag(language: str) -> str:
    """Return the token that asks for a target language, e.g. `<2de>`."""
    return f"<2{language}>"


def split_of(kind: str, value: str) -> str:
    """Return `"test"` for one atom in ten, else `"train"`; depends on nothing but the atom itself.

    Args:
        kind: What the value is ("date", "minute", "number", "pair", "set").
        value: Its canonical spelling.
    """
    digest = hashlib.blake2b(f"{kind}:{value}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0 else "train"


def number_atom(value: Decimal) -> str:
    """Return the canonical spelling of a number: no trailing zeros, no exponent."""
    return f"{value.normalize():f}"


def _plain_spaces(text: str) -> str:
    # CLDR separates with no-break spaces (U+00A0, U+202F), which nobody types.
    return text.replace("\u00a0", " ").replace("\u202f", " ")


class _Generator:
    """Draws phrases of one split. A kind is a method that draws atoms and returns their rendering per locale."""

    def __init__(self, split: str, seed: int) -> None:
        self.split = split
        self.rng = random.Random(f"{seed}:{split}")
        self.units = _translatable_units()

    def _draw(self, kind: str, make: Callable[[], _T], canonical: Callable[[_T], str]) -> _T:
        while True:
            value = make()
            if split_of(kind, canonical(value)) == self.split:
                return value

    # --- atoms -------------------------------------------------------------------------------------------------
    def _date(self) -> datetime.date:
        first = datetime.date(1950, 1, 1)
        return self._draw(
            "date", lambda: first + datetime.timedelta(days=self.rng.randrange(36525)), datetime.date.isoformat
        )

    def _time(self) -> datetime.time:
        def make() -> datetime.time:
            minute = self.rng.randrange(24 * 60)
            return datetime.time(minute // 60, minute % 60, self.rng.randrange(60))

        return self._draw("minute", make, lambda moment: f"{moment:%H:%M}")

    def _number(self, decimals: tuple[int, ...] = (0, 0, 1, 2), max_digits: int = 7) -> Decimal:
        def make() -> Decimal:
            places = self.rng.choice(decimals)
            digits = self.rng.randint(1, max_digits - places)
            whole = self.rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
            return Decimal(whole * 10**places + self.rng.randrange(10**places)).scaleb(-places)

        return self._draw("number", make, number_atom)

    def _amount(self) -> tuple[Decimal, str]:
        # As many decimals as the currency has: rounding would turn one number into another.
        currency = self.rng.choice(_CURRENCIES)
        return self._number(decimals=(numbers.get_currency_precision(currency),)), currency

    def _names(self, codes: list[str], count: int) -> list[str]:
        return self._draw("set", lambda: self.rng.sample(codes, count), lambda chosen: " ".join(sorted(chosen)))

    # --- kinds of phrases --------------------------------------------------------------------------------------
    def date(self) -> _Render:
        day, style = self._date(), self.rng.choice(_DATE_STYLES)
        return lambda locale: dates.format_date(day, style, locale=locale)

    def time(self) -> _Render:
        moment, style = self._time(), self.rng.choice(_TIME_STYLES)
        return lambda locale: dates.format_time(moment, style, locale=locale)

    def datetime(self) -> _Render:
        moment, style = datetime.datetime.combine(self._date(), self._time()), self.rng.choice(_TIME_STYLES)
        return lambda locale: dates.format_datetime(moment, style, locale=locale)

    def number(self) -> _Render:
        value = self._number()
        return lambda locale: numbers.format_decimal(value, locale=locale, decimal_quantization=False)

    def percent(self) -> _Render:
        value = self._number(max_digits=4) / 100
        return lambda locale: numbers.format_percent(value, locale=locale, decimal_quantization=False)

    def currency(self) -> _Render:
        value, currency = self._amount()
        return lambda locale: numbers.format_currency(value, currency, locale=locale)

    def currency_name(self) -> _Render:
        value, currency = self._amount()
        return lambda locale: numbers.format_currency(value, currency, locale=locale, format_type="name")

    def unit(self) -> _Render:
        value, unit = self._number(decimals=(0, 1), max_digits=5), self.rng.choice(self.units)
        return lambda locale: _format_unit(value, unit, locale)

    def language_in_territory(self) -> _Render:
        def make() -> tuple[str, str]:
            return self.rng.choice(_LANGUAGE_CODES), self.rng.choice(_TERRITORIES)

        language, territory = self._draw("pair", make, " ".join)

        def render(locale: str) -> str:
            # `Locale.get_display_name` knows only the pairs that CLDR has data for.
            names = Locale.parse(locale)
            return f"{names.languages[language]} ({names.territories[territory]})"

        return render

    def territory_list(self) -> _Render:
        return self._list(self._names(_TERRITORIES, self.rng.choice((2, 3))), "territories")

    def language_list(self) -> _Render:
        return self._list(self._names(_LANGUAGE_CODES, self.rng.choice((2, 3))), "languages")

    def _list(self, codes: list[str], table: Literal["territories", "languages"]) -> _Render:
        style: Literal["standard", "or"] = self.rng.choice(("standard", "or"))

        def render(locale: str) -> str:
            names = getattr(Locale.parse(locale), table)
            return lists.format_list([names[code] for code in codes], style=style, locale=locale)

        return render

    def phrase(self, language: str) -> Phrase:
        kind = self.rng.choices(list(_KIND_WEIGHTS), weights=list(_KIND_WEIGHTS.values()))[0]
        render: _Render = getattr(self, kind)()
        source, target = (_plain_spaces(render(locale)) for locale in (SOURCE_LANGUAGE, language))
        return Phrase(f"{language_tag(language)} {source}", target, language, kind)


def _format_unit(value: Decimal, unit: str, locale: str) -> str:
    # CLDR's Chinese has no "long" names where the short ones say the same; "short" is the long name there.
    return units.format_unit(value, unit, length="short" if locale == "zh" else "long", locale=locale)


def _translatable_units() -> list[str]:
    """Return the units for which babel has a pattern in every language (it prints the bare identifier otherwise)."""
    return [
        unit
        for unit in _UNITS
        if not any(unit in _format_unit(Decimal(2), unit, locale) for locale in (SOURCE_LANGUAGE, *LANGUAGES))
    ]


def generate_corpus(split: str, size: int, seed: int = 0, languages: tuple[str, ...] = LANGUAGES) -> list[Phrase]:
    """Draw `size` different phrases of one split, the languages in turn.

    Args:
        split: `"train"` or `"test"`; see the module's docstring for what separates them.
        size: Number of phrases, all sources different.
        seed: The same seed gives the same corpus.
        languages: Target languages.

    Raises:
        ValueError: If the split is not one of the two.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    generator = _Generator(split, seed)
    phrases: dict[str, Phrase] = {}
    while len(phrases) < size:
        phrase = generator.phrase(languages[len(phrases) % len(languages)])
        phrases.setdefault(phrase.source, phrase)
    return list(phrases.values())
