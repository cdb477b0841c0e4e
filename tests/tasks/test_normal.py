"""Answers as words: numbers in every spelling, characters, articles, and what must stay apart."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from num2words import num2words

from gapprobe.tasks.normal import find, words


@pytest.mark.parametrize("ordinal", [False, True])
def test_every_number_is_read_as_num2words_writes_it(ordinal: bool) -> None:
    for value in [*range(2_001), *range(2_001, 2_000_000, 7_919), 10**9 + 1, 3 * 10**12 + 40]:
        spelt = num2words(value, ordinal=ordinal)
        # It sets a comma between thousands, at which a number would end.
        assert words(spelt.replace(",", "")) == [f"{value}th" if ordinal else str(value)], spelt


@given(st.integers(-(10**12), 10**12), st.integers(0, 999))
def test_digits_and_words_are_one_number(whole: int, thousandths: int) -> None:
    plain = f"{whole}.{thousandths:03d}"
    grouped = f"{whole:,}.{thousandths:03d}"
    assert words(plain) == words(grouped)
    assert float(words(plain)[0]) == float(plain)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "one thousand"),
        ("1\u202f000", "a thousand"),
        ("3.5 million", "3,500,000"),
        ("1984", "nineteen eighty-four"),
        ("2019", "twenty nineteen"),
        ("1905", "nineteen hundred and five"),
        ("2.50", "two point five"),
        ("0.5", ".5"),
        ("007", "seven"),
        ("-5", "minus five"),
        ("\u22125", "-5"),
        ("21st", "Twenty-First"),
        ("٣", "three"),
        ("１２", "twelve"),
        ("e\u0301te\u0301", "ÉTÉ"),
        ("U.S.A.", "usa"),
        ("Earth's moon", "the Earth moon"),
        ("O’Brien", "o'brien"),
        ("Twenty\u2011five", "25"),
        ("Straße", "STRASSE"),
        ("new_york", "New York"),
    ],
)
def test_spellings_of_one_answer(one: str, other: str) -> None:
    assert words(one) == words(other)


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ("1.5", "1"),
        ("1,234", "1"),
        ("0,5", "0"),
        ("10:30", "10"),
        ("1/2", "1"),
        ("½", "1"),
        ("10²", "10"),
        ("-5", "5"),
        ("3rd", "3"),
        ("5km", "5"),
        ("v1.5", "5"),
        ("1.2.3", "2"),
        ("three point five", "three"),
        ("one hundred and five", "one hundred"),
        ("nineteen eighty-four", "nineteen"),
        ("twenty, five", "25"),
        ("vitamin C", "vitamin A"),
        ("zero", "zéro"),
        ("हिन्दी", "हि"),
    ],
)
def test_a_part_is_not_the_whole(answer: str, part: str) -> None:
    assert find(answer, part) == []
    assert find(answer, answer)


def test_two_numbers_are_not_one() -> None:
    assert words("between one hundred and two hundred") == ["between", "100", "and", "200"]
    assert words("one thousand and two thousand") == ["1000", "and", "2000"]
    assert words("one and two") == ["1", "and", "2"]
    assert words("seven minus five") == ["7", "minus", "5"]
    assert words("in 2019 300 people") == ["in", "2019", "300", "people"]


def test_articles_in_the_answer_are_passed_over_and_a_letter_is_not() -> None:
    assert find("once upon time", "Once upon a time")
    assert find("kick the can", "kick can")
    assert find("It is vitamin A because", "vitamin A")
    assert words("The") == ["the"]


def test_where_words_stand() -> None:
    assert find("five and five", "5") == [(0, 1), (2, 3)]
    assert find("anything", "?!") == []


@given(st.text())
@example("a a")
@example("the a, an")
@example("9" * 5000)
@example("one hundred hundred and thousand point first")
def test_any_text_with_words_stands_in_itself(text: str) -> None:
    assert bool(find(text, text)) == bool(words(text))


LATIN = st.text(st.characters(max_codepoint=0xFF))


@given(LATIN, st.sampled_from([str.upper, str.lower, str.title, str.swapcase]))
def test_casing_and_outer_spacing_change_nothing(text: str, cased) -> None:
    # Title-casing sets letters after apostrophes large, and nothing else; the micro sign has no small form of its own.
    assert words(f"  {cased(text)}\n") == words(text)


WORDS = st.sampled_from(["one", "five", "hundred", "thousand", "paris", "12", "1.5", "a", "the"])


@given(st.lists(WORDS, min_size=1), st.data())
def test_spacing_between_words_changes_nothing(parts: list[str], data) -> None:
    gaps = [data.draw(st.sampled_from([" ", "  ", "\n", "\t "])) for _ in parts]
    assert words("".join(p + g for p, g in zip(parts, gaps, strict=True))) == words(" ".join(parts))
