from typing import Any

import numpy as np
import pytest

from gapprobe.errors import ConfigError
from gapprobe.store.format import ROLES
from gapprobe.tracing.positions import parse_positions
from gapprobe.tracing.tokens import TokenTable

NAMES = ["other", "image", "image", "question", "entity", "question", "entity", "answer_cue"]
TABLE = TokenTable(
    np.arange(8) + 50, np.array([ROLES[name] for name in NAMES], dtype=np.uint8), lambda _: "abcdefgh", np.zeros((8, 4))
)


def chosen(rule: Any) -> list[int]:
    (position,) = parse_positions({"x": rule})
    return position.in_prompt(TABLE).tolist()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("last_input", [7]),
        ("prompt", list(range(8))),
        ("all", list(range(8))),
        ("prompt[-1]", [7]),
        ("prompt[0]", [0]),
        ("prompt[-2]", [6]),
        ("prompt[9]", []),
        ("prompt[-3:]", [5, 6, 7]),
        ("prompt[2:4]", [2, 3]),
        ("prompt[:-6]", [0, 1]),
        ("image", [1, 2]),
        ("entity", [4, 6]),
        ("entity[-1]", [6]),
        ("entity[0]", [4]),
        ("question[1:]", [5]),
        ("query", []),
        ("last_output", []),
        ("answer", []),
        ("start", []),
        (lambda table: table.where("entity") - 1, [3, 5]),
        (lambda table: table.roles == ROLES["image"], [1, 2]),
        (lambda _: [-1, 0, 0], [0, 7]),
        (lambda _: [], []),
        (lambda table: table.frame().query("text > 'f'").index, [6, 7]),
    ],
)
def test_tokens_of_the_prompt(rule: Any, expected: list[int]) -> None:
    assert chosen(rule) == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("last_output", [2]),
        ("answer", [0, 1, 2]),
        ("all", [0, 1, 2]),
        ("answer[0]", [0]),
        ("answer[-2:]", [1, 2]),
        ("answer[5]", []),
        ("prompt", []),
        ("entity", []),
        (lambda _: [0], []),
    ],
)
def test_tokens_of_the_answer(rule: Any, expected: list[int]) -> None:
    (position,) = parse_positions({"x": rule})
    assert position.in_answer(3).tolist() == expected
    assert position.in_answer(0).tolist() == []
    assert position.answers == (rule in ("last_output", "answer", "all", "answer[0]", "answer[-2:]", "answer[5]"))


@pytest.mark.parametrize(
    "bad",
    [[], ["a", "a"], ["first"], ["entity[]"], ["entity[1:2:3]"], ["entity[x]"], ["all[1]"], ["all[1:]"], ["padding"]]
    + [["last_input"] * 2, {}, "last_input", [f"prompt[{i}]" for i in range(9)]],
)
def test_rules_that_make_no_sense(bad: Any) -> None:
    with pytest.raises(ConfigError):
        parse_positions(bad)


@pytest.mark.parametrize("told", [[8], [-9], [0.5], ["a"], [[1]], [True], 3])
def test_functions_that_return_no_positions(told: Any) -> None:
    with pytest.raises(ConfigError, match=r"position 'x' returned .* for a prompt of 8 tokens"):
        chosen(lambda _table: told)


def test_names_that_say_their_rule_need_no_other() -> None:
    plain, renamed, function = parse_positions({"last_input": "last_input", "end": "last_input", "f": len})
    assert (plain.renamed, renamed.renamed, function.renamed) == (False, True, True)
    assert (plain.rule, renamed.rule, function.rule) == ("prompt[-1]", "prompt[-1]", "function builtins.len")


def test_the_table_as_a_frame() -> None:
    frame = TABLE.frame()
    assert frame["role"].tolist() == NAMES
    assert frame.index.name == "position"
    assert frame["id"].tolist() == list(range(50, 58))
