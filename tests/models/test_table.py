import subprocess
import sys

from tests.models.kinds import KINDS
from tests.models.table import BEGIN, COLUMNS, END, PAGE, ROOT, cells, render


def test_the_page_claims_what_tests_fill_and_nothing_else() -> None:
    # Every test that is collected must pass for the run of tests to pass, this one among them.
    files = sorted({f"tests/{test.split('::')[0]}" for tests in COLUMNS.values() for test in tests})
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:xdist", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    collected = [(line, True) for line in told.stdout.splitlines() if "::" in line]
    table = render(cells(collected))
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0] == table


def test_a_test_that_fails_shows() -> None:
    kind = "llava-llama"
    name = "tests/" + COLUMNS["bit-equal"][0]
    told = cells([(f"{name}[{kind}-True]", True), (f"{name}[{kind}-False]", False), (f"{name}[gpt2-gpt2-False]", True)])
    assert told == {(kind, "bit-equal"): "fails", ("gpt2-gpt2", "bit-equal"): "text"}
    assert kind in KINDS
