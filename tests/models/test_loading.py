import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gapprobe.models.loading as loading
from gapprobe.errors import ModelError
from gapprobe.models.check import check_model
from gapprobe.models.loading import load_model
from tests.models.kinds import BUILDERS, KINDS
from tests.models.tiny import build, picture


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        model, processor = BUILDERS[kind]()
        model.save_pretrained(root / kind)
        # As a user would: the side is saved with the tokenizer, from where it would reach the Q-Former.
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"
        processor.save_pretrained(root / kind)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["llava-llama"], tmp_path / "model"))


@pytest.fixture
def sealed_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **_: object) -> None:
        raise AssertionError(f"left the machine or started a program: {args}")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(subprocess.Popen, "__init__", never)


@pytest.mark.usefixtures("sealed_off")
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_is_the_model_that_was_saved(kind: str, folders: dict[str, Path]) -> None:
    hf, _ = BUILDERS[kind]()
    model = load_model(folders[kind])
    assert check_model(model).passed
    theirs = hf.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.hf.state_dict().items())
    assert model.family.name == kind.split("-")[0]
    assert model.tokenizer.padding_side == "left"
    assert not any(p.requires_grad for p in model.hf.parameters())
    assert not model.hf.training


def test_the_q_former_reads_from_the_left_whatever_was_saved(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["instructblip-llama"]))
    mask = model.encode(["a", "a longer one"], [picture(0), picture(1)])["qformer_attention_mask"]
    assert mask[0, 0] == 1
    assert mask[0, -1] == 0


def test_dtypes(folders: dict[str, Path], tmp_path: Path) -> None:
    hf, processor = build("llava-llama")
    hf.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_model(tmp_path).hf.dtype == torch.float32
    assert load_model(tmp_path, dtype="auto").hf.dtype == torch.bfloat16
    half = load_model(folders["llava-llama"], dtype="bfloat16")
    assert half.hf.dtype == torch.bfloat16
    assert half.describe()["dtype"] == "bfloat16"
    assert half.encode(["hi"], [picture(0)])["pixel_values"].dtype == torch.bfloat16


def test_the_weights_fingerprint_is_that_of_the_file(folder: Path) -> None:
    model = load_model(folder)
    weights = folder / "model.safetensors"
    told = subprocess.run(["sha256sum", str(weights)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert model.describe()["weights"] == told
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert load_model(folder).describe()["weights"] != told


def test_a_folder_elsewhere_is_the_same_model(folder: Path, folders: dict[str, Path]) -> None:
    here, there = (load_model(path).describe() for path in (folder, folders["llava-llama"]))
    assert here.pop("source") != there.pop("source")
    assert here == there


def test_several_files_of_weights(folder: Path) -> None:
    hf, _ = build("llava-llama")
    (folder / "model.safetensors").unlink()
    hf.save_pretrained(folder, max_shard_size="100KB")
    model = load_model(folder)
    assert len(model.files) > 1
    assert len(model.describe()["weights"]) == 64
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match=r"weights cannot be loaded|weights lack"):
        load_model(folder)


def refused(source: object, *words: str, **options: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(source, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.usefixtures("sealed_off")
class TestRefusals:
    def test_no_such_path(self, tmp_path: Path) -> None:
        refused(tmp_path / "none", "none does not exist")
        refused("./none", "./none does not exist")
        refused(str(tmp_path / "none"), "does not exist")

    def test_a_file(self, folder: Path) -> None:
        refused(folder / "config.json", "is a file", "folder")

    def test_no_model_folder(self, tmp_path: Path) -> None:
        refused(tmp_path, "no config.json")

    def test_an_unknown_architecture(self, folder: Path) -> None:
        self.edit(folder / "config.json", architectures=["NewForConditionalGeneration"])
        refused(folder, "NewForConditionalGeneration", "InstructBlipForConditionalGeneration", "gapprobe models list")

    @pytest.mark.parametrize("content", ["{", "[]", "{}"])
    def test_a_damaged_configuration(self, folder: Path, content: str) -> None:
        (folder / "config.json").write_text(content)
        refused(folder, "config.json")

    @pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
    def test_a_missing_part_of_the_processor(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        refused(folder, "processor", name, "missing")

    @pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
    def test_a_damaged_part_of_the_processor(self, folder: Path, name: str) -> None:
        (folder / name).write_text("{")
        refused(folder, "processor cannot be loaded")

    def test_no_q_former_tokenizer(self, folders: dict[str, Path], tmp_path: Path) -> None:
        shutil.copytree(folders["instructblip-llama"], tmp_path / "model")
        shutil.rmtree(tmp_path / "model" / "qformer_tokenizer")
        refused(tmp_path / "model", "processor", "qformer_tokenizer")

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        refused(folder, "no weights", ".safetensors")

    def test_pickled_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        refused(folder, "pytorch_model.bin", "pickle", "safetensors")

    def test_truncated_weights(self, folder: Path) -> None:
        os.truncate(folder / "model.safetensors", 100_000)
        refused(folder, "weights cannot be loaded")

    def test_missing_tensors(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        refused(folder, "lack 1 tensors", "layers.1.mlp.up_proj")

    def test_an_instantiated_model_without_processor(self) -> None:
        refused(build("llava-llama")[0], "needs its processor")

    def test_a_processor_of_another_kind(self) -> None:
        refused(build("instructblip-llama")[0], "no qformer_tokenizer", processor=build("llava-llama")[1])

    def test_no_such_device(self, folder: Path) -> None:
        refused(folder, "device 'nonsense'", device="nonsense")

    @staticmethod
    def edit(path: Path, **fields: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nmore")

    monkeypatch.setattr(loading, "cached_file", unreachable)
    with pytest.raises(ModelError, match="owner/name is no folder here.*at revision v2: We couldn't connect. Check"):
        load_model("owner/name", revision="v2")


def test_a_hub_model_records_its_commit(folder: Path, tmp_path: Path) -> None:
    # A cache as the hub's client leaves it; in another process, for the client reads its settings when imported.
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "home" / "hub" / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots").mkdir()
    shutil.copytree(folder, cache / "snapshots" / commit)
    code = (
        "from gapprobe.models.loading import load_model; m = load_model('owner/name'); "
        "print(m.revision, m.source, m.weights_fingerprint)"
    )
    home = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=home, check=True)
    assert done.stdout.split() == [commit, "owner/name", load_model(folder).weights_fingerprint]


def test_the_attention_implementation_is_the_one_asked_for(folder: Path) -> None:
    assert load_model(folder, attention="eager").attention == "eager"
    assert load_model(folder).attention == "sdpa"
    refused(folder, "weights cannot be loaded", attention="nonsense")


def test_the_dtype_is_that_of_the_stream(folders: dict[str, Path]) -> None:
    # InstructBLIP keeps its queries, the first of its parameters, in float32.
    model = load_model(folders["instructblip-llama"], dtype="float16")
    assert model.hf.dtype == torch.float32
    assert model.dtype == torch.float16
    assert model.describe()["dtype"] == "float16"


def test_pickled_weights_are_read_if_the_user_insists(folder: Path) -> None:
    plain = load_model(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = load_model(folder, allow_pickle=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.hf.parameters(), model.hf.parameters(), strict=True))
    assert len(model.weights_fingerprint) == 64


def test_weights_spread_over_devices_are_the_same(folder: Path) -> None:
    plain, spread = load_model(folder), load_model(folder, device="spread")
    assert spread.describe() == plain.describe()
    assert check_model(spread).passed
    assert all(torch.equal(a, b) for a, b in zip(plain.hf.parameters(), spread.hf.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "package"), [({"device": "spread"}, "accelerate"), ({"quantized": "4bit"}, "bitsandbytes")]
)
def test_a_package_that_is_missing_is_named(
    options: dict[str, Any], package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = loading.find_spec
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == package else known(name))
    refused(folder, f"needs the package {package}: pip install {package}", **options)


def test_a_processor_with_a_video_half_needs_no_torchvision(folders: dict[str, Path]) -> None:
    for kind in ("qwen2_vl-qwen2_vl_text", "internvl-qwen2", "llava_onevision-qwen2", "smolvlm-llama"):
        model = load_model(folders[kind])
        assert "video_processor" not in model.processor.get_attributes()
        assert (
            type(model.processor).__name__
            == json.loads((folders[kind] / "processor_config.json").read_text())["processor_class"]
        )
