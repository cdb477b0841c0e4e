from dataclasses import replace
from typing import Any

import pytest
import torch

from gapprobe.errors import ModelError
from gapprobe.models.check import Check, check_model
from gapprobe.models.model import Model
from tests.models.kinds import KINDS, fresh, loaded


def changed(kind: str, **row: str) -> Model:
    model = loaded(kind)
    return replace(model, family=replace(model.family, **row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_passes(kind: str, dtype: torch.dtype) -> None:
    result = check_model(fresh(kind, dtype=dtype))
    result.require()
    assert len(result.checks) == 4
    assert result.checks[0].error == 0
    assert str(result).count("ok  ") == 4


def failing(model: Model) -> list[str]:
    result = check_model(model)
    with pytest.raises(ModelError, match="FAIL"):
        result.require()
    return [check.name for check in result.checks if not check.passed]


def test_a_wrong_norm_is_caught() -> None:
    names = failing(changed("llava-llama", final_norm="model.language_model.layers.1.input_layernorm"))
    assert len(names) == 2
    assert "through the final norm" in names[0]
    assert "logits follow" in names[1]


def test_shifted_blocks_are_caught() -> None:
    model = fresh("llava-llama")
    hf: Any = model.hf
    # A path cannot skip a block, so a list of the later blocks stands in for a wrong row.
    hf.late = torch.nn.ModuleList(list(hf.model.language_model.layers)[1:])
    with pytest.raises(ModelError, match="2 blocks were found, but transformers returns 3"):
        check_model(replace(model, family=replace(model.family, blocks="late")))


def test_blocks_of_another_part_are_caught() -> None:
    model = fresh("llava-llama")
    hf: Any = model.hf
    hf.other = torch.nn.ModuleList([hf.model.multi_modal_projector.linear_2, *hf.model.language_model.layers[1:]])
    with pytest.raises((ModelError, IndexError)):
        check_model(replace(model, family=replace(model.family, blocks="other"))).require()


def test_a_missing_gain_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Model.unembedding
    monkeypatch.setattr(Model, "unembedding", lambda self: replace(original(self), gain=None))
    assert failing(loaded("llava-llama")) == ["the logits follow from layer 3"]


def test_padding_between_picture_and_text_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # A T5 knows where a token stands from the distances alone.
    monkeypatch.setattr("gapprobe.models.model._padded_in_front", lambda inputs: inputs)
    for kind in ("blip2_t5-t5", "instructblip_t5-t5"):
        assert failing(loaded(kind)) == ["a batch gives what its rows give alone"]


def test_left_padding_in_the_q_former_is_caught() -> None:
    model = fresh("instructblip-llama")
    model.processor.qformer_tokenizer.padding_side = "left"
    assert failing(model) == ["a batch gives what its rows give alone"]


def test_a_nan_never_passes() -> None:
    model = fresh("llava-llama")
    hf: Any = model.hf
    with torch.no_grad():
        hf.model.language_model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    assert len(failing(model)) == 4
    assert not Check("x", float("nan"), 1.0).passed
