"""From a hub id, a folder or an instantiated model to a `Model`. Everything that can be refused is, before any work.

Weights come from safetensors only. A local folder never leads to the network, and nothing here installs anything.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils.hub import cached_file

from gapprobe.errors import ModelError
from gapprobe.models.families import Family, family_of
from gapprobe.models.model import Model

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Files of a processor; of each line one must be there.
PROCESSOR_FILES = (
    ("processor_config.json", "preprocessor_config.json"),
    ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"),
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load_model(
    source: str | Path | PreTrainedModel,
    *,
    processor: ProcessorMixin | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a vision-language model so that it can be traced.

    Args:
        source: a Hugging Face id, a folder, or an instantiated model (which keeps its dtype and device).
        processor: the processor of an instantiated model; it is copied, for its padding side must change.
        dtype: of the weights; "auto" takes the dtype they were saved in.
        device: "cpu", "cuda", "cuda:1", …; "auto" is a GPU where there is one.
        revision: branch, tag or commit of a Hugging Face id; the commit is recorded.
        trust_remote_code: let code from the model's repository run. Off, and best left off.

    Raises:
        ModelError: what `source` names is not there, is no vision-language model that gapprobe knows, or lacks a part.
    """
    if isinstance(source, PreTrainedModel):
        return _instantiated(source, processor)
    folder, commit = _find(source, revision)
    where = str(source)
    config = _read_config(folder, where)
    architecture = _architecture(config, where)
    family = family_of(architecture, None, where)
    if commit is None:  # the hub's client fetches what it needs, and says what is not there
        _require_files(folder, where)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options |= {"local_files_only": True} if commit is None else {"revision": commit}
    name = str(folder) if commit is None else where
    language = cast(Any, _pretrained(AutoConfig, name, where, "config.json", options)).text_config.model_type
    family = family_of(architecture, language, where)
    # Before the weights, because it is quick to fail.
    loaded = processor or _pretrained(AutoProcessor, name, where, "processor", options)
    ready = _ready_processor(cast(ProcessorMixin, loaded), family, where)
    for part in family.processor_parts:
        # transformers puts the language model's tokenizer in the place of another one that is missing.
        if processor is None and part not in ("image_processor", "tokenizer") and not (folder / part).is_dir():
            raise ModelError(f"{where}: its processor lacks the folder {part}; copy it from the original model")
    place = _device(device)
    hf = _load_weights(name, where, options, dtype)
    cast(nn.Module, hf).to(place)
    files = tuple(sorted(folder.glob("*.safetensors")))
    return Model(_frozen(hf), ready, family, where, commit or "", files)


def _instantiated(hf: PreTrainedModel, processor: ProcessorMixin | None) -> Model:
    where = type(hf).__name__
    if processor is None:
        raise ModelError(f"{where}: an instantiated model needs its processor; give processor=AutoProcessor…")
    text = getattr(hf.config, "text_config", None)
    family = family_of(where, getattr(text, "model_type", None), where)
    return Model(_frozen(hf), _ready_processor(processor, family, where), family, where)


def _find(source: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """Return the folder that holds config.json, and the commit if it came from the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{source} is not a model folder: it has no config.json")
        return path, None
    if path.exists():
        raise ModelError(f"{source} is a file; give the folder that holds config.json and the weights")
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise ModelError(f"{source} does not exist; give a model folder or a Hugging Face id such as owner/name")
    try:
        config = cached_file(source, "config.json", revision=revision)
    # The hub's client raises OSError, its own HTTP errors and ValueError; each says that there is no such model here.
    except Exception as error:
        asked = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{source} is no folder here, and the Hugging Face hub does not give it{asked}: {_first_line(error)}. "
            "Check the spelling and the network, or give the path of a downloaded folder"
        ) from error
    # …/snapshots/<commit>/config.json
    folder = Path(cast(str, config)).parent
    return folder, folder.name


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}: config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{where}: config.json does not hold a configuration")
    return config


def _architecture(config: dict[str, Any], where: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise ModelError(f"{where}: config.json names no architecture, so this is not a model gapprobe can load")
    if not isinstance(config.get("vision_config"), dict):
        raise ModelError(
            f"{where} is not a vision-language model: {names[0]} has no vision_config. gapprobe traces models that "
            "read images (`gapprobe models list`)"
        )
    return str(names[0])


def _require_files(folder: Path, where: str) -> None:
    for names in PROCESSOR_FILES:
        if not any((folder / name).is_file() for name in names):
            name = " or ".join(names)
            raise ModelError(f"{where} has no processor: {name} is missing; copy it from the original model")
    if not any(folder.glob("*.safetensors")):
        pickled = [path.name for pattern in PICKLED for path in folder.glob(pattern)]
        if pickled:
            raise ModelError(
                f"{where} has its weights only in {pickled[0]}, a pickle that can run code when it is read; convert "
                "them to safetensors (load in transformers and save_pretrained) and try again"
            )
        raise ModelError(f"{where} has no weights: no file ends in .safetensors")


def _pretrained(kind: Any, name: str, where: str, what: str, options: dict[str, Any]) -> object:
    try:
        return kind.from_pretrained(name, **options)
    # transformers answers damaged or missing files with nearly any exception; all mean that this part is unusable.
    except Exception as error:
        raise ModelError(f"{where}: {what} cannot be loaded: {_first_line(error)}") from error


def _load_weights(name: str, where: str, options: dict[str, Any], dtype: Dtype) -> PreTrainedModel:
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    options = options | {"dtype": wanted, "use_safetensors": True, "output_loading_info": True}
    hf, told = cast(Any, _pretrained(AutoModelForImageTextToText, name, where, "weights", options))
    # transformers fills what is missing with random numbers and goes on.
    if missing := sorted(told["missing_keys"]):
        raise ModelError(f"{where}: the weights lack {len(missing)} tensors of the model, the first is {missing[0]}")
    return hf


def _ready_processor(processor: ProcessorMixin, family: Family, where: str) -> ProcessorMixin:
    """Return a copy that pads on the left."""
    ready = cast(Any, copy.deepcopy(processor))
    if lacking := [part for part in family.processor_parts if getattr(ready, part, None) is None]:
        raise ModelError(f"{where}: its processor ({type(processor).__name__}) has no {', no '.join(lacking)}")
    # Set on the tokenizer and taken out of its settings: from there the side would also reach the Q-Former's tokenizer,
    # whose absolute positions count from the left.
    ready.tokenizer.init_kwargs.pop("padding_side", None)
    ready.tokenizer.padding_side = "left"
    if hasattr(ready, "qformer_tokenizer"):
        ready.qformer_tokenizer.padding_side = "right"
    if ready.tokenizer.pad_token is None:
        ready.tokenizer.pad_token = ready.tokenizer.eos_token  # masked wherever it pads
    return ready


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {_first_line(error)}; try device='cpu'") from error
    return found


def _frozen(hf: PreTrainedModel) -> PreTrainedModel:
    return hf.eval().requires_grad_(False)


def _first_line(error: BaseException) -> str:
    lines = (line.strip().rstrip(".") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
