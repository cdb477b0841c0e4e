"""The command line: parse, call, print. Everything it does is a verb of the Python API too.

Built on tyro: commands are plain typed functions, so that the help, the types and the defaults cannot drift apart
from the code. Imports of heavy parts stay inside the commands: `gapprobe --help` must be quick.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro
from tyro.extras import SubcommandApp

from gapprobe.errors import ConfigError, GapprobeError
from gapprobe.files import told_count
from gapprobe.models.families.base import Site

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gapprobe.store.exchange.importing import TracedModel
    from gapprobe.study.config import StudyConfig
    from gapprobe.study.study import Study

Positional = tyro.conf.Positional
Family = Literal["llava", "instructblip", "both"]
Config = Annotated[Positional[Path], tyro.conf.arg(metavar="CONFIG.toml", help="the study")]
Configs = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="CONFIG.toml …", help="one study each")]
Data = Annotated[tuple[str, ...], tyro.conf.arg(help="some of the file's [data.…] tables; all if none", metavar="NAME")]
OUT = Path("gapprobe-study")
Model = Annotated[Positional[str], tyro.conf.arg(metavar="MODEL", help="a folder or a Hugging Face id")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], tyro.conf.arg(help="weights; auto is as saved")]
Device = Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:1, …; spread is over all there are")]
Attention = Annotated[str | None, tyro.conf.arg(help="eager, sdpa, …; transformers' choice if not given")]
Revision = Annotated[str | None, tyro.conf.arg(help="branch, tag or commit of a Hugging Face id")]
Stores = Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="a store, or a folder of stores")]
Url = Annotated[Positional[str], tyro.conf.arg(metavar="URL", help="s3://bucket/name, gs://…, sftp://…, or a folder")]
Transfers = Annotated[int, tyro.conf.arg(help="shards at once; each takes some 70 MB of memory")]
Out = Annotated[Path, tyro.conf.arg(help="output folder", metavar="DIR")]

app = SubcommandApp()
study = SubcommandApp()
models = SubcommandApp()
store = SubcommandApp()
bench = SubcommandApp()
data = SubcommandApp()


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


@app.command
def capture(
    model: Model,
    examples: Annotated[Positional[Path], tyro.conf.arg(metavar="EXAMPLES", help=".csv, .tsv, .jsonl or .parquet")],
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="the store; goes on if it is there")],
    positions: Annotated[
        tuple[str, ...], tyro.conf.arg(help="which tokens: last_input, answer, image, entity[-1], all, …")
    ] = ("last_input", "last_output"),
    layers: Annotated[tuple[int, ...], tyro.conf.arg(help="numbers from 0, the embeddings; all if not given")] = (),
    site: Annotated[Site, tyro.conf.arg(help="where in the model; of the last three all tokens are kept")] = "residual",
    max_new_tokens: Annotated[int, tyro.conf.arg(help="longest answer; 0 reads the prompts only")] = 10,
    stop: Annotated[tuple[str, ...], tyro.conf.arg(help="texts that end an answer")] = (),
    temperature: Annotated[
        float, tyro.conf.arg(help="0 takes the most probable token; above, answers are drawn")
    ] = 0.0,
    seed: Annotated[int, tyro.conf.arg(help="of the draws")] = 0,
    batch_size: Annotated[int, tyro.conf.arg(help="rows at once; fewer where the memory does not hold them")] = 32,
    store_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, tyro.conf.arg(help="of the residuals; the model's by default")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attention: Attention = None,
    revision: Revision = None,
    random_weights: Annotated[
        int | None, tyro.conf.arg(help="seed: the untrained model, for `probe --random-model`", metavar="SEED")
    ] = None,
) -> None:
    """Run a model over a table of prompts; keep answers and hidden states of the tokens asked for in a store.

    Columns: `text`, the prompt; `image` or `sound`, a file beside the table; `entity` and `reference`, phrases whose
    mentions in the text become tokens of that role; all are kept beside the activations. Stopped half-way, the same
    command goes on where it was. A line that cannot be run is kept with what is wrong with it.

    For example:
        gapprobe capture llava-hf/llava-v1.6-vicuna-7b-hf questions.csv acts --positions last_input image entity[-1]
        gapprobe capture ./my-model questions.jsonl acts --layers 10 20 30 --max-new-tokens 0
    """
    import gapprobe as gp
    from gapprobe.models.sites import IN_TOWER
    from gapprobe.tasks.tables import load_examples

    loaded = gp.load_model(
        _source(model),
        dtype=dtype,
        device=device,
        attention=attention,
        revision=revision,
        random_weights=random_weights,
    )
    kept = gp.capture(
        loaded,
        load_examples(examples),
        out,
        layers=layers or "all",
        positions=None if site in IN_TOWER else positions,
        site=site,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        stop=stop,
        temperature=temperature,
        seed=seed,
        dtype=store_dtype or str(loaded.dtype).removeprefix("torch."),
    )
    print(kept.info())


@study.command
def run(
    configs: Configs,
    data: Data = (),
    out: Out = OUT,
) -> None:
    """Run one or more studies, each on one model, into one report.

    The steps are capture (answers and residual streams), gap (judging, and which trials count), judges, choices,
    probe, recipe, lens, cosine and selective; each is a command of its own too. A finished step is not run again; a
    changed setting of the analysis runs the analysis again and keeps the activations. `study plan` says beforehand what
    it takes, `study status` how far it is.

    For example:
        gapprobe study run my-study.toml --out runs/mine
        gapprobe study run configs/llava-1.6-vicuna-7b.toml --data landmarks --out runs/landmarks
        gapprobe study run llava-1.6.toml instructblip.toml --out runs/two
    """
    chosen = _configs(configs, data)
    if any(config.server for config in chosen):
        _tell_costs(chosen, out)
    _run(chosen, out)


@study.command
def plan(
    configs: Configs,
    data: Data = (),
    tflops: Annotated[
        float | None, tyro.conf.arg(help="of the device, in the study's dtype; measured if the device is here")
    ] = None,
    out: Out = OUT,
) -> None:
    """Print steps, rows, forward passes, disk, memory and hours of a study, before anything runs.

    Fetches the model's configuration and processor, no weights. Hours are a lower bound. Of a model behind a server it
    prints requests, tokens and their price, less what is answered in the output folder already.

    For example:
        gapprobe study plan configs/llava-1.6-vicuna-7b.toml --tflops 150
        gapprobe study plan configs/gpt-4o.toml --data landmarks
    """
    from gapprobe.models.loading import load_model
    from gapprobe.study.planning import measured_tflops
    from gapprobe.study.planning import plan as planned
    from gapprobe.study.run import open_study

    for config in _configs(configs, data):
        if config.server:
            _tell_costs([config], out)
            continue
        asked = open_study(config, out)
        outline = load_model(config.model_source, dtype=config.dtype, device="meta", revision=config.revision)
        rate = tflops or measured_tflops(config.device, outline.dtype)
        print(planned(asked, outline).told(rate, "as given" if tflops else f"matrix products on {config.device}, here"))


@study.command
def status(
    configs: Configs,
    data: Data = (),
    out: Out = OUT,
) -> None:
    """Print how far a study is: rows captured, and which steps are done. Loads no model, and changes nothing.

    For example:
        gapprobe study status my-study.toml --out runs/mine
    """
    from gapprobe.study.planning import status as stand
    from gapprobe.study.run import open_study

    for config in _configs(configs, data):
        print(config.name)
        for step, state in stand(open_study(config, out)):
            print(f"  {step:10} {state}")


@study.command(name="capture")
def capture_study(config: Config, data: Data = (), out: Out = OUT) -> None:
    """Ask the model everything; keep answers and residual streams. Goes on where an earlier run stopped.

    For example:
        gapprobe study capture my-study.toml --out runs/mine
    """
    print(_study(config, data, out).capture().info())


@study.command
def gap(config: Config, data: Data = (), out: Out = OUT) -> None:
    """Print accuracies by setting, which trials count, and the gap between told and shown, as JSON.

    For example:
        gapprobe study gap my-study.toml --out runs/mine | jq .gap
    """
    _print(_study(config, data, out).gap())


@study.command
def validate(
    config: Config,
    data: Data = (),
    model: Annotated[str | None, tyro.conf.arg(help="a strong model; the study's own if not given")] = None,
    images: Annotated[int, tyro.conf.arg(help="of each entity")] = 10,
    share: Annotated[float, tyro.conf.arg(help="an entity stays if it is named in more than this share")] = 0.5,
    out: Out = OUT,
) -> None:
    """Ask a model to identify images of every entity; print which it names often enough to stay in the study.

    Writes classes.csv. Take what does not stay out of the question file.

    For example:
        gapprobe study validate my-study.toml --model llava-hf/llava-v1.6-34b-hf --out runs/classes
    """
    from gapprobe.study.run import open_study
    from gapprobe.study.validation import validate_classes

    chosen = _config(config, data)
    if model is not None:
        chosen = chosen.model_copy(update={"model": model, "revision": None, "name": f"{chosen.name}-classes"})
    table = validate_classes(open_study(chosen, out), images=images, share=share)
    table.to_csv(out / "classes.csv", index=False)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    gone = table[~table["kept"]]["entity"].tolist()
    print(f"{len(table) - len(gone)} of {len(table)} stay" + (f"; out: {', '.join(gone)}" if gone else ""))


@study.command
def judges(config: Config, data: Data = (), out: Out = OUT) -> None:
    """Print the gap by both judges, how far they agree, and disagreements to read, as JSON.

    For example:
        gapprobe study judges my-study.toml --out runs/mine | jq '.disagreements[]'
    """
    _print(_study(config, data, out).judges())


@study.command
def choices(config: Config, data: Data = (), out: Out = OUT) -> None:
    """Ask every question with options and print the gap by letter, option and log-probability, as JSON.

    For example:
        gapprobe study choices my-study.toml --out runs/mine | jq '.by.either.gap'
    """
    found = _study(config, data, out).choices()
    if found is None:
        raise ConfigError(f"{config} has no table [choices], so no question is asked with options; add one")
    _print(found)


@study.command
def probe(config: Config, data: Data = (), out: Out = OUT) -> None:
    """Fit failure probes at every layer beside their controls; print areas and verdicts as JSON.

    For example:
        gapprobe study probe my-study.toml --out runs/mine | jq -r '.verdict[].sentence'
    """
    _print({key: value for key, value in _study(config, data, out).probe().items() if key != "scores"})


@study.command
def recipe(config: Config, data: Data = (), out: Out = OUT) -> None:
    """Print the published probe's accuracy as published, and what of it is left when questions stay together, as JSON.

    For example:
        gapprobe study recipe my-study.toml --out runs/mine | jq .leakage.question
    """
    _print(_study(config, data, out).recipe())


@study.command(name="transfer")
def transfer_study(
    configs: Configs,
    data: Data = (),
    aligned: Annotated[bool, tyro.conf.arg(help="align models of one width, too")] = False,
    out: Out = OUT,
) -> None:
    """Fit failure probes on all studies but one and judge them on that one, each in turn; print areas as JSON.

    For other data of one model, or other models. Layer and strength are chosen on training rows alone; studies that
    ask the same questions are cut so that no question is on both sides. Models of different widths are aligned on the
    calls that no probe reads, and must have been asked the same.

    For example:
        gapprobe study transfer configs/llava-1.6-vicuna-7b.toml --out runs/llava | jq .best
        gapprobe study transfer llava.toml instructblip.toml --out runs/two | jq .best
    """
    from gapprobe.study.run import open_study
    from gapprobe.study.transfer import transfer_between

    studies = [open_study(config, out) for config in _configs(configs, data)]
    _print(transfer_between(studies, aligned=aligned, progress=True))


@study.command
def outside(
    table: Annotated[Positional[Path], tyro.conf.arg(metavar="TABLE", help="prompts with the column gold")],
    configs: Configs,
    data: Data = (),
    out: Out = OUT,
) -> None:
    """Foresee wrong answers to questions of another kind from a study's trials: OKVQA, in the paper; print JSON.

    Asks the study's model every line of the table. Perplexity, probe and their mean are fitted on the trials of all
    studies given, which are of one model, and judged on the table: coverage, risk, and what the mean gains.

    For example:
        gapprobe data okvqa ~/okvqa examples/landmarks/prompts.toml okvqa.csv
        gapprobe study outside okvqa.csv my-study.toml --out runs/mine | jq .ensemble_minus_perplexity
    """
    from gapprobe.study.outside import measure_outside
    from gapprobe.study.run import open_study

    _print(measure_outside([open_study(config, out) for config in _configs(configs, data)], table, progress=True))


@study.command
def lens(config: Config, data: Data = (), out: Out = OUT) -> None:
    """Print the answer's probability at every layer, told and shown, as JSON.

    For example:
        gapprobe study lens my-study.toml --out runs/mine | jq '.text, .visual'
    """
    _print(_study(config, data, out).lens())


@study.command
def cosine(config: Config, data: Data = (), out: Out = OUT) -> None:
    """Print the cosine of visual and full-information states at every layer, as JSON.

    For example:
        gapprobe study cosine my-study.toml --out runs/mine | jq '.success, .failure'
    """
    _print(_study(config, data, out).cosine())


@study.command
def selective(config: Config, data: Data = (), out: Out = OUT) -> None:
    """Print coverage and risk of answering only when confident, by every confidence and measure, as JSON.

    For example:
        gapprobe study selective my-study.toml --out runs/mine | jq .ensemble
    """
    _print(_study(config, data, out).selective())


@app.command
def report(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="folder with a results.json")],
    markdown: Annotated[
        Path | None, tyro.conf.arg(help="write all tables to this file too, as Markdown", metavar="FILE.md")
    ] = None,
) -> None:
    """Write report.html anew from the results.json of a study, without running anything.

    For example:
        gapprobe report gapprobe-demo
        gapprobe report gapprobe-demo --markdown tables.md
    """
    from gapprobe.files import write_bytes
    from gapprobe.report.page import write_report
    from gapprobe.report.tables import markdown as as_markdown
    from gapprobe.study.results import read_results

    results = read_results(folder / "results.json")
    print(write_report(results, folder / "report.html"))
    if markdown is not None:
        write_bytes(markdown, as_markdown(results).encode())
        print(markdown)


@app.command(name="probe")
def sweep(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="STORE", help="a store")],
    target: Annotated[str, tyro.conf.arg(help="column of the store's table with the labels")],
    position: Annotated[
        tuple[str, ...], tyro.conf.arg(help="tokens whose residuals are read; mean(image), max(all), last(entity) pool")
    ] = ("last_input",),
    contrast: Annotated[str | None, tyro.conf.arg(help="column with the id of each row's contrast, for ccs")] = None,
    probe: Annotated[tuple[str, ...], tyro.conf.arg(help="kinds of probes, by name")] = ("logistic",),
    split: Annotated[
        tuple[str, ...], tyro.conf.arg(help="columns whose groups stay together; random rows if none")
    ] = (),
    clusters: Annotated[str | None, tyro.conf.arg(help="column that the bootstrap resamples by; rows if none")] = None,
    layers: Annotated[tuple[int, ...], tyro.conf.arg(help="all if none")] = (),
    strengths: Annotated[tuple[float, ...], tyro.conf.arg(help="inverse strengths; the probe's own if none")] = (),
    controls: Annotated[
        tuple[Literal["shuffled", "layer_0", "random_projection", "random_model"], ...],
        tyro.conf.arg(help="what the probe must beat; all that can be run, but for random_projection, if none"),
    ] = (),
    random_model: Annotated[
        Path | None, tyro.conf.arg(help="the same rows, captured with --random-weights", metavar="STORE")
    ] = None,
    dimensions: Annotated[int, tyro.conf.arg(help="of random_projection")] = 32,
    folds: int = 5,
    permutations: Annotated[int, tyro.conf.arg(help="of labels, for the control and the p-value")] = 5,
    seed: int = 0,
    out: Annotated[Path, tyro.conf.arg(help="for tables, the figure, and what is fitted", metavar="DIR")] = Path(
        "gapprobe-probes"
    ),
) -> None:
    """Fit probes at every layer of a store beside their controls; print what holds on held-out rows.

    Writes best.csv, table.csv, strengths.csv and areas.html, and all of it, coefficients too, into `sweep`, which
    `gp.load_sweep` reads. Stopped half-way, the same command goes on where it was.

    For example:
        gapprobe probe acts --target right --split entity image --probe logistic mean_difference
    """
    from gapprobe.probes.sweep import sweep_probes
    from gapprobe.store.reader import open_store

    result = sweep_probes(
        open_store(folder),
        target,
        position=position,
        contrast=contrast,
        probe=probe,
        splits={name: name for name in split} or None,
        clusters=clusters,
        layers=layers or "all",
        strengths=strengths or None,
        controls=controls or None,
        random_model=None if random_model is None else open_store(random_model),
        dimensions=dimensions,
        folds=folds,
        permutations=permutations,
        seed=seed,
        folder=out / "fitted",
        progress=True,
    )
    best = result.best()
    for name, table in (("best", best), ("table", result.table), ("strengths", result.strengths)):
        table.to_csv(out / f"{name}.csv", index=False)
    result.save(out / "sweep")
    result.plot().write_html(out / "areas.html", include_plotlyjs=True)
    for line in best.itertuples():
        print(f"{line.probe} at {line.position}, split {line.split}: {line.sentence}")
    print(f"tables and figure: {out}")


@app.command(name="lens")
def read_words(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="STORE", help="a store")],
    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL", help="the model that made it")],
    targets: Annotated[
        str | None, tyro.conf.arg(help="next, generated, or a column with answers; best words only if not given")
    ] = None,
    position: Annotated[str | None, tyro.conf.arg(help="token of each row; all tokens if not given")] = None,
    layers: Annotated[tuple[int, ...], tyro.conf.arg(help="all if none")] = (),
    lens: Annotated[str, tyro.conf.arg(help="a lens by name, or the folder of a tuned one")] = "logit",
    norm: Annotated[bool, tyro.conf.arg(help="apply the final norm at every layer; without: as published")] = True,
    top_k: Annotated[int, tyro.conf.arg(help="how many of the best words are kept")] = 10,
    by: Annotated[str | None, tyro.conf.arg(help="column with groups of rows, for the figure by layer")] = None,
    row: Annotated[str | None, tyro.conf.arg(help="id of the row in the heatmap; the first if not given")] = None,
    out: Annotated[Path, tyro.conf.arg(help="for the reading, the figures, and what is kept", metavar="DIR")] = Path(
        "gapprobe-lens"
    ),
) -> None:
    """Read words off the residual stream at every layer and token: log-probability and rank of targets, best words.

    Writes reading.safetensors (`gp.load_lens_reading`), tokens.html (layer by token, of one row) and, with --position
    and --targets, by_layer.csv and by_layer.html. Stopped half-way, the same command goes on where it was.

    For example:
        gapprobe lens acts llava-hf/llava-v1.6-vicuna-7b-hf --targets gold --position last_input --by setting
    """
    import gapprobe as gp
    from gapprobe.lens.plotting import by_layer

    if by is not None and (targets is None or position is None):
        raise ConfigError("--by groups the rows of the figure by layer, which wants --targets and --position too")
    kept = gp.open_store(folder)
    if by is not None and by not in kept.rows:
        raise ConfigError(f"--by: {folder} has no column {by!r}; it has {', '.join(map(str, kept.rows.columns))}")
    if row is not None and row not in kept.ids:
        raise ConfigError(f"--row: {folder} has no row {row!r}")
    loaded = gp.load_model(_source(model))
    found = gp.logit_lens(
        kept,
        loaded,
        targets,
        position=position,
        layers=layers or "all",
        lens=gp.load_tuned_lens(lens) if Path(lens).is_dir() else lens,
        norm=norm,
        top_k=top_k,
        folder=out / "blocks",
        progress=True,
    )
    found.save(out / "reading.safetensors")
    found.plot(row, loaded).write_html(out / "tokens.html", include_plotlyjs=True)
    print(f"{found.label}: {told_count(len(found.row), 'token')}, {len(found.layers)} layers")
    if targets is not None and position is not None:
        table = found.by_layer(None if by is None else kept.rows[by])
        table.to_csv(out / "by_layer.csv", index=False)
        by_layer(table, found.label).write_html(out / "by_layer.html", include_plotlyjs=True)
        print(table[table["layer"] == found.layers[-1]].to_string(index=False, float_format=lambda v: f"{v:.3f}"))
    print(f"reading and figures: {out}")


@app.command(name="cosine")
def compare(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="STORE", help="a store")],
    pair: Annotated[tuple[str, str], tyro.conf.arg(help="two settings, such as visual full_information")],
    key: Annotated[
        tuple[str, ...], tyro.conf.arg(help="columns that a pair shares; trial, or question and image, if none")
    ] = (),
    setting: Annotated[str, tyro.conf.arg(help="column that --pair is about")] = "setting",
    by: Annotated[str | None, tyro.conf.arg(help="column of the first setting's rows with groups")] = None,
    clusters: Annotated[
        tuple[str, ...], tyro.conf.arg(help="one column or two that the bootstrap resamples by; pairs if none")
    ] = (),
    position: Annotated[tuple[str, ...], tyro.conf.arg(help="tokens whose residuals are compared")] = ("last_input",),
    layers: Annotated[tuple[int, ...], tyro.conf.arg(help="all if none")] = (),
    other: Annotated[Path | None, tyro.conf.arg(help="store of the second setting", metavar="STORE")] = None,
    seed: int = 0,
    out: Annotated[Path, tyro.conf.arg(help="for the table, the figure, and what is computed", metavar="DIR")] = Path(
        "gapprobe-cosines"
    ),
) -> None:
    """Compare rows of two settings by cosine at every layer: raw, centred and standardised; print the last layer's.

    Writes table.csv, cosines.safetensors (`gp.load_cosine`) and cosines.html. Stopped half-way, the same command goes
    on where it was.

    For example:
        gapprobe cosine acts --pair visual full_information --by correct --clusters question image
    """
    from gapprobe.similarity import cosine
    from gapprobe.store.reader import open_store

    if len(clusters) > 2:
        raise ConfigError(f"--clusters takes one column or two that cross, not {len(clusters)}")
    result = cosine(
        open_store(folder),
        pair=pair,
        key=key or None,
        setting=setting,
        other=None if other is None else open_store(other),
        by=by,
        clusters=(clusters[0], clusters[1]) if len(clusters) == 2 else clusters[0] if clusters else None,
        position=position[0] if len(position) == 1 else position,
        layers=layers or "all",
        seed=seed,
        folder=out / "layers",
        progress=True,
    )
    result.save(out / "cosines.safetensors")
    result.table.to_csv(out / "table.csv", index=False)
    result.plot().write_html(out / "cosines.html", include_plotlyjs=True)
    last = result.table[result.table["layer"] == result.layers[-1]]
    print(last.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"{told_count(len(result.left), 'pair')}, {result.lonely:,} rows without partner; table and figure: {out}")


@bench.command
def probes(
    folder: Annotated[
        Path | None, tyro.conf.arg(name="store", help="a store; random activations if not given", metavar="DIR")
    ] = None,
    target: Annotated[str | None, tyro.conf.arg(help="column with labels; a random direction's if not given")] = None,
    probe: Annotated[str, tyro.conf.arg(help="any registered probe")] = "logistic",
    position: str = "last_input",
    layers: Annotated[tuple[int, ...], tyro.conf.arg(help="all if none")] = (),
    rows: Annotated[int, tyro.conf.arg(help="of random activations")] = 2000,
    width: Annotated[int, tyro.conf.arg(help="of random activations")] = 1024,
    sklearn: Annotated[bool, tyro.conf.arg(help="fit the same one by one with scikit-learn too: slow")] = False,
) -> None:
    """Time probe fits by layer on this machine: fits and gigabytes a second, and shares of the machine's limits.

    For example:
        gapprobe bench probes
        gapprobe bench probes --store acts --target right --probe ridge --sklearn
    """
    from gapprobe.probes.throughput import bench_probes
    from gapprobe.store.reader import open_store

    table = bench_probes(
        None if folder is None else open_store(folder),
        target,
        probe=probe,
        position=position,
        layers=layers or None,
        rows=rows,
        width=width,
        against_sklearn=sklearn,
        progress=True,
    )
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    rates = table["fits_per_second"].tolist()
    print("\nfits a second by layer")
    for layer, rate in zip(table["layer"].tolist(), rates, strict=True):
        print(f"{layer:>4} {'█' * max(1, round(40 * rate / max(rates)))} {rate:.0f}")


@data.command
def prepare(
    kind: Annotated[
        Positional[Literal["mnist", "cifar100", "food101", "folder"]], tyro.conf.arg(metavar="KIND", help="of data set")
    ],
    source: Annotated[
        Positional[str], tyro.conf.arg(metavar="SOURCE", help="a folder or file as published, or a Hugging Face id")
    ],
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="images.parquet, entities.csv, source.json")],
    split: Annotated[Literal["test", "train"], tyro.conf.arg(help="of the data set")] = "test",
    images_per_entity: Annotated[int, tyro.conf.arg(help="at most, drawn by the seed")] = 100,
    entities: Annotated[tuple[str, ...], tyro.conf.arg(help="some of the classes; all if none", metavar="NAME")] = (),
    seed: int = 0,
) -> None:
    """Turn a data set into what a study reads: pictures by entity in one parquet file, and the list of entities.

    mnist is read from its IDX files, food101 from its folder with images/ and meta/, both also from parquet; cifar100
    from parquet (its own archive is a pickle); folder is one folder a class. A picture that cannot be decoded is left
    out and named.

    For example:
        gapprobe data prepare mnist ~/mnist data/mnist
        gapprobe data prepare cifar100 uoft-cs/cifar100 data/cifar100
        gapprobe data prepare folder ~/photographs data/landmarks
    """
    from gapprobe.tasks.datasets.preparing import prepare_dataset

    print(
        prepare_dataset(
            kind, source, out, split=split, images_per_entity=images_per_entity, entities=entities, seed=seed
        ).told
    )


@data.command
def arithmetic(
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="FILE.csv", help="the questions")],
    per_digit: Annotated[int, tyro.conf.arg(help="questions a digit")] = 10,
    seed: int = 0,
) -> None:
    """Write the rule's questions about MNIST's digits: "what is <digit> (+ or *) r?", the same of every digit.

    For example:
        gapprobe data arithmetic data/mnist/questions.csv
    """
    from gapprobe.files import write_bytes
    from gapprobe.tasks.datasets.arithmetic import arithmetic_questions, as_csv

    questions = arithmetic_questions(per_digit=per_digit, seed=seed)
    write_bytes(out, as_csv(questions))
    print(f"{out}: {told_count(len(questions), 'question')}")


@data.command
def okvqa(
    source: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="OKVQA's json files and val2014/")],
    prompts: Annotated[Positional[Path], tyro.conf.arg(metavar="PROMPTS.toml", help="the study's prompt template")],
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="FILE.csv", help="a table for gapprobe capture")],
) -> None:
    """Write OKVQA's validation questions as a table for `gapprobe capture`: rows out of a probe's domain.

    For example:
        gapprobe data okvqa ~/okvqa examples/landmarks/prompts.toml okvqa.csv
        gapprobe capture llava-hf/llava-v1.6-vicuna-7b-hf okvqa.csv acts-okvqa
    """
    from gapprobe.files import write_bytes
    from gapprobe.tasks.datasets.okvqa import read_okvqa
    from gapprobe.tasks.prompts import load_template

    table = read_okvqa(source, load_template(prompts))
    write_bytes(out, table.to_csv(index=False).encode())
    print(f"{out}: {told_count(len(table), 'question')}")


@data.command
def generate(
    entities: Annotated[
        Positional[Path], tyro.conf.arg(metavar="ENTITIES.csv", help="columns entity and, if you like, aliases")
    ],
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="questions.csv, dropped.csv, report.md, …")],
    model: Annotated[str, tyro.conf.arg(help="the language model's name at the server; of --local, folder or hub id")],
    url: Annotated[str, tyro.conf.arg(help="of an OpenAI-compatible server")] = "http://localhost:8000/v1",
    pages: Annotated[
        str | None, tyro.conf.arg(help="a folder of texts, a .jsonl or .parquet dump, or a MediaWiki's api.php")
    ] = None,
    reference: Annotated[
        str, tyro.conf.arg(help="stands for the name when it is only shown")
    ] = "the object in the image",
    own_article: Annotated[bool, tyro.conf.arg(help="have the model write an article of each entity, too")] = True,
    passages: Annotated[int, tyro.conf.arg(help="of a page or article, at most")] = 10,
    distractors: Annotated[bool, tyro.conf.arg(help="have wrong answers written, for [choices]")] = False,
    api_key_env: Annotated[str | None, tyro.conf.arg(help="environment variable that holds the server's key")] = None,
    concurrency: Annotated[int, tyro.conf.arg(help="requests at once")] = 4,
    requests_per_minute: Annotated[float | None, tyro.conf.arg(help="at most")] = None,
    json_schema: Annotated[bool, tyro.conf.arg(help="the server takes a schema that replies must follow")] = False,
    stop_texts: Annotated[bool, tyro.conf.arg(help="the server takes stop texts")] = True,
    local: Annotated[bool, tyro.conf.arg(help="load the model here; no server is asked")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: int = 0,
) -> None:
    """Have a language model write questions about entities; keep those that pass the published filters.

    It reads two-sentence passages that name an entity and proposes pairs of question and answer. Each must be well
    formed, have one right answer, be answered right without the passage, and be no duplicate. report.md says what each
    filter dropped, with some to read. Replies are kept: stopped half-way, the same command goes on where it was.

    For example:
        gapprobe data generate data/landmarks/entities.csv data/landmarks --model llama --pages wiki.parquet
        gapprobe data generate entities.csv out --model m --pages https://en.wikipedia.org/w/api.php --distractors
    """
    from pydantic import ValidationError

    from gapprobe.chat.server import ChatServer, ServerSettings
    from gapprobe.generation.generating import generate_questions, read_entities, require_own, write_generated
    from gapprobe.generation.pages import open_pages

    try:
        settings = ServerSettings(
            url=url,
            api_key_env=api_key_env,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            json_schema=json_schema,
            stop=stop_texts,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, problem['loc'])) or 'server'}: {problem['msg']}") from error
    require_own(out)
    listed = read_entities(entities)
    source = None if pages is None else open_pages(pages, out / "pages")
    if local:
        from gapprobe.generation.local import LocalChat
        from gapprobe.models.loading import load_model

        chat = LocalChat(load_model(_source(model), dtype=dtype, device=device), out / "replies")
    else:
        chat = ChatServer(settings, model, out / "replies")
    found = generate_questions(
        listed,
        chat,
        source,
        reference=reference,
        own_article=own_article,
        most_passages=passages,
        with_distractors=distractors,
        seed=seed,
    )
    write_generated(found, out)
    print(
        f"{out / 'questions.csv'}: {told_count(len(found.questions), 'question')}; {out / 'report.md'} says what went"
    )


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
    model: Model,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attention: Attention = None,
    revision: Revision = None,
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

    loaded = load_model(_source(model), dtype=dtype, device=device, attention=attention, revision=revision)
    result = check_model(loaded)
    print(result)
    if not result.passed:
        sys.exit(1)


@store.command
def info(folder: Stores) -> None:
    """Say what an activation store holds: model, layers, positions, rows, errors, size.

    For example:
        gapprobe store info gapprobe-demo/store
    """
    from gapprobe.store.reader import find_stores, open_store

    for path in find_stores(folder):
        print(open_store(path).info())


@store.command
def verify(
    folder: Stores,
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print every problem with the ids of its rows")] = False,
) -> None:
    """Read every byte of a store: checksums, offsets, NaN and infinities. Exits with 1 when something is wrong.

    Names the rows that damage touches, as few as the checksums of each MiB allow. Writes nothing.

    For example:
        gapprobe store verify gapprobe-demo/store
        gapprobe store verify runs --json | jq '.[].problems[].rows'
    """
    from gapprobe.store.care.verify import verify_store
    from gapprobe.store.reader import find_stores

    found = {path: verify_store(path) for path in find_stores(folder)}
    if as_json:
        _print([{"store": str(p), "problems": [asdict(each) for each in problems]} for p, problems in found.items()])
    else:
        for path, problems in found.items():
            print(f"{path}: {told_count(len(problems), 'problem') if problems else 'sound'}")
            for problem in problems:
                print(f"  {problem}")
            if problems:
                print(f"  to mend what can be mended: gapprobe store repair {path}")
    if any(found.values()):
        sys.exit(1)


@store.command
def repair(
    folder: Stores,
    like: Annotated[
        Path | None, tyro.conf.arg(help="a store of the same model and settings, if store.json is lost", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print all that was done, with all ids")] = False,
) -> None:
    """Bring a damaged store back to its largest consistent state, and say what must be captured again.

    Rows that no damage touches are kept, bit for bit. Nothing is deleted: damaged files are moved to damaged/ in the
    store, until gapprobe store gc --damaged. The capture that made the store makes what is lost again when it is run
    once more. Exits with 0 when the store is whole again, whether rows were lost or not.

    For example:
        gapprobe store repair gapprobe-demo/store
        gapprobe store repair runs/mine --json | jq -r '.[].lost[]'
    """
    from gapprobe.store.care.repairing import repair_store
    from gapprobe.store.reader import find_stores

    # Stores are found by their store.json, which may be what is lost.
    stores = [folder] if like is not None or (folder / "shards").is_dir() else find_stores(folder)
    done = [repair_store(path, like) for path in stores]
    if as_json:
        _print([asdict(each) | {"path": str(each.path)} for each in done])
    else:
        for each in done:
            print(each)


@store.command
def merge(
    sources: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DIR …", help="stores, or folders of them")],
    into: Annotated[Path, tyro.conf.arg(help="the store that gets the rows; made if there is none", metavar="DIR")],
) -> None:
    """Bring the rows of several stores of one model and one kind of run together in one.

    Rows that the target has already are left out. Sources stay as they are; on one file system no residual is copied.
    Stopped half-way, the same command goes on where it was.

    For example:
        gapprobe store merge runs/node-0 runs/node-1 --into runs/all
    """
    from gapprobe.store.care.merging import merge_stores
    from gapprobe.store.reader import find_stores

    found = dict.fromkeys(path for source in sources for path in find_stores(source))
    # A folder of stores may hold the target of an earlier merge.
    print(merge_stores([path for path in found if path in sources or path.resolve() != into.resolve()], into))


@store.command
def compact(
    folder: Stores,
    shard_mb: Annotated[int, tyro.conf.arg(help="size of a shard; memory is one and a half times that")] = 256,
) -> None:
    """Join small shards, as many short runs leave them, into larger ones. Rows, order and bits stay as they are.

    Needs room for the new shards beside the old ones, which stay until gapprobe store gc for programs that have the
    store open. Writers may go on meanwhile.

    For example:
        gapprobe store compact gapprobe-demo/store
        gapprobe store compact runs/mine --shard-mb 512
    """
    from gapprobe.store.care.compacting import compact_store
    from gapprobe.store.reader import find_stores

    for path in find_stores(folder):
        print(compact_store(path, shard_mb << 20))


@store.command
def gc(
    folder: Stores,
    dry_run: Annotated[bool, tyro.conf.arg(help="only say what would be removed")] = False,
    damaged: Annotated[bool, tyro.conf.arg(help="remove what repairs moved to damaged/, too")] = False,
) -> None:
    """Remove what no row needs: temporaries of runs that died, and old files of compacted or repaired shards.

    A file goes only if all its rows are sealed in another one that is there. Files of unknown names stay.

    For example:
        gapprobe store gc gapprobe-demo/store --dry-run
        gapprobe store gc runs/mine --damaged
    """
    from gapprobe.store.care.clearing import collect_garbage
    from gapprobe.store.reader import find_stores

    for path in find_stores(folder):
        print(collect_garbage(path, dry_run, damaged))


def _run(configs: Sequence[StudyConfig], out: Path) -> None:
    from gapprobe.report.page import write_report
    from gapprobe.study.run import run_studies

    results = run_studies(configs, out)
    page = write_report(results, out / "report.html")
    print(f"\n{results['headline']}\n\nreport   {page}\nnumbers  {out / 'results.json'}")
    for kept in ("store", "replies"):
        if (out / kept).is_dir():
            print(f"{kept:8} {out / kept}")


def _tell_costs(configs: Sequence[StudyConfig], out: Path) -> None:
    from gapprobe.study.served import ServedStudy

    for config in configs:
        if config.server:
            print(f"{config.name}: {ServedStudy(config, out).cost().told}")


def _configs(paths: Sequence[Path], data: Sequence[str]) -> list[StudyConfig]:
    from gapprobe.study.config import load_configs

    return [config for path in paths for config in load_configs(path, data)]


def _config(path: Path, data: Sequence[str]) -> StudyConfig:
    found = _configs([path], data)
    if len(found) > 1:
        raise ConfigError(f"{path} has {len(found)} data sets; a step is of one of them: name it with --data")
    return found[0]


def _study(config: Path, data: Sequence[str], out: Path) -> Study:
    from gapprobe.study.run import open_study

    return open_study(_config(config, data), out)


@store.command(name="import")
def import_activations(
    activations: Annotated[
        Positional[Path], tyro.conf.arg(metavar="FILE", help=".safetensors, .npy, .npz, folder of .npy, or export")
    ],
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="the store")],
    labels: Annotated[Path | None, tyro.conf.arg(metavar="TABLE", help=".csv, .tsv or .parquet, a line a row")] = None,
    position: Annotated[str, tyro.conf.arg(help="what to call the last token of each row")] = "last_input",
    layers: Annotated[
        tuple[int, ...] | None, tyro.conf.arg(help="numbers of an array's layers, or a selection")
    ] = None,
    mask: Annotated[Path | None, tyro.conf.arg(metavar="FILE.npy", help="[n, tokens], true for real tokens")] = None,
    lengths: Annotated[Path | None, tyro.conf.arg(metavar="FILE.npy", help="[n], real tokens of each row")] = None,
    token_ids: Annotated[Path | None, tyro.conf.arg(metavar="FILE.npy", help="of the shape of the tokens")] = None,
    model: Annotated[str | None, tyro.conf.arg(help="folder or Hugging Face id; loaded, so that lenses work")] = None,
    name: Annotated[str | None, tyro.conf.arg(help="of the model, if it is not to be loaded")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, tyro.conf.arg(help="convert to this")] = None,
    allow_nonfinite: Annotated[bool, tyro.conf.arg(help="store NaN and infinities too")] = False,
) -> None:
    """Make a store of activations that you already have. The same command again adds nothing, or goes on.

    Layer 0 is the embeddings, layer l what block l leaves. Tensors by layer are named 7, layer_7, residual.07, or as
    TransformerLens names them.

    For example:
        gapprobe store import acts.safetensors my-store --labels labels.csv
        gapprobe store import acts.npy my-store --lengths lengths.npy --model llava-hf/llava-v1.6-vicuna-7b-hf
    """
    from gapprobe.models.loading import load_model
    from gapprobe.store.exchange.importing import import_activations as import_

    if model is not None and name is not None:
        raise ConfigError("--model and --name both say what the activations come from; give one of them")
    source = Path(model) if model is not None and Path(model).exists() else model
    made = import_(
        folder,
        activations,
        labels,
        position=position,
        layers=layers,
        mask=mask,
        lengths=lengths,
        token_ids=token_ids,
        # pyright does not take a cached_property for the property of a protocol.
        model=name if source is None else cast("TracedModel", load_model(source, dtype="auto")),
        dtype=dtype,
        allow_nonfinite=allow_nonfinite,
        progress=True,
    )
    print(made.info())


@store.command
def export(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="the store")],
    target: Annotated[Positional[Path], tyro.conf.arg(metavar="TARGET", help="folder to make")],
    format: Annotated[Literal["numpy", "transformer_lens", "datasets"], tyro.conf.arg(help="for which tool")] = "numpy",
    rows: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="ids, one a line; all if not given")] = None,
    layers: Annotated[tuple[int, ...] | None, tyro.conf.arg(help="some of the store's; all if not given")] = None,
    position: Annotated[str | None, tyro.conf.arg(help="only this token of each row; all if not given")] = None,
    padding_side: Annotated[Literal["left", "right"], tyro.conf.arg(help="of transformer_lens")] = "left",
) -> None:
    """Write a store for numpy, TransformerLens or Hugging Face datasets. `gapprobe store import` reads it back.

    For example:
        gapprobe store export my-store for-numpy --layers 0 16 32 --position last_input
        gapprobe store export my-store for-lens --format transformer_lens
    """
    from gapprobe.store.exchange.exporting import export_store
    from gapprobe.store.reader import open_store

    if rows is not None and not rows.is_file():
        raise ConfigError(f"--rows {rows} is no file; give a text file with an id a line")
    made = export_store(
        open_store(folder),
        target,
        format,
        rows=None if rows is None else filter(None, rows.read_text(encoding="utf-8").split("\n")),
        layers="all" if layers is None else layers,
        position=position,
        padding_side=padding_side,
    )
    print(made)


@store.command
def push(
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="a store")],
    url: Url,
    verify: Annotated[bool, tyro.conf.arg(help="compare the content of what arrived, not only its size")] = True,
    recheck: Annotated[bool, tyro.conf.arg(help="compare what was pushed before, too; send it again if bad")] = False,
    transfers: Transfers = 4,
) -> None:
    """Send a store to S3 or any other place that fsspec reaches. Stopped, the same command goes on where it was.

    What lies there is a store, too. Only what is missing is sent, and it is compared once it has arrived. Keys and
    endpoints come from the environment (AWS_PROFILE, AWS_ENDPOINT_URL, …) or fsspec's configuration.

    For example:
        gapprobe store push gapprobe-demo/store/llava s3://my-bucket/llava
    """
    from gapprobe.store.remote.pushing import push

    print(push(folder, url, verify=verify, recheck=recheck, transfers=transfers))


@store.command
def pull(
    url: Url,
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR", help="the store, made if there is none")],
    transfers: Transfers = 4,
) -> None:
    """Bring the shards of a store elsewhere that are missing here. Stopped, the same command goes on where it was.

    For example:
        gapprobe store pull s3://my-bucket/llava llava-store
    """
    from gapprobe.store.remote.pulling import pull

    print(pull(url, folder, transfers=transfers))


def _source(model: str) -> str | Path:
    return Path(model) if Path(model).exists() else model


def _print(result: Mapping[str, object] | Sequence[Mapping[str, object]]) -> None:
    print(json.dumps(result, indent=1, ensure_ascii=False))


app.command(study, name="study", help="run the whole study, or its steps, from a configuration file")
app.command(models, name="models", help="the families of models that can be traced, and whether a model passes")
app.command(data, name="data", help="data sets and questions in the form that a study reads")
app.command(bench, name="bench", help="how fast things are on this machine")
app.command(store, name="store", help="activation stores: look, check, mend, join, bring activations in and out")


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors of gapprobe are one line on stderr and exit code 1."""
    try:
        app.cli(
            prog="gapprobe",
            description="Where knowing and seeing come apart in vision-language models.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        sys.stdout.flush()
    except GapprobeError as error:
        print(f"gapprobe: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # Whoever reads has seen enough (`| head`). Python would flush the rest once more at the end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("gapprobe: stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
