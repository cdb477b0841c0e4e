from dataclasses import fields

import pytest

from gapprobe.models.families import FAMILIES, family_of
from gapprobe.models.families.base import Family
from tests.models.kinds import KINDS, loaded

PATHS = ("blocks", "final_norm", "unembedding", "encoder", "encoder_norm", "generator", "vision", "bridge", "queries")


def test_every_family_and_every_language_model_in_it_is_filled_by_a_test() -> None:
    assert sorted(KINDS) == sorted(f"{family.name}-{lm}" for family in FAMILIES for lm in family.language_models)


def test_no_architecture_with_a_language_model_has_two_families() -> None:
    pairs = [(name, lm) for family in FAMILIES for name in family.architectures for lm in family.language_models]
    assert len(set(pairs)) == len(pairs)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_a_family_is_found_by_architecture_and_language_model() -> None:
    found = family_of("InstructBlipForConditionalGeneration", "t5")
    assert found is not None
    assert found.name == "instructblip_t5"
    assert family_of("InstructBlipForConditionalGeneration", "gpt2") is None
    assert family_of("OtherForConditionalGeneration", "llama") is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_leads_to_a_module(kind: str) -> None:
    model = loaded(kind)
    assert {field.name for field in fields(Family)} > set(PATHS)
    for name in PATHS:
        if path := getattr(model.family, name):
            assert model.hf.get_submodule(path) is not None
