import pytest

from gapprobe.errors import ModelError
from gapprobe.models.families import FAMILIES, family_of
from tests.models.tiny import KINDS


def test_every_row_and_every_language_model_in_it_is_filled_by_a_test() -> None:
    assert sorted(KINDS) == sorted(f"{family.name}-{lm}" for family in FAMILIES for lm in family.language_models)


def test_no_architecture_has_two_rows() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(set(names)) == len(names)


def test_an_unknown_architecture_is_named_beside_the_known() -> None:
    with pytest.raises(ModelError, match=r"x: .*Other.*LlavaForConditionalGeneration.*gapprobe models list"):
        family_of("OtherForConditionalGeneration", None, "x")


@pytest.mark.parametrize("language", ["t5", "opt"])
def test_instructblip_with_an_untested_language_model_is_refused_by_name(language: str) -> None:
    with pytest.raises(ModelError, match=rf"'{language}'.*known inside instructblip: llama"):
        family_of("InstructBlipForConditionalGeneration", language, "x")
