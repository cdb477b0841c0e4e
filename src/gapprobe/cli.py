"""The command line: parse, call, print. Everything it does is a verb of the Python API too.

Built on tyro: commands are plain typed functions, so that the help, the types and the defaults cannot drift apart
from the code. Imports of heavy parts stay inside the commands: `gapprobe --help` must be quick.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.extras import SubcommandApp

from gapprobe.errors import GapprobeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gapprobe.study.config import StudyConfig
    from gapprobe.study.run import Study

Positional = tyro.conf.Positional
Family = Literal["llava", "instructblip", "both"]
Config = Annotated[Positional[Path], tyro.conf.arg(metavar="CONFIG.toml", help="the study")]
OUT = Path("gapprobe-study")
Out = Annotated[Path, tyro.conf.arg(help="output folder", metavar="DIR")]

app = SubcommandApp()
study = SubcommandApp()
models = SubcommandApp()
store = SubcommandApp()


@app.command
def demo(
    out: Annotated[Path | None, tyro.conf.arg(help="output folder; gapprobe-demo if not given", metavar="DIR")] = None,
    family: Annotated[Family, tyro.conf.arg(help="which of the shipped models to study")] = "both",
    quick: Annotated[bool, tyro.conf.arg(help="fewer images a question: half a minute, wider intervals")] = False,
) -> None:
    """Study the grounding gap of the two shipped toy models, on real images of digits.

    Writes report.html, results.json and the activation stores. Needs no network and no GPU. Stopped half-way, the same
    command goes on where it was.

    For example:
        gapprobe demo
        gapprobe demo --family llava --quick --out /tmp/digits
    """
    from gapprobe.demo import FOLDER
    from gapprobe.study.config import load_config

    names = ["llava", "instructblip"] if family == "both" else [family]
    configs = [load_config(FOLDER / f"{name}.toml") for name in names]
    if quick:
        configs = [c.model_copy(update={"images_per_question": 3, "trivial_images": ("black",)}) for c in configs]
    _run(configs, out or Path("gapprobe-demo-quick" if quick else "gapprobe-demo"))


@study.command
def run(
    configs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="CONFIG.toml …", help="one study each")],
    out: Out = OUT,
) -> None:
    """Run one or more studies, each on one model, into one report.

    The steps are capture (answers and residual streams), gap (judging, and which trials count), probe, lens, cosine
    and selective; each is a command of its own too. A finished step is not run again; a changed setting of the
    analysis runs the analysis again and keeps the activations.

    For example:
        gapprobe study run my-study.toml --out runs/mine
        gapprobe study run llava-1.6.toml instructblip.toml --out runs/two
    """
    from gapprobe.study.config import load_config

    _run([load_config(path) for path in configs], out)


@study.command
def capture(config: Config, out: Out = OUT) -> None:
    """Ask the model everything; keep answers and residual streams. Goes on where an earlier run stopped.

    For example:
        gapprobe study capture my-study.toml --out runs/mine
    """
    print(_study(config, out).capture().info())


@study.command
def gap(config: Config, out: Out = OUT) -> None:
    """Print accuracies by setting, which trials count, and the gap between told and shown, as JSON.

    For example:
        gapprobe study gap my-study.toml --out runs/mine | jq .gap
    """
    _print(_study(config, out).gap())


@study.command
def probe(config: Config, out: Out = OUT) -> None:
    """Fit failure probes at every layer beside their controls; print areas and verdicts as JSON.

    For example:
        gapprobe study probe my-study.toml --out runs/mine | jq -r '.verdict[].sentence'
    """
    _print({key: value for key, value in _study(config, out).probe().items() if key != "scores"})


@study.command
def lens(config: Config, out: Out = OUT) -> None:
    """Print the answer's probability at every layer, told and shown, as JSON.

    For example:
        gapprobe study lens my-study.toml --out runs/mine | jq '.text, .visual'
    """
    _print(_study(config, out).lens())


@study.command
def cosine(config: Config, out: Out = OUT) -> None:
    """Print the cosine of visual and full-information states at every layer, as JSON.

    For example:
        gapprobe study cosine my-study.toml --out runs/mine | jq '.success, .failure'
    """
    _print(_study(config, out).cosine())


@study.command
def selective(config: Config, out: Out = OUT) -> None:
    """Print coverage and risk of answering only when confident, by perplexity, probe and both, as JSON.

    For example:
        gapprobe study selective my-study.toml --out runs/mine | jq .ensemble
    """
    _print(_study(config, out).selective())


@app.command
def report(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="folder with a results.json")],
) -> None:
    """Write report.html anew from the results.json of a study, without running anything.

    For example:
        gapprobe report gapprobe-demo
    """
    from gapprobe.report.page import write_report
    from gapprobe.study.results import read_results

    print(write_report(read_results(folder / "results.json"), folder / "report.html"))


@models.command(name="list")
def list_models() -> None:
    """List the families of models that gapprobe can trace, and where it finds their parts.

    For example:
        gapprobe models list
    """
    from gapprobe.models.families import FAMILIES

    for family in FAMILIES:
        print(f"{family.name:14} {', '.join(family.architectures)}")
        print(f"{'':14} blocks {family.blocks}, final norm {family.final_norm}, unembedding {family.unembedding}")


@models.command
def check(
    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL", help="a folder or a Hugging Face id")],
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], tyro.conf.arg(help="weights")] = "auto",
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    revision: Annotated[str | None, tyro.conf.arg(help="branch, tag or commit of a Hugging Face id")] = None,
) -> None:
    """Check that the residual streams gapprobe would capture are the model's own, on a small real batch.

    Layers must equal Hugging Face's hidden states bit for bit, a batch must give what its rows give alone, and the
    logits must follow from the last layer. Exits with 1 when a check fails.

    For example:
        gapprobe models check llava-hf/llava-v1.6-vicuna-7b-hf --dtype bfloat16
        gapprobe models check ./my-llava
    """
    from gapprobe.models.check import check_model
    from gapprobe.models.loading import load_model

    source = Path(model) if Path(model).exists() else model
    result = check_model(load_model(source, dtype=dtype, device=device, revision=revision))
    print(result)
    if not result.passed:
        sys.exit(1)


@store.command
def info(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="a store, or a folder of stores")],
) -> None:
    """Say what an activation store holds: model, layers, positions, rows, errors, size.

    For example:
        gapprobe store info gapprobe-demo/store
    """
    from gapprobe.store.reader import find_stores, open_store

    for path in find_stores(folder):
        print(open_store(path).info())


@store.command
def verify(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="a store, or a folder of stores")],
) -> None:
    """Check every byte of a store against its manifest. Exits with 1 when something is wrong.

    For example:
        gapprobe store verify gapprobe-demo/store
    """
    from gapprobe.store.reader import find_stores
    from gapprobe.store.verify import verify_store

    wrong = False
    for path in find_stores(folder):
        problems = verify_store(path)
        wrong = wrong or bool(problems)
        print(f"{path}: {'sound' if not problems else f'{len(problems)} problems'}")
        for problem in problems:
            print(f"  {problem}")
    if wrong:
        sys.exit(1)


def _run(configs: Sequence[StudyConfig], out: Path) -> None:
    from gapprobe.report.page import write_report
    from gapprobe.study.run import run_studies

    results = run_studies(configs, out)
    page = write_report(results, out / "report.html")
    print(f"\n{results['headline']}\n\nreport   {page}\nnumbers  {out / 'results.json'}\nstore    {out / 'store'}")


def _study(config: Path, out: Path) -> Study:
    from gapprobe.study.config import load_config
    from gapprobe.study.run import Study

    return Study(load_config(config), out)


def _print(result: Mapping[str, object]) -> None:
    print(json.dumps(result, indent=1, ensure_ascii=False))


app.command(study, name="study", help="run the whole study, or its steps, from a configuration file")
app.command(models, name="models", help="the families of models that can be traced, and whether a model passes")
app.command(store, name="store", help="what an activation store holds, and whether it is sound")


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors of gapprobe are one line on stderr and exit code 1."""
    try:
        app.cli(
            prog="gapprobe",
            description="Where knowing and seeing come apart in vision-language models.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except GapprobeError as error:
        print(f"gapprobe: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("gapprobe: stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
