"""Results as Markdown: their numbers as they are, and nothing that a text could break."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from gapprobe.cli import main
from gapprobe.files import write_json
from gapprobe.report.tables import markdown
from gapprobe.study.results import read_results
from tests.report import synthetic


def cells(text: str) -> list[list[str]]:
    """Split every table line at the bars that are no part of a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize(
    "made", [synthetic.results(), synthetic.with_nulls(), synthetic.with_details(), synthetic.with_failures()]
)
def test_every_table_has_as_many_cells_in_every_line(made) -> None:
    head: list[str] = []
    for row, following in pairwise([*cells(markdown(made)), []]):
        if set("".join(following)) == {"-"}:
            head = row
        assert len(row) == len(head), row
    assert markdown(made) == markdown(made)


def test_numbers_stand_as_they_are() -> None:
    made = synthetic.with_details()
    rows = {row[0]: row for row in cells(markdown(made))}
    share = made["families"]["llava"]["settings"]["visual"]
    assert rows["visual"][2].startswith(f"{100 * share['accuracy']:.1f}")
    assert rows["published"][1] == "850"
    assert rows["by entity"][1:] == ["4", "81.0\u202f% [78.4, 83.6]", "56.0\u202f% [52.8, 59.2]", "25.0 [19.0, 31.0]"]
    assert rows["aurc"][1:] == ["0.123"] * 4
    assert rows["ece"][1:] == ["not computed"] * 4
    assert rows["letter"][1] == "500"
    layer = rows["6"]
    assert layer[1].startswith(f"{made['families']['llava']['lens']['text'][6]:.3f} [")
    assert "321, only when shown 12 (McNemar p 1e-30)" in markdown(made)


def test_what_a_model_or_a_file_says_is_no_markup() -> None:
    evil = "a | b\n# c <script>x</script> [l](javascript:1) `d` ![i](j)"
    made = synthetic.with_details(evil)
    made["study"]["title"] = made["headline"] = made["study"]["note"] = evil
    made["families"][evil] = made["families"].pop("llava")
    made["families"][evil]["model"]["source"] = evil
    text = markdown(made)
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(|^# c", text, re.MULTILINE)
    assert text.count("\n# ") == 0


def test_the_command_writes_them(tmp_path, capsys) -> None:
    write_json(tmp_path / "results.json", synthetic.results())
    main(["report", str(tmp_path), "--markdown", str(tmp_path / "tables.md")])
    assert str(tmp_path / "tables.md") in capsys.readouterr().out
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") == markdown(synthetic.results())


def test_the_demos_tables_in_the_docs_are_generated() -> None:
    root = Path(__file__).parents[2]
    newest = max((root / "benchmarks" / "results").glob("demo-study-*.json"))
    assert (root / "docs" / "results-demo.md").read_text(encoding="utf-8") == markdown(read_results(newest))
