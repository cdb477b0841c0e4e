"""Answers as normalised words, so that they can be compared word by word: casing, characters, articles, numbers.

Written for English. What is not done: negation, fractions in words, decimal commas, units, accents left out ("zero" is
no French for 0: give an alias where "Sao Paulo" will do), languages without spaces.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext

_UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()  # noqa: SIM905 (a list of quoted words is harder to read and check)
_ORDINAL_UNITS = """zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth
fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth""".split()  # noqa: SIM905 (as above)
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_UNIT = {word: value for value, word in enumerate(_UNITS)}
_TEN = {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_SCALE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# From an ordinal to the cardinal word in its place: "twenty-first" is read as "twenty-one", and then marked.
_ORDINAL = (
    dict(zip(_ORDINAL_UNITS, _UNITS, strict=True))
    | {word[:-1] + "ieth": word for word in _TENS}
    | {word + "th": word for word in ("hundred", *_SCALE)}
)
_DROPPED = frozenset({"the", "an"})
_BREAK = ""

_FIGURES = r"(?:\d{1,3}(?:[,']\d{3})+|\d{1,40})"
# A time, a date, a fraction, a decimal comma: one word, so that no part of it is taken for the whole.
_MORE_FIGURES = r"(?!\w|[.,:/]\d)"
_TOKEN = re.compile(
    rf"(?P<ordinal>(?<!\w){_FIGURES})(?:st|nd|rd|th)(?!\w)"
    rf"|(?P<number>(?:(?<!\w)-)?(?<!\w){_FIGURES}(?:\.\d{{1,40}})?){_MORE_FIGURES}"
    rf"|(?P<decimal>(?<![\w.])\.\d{{1,40}}){_MORE_FIGURES}"
    r"|(?P<figures>(?:(?<!\w)-)?\d+(?:[.,:/]\d+)+\w*)"
    r"|(?P<initials>(?<!\w)(?:[^\W\d]\.){2,}(?!\w))"
    r"|(?P<possessive>(?<=\w)'s(?!\w))"
    r"|(?P<word>\w+(?:\.\d+)*)"
    r"|(?P<joint>\s+|-)"
    r"|(?P<break>.)",
    re.DOTALL,
)
_SPACED_THOUSANDS = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_DASHES = str.maketrans(
    {"\u2010": "-", "\u2011": "-", "\u2013": "-", "\u2212": "-", "\u2018": "'", "\u2019": "'", "_": " "}
)


def words(text: str) -> list[str]:
    """Split `text` into normalised words.

    Casefolded, without punctuation, articles ("a" stays where no word follows it: "vitamin A") and possessive endings;
    numbers as digits, whether written in digits or English words ("1,000", "one thousand"), ordinals apart from them
    ("21th" for "twenty-first").

    >>> words("The Twenty-first of May, one thousand five hundred")
    ['21th', 'of', 'may', '1500']
    """
    tokens = _tokens(text)
    following = zip(tokens, [*tokens[1:], _BREAK], strict=False)
    kept = [t for t, after in following if t not in _DROPPED and (t != "a" or after == _BREAK)]
    return [t for t in kept if t != _BREAK] or [t for t in tokens if t != _BREAK]


def find(answer: str, wanted: str) -> list[tuple[int, int]]:
    """Return where the words of `wanted` stand in `answer`, one after another; none if `wanted` has no words.

    Returns:
        Stretches of the answer's words, from start to end; `find` of another text in the same answer counts the same.
    """
    given, sought = [t for t in _tokens(answer) if t != _BREAK], words(wanted)
    ends = (_end(given, start, sought) for start in range(len(given))) if sought else ()
    return [(start, end) for start, end in enumerate(ends) if end is not None]


def _end(given: Sequence[str], at: int, sought: Sequence[str]) -> int | None:
    """Return where `sought` ends in `given` if it starts at `at`; articles in between are passed over."""
    for place, word in enumerate(sought):
        while place and at < len(given) and given[at] != word and given[at] in {"a", *_DROPPED}:
            at += 1
        if at == len(given) or given[at] != word:
            return None
        at += 1
    return at


def _tokens(text: str) -> list[str]:
    """Return normalised words with all articles, and `_BREAK` for punctuation that ends a number in words."""
    text = _folded(text)
    # Marks of other scripts are parts of words, which `\w` does not know.
    shape = "".join("x" if unicodedata.category(c).startswith("M") else c for c in text)
    tokens: list[_Token] = []
    for match in _TOKEN.finditer(shape):
        kind, part = match.lastgroup, text[match.start() : match.end()]
        if kind in ("ordinal", "number", "decimal"):
            figures = re.sub("[,']", "", match[kind])
            tokens.append(_Token(figures, Decimal(figures), kind == "ordinal"))
        elif kind in ("word", "figures"):
            tokens.append(_Token(part))
        elif kind == "initials":
            tokens.append(_Token(part.replace(".", "")))
        elif kind == "break":
            tokens.append(_Token(_BREAK))
    with localcontext(prec=100):
        return _with_numbers(tokens)


def _folded(text: str) -> str:
    """Return text with one spelling for casing, composed and compatibility characters, dashes and quotes."""
    text = _SPACED_THOUSANDS.sub(",", text)
    # Superscripts and fractions stay: NFKC would make 102 of 10², and 1 and 2 of ½.
    text = "".join(c if unicodedata.category(c) == "No" else unicodedata.normalize("NFKC", c) for c in text)
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).translate(_DASHES)


@dataclass(frozen=True)
class _Token:
    """A word, with its value where it is written in digits."""

    text: str
    value: Decimal | None = None
    ordinal: bool = False


def _with_numbers(tokens: Sequence[_Token]) -> list[str]:
    """Return the tokens' words, each number as one word of digits."""
    result: list[str] = []
    at, after_number = 0, False
    while at < len(tokens):
        # "Minus five" is a number, "seven minus five" is not.
        minus = tokens[at].text == "minus" and not after_number
        number = _quantity(tokens, at + minus)
        if number is None:
            result.append(tokens[at].text)
            at += 1
        else:
            value, at, ordinal = number
            # Plus zero, so that none is -0.
            value = (-value if minus else value) + 0
            result.append(f"{value.normalize():f}" + ("th" if ordinal else ""))
        after_number = number is not None
    return result


def _quantity(tokens: Sequence[_Token], at: int) -> tuple[Decimal, int, bool] | None:
    """Read a number that starts at `at`: its value, where it ends, and whether it is an ordinal."""
    total, limit, end, ordinal = Decimal(0), Decimal(10**15), at, False
    while (group := _group(tokens, _past_and(tokens, end, at), first=end == at)) is not None:
        value, after, last, digits = group
        scale = _SCALE.get(_cardinal(tokens, after)[0]) if not last else None
        if scale is not None and scale < limit:
            last = _cardinal(tokens, after)[1]
            total, limit, end = total + value * scale, Decimal(scale), after + 1
        elif end == at or (value < limit and not digits and scale is None):
            total, limit, end = total + value, Decimal(0), after
        else:
            break
        ordinal = last
        if ordinal or not limit:
            break
    if end == at:
        return None
    decimals = [] if ordinal else _decimals(tokens, end)
    if decimals:
        total += Decimal("0." + "".join(decimals))
        end += 1 + len(decimals)
    return total, end, ordinal


def _group(tokens: Sequence[_Token], at: int, *, first: bool) -> tuple[Decimal, int, bool, bool] | None:
    """Read what stands before a scale, up to hundreds: value, end, whether an ordinal, and whether in digits."""
    if at >= len(tokens):
        return None
    token = tokens[at]
    digits = token.value is not None
    if token.value is not None:
        value, end, ordinal = token.value, at + 1, token.ordinal
    elif (small := _small(tokens, at)) is not None:
        value, end, ordinal = small
    elif first and _cardinal(tokens, at)[0] in ("hundred", *_SCALE):
        value, end, ordinal = Decimal(1), at, False
    elif first and token.text == "a" and _cardinal(tokens, at + 1)[0] in ("hundred", *_SCALE):
        value, end, ordinal = Decimal(1), at + 1, False
    else:
        return None
    word, last = _cardinal(tokens, end)
    if not ordinal and word == "hundred":
        value, end, ordinal, digits = value * 100, end + 1, last, False
        rest = None if ordinal else _small(tokens, _past_and(tokens, end, at))
        # "Between one hundred and two hundred": the second number is no rest of the first.
        if rest is not None and _cardinal(tokens, rest[1])[0] != "hundred":
            value, end, ordinal = value + rest[0], rest[1], rest[2]
    elif not ordinal and first and not digits and 11 <= value <= 20:
        # "Nineteen eighty-four".
        years = _small(tokens, end)
        if years is not None and years[0] >= 10:
            value, end, ordinal = 100 * value + years[0], years[1], years[2]
    return value, end, ordinal, digits


def _small(tokens: Sequence[_Token], at: int) -> tuple[Decimal, int, bool] | None:
    """Read a number below a hundred in words: its value, where it ends, and whether it is an ordinal."""
    word, ordinal = _cardinal(tokens, at)
    if word in _UNIT:
        return Decimal(_UNIT[word]), at + 1, ordinal
    if word not in _TEN:
        return None
    unit, last = _cardinal(tokens, at + 1)
    if not ordinal and 0 < _UNIT.get(unit, 0) < 10:
        return Decimal(_TEN[word] + _UNIT[unit]), at + 2, last
    return Decimal(_TEN[word]), at + 1, ordinal


def _decimals(tokens: Sequence[_Token], at: int) -> list[str]:
    """Return the digits after "point"."""
    found: list[str] = []
    if at < len(tokens) and tokens[at].text == "point":
        for token in tokens[at + 1 :]:
            if _UNIT.get(token.text, 10) > 9:
                break
            found.append(str(_UNIT[token.text]))
    return found


def _past_and(tokens: Sequence[_Token], at: int, start: int) -> int:
    """Return the place after an "and" at `at`, if a number began before it."""
    return at + 1 if at > start and at < len(tokens) and tokens[at].text == "and" else at


def _cardinal(tokens: Sequence[_Token], at: int) -> tuple[str, bool]:
    """Return the word at `at` as a cardinal, and whether it was an ordinal; nothing behind the end."""
    word = tokens[at].text if at < len(tokens) else _BREAK
    return (_ORDINAL[word], True) if word in _ORDINAL else (word, False)
