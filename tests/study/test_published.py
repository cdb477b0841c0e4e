import pytest

from gapprobe.errors import ConfigError
from gapprobe.study.config import load_config
from gapprobe.study.published import beside, published


def test_the_papers_figures_are_shares_and_text_is_never_below_visual() -> None:
    assert len(published()) == 25
    for visual, text in published().values():
        assert 0 < visual < text <= 1
    assert beside("llava-1.6-vicuna-7b/mnist") == {
        "name": "llava-1.6-vicuna-7b/mnist",
        "text_only": 0.96,
        "visual": 0.08,
        "gap": 0.88,
    }
    assert beside(None) is None


def test_a_study_names_figures_that_there_are(tmp_path) -> None:
    told = 'name = "n"\nmodel = "m"\nimages = "i"\nquestions = "q.csv"\nprompts = "p.toml"\n'
    (tmp_path / "c.toml").write_text(told + 'published = "gpt-4o/landmarks"\n')
    assert load_config(tmp_path / "c.toml").published == "gpt-4o/landmarks"
    (tmp_path / "c.toml").write_text(told + 'published = "gpt-5/landmarks"\n')
    with pytest.raises(ConfigError, match=r"published: .*no such figures; it has llava-1\.6-mistral-7b/mnist"):
        load_config(tmp_path / "c.toml")
