"""Agreement of judges: against scikit-learn, by hand, and with rows that hang together."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

import gapprobe as gp
from gapprobe.errors import DataError
from gapprobe.tasks.agreement import agreement, weighted_kappa
from gapprobe.tasks.judging import judge_answers

RNG = np.random.default_rng(0)
A = RNG.random(200) < 0.4
B = np.where(RNG.random(200) < 0.2, ~A, A)


def test_kappa_is_scikit_learns_with_and_without_weights() -> None:
    weights = RNG.integers(0, 4, (5, 200)).astype(float)
    for found, w in zip(weighted_kappa(A, B, weights), weights, strict=True):
        # Both are a few sums of 200 terms: their rounding is some 200 units in the last place.
        assert found == pytest.approx(cohen_kappa_score(A, B, sample_weight=w), abs=200 * np.finfo(float).eps)


def test_kappa_of_judges_who_never_differ_in_verdict_does_not_exist() -> None:
    same = np.ones(4, dtype=bool)
    ones = np.ones((1, 4))
    assert np.isnan(weighted_kappa(same, same, ones)).all()
    assert weighted_kappa(same, ~same, ones).tolist() == [0.0]
    assert weighted_kappa(A[:4], A[:4], np.zeros((1, 4))).tolist() == pytest.approx([np.nan], nan_ok=True)


def test_a_table_by_pair_and_what_to_read() -> None:
    answers = {"r1": "12", "r2": "one", "r3": "", "r4": "It is Paris.", "r5": "Rome"}
    gold = {"r1": ["1"], "r2": ["1", "one"], "r3": ["2"], "r4": ["Paris"], "r5": ["Paris"]}
    judged = judge_answers(answers, gold)
    judged["strict"] = [answers[id_] in gold[id_] for id_ in judged.index]
    found = gp.agreement(judged)
    line = found.table.set_index(["first", "second"]).loc[("sound", "published")]
    assert line["n"] == 5
    assert line["agreement"] == pytest.approx(3 / 5)
    # Sound takes 2 of 5 for right, published 4 of 5, so chance agrees on 2/5 * 4/5 + 3/5 * 1/5 = 11/25.
    assert line["kappa"] == pytest.approx((3 / 5 - 11 / 25) / (1 - 11 / 25))
    assert (line["only_first"], line["only_second"]) == (0, 2)
    assert line["ci_low"] <= line["agreement"] <= line["ci_high"]
    assert line["kappa_ci_low"] <= line["kappa"] <= line["kappa_ci_high"]
    assert len(found.table) == 3
    assert found.disagreements.index.tolist() == ["r1", "r3", "r4"]
    assert found.disagreements.loc["r1", "answer"] == "12"


def test_rows_that_hang_together_widen_the_interval() -> None:
    # Each of 20 questions has ten rows alike, so 200 rows say what 20 say: the interval is sqrt(10) times as wide.
    alike = pd.DataFrame({"a": np.repeat(A[:20], 10), "b": np.repeat(B[:20], 10), "question": np.repeat(range(20), 10)})
    alike["image"] = np.tile(range(10), 20)
    rows, questions = (agreement(alike, clusters=c, replicates=4000).table.iloc[0] for c in (None, "question"))
    assert rows["agreement"] == questions["agreement"]
    widths = [line["ci_high"] - line["ci_low"] for line in (rows, questions)]
    assert widths[1] / widths[0] == pytest.approx(np.sqrt(10), rel=0.15)
    # Images say the same as each other, so resampling them besides changes nothing.
    crossed = agreement(alike, clusters=("question", "image"), replicates=4000).table.iloc[0]
    assert crossed["ci_high"] - crossed["ci_low"] == pytest.approx(widths[1], rel=0.15)


@pytest.mark.parametrize(
    ("table", "clusters", "message"),
    [
        (pd.DataFrame({"a": [True], "b": ["x"]}), None, "1 columns of truth values"),
        (pd.DataFrame({"a": [True], "b": [False]}).iloc[:0], None, "0 rows"),
        (pd.DataFrame({"a": [True], "b": pd.array([None], dtype="boolean")}), None, "judge b has rows without"),
        (pd.DataFrame({"a": [True], "b": [False]}), "question", "no column 'question'"),
    ],
)
def test_tables_that_are_refused(table: pd.DataFrame, clusters: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        agreement(table, clusters)


def test_answers_without_text_or_gold_are_refused() -> None:
    with pytest.raises(DataError, match="answer of row r2 is nan"):
        judge_answers({"r1": "x", "r2": float("nan")}, {"r1": ["x"], "r2": ["x"]})
    with pytest.raises(DataError, match=r"row r1 has the gold answers \(\)"):
        judge_answers({"r1": "x"}, {})
    with pytest.raises(DataError, match="row r1 has the gold answers 'x'; give a list"):
        judge_answers({"r1": "x"}, {"r1": "x"})
