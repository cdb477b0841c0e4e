"""A model as TransformerLens sees it: for its tools, and as an oracle that shares no code with our traces.

TransformerLens is optional and imported when asked for. Its loader installs packages when a processor does not load,
and fetches a tokenizer again by name; neither happens from here.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any, cast

from transformers import AutoTokenizer

from gapprobe.errors import ConfigError, ModelError
from gapprobe.models.model import Model

_SOURCE = "transformer_lens.model_bridge.sources.transformers.source"
_HELPERS = "transformer_lens.model_bridge.sources.transformers.helpers"
_BOOTING = threading.Lock()


def to_transformer_lens(model: Model) -> Any:
    """Return TransformerLens' bridge to a copy of a model, with the model's own processor; takes its memory again.

    The copy runs eager attention, as TransformerLens wants it: load the model with `attention="eager"` where residuals
    must be the same to the bit.

    Raises:
        ConfigError: TransformerLens is not installed.
        ModelError: TransformerLens does not know the architecture.
    """
    try:
        bridge = cast(Any, import_module("transformer_lens.model_bridge")).TransformerBridge
    except ImportError as error:
        raise ConfigError("this needs TransformerLens: pip install 'gapprobe[export]'") from error
    hf = cast(Any, copy.deepcopy(model.hf))
    hf.config.architectures = [type(hf).__name__]
    with TemporaryDirectory() as folder, _no_installer():
        model.tokenizer.save_pretrained(folder)
        hf.config.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        try:
            found = bridge.boot_transformers(folder, hf_model=hf, tokenizer=tokenizer, device=str(model.hf.device))
        # It answers what it does not know with nearly any exception.
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise ModelError(
                f"{model.source}: TransformerLens cannot load {type(hf).__name__}: {lines[0]:.200}"
            ) from error
    found.processor = model.processor
    return found


@contextmanager
def _no_installer() -> Generator[None]:
    """Have TransformerLens load no processor, which may end in `pip install torchvision`."""
    source, helpers = (cast(Any, import_module(name)) for name in (_SOURCE, _HELPERS))
    with _BOOTING:
        before = source.load_modality_processor, helpers._ensure_torchvision
        source.load_modality_processor, helpers._ensure_torchvision = lambda *_, **__: None, lambda: False
        try:
            yield
        finally:
            source.load_modality_processor, helpers._ensure_torchvision = before
