"""The configuration of a study: one TOML file, read into models, every mistake named before anything runs."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gapprobe.chat.server import ServerSettings
from gapprobe.errors import ConfigError
from gapprobe.study.published import published

AtLeastOne = Annotated[int, Field(ge=1)]


class ProbeConfig(BaseModel):
    """How the failure probe is fitted and tested.

    Attributes:
        position: the token whose residual stream the probe reads.
        rows: `counted` (rows that count, so that a failure is a linking failure) or `full_information` (all rows whose
            full-information answer is right, as published).
        splits: what keeps together in cross-validation; the first one is the headline.
        controls: what the probe is compared with, under every split.
        folds: number of cross-validation folds.
        c: inverse strength of the L2 penalty, scikit-learn's `C`.
        replicates: bootstrap replicates behind every interval.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    position: Literal["last_input", "last_output"] = "last_input"
    rows: Literal["counted", "full_information"] = "counted"
    splits: Annotated[tuple[Literal["image", "entity", "question", "random"], ...], Field(min_length=1)] = (
        "image",
        "entity",
        "question",
        "random",
    )
    controls: tuple[Literal["shuffled", "question_only", "layer_0"], ...] = ("shuffled", "question_only", "layer_0")
    folds: Annotated[int, Field(ge=2)] = 5
    c: Annotated[float, Field(gt=0)] = 1.0
    replicates: Annotated[int, Field(ge=100)] = 1000


class SamplesConfig(BaseModel):
    """Answers drawn beside the greedy one, for self-consistency.

    Attributes:
        count: answers drawn for each visual call.
        temperature: of the draws.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: Annotated[int, Field(ge=2)] = 10
    temperature: Annotated[float, Field(gt=0)] = 1.0


class ChoicesConfig(BaseModel):
    """The multiple-choice form of every question.

    Attributes:
        options: how many options a question has.
        distractors: a CSV with the columns `question` (its id), `distractor`; other entities' answers to the same
            relation where left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: Annotated[int, Field(ge=2, le=26)] = 4
    distractors: str | None = None


class JudgeConfig(BaseModel):
    """A language model that judges answers beside the two judges that are rules.

    Attributes:
        model: its name at the server.
        server: where it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(min_length=1)]
    server: ServerSettings


class StudyConfig(BaseModel):
    """One model, one data set, one protocol. Paths are read from the folder of the configuration file.

    Attributes:
        name: names the study in tables and folders.
        model: a folder, or a Hugging Face id.
        images: a folder with one folder an entity, or a parquet file.
        questions: a `.toml` or `.csv` question file.
        prompts: the prompt template.
        title: the heading of the report.
        note: what a reader must know about the model or the data, shown in the report.
        revision: of a Hugging Face id: a branch, tag or commit.
        reference: what stands in place of the name when the entity is only shown; else the question file says.
        identify: the identification question; else the question file says.
        list_classes: let the identification question list all entities to choose from.
        images_per_question: images drawn for each question.
        trivial_images: images that show nothing, of which the majority answer counts.
        judge: how an answer is compared with the gold one.
        layers: `all`, or layer numbers, 0 being the embeddings.
        max_new_tokens: length limit of an answer.
        batch_size: prompts in one forward pass.
        dtype: of the model while it runs.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ….
        seed: of every random choice.
        gallery: linking failures shown in the report.
        published: "model/data", of which the report shows the paper's figures beside this study's.
        samples: see SamplesConfig; none are drawn if not given.
        choices: see ChoicesConfig; no question is asked so if not given.
        probe: see ProbeConfig.
        llm_judge: see JudgeConfig; no language model judges if not given.
        server: see `gapprobe.chat.server.ServerSettings`; `model` is a name there then. The model is loaded here if
            not given.
        folder: where the configuration file is; set by `load_config`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # It names folders in the output folder, and must not lead out of it.
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    model: Annotated[str, Field(min_length=1)]
    images: str
    questions: str
    prompts: str
    title: str = "Knowing and seeing"
    note: str = ""
    revision: str | None = None
    reference: str | None = None
    identify: str | None = None
    list_classes: bool = False
    images_per_question: AtLeastOne = 10
    trivial_images: Annotated[tuple[Literal["black", "white", "noise", "none"], ...], Field(min_length=1)] = (
        "black",
        "white",
        "noise",
        "none",
    )
    judge: Literal["sound", "published"] = "sound"
    layers: Literal["all"] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = "all"
    max_new_tokens: AtLeastOne = 10
    batch_size: AtLeastOne = 64
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    seed: int = 0
    gallery: Annotated[int, Field(ge=0)] = 12
    published: str | None = None
    samples: SamplesConfig | None = None
    choices: ChoicesConfig | None = None
    probe: ProbeConfig = ProbeConfig()
    llm_judge: JudgeConfig | None = None
    server: ServerSettings | None = None

    folder: Annotated[Path, Field(exclude=True)] = Path()

    @field_validator("published")
    @classmethod
    def _known_figures(cls, name: str | None) -> str | None:
        if name is not None and name not in published():
            raise ValueError(f"the paper has no such figures; it has {', '.join(published())}")
        return name

    @model_validator(mode="after")
    def _no_samples_of_a_server(self) -> StudyConfig:
        if self.server is not None and self.samples is not None:
            raise ValueError("samples serve selective prediction, which reads activations; a server shows none")
        return self

    @model_validator(mode="after")
    def _layer_of_the_control(self) -> StudyConfig:
        if self.layers != "all" and 0 not in self.layers and "layer_0" in self.probe.controls:
            raise ValueError(
                "layers must hold 0 for the control layer_0; add it, or leave layer_0 out of probe.controls"
            )
        return self

    def path(self, value: str) -> Path:
        """Return `value` as a path, read from the folder of the configuration file."""
        return self.folder / Path(value).expanduser()

    @property
    def model_source(self) -> str | Path:
        """Return the model's folder if it looks like a path or is there, else `model` as a Hugging Face id."""
        local = self.path(self.model)
        looks_local = self.model.startswith(("/", ".", "~")) or self.model.count("/") > 1
        return local if local.exists() or looks_local else self.model

    @property
    def asked(self) -> str:
        """Return the settings that decide what the model is asked, as JSON; the others only change the analysis."""
        analysis = {"title", "note", "judge", "gallery", "probe", "batch_size", "device", "published"}
        analysis |= {"samples", "choices", "llm_judge"}  # they are asked apart, and kept in stores of their own
        if not self.list_classes:
            analysis.add("list_classes")
        place = "" if self.server is None else f" at {self.server.place}"
        return self.model_dump_json(exclude=analysis | {"server"}) + place


def load_configs(path: Path | str, data: Sequence[str] = ()) -> list[StudyConfig]:
    """Read a study configuration: one study, or one for each of its tables `[data.<name>]`.

    Such a table holds what differs between data sets (images, questions, reference, …) and outranks what the file says
    for all; its study is called `<name of the file's study>-<name of the table>`.

    Args:
        path: the file.
        data: names of tables; all if none.

    Raises:
        ConfigError: the file is missing or no TOML, a field is unknown, missing, of the wrong type, or out of range, or
            there is no such table.
    """
    path = Path(path)
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"study configuration {path} does not exist; configs/ has some to copy") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"study configuration {path} cannot be read: {error}") from error
    tables = told.pop("data", None)
    if tables is None:
        if data:
            raise ConfigError(f"study configuration {path} has no tables [data.…], and {data[0]} was asked for")
        return [_checked(told, path)]
    if not isinstance(tables, dict) or not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError(f"study configuration {path}: data must be tables, [data.landmarks] for one")
    if unknown := [name for name in data if name not in tables]:
        raise ConfigError(f"study configuration {path} has no [data.{unknown[0]}]; it has {', '.join(tables)}")
    if fixed := [(name, key) for name, table in tables.items() for key in ("name", "model") if key in table]:
        raise ConfigError(f"study configuration {path}: data.{'.'.join(fixed[0])} is one for all data sets")
    return [
        _checked(told | tables[name] | {"name": f"{told['name']}-{name}"} if "name" in told else told, path)
        for name in data or tables
    ]


def load_config(path: Path | str) -> StudyConfig:
    """Read the configuration of one study; see `load_configs`.

    Raises:
        ConfigError: as there, and for a file with several data sets.
    """
    configs = load_configs(path)
    if len(configs) > 1:
        raise ConfigError(f"study configuration {path} has several data sets; name one of them (load_configs, --data)")
    return configs[0]


def _checked(told: dict[str, object], path: Path) -> StudyConfig:
    try:
        return StudyConfig.model_validate(told | {"folder": path.parent})
    except ValidationError as error:
        raise ConfigError(f"study configuration {path}: {_in_words(error)}") from error


def _in_words(error: ValidationError) -> str:
    parts: dict[str, type[BaseModel]] = {"probe": ProbeConfig, "samples": SamplesConfig, "choices": ChoicesConfig}
    parts |= {"llm_judge": JudgeConfig, "server": ServerSettings}
    problems: list[str] = []
    for problem in error.errors():
        setting = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            # Of llm_judge.server.… too, the table that holds the setting is the one to tell of.
            tables = [parts[str(name)] for name in problem["loc"][:-1] if name in parts]
            part = tables[-1] if tables else StudyConfig
            problems.append(f"{setting} is not a setting; the settings are {', '.join(sorted(part.model_fields))}")
        else:
            problems.append(f"{setting}: {problem['msg']} (given: {problem['input']!r:.80})")
    return "; ".join(problems)
