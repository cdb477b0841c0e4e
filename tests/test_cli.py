"""The command line as a user types it: real processes, their output and exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gapprobe.demo import FOLDER
from gapprobe.store.reader import open_store
from gapprobe.tasks.images import load_images
from tests.store.damage import flip
from tests.store.rows import holds, some_rows, write

COMMANDS = [
    [],
    ["demo"],
    ["capture"],
    ["report"],
    ["study"],
    *[["study", step] for step in ("run", "capture", "gap", "probe", "lens", "cosine", "selective")],
    ["models"],
    ["models", "list"],
    ["models", "check"],
    ["store"],
    *[["store", command] for command in ("info", "verify", "repair", "merge", "compact", "gc")],
]
# The trained toys are too small to gain from threads, and tests run beside each other.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def gapprobe(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gapprobe", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, cwd=cwd, capture_output=True, text=True, check=False)


def test_help_is_there_for_every_command_with_an_example() -> None:
    script = (
        "import contextlib, io, sys\nfrom gapprobe.cli import main\n"
        f"for command in {COMMANDS!r}:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n"
        "        main([*command, '--help'])\n"
        "    text = out.getvalue()\n"
        "    assert 'usage: gapprobe' in text, command\n"
        "    assert len(command) < 2 or 'gapprobe ' + ' '.join(command) in text.split('example', 1)[1], command\n"
        "print('all there')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.stdout == "all there\n", done.stderr


def test_the_package_and_its_help_load_nothing_heavy() -> None:
    script = (
        "import sys, gapprobe, gapprobe.cli\n"
        "print([m for m in ('torch', 'transformers', 'nnsight', 'pandas', 'plotly', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import gapprobe

    for name in gapprobe.__all__:
        assert getattr(gapprobe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gapprobe.nonsense


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of the shipped LLaVA with few calls, its parts named by path."""
    text = (FOLDER / "llava.toml").read_text(encoding="utf-8")
    for part in ("models/llava", "digits.parquet", "facts.toml", "prompts.toml"):
        text = text.replace(f'"{part}"', f'"{FOLDER / part}"')
    text = text.replace("images_per_question = 10", "images_per_question = 1")
    text = text.replace('["black", "white", "noise", "none"]', '["black"]')
    path = tmp_path_factory.mktemp("study") / "study.toml"
    path.write_text(text + "\n[probe]\nreplicates = 100\nfolds = 3\n", encoding="utf-8")
    return path


def test_a_study_step_by_step_and_then_whole(config: Path, tmp_path: Path) -> None:
    captured = gapprobe("study", "capture", config, "--out", "out", cwd=tmp_path)
    assert captured.returncode == 0, captured.stderr
    assert "0 could not be run" in captured.stdout
    assert "row/s" in captured.stderr or "row" in captured.stderr
    gap = gapprobe("study", "gap", config, "--out", "out", cwd=tmp_path)
    assert json.loads(gap.stdout)["raw"]["text_only"]["accuracy"] >= 0.9
    whole = gapprobe("study", "run", config, "--out", "out", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "report   out/report.html" in whole.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["headline"] in whole.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "study.json", "steps", "store", "results.json", "report.html",
    }  # fmt: skip

    info = gapprobe("store", "info", "out", cwd=tmp_path)
    assert "LlavaForConditionalGeneration" in info.stdout
    assert gapprobe("store", "verify", "out", cwd=tmp_path).stdout.strip().endswith("sound")
    shard = next((tmp_path / "out").rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    broken = gapprobe("store", "verify", "out", cwd=tmp_path)
    assert broken.returncode == 1
    assert shard.name in broken.stdout

    (tmp_path / "out" / "report.html").unlink()
    assert gapprobe("report", "out", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("study", "run", "nowhere.toml"), "nowhere.toml does not exist"),
        (("study", "run"), "give a configuration"),
        (("models", "check", "."), "no config.json"),
        *[(("store", command, "."), "no gapprobe store") for command in ("info", "verify", "repair", "compact", "gc")],
        (("store", "merge", ".", "--into", "all"), "no gapprobe store"),
        (("report", "."), "results.json does not exist"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = gapprobe(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("gapprobe: ")
    assert "Traceback" not in done.stderr


def test_a_store_is_verified_repaired_merged_compacted_and_cleared_up(tmp_path: Path) -> None:
    write(tmp_path / "runs/a", some_rows(9))
    write(tmp_path / "runs/b", some_rows(18)[9:])
    flip(tmp_path / "runs/a/shards/000001.safetensors", 4200)

    broken = gapprobe("store", "verify", "runs", cwd=tmp_path)
    assert broken.returncode == 1
    assert "runs/b: sound" in broken.stdout
    assert "rows row 3, row 4, row 5" in broken.stdout
    assert "gapprobe store repair runs/a" in broken.stdout
    told = gapprobe("store", "verify", "runs", "--json", cwd=tmp_path)
    assert told.returncode == 1
    assert [len(store["problems"]) for store in json.loads(told.stdout)] == [1, 0]

    refused = gapprobe("store", "merge", "runs", "--into", "runs/all", cwd=tmp_path)
    assert refused.returncode == 1
    assert "gapprobe store repair" in refused.stderr
    repaired = gapprobe("store", "repair", "runs", "--json", cwd=tmp_path)
    assert repaired.returncode == 0, repaired.stderr
    assert {store["path"]: store["lost"] for store in json.loads(repaired.stdout)} == {
        "runs/a": ["row 3", "row 4", "row 5"], "runs/all": [], "runs/b": [],
    }  # fmt: skip
    assert (tmp_path / "runs/a/damaged/lost-000000.txt").read_text() == "row 3\nrow 4\nrow 5\n"
    assert "nothing to repair" in gapprobe("store", "repair", "runs", cwd=tmp_path).stdout
    write(tmp_path / "runs/a", some_rows(9))

    merged = gapprobe("store", "merge", "runs", "--into", "runs/all", cwd=tmp_path)
    assert "runs/all: 3 rows are new, 15 were there already" in merged.stdout
    assert holds(tmp_path / "runs/all", some_rows(18))

    compacted = gapprobe("store", "compact", "runs/all", "--shard-mb", "1", cwd=tmp_path)
    assert "6 shards became 1" in compacted.stdout
    told = gapprobe("store", "gc", "runs", "--dry-run", "--damaged", cwd=tmp_path)
    assert "runs/all: 12 files" in told.stdout
    assert "damaged/000001.safetensors" in told.stdout
    assert "would be removed" in told.stdout
    assert "removed" in gapprobe("store", "gc", "runs", "--damaged", cwd=tmp_path).stdout
    assert not (tmp_path / "runs/a/damaged").exists()
    assert gapprobe("store", "verify", "runs", cwd=tmp_path).returncode == 0
    assert holds(tmp_path / "runs/all", some_rows(18))

    (tmp_path / "runs/a/store.json").unlink()
    assert "gapprobe store repair runs/a --like OTHER" in gapprobe("store", "repair", "runs/a", cwd=tmp_path).stderr
    assert gapprobe("store", "repair", "runs/a", "--like", "runs/b", cwd=tmp_path).returncode == 0
    assert holds(tmp_path / "runs/a", some_rows(9))


def test_models_list_names_the_families() -> None:
    listed = gapprobe("models", "list").stdout
    for name in ("llava", "llava_next", "instructblip", "LlavaNextForConditionalGeneration"):
        assert name in listed


@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_models_check_passes_on_the_shipped_models(family: str) -> None:
    done = gapprobe("models", "check", FOLDER / "models" / family, "--dtype", "float32", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert done.stdout.count("ok") >= 4


def test_a_full_disk_is_said_in_one_line_and_the_same_command_goes_on(config: Path, tmp_path: Path) -> None:
    limited = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "from gapprobe.cli import main\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", limited, "study", "capture", str(config), "--out", "out"]
    full = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=False)
    last = full.stderr.strip().splitlines()[-1]
    assert full.returncode == 1
    assert last.startswith("gapprobe: ")
    assert "free some space, or choose another folder) and run the same again" in last
    assert "Traceback" not in full.stderr
    again = gapprobe("study", "capture", config, "--out", "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert gapprobe("store", "verify", "out", cwd=tmp_path).returncode == 0


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    write(tmp_path, some_rows(3))
    for unbuffered in ("", "1"):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "gapprobe", "store", "info", str(tmp_path)]
        environment = ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")


def test_a_table_of_prompts_becomes_a_store(tmp_path: Path) -> None:
    for i, file in enumerate(load_images(FOLDER / "digits.parquet", ["four"]).by_entity["four"][:2]):
        (tmp_path / f"{i}.png").write_bytes(file.read())
    lines = ["text,image,entity", "Question: What is four doubled? Answer:,0.png,four"]
    lines += ["Question: What is the number in the image? Answer:,1.png,", "Question: What? Answer:,2.png,"]
    (tmp_path / "asked.csv").write_text("\n".join(lines) + "\n")
    command = ["capture", FOLDER / "models" / "llava", "asked.csv", "acts", "--positions", "last_input", "entity[-1]"]
    command += ["--layers", 0, 6, "--stop", "###"]
    done = gapprobe(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3, of which 1 could not be run" in done.stdout
    store = open_store(tmp_path / "acts")
    assert store.header.layers == (0, 6)
    assert store.rows.sort_values("image")["answer"].tolist()[0] == "eight"
    assert len(store.batch(position="entity[-1]").token_ids) == 1
    again = gapprobe(*command, cwd=tmp_path)
    assert again.returncode == 0
    assert "rows x" not in again.stderr
    wrong = gapprobe(*command[:4], "--positions", "first", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "position 'first' is not understood" in wrong.stderr
