"""The table of docs/models.md: what the tests have shown of which family. `python -m tests.models.table` makes it anew.

A cell is filled by the outcomes of tests named here, and by nothing else; test_table.py has the docs agree with it.
"""

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from gapprobe.models.families import FAMILIES
from tests.models.kinds import KINDS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
# Heading -> the tests that fill the column.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "bit-equal": ("models/test_trace.py::test_layers_are_the_hidden_states_of_transformers",),
    "batch = single": ("models/test_trace.py::test_a_batch_gives_what_its_rows_give_alone",),
    "answers": ("tracing/test_answers.py::test_a_batch_is_answered_as_transformers_answers_each_alone",),
    "roles": ("tracing/test_tokens.py::test_roles_in_every_family",),
    "places": ("models/test_layouts.py::test_a_token_changes_where_its_box_lies",),
    "lens": ("models/test_model.py::test_the_unembedding_gives_the_models_logits",),
    "parts of blocks": ("models/test_sites.py::test_the_stream_is_the_sum_of_what_is_added_to_it",),
    "tower": ("models/test_sites.py::test_the_tower_is_read_layer_by_layer",),
    "from a folder": ("models/test_loading.py::test_a_saved_folder_is_the_model_that_was_saved",),
    "TransformerLens": ("models/test_bridge.py::test_our_trace_is_transformer_lens_cache_bit_for_bit",),
}
Cells = dict[tuple[str, str], str]


def cells(outcomes: Iterable[tuple[str, bool]]) -> Cells:
    """Return what the outcomes of tests, by node id, say of each kind in each column."""
    found: dict[tuple[str, str], list[tuple[str, bool]]] = defaultdict(list)
    columns = {test: name for name, tests in COLUMNS.items() for test in tests}
    for node, passed in outcomes:
        name, _, parameters = node.partition("[")
        column = columns.get(name.removeprefix("tests/"))
        kind = next((kind for kind in KINDS if re.fullmatch(rf"{re.escape(kind)}(-.*)?", parameters.rstrip("]"))), None)
        # "places" has the size of the picture in front.
        kind = kind or next((kind for kind in KINDS if parameters.rstrip("]").startswith(kind + "-")), None)
        if column and kind:
            found[kind, column].append((parameters.rstrip("]"), passed))
    return {key: _told(tests) for key, tests in found.items()}


def _told(tests: list[tuple[str, bool]]) -> str:
    if not all(passed for _, passed in tests):
        return "fails"
    ways = {parameters.rsplit("-", 1)[-1] for parameters, _ in tests} & {"True", "False"}
    return {frozenset({"False"}): "text", frozenset({"True", "False"}): "image, text"}.get(frozenset(ways), "yes")


def render(found: Cells) -> str:
    """Return the table."""
    lines = [
        f"| family | language model | {' | '.join(COLUMNS)} |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for family in FAMILIES:
        for language in family.language_models:
            row = [found.get((f"{family.name}-{language}", column), "–") for column in COLUMNS]
            lines.append(f"| {family.name} | {language} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def run() -> list[tuple[str, bool]]:
    """Run the tests that fill the table; return their node ids and outcomes."""
    files = sorted({f"tests/{test.split('::')[0]}" for tests in COLUMNS.values() for test in tests})
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "auto", f"--junit-xml={report}", *files], cwd=ROOT, check=False
        )
        cases = ElementTree.parse(report).iter("testcase")
        return [
            (f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}", len(case) == 0)
            for case in cases
        ]


if __name__ == "__main__":
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + render(cells(run())) + END + rest.partition(END)[2])
