"""What the README and the docs show is run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The examples of stores are run by tests/store: test_format.py and test_exporting.py.
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("[!s]*.md")),
    ROOT / "docs" / "selective.md",
    ROOT / "docs" / "similarity.md",
]
FENCES = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for page in PAGES}


@pytest.mark.parametrize("page", [name for name, fences in FENCES.items() if fences])
def test_python_examples_run(page: str, tmp_path, monkeypatch) -> None:
    """Run a page's examples one after another, as its reader would: a later one may use what an earlier one made."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, code in enumerate(FENCES[page]):
        exec(compile(code, f"{page}, example {number}", "exec"), names)


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
