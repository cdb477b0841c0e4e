"""From a hub id, a folder or an instantiated model to a `Model`. Everything that can be refused is, before any work.

Weights come from safetensors only. A local folder never leads to the network, and nothing here installs anything.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.hub import cached_file

from gapprobe.errors import ModelError
from gapprobe.models.check import check_model
from gapprobe.models.families import FAMILIES, family_of
from gapprobe.models.families.base import Family
from gapprobe.models.model import Model
from gapprobe.models.probing import probe_family

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Files of a processor; of each line one must be there.
PROCESSOR_FILES = (
    ("processor_config.json", "preprocessor_config.json"),
    ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"),
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantized = Literal["none", "8bit", "4bit"]


def load_model(
    source: str | Path | PreTrainedModel,
    *,
    processor: ProcessorMixin | PreTrainedTokenizerBase | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
    revision: str | None = None,
    attention: str | None = None,
    quantized: Quantized = "none",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    random_weights: int | None = None,
) -> Model:
    """Load a model so that it can be traced: a vision-language model, an audio-language model or a plain causal one.

    An architecture that no family knows is probed by its shape and checked (`check_model`); if it passes, it is used
    with a warning.

    Args:
        source: a Hugging Face id, a folder, or an instantiated model (which keeps its dtype, device and attention).
        processor: the processor (or tokenizer) of an instantiated model; copied, for its padding side must change.
        dtype: of the weights; "auto" takes the dtype they were saved in.
        device: "cpu", "cuda", "cuda:1", …; "auto" is a GPU where there is one, "spread" lays the blocks over all GPUs
            and main memory (needs the package accelerate). "meta" reads no weights at all: the model has its shapes and
            its processor, can encode, and cannot run.
        revision: branch, tag or commit of a Hugging Face id; the commit is recorded.
        attention: attention implementation, as transformers names it ("eager", "sdpa", …); its own choice by default.
        quantized: "8bit" or "4bit" loads the weights quantised (needs the package bitsandbytes).
        allow_pickle: read weights that are not in safetensors. A pickle can run any code: off, and best left off.
        trust_remote_code: let code from the model's repository run. Off, and best left off.
        random_weights: a seed. No weights are read: the model has those that its architecture starts training from, so
            what a probe reads there no training put there. The header of a store has the seed, and other weights.

    Raises:
        ModelError: what `source` names is not there, is no model that gapprobe can trace, or lacks a part.
    """
    if random_weights is not None and (
        isinstance(source, PreTrainedModel) or quantized != "none" or device == "spread"
    ):
        raise ModelError(
            "random_weights are drawn for a model's folder or Hugging Face id, on one device and not quantised; give "
            "source, device and quantized so"
        )
    if isinstance(source, PreTrainedModel):
        return _instantiated(source, processor)
    folder, commit = _find(source, revision)
    where = str(source)
    architecture = _architecture(_read_config(folder, where), where)
    outline = device == "meta"
    # The hub's client fetches what it needs, and says what is not there.
    if commit is None and random_weights is None and not outline:
        _require_weights(folder, where, allow_pickle)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options |= {"local_files_only": True} if commit is None else {"revision": commit}
    name = str(folder) if commit is None else where
    config = cast(Any, _pretrained(AutoConfig, name, where, "config.json", options))
    family = family_of(architecture, config.get_text_config(decoder=True).model_type)
    kind = _class_of(architecture, config, where, trust_remote_code)
    # Before the weights, because it is quick to fail.
    if processor is None:
        text_only = family.modality == "text" if family else not _reads_media(config)
        processor = _load_processor(name, folder if commit is None else None, where, options, config, text_only)
        _refuse_stand_ins(processor, folder, where, family)
    place = _place(device, quantized)
    options |= place | {"use_safetensors": None if allow_pickle else True}
    options |= {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    options |= {"attn_implementation": attention} if attention else {}
    if outline:
        with torch.device("meta"):
            hf = _draw_weights(kind, config, where, dtype, attention, 0)
    elif random_weights is None:
        hf = _load_weights(kind, name, where, options)
    else:
        hf = _draw_weights(kind, config, where, dtype, attention, random_weights)
    if not place and not outline:
        cast(nn.Module, hf).to(_device(device))
    files = tuple(sorted(folder.glob("*.safetensors"))) if random_weights is None else ()
    return _finished(hf, processor, family, where, commit or "", files, random_weights)


def _instantiated(hf: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase | None) -> Model:
    where = type(hf).__name__
    if processor is None:
        raise ModelError(
            f"{where}: an instantiated model needs its processor; give processor=AutoProcessor… (or its tokenizer)"
        )
    text = cast(Any, hf.config).get_text_config(decoder=True)
    return _finished(hf, processor, family_of(where, text.model_type), where)


def _finished(
    hf: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    family: Family | None,
    where: str,
    revision: str = "",
    files: tuple[Path, ...] = (),
    random_weights: int | None = None,
) -> Model:
    known = family or _probed(hf, where)
    if known.encoder:
        depths = [len(cast(nn.ModuleList, hf.get_submodule(path))) for path in (known.encoder, known.blocks)]
        if len(set(depths)) > 1:
            raise ModelError(
                f"{where}: its encoder has {depths[0]} blocks and its decoder {depths[1]}; a store has the same layers "
                "for all tokens, so only models with as many of both can be traced"
            )
    ready = _ready_processor(processor, known, where)
    model = Model(hf.eval().requires_grad_(False), ready, known, where, revision, files, random_weights)
    if family is None and hf.device.type != "meta":
        check_model(model).require()
        warnings.warn(
            f"{where}: gapprobe has no family for {type(hf).__name__} and found its parts by their shape: blocks "
            f"{known.blocks}, final norm {known.final_norm}, unembedding {known.unembedding}. They pass the check; "
            "token roles and places in the picture may be coarse",
            stacklevel=3,
        )
    return model


def _probed(hf: PreTrainedModel, where: str) -> Family:
    try:
        return probe_family(hf, where)
    except ModelError as error:
        names = ", ".join(sorted({name for family in FAMILIES for name in family.architectures}))
        raise ModelError(f"{error}. It knows {names} (`gapprobe models list`)") from error


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
    return str(names[0])


def _class_of(architecture: str, config: Any, where: str, trust_remote_code: bool) -> Any:
    """Return the class that loads the weights."""
    found = getattr(transformers, architecture, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    if trust_remote_code:
        return AutoModelForImageTextToText if _reads_media(config) else AutoModelForCausalLM
    known = ", ".join(sorted({name for family in FAMILIES for name in family.architectures}))
    raise ModelError(
        f"{where}: transformers {transformers.__version__} has no architecture {architecture}. gapprobe knows {known} "
        "(`gapprobe models list`); code from the model's own repository runs only with trust_remote_code"
    )


def _reads_media(config: Any) -> bool:
    return any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config"))


def _require_weights(folder: Path, where: str, allow_pickle: bool) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for pattern in PICKLED for path in folder.glob(pattern)]
    if not pickled:
        raise ModelError(f"{where} has no weights: no file ends in .safetensors")
    if not allow_pickle:
        raise ModelError(
            f"{where} has its weights only in {pickled[0]}, a pickle that can run code when it is read; convert "
            "them to safetensors (load in transformers and save_pretrained) and try again"
        )


def _load_processor(
    name: str, folder: Path | None, where: str, options: dict[str, Any], config: Any, text_only: bool
) -> ProcessorMixin | PreTrainedTokenizerBase:
    for names in PROCESSOR_FILES[text_only:] if folder else ():
        if not any((cast(Path, folder) / file).is_file() for file in names):
            what = "tokenizer" if text_only else "processor"
            raise ModelError(f"{where} has no {what}: {' or '.join(names)} is missing; copy it from the original model")
    if text_only:
        return cast(Any, _pretrained(AutoTokenizer, name, where, "tokenizer", options))
    kind = cast(Any, PROCESSOR_MAPPING.get(type(config), None))
    if kind is not None and "video_processor" in kind.get_attributes():
        return cast(Any, _pretrained(without_video(kind), name, where, "processor", options))
    return cast(Any, _pretrained(AutoProcessor, name, where, "processor", options))


def _refuse_stand_ins(processor: object, folder: Path, where: str, family: Family | None) -> None:
    """Refuse a processor in which transformers put the language model's tokenizer in the place of a missing one."""
    for part in family.processor_parts if family else ():
        if part.endswith("tokenizer") and hasattr(processor, part) and not (folder / part).is_dir():
            raise ModelError(f"{where}: its processor lacks the folder {part}; copy it from the original model")


def without_video(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return a processor's class without its video processor, which needs torchvision and which nothing here asks.

    It keeps its name, by which it is saved.
    """
    parts = [part for part in kind.get_attributes() if part != "video_processor"]
    from_parts = cast(Any, kind.from_args_and_dict).__func__

    def without(cls: Any, args: Any, settings: dict[str, Any], **kwargs: Any) -> Any:
        asked = "video_processor" in inspect.signature(kind.__init__).parameters
        return from_parts(cls, args, settings | ({"video_processor": None} if asked else {}), **kwargs)

    members: dict[str, Any] = {
        "get_attributes": classmethod(lambda _: parts),
        "from_args_and_dict": classmethod(without),
        # SmolVLM looks at these two whenever it fills in its chat template.
        "video_processor": SimpleNamespace(num_frames=None, fps=None),
    }
    return type(kind.__name__, (kind,), members)


def _pretrained(kind: Any, name: str, where: str, what: str, options: dict[str, Any]) -> object:
    try:
        return kind.from_pretrained(name, **options)
    # transformers answers damaged or missing files with nearly any exception; all mean that this part is unusable.
    except Exception as error:
        raise ModelError(f"{where}: {what} cannot be loaded: {_first_line(error)}") from error


def _load_weights(kind: Any, name: str, where: str, options: dict[str, Any]) -> PreTrainedModel:
    hf, told = cast(Any, _pretrained(kind, name, where, "weights", options | {"output_loading_info": True}))
    # transformers fills what is missing with random numbers and goes on.
    if missing := sorted(told["missing_keys"]):
        raise ModelError(f"{where}: the weights lack {len(missing)} tensors of the model, the first is {missing[0]}")
    return hf


def _draw_weights(
    kind: Any, config: Any, where: str, dtype: Dtype, attention: str | None, seed: int
) -> PreTrainedModel:
    """Return the model with the weights that its architecture starts from; the process' own random numbers are left."""
    options: dict[str, Any] = {"dtype": getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)}
    options |= {"attn_implementation": attention} if attention else {}
    # AutoModel's classes have a public name for it, the architectures' own do not.
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return make(config, **options)
        # As for files: an unusable configuration is answered with nearly any exception.
        except Exception as error:
            raise ModelError(f"{where}: random weights cannot be drawn: {_first_line(error)}") from error


def _place(device: str, quantized: Quantized) -> dict[str, Any]:
    """Return the arguments by which transformers itself lays out the weights; none where we move them."""
    if quantized == "none" and device != "spread":
        return {}
    _require_package("accelerate", f"device {device!r}" if quantized == "none" else f"quantized={quantized!r}")
    spread: dict[str, Any] = {"device_map": "auto" if device in ("spread", "auto") else {"": _device(device)}}
    if quantized == "none":
        return spread
    _require_package("bitsandbytes", f"quantized={quantized!r}")
    bits = BitsAndBytesConfig(load_in_8bit=quantized == "8bit", load_in_4bit=quantized == "4bit")
    return spread | {"quantization_config": bits}


def _require_package(name: str, what: str) -> None:
    if find_spec(name) is None:
        raise ModelError(f"{what} needs the package {name}: pip install {name}")


def _ready_processor(
    processor: ProcessorMixin | PreTrainedTokenizerBase, family: Family, where: str
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Return a copy that pads on the left."""
    ready = cast(Any, copy.deepcopy(processor))
    if lacking := [part for part in family.processor_parts if getattr(ready, part, None) is None]:
        raise ModelError(f"{where}: its processor ({type(processor).__name__}) has no {', no '.join(lacking)}")
    tokenizer = getattr(ready, "tokenizer", ready)
    # Set on the tokenizer and taken out of its settings: from there the side would also reach the Q-Former's tokenizer,
    # whose absolute positions count from the left.
    tokenizer.init_kwargs.pop("padding_side", None)
    tokenizer.padding_side = "left"
    if hasattr(ready, "qformer_tokenizer"):
        ready.qformer_tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
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


def _first_line(error: BaseException) -> str:
    lines = (line.strip().rstrip(".") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
