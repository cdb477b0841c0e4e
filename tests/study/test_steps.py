import pytest

from gapprobe.errors import OutputError
from gapprobe.study.steps import Steps, claim


def test_a_finished_step_is_read_and_not_run_again(tmp_path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, object]:
        calls.append(1)
        return {"value": 0.1 + 0.2}

    first = Steps(tmp_path).once("gap", "key", compute)
    again = Steps(tmp_path).once("gap", "key", compute)
    assert first == again == {"value": 0.1 + 0.2}
    assert len(calls) == 1
    Steps(tmp_path).once("gap", "another key", compute)
    assert len(calls) == 2


def test_a_torn_step_is_run_again(tmp_path) -> None:
    Steps(tmp_path).once("gap", "key", lambda: {"value": 1})
    (tmp_path / "gap.json").write_text((tmp_path / "gap.json").read_text()[:20])
    assert Steps(tmp_path).once("gap", "key", lambda: {"value": 2}) == {"value": 2}


def test_a_step_that_fails_leaves_nothing_behind(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError):
        Steps(tmp_path).once("gap", "key", lambda: {"value": 1 / 0})
    assert list(tmp_path.iterdir()) == []


def test_the_output_folder_of_another_study_is_refused(tmp_path) -> None:
    claim(tmp_path / "out", {"a": "1"})
    claim(tmp_path / "out", {"a": "1", "b": "2"})
    with pytest.raises(OutputError, match="holds another study called a"):
        claim(tmp_path / "out", {"a": "3"})


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"not empty and not gapprobe's \(it holds thesis.tex\)"):
        claim(tmp_path, {"a": "1"})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match="is a file"):
        claim(tmp_path / "thesis.tex", {"a": "1"})
