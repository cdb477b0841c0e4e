from pathlib import Path
from typing import Any

import pytest
from torch import nn

from gapprobe.errors import ModelError
from gapprobe.models import loading
from gapprobe.models.check import check_model
from gapprobe.models.loading import load_model
from gapprobe.models.probing import probe_family
from tests.models.kinds import BUILDERS, KINDS, fresh, loaded


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget all families."""
    monkeypatch.setattr(loading, "family_of", lambda *_: None)


@pytest.mark.parametrize("kind", KINDS)
def test_probing_finds_what_the_family_says(kind: str) -> None:
    model = loaded(kind)
    found = probe_family(model.hf, "here")
    for part in ("blocks", "final_norm", "unembedding", "encoder", "encoder_norm", "generator", "modality"):
        assert getattr(found, part) == getattr(model.family, part), part


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize("kind", ["gpt2-gpt2", "llava-llama", "qwen2_vl-qwen2_vl_text", "instructblip-llama"])
def test_an_unknown_model_is_used_with_a_warning_that_names_its_parts(kind: str) -> None:
    hf, processor = BUILDERS[kind]()
    with pytest.warns(UserWarning, match=rf"no family for {type(hf).__name__} .*blocks .*(layers|h), final norm"):
        model = load_model(hf, processor=processor)
    assert model.family.name == f"probed:{type(hf).__name__}"
    assert check_model(model).passed


@pytest.mark.usefixtures("unknown")
def test_an_unknown_folder_too(tmp_path: Path) -> None:
    hf, processor = BUILDERS["qwen2-qwen2"]()
    hf.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no family for Qwen2ForCausalLM"):
        assert load_model(tmp_path).n_layers == 3


@pytest.mark.usefixtures("unknown")
def test_a_model_that_fails_the_check_is_refused() -> None:
    hf, processor = BUILDERS["gpt2-gpt2"]()
    unsteady: Any = hf

    # Between the final norm and the unembedding, where no part of the model shows it.
    unsteady.transformer.register_forward_hook(lambda _m, _a, out: setattr(out, "last_hidden_state", out[0] * 2))
    with pytest.raises(ModelError, match="not this model's residual stream"):
        load_model(hf, processor=processor)


@pytest.mark.usefixtures("unknown")
def test_a_model_whose_parts_could_be_several_is_refused() -> None:
    hf, processor = BUILDERS["gpt2-gpt2"]()
    other: Any = hf
    other.spare = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    with pytest.raises(
        ModelError, match=r"list of 3 decoder blocks found 2 of them \(transformer.h, spare\).*It knows"
    ):
        load_model(hf, processor=processor)
    del other.spare
    other.transformer.ln_f = nn.Identity()
    with pytest.raises(ModelError, match="norm of width 32 beside transformer.h found none"):
        load_model(hf, processor=processor)


def test_a_known_family_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "probe_family", None)
    assert fresh("gpt2-gpt2").family.name == "gpt2"


def test_an_encoder_deeper_than_its_decoder_is_refused() -> None:
    hf, processor = BUILDERS["blip2_t5-t5"]()
    deep: Any = hf
    deep.language_model.decoder.block = deep.language_model.decoder.block[:2]
    with pytest.raises(ModelError, match="encoder has 3 blocks and its decoder 2"):
        load_model(hf, processor=processor)
