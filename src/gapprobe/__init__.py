"""gapprobe: where knowing and seeing come apart in vision-language models.

The flat public API. Everything heavy (torch, transformers, nnsight, pandas, plotly) is imported when a name is first
used, so that `import gapprobe` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gapprobe.chat.server import ChatServer as ChatServer
    from gapprobe.chat.server import ServerSettings as ServerSettings
    from gapprobe.errors import ConfigError as ConfigError
    from gapprobe.errors import DataError as DataError
    from gapprobe.errors import GapprobeError as GapprobeError
    from gapprobe.errors import ModelError as ModelError
    from gapprobe.errors import OutputError as OutputError
    from gapprobe.errors import StoreError as StoreError
    from gapprobe.generation.generating import generate_questions as generate_questions
    from gapprobe.lens.base import known_lenses as known_lenses
    from gapprobe.lens.base import register_lens as register_lens
    from gapprobe.lens.logit import logit_lens as logit_lens
    from gapprobe.lens.plotting import lens_over_image as lens_over_image
    from gapprobe.lens.reading import load_lens_reading as load_lens_reading
    from gapprobe.lens.training import train_tuned_lens as train_tuned_lens
    from gapprobe.lens.tuned import TunedLens as TunedLens
    from gapprobe.lens.tuned import load_tuned_lens as load_tuned_lens
    from gapprobe.models.bridge import to_transformer_lens as to_transformer_lens
    from gapprobe.models.check import check_model as check_model
    from gapprobe.models.loading import load_model as load_model
    from gapprobe.probes.adapters import from_sklearn as from_sklearn
    from gapprobe.probes.alignment import Alignment as Alignment
    from gapprobe.probes.base import LinearFits as LinearFits
    from gapprobe.probes.base import check_problems as check_problems
    from gapprobe.probes.base import find_probe as find_probe
    from gapprobe.probes.base import known_probes as known_probes
    from gapprobe.probes.base import register_probe as register_probe
    from gapprobe.probes.codelength import online_code as online_code
    from gapprobe.probes.controls import control_task as control_task
    from gapprobe.probes.directions import load_direction as load_direction
    from gapprobe.probes.directions import probe_direction as probe_direction
    from gapprobe.probes.estimator import ProbeClassifier as ProbeClassifier
    from gapprobe.probes.leakage import leakage_report as leakage_report
    from gapprobe.probes.modules import from_module as from_module
    from gapprobe.probes.saved import load_sweep as load_sweep
    from gapprobe.probes.sweep import sweep_probes as sweep_probes
    from gapprobe.probes.tokens import Tokens as Tokens
    from gapprobe.probes.tokens import read_position as read_position
    from gapprobe.probes.transfer import TransferSet as TransferSet
    from gapprobe.probes.transfer import transfer_probes as transfer_probes
    from gapprobe.report.page import write_report as write_report
    from gapprobe.selective.measures import risk_coverage as risk_coverage
    from gapprobe.selective.report import selective_report as selective_report
    from gapprobe.selective.thresholds import ltt_threshold as ltt_threshold
    from gapprobe.selective.thresholds import sgr_threshold as sgr_threshold
    from gapprobe.similarity.cka import cka as cka
    from gapprobe.similarity.cosines import cosine as cosine
    from gapprobe.similarity.result import load_cosine as load_cosine
    from gapprobe.store.batches import TokenBatches as TokenBatches
    from gapprobe.store.care.clearing import collect_garbage as collect_garbage
    from gapprobe.store.care.compacting import compact_store as compact_store
    from gapprobe.store.care.merging import merge_stores as merge_stores
    from gapprobe.store.care.repairing import repair_store as repair_store
    from gapprobe.store.care.verify import verify_store as verify_store
    from gapprobe.store.exchange.exporting import export_store as export_store
    from gapprobe.store.exchange.exporting import to_activation_cache as to_activation_cache
    from gapprobe.store.exchange.exporting import to_dataset as to_dataset
    from gapprobe.store.exchange.importing import import_activations as import_activations
    from gapprobe.store.reader import open_store as open_store
    from gapprobe.store.remote.pulling import pull as pull
    from gapprobe.store.remote.pushing import push as push
    from gapprobe.study.config import load_config as load_config
    from gapprobe.study.run import open_study as open_study
    from gapprobe.study.run import run_studies as run_studies
    from gapprobe.study.study import Study as Study
    from gapprobe.tasks.agreement import agreement as agreement
    from gapprobe.tasks.choices import make_choices as make_choices
    from gapprobe.tasks.examples import Example as Example
    from gapprobe.tasks.examples import mentions as mentions
    from gapprobe.tasks.images import ImageFile as ImageFile
    from gapprobe.tasks.images import load_images as load_images
    from gapprobe.tasks.judging import judge_answers as judge_answers
    from gapprobe.tasks.prompts import load_template as load_template
    from gapprobe.tasks.questions import load_questions as load_questions
    from gapprobe.tasks.sounds import SoundFile as SoundFile
    from gapprobe.tasks.tables import load_examples as load_examples
    from gapprobe.testing import check_probe as check_probe
    from gapprobe.tracing.run import capture as capture
    from gapprobe.tracing.tokens import TokenTable as TokenTable

__version__ = "0.1.0"

_HOMES = {
    "capture": "gapprobe.tracing.run",
    "ConfigError": "gapprobe.errors",
    "DataError": "gapprobe.errors",
    "GapprobeError": "gapprobe.errors",
    "ModelError": "gapprobe.errors",
    "OutputError": "gapprobe.errors",
    "StoreError": "gapprobe.errors",
    "logit_lens": "gapprobe.lens.logit",
    "register_lens": "gapprobe.lens.base",
    "known_lenses": "gapprobe.lens.base",
    "load_lens_reading": "gapprobe.lens.reading",
    "TunedLens": "gapprobe.lens.tuned",
    "load_tuned_lens": "gapprobe.lens.tuned",
    "train_tuned_lens": "gapprobe.lens.training",
    "lens_over_image": "gapprobe.lens.plotting",
    "check_model": "gapprobe.models.check",
    "load_model": "gapprobe.models.loading",
    "to_transformer_lens": "gapprobe.models.bridge",
    "mentions": "gapprobe.tasks.examples",
    "TokenTable": "gapprobe.tracing.tokens",
    "load_sweep": "gapprobe.probes.saved",
    "sweep_probes": "gapprobe.probes.sweep",
    "Tokens": "gapprobe.probes.tokens",
    "read_position": "gapprobe.probes.tokens",
    "from_sklearn": "gapprobe.probes.adapters",
    "from_module": "gapprobe.probes.modules",
    "check_probe": "gapprobe.testing",
    "register_probe": "gapprobe.probes.base",
    "check_problems": "gapprobe.probes.base",
    "find_probe": "gapprobe.probes.base",
    "known_probes": "gapprobe.probes.base",
    "Alignment": "gapprobe.probes.alignment",
    "TransferSet": "gapprobe.probes.transfer",
    "transfer_probes": "gapprobe.probes.transfer",
    "LinearFits": "gapprobe.probes.base",
    "online_code": "gapprobe.probes.codelength",
    "control_task": "gapprobe.probes.controls",
    "ProbeClassifier": "gapprobe.probes.estimator",
    "leakage_report": "gapprobe.probes.leakage",
    "probe_direction": "gapprobe.probes.directions",
    "load_direction": "gapprobe.probes.directions",
    "write_report": "gapprobe.report.page",
    "risk_coverage": "gapprobe.selective.measures",
    "selective_report": "gapprobe.selective.report",
    "ltt_threshold": "gapprobe.selective.thresholds",
    "sgr_threshold": "gapprobe.selective.thresholds",
    "cka": "gapprobe.similarity.cka",
    "cosine": "gapprobe.similarity.cosines",
    "load_cosine": "gapprobe.similarity.result",
    "open_store": "gapprobe.store.reader",
    "import_activations": "gapprobe.store.exchange.importing",
    "export_store": "gapprobe.store.exchange.exporting",
    "to_activation_cache": "gapprobe.store.exchange.exporting",
    "to_dataset": "gapprobe.store.exchange.exporting",
    "push": "gapprobe.store.remote.pushing",
    "pull": "gapprobe.store.remote.pulling",
    "verify_store": "gapprobe.store.care.verify",
    "repair_store": "gapprobe.store.care.repairing",
    "merge_stores": "gapprobe.store.care.merging",
    "compact_store": "gapprobe.store.care.compacting",
    "collect_garbage": "gapprobe.store.care.clearing",
    "TokenBatches": "gapprobe.store.batches",
    "load_config": "gapprobe.study.config",
    "Study": "gapprobe.study.study",
    "open_study": "gapprobe.study.run",
    "run_studies": "gapprobe.study.run",
    "ChatServer": "gapprobe.chat.server",
    "ServerSettings": "gapprobe.chat.server",
    "generate_questions": "gapprobe.generation.generating",
    "Example": "gapprobe.tasks.examples",
    "ImageFile": "gapprobe.tasks.images",
    "SoundFile": "gapprobe.tasks.sounds",
    "load_examples": "gapprobe.tasks.tables",
    "load_images": "gapprobe.tasks.images",
    "load_template": "gapprobe.tasks.prompts",
    "agreement": "gapprobe.tasks.agreement",
    "judge_answers": "gapprobe.tasks.judging",
    "make_choices": "gapprobe.tasks.choices",
    "load_questions": "gapprobe.tasks.questions",
}

__all__ = ["__version__", *sorted(_HOMES)]  # pyright: ignore[reportUnsupportedDunderAll] (the names are the keys above)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gapprobe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
