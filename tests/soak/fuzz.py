"""Fuzzing of stores: mutated files, and every public way to read, write and mend them.

    python -m tests.soak.fuzz [--seconds 600] [--seed 0] [--engine atheris] [--json FILE]
    python -m tests.soak.fuzz --replay HEX

Trials run in a process of their own, which is watched: it may neither die nor hang. README.md says what is held to be
right. With atheris, coverage of gapprobe.store guides the mutations; without, they are random.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from tests.soak.report import machine, versions

RESULTS = Path(__file__).parent / "results"
# A trial is some forty operations of at most five seconds each, nearly all of which take milliseconds.
PATIENCE = 60
MEMORY = 3 << 30
LONGEST = 400


def work(folder: Path, engine: str, seconds: float, seed: int) -> None:
    """Run trials until the time is up. Say in files what is being tried, how often, and what was found."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["gapprobe.store"]):
            from tests.soak.trial import Sandbox
    else:
        from tests.soak.trial import Sandbox
    import torch

    torch.set_num_threads(1)
    sandbox, runs, found, end = Sandbox(folder / f"sandbox {seed}"), 0, Counter(), time.monotonic() + seconds
    # More than that is a bug; without a limit it would take the machine along.
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))

    def one(data: bytes) -> None:
        nonlocal runs
        (folder / "current").write_bytes(data)
        told, findings = sandbox.run(data)
        runs += 1
        (folder / f"runs-{seed}").write_text(str(runs))
        for finding in findings:
            kind = re.sub(r"\d+", "#", finding)
            found[kind] += 1
            if found[kind] == 1:
                with (folder / "found.jsonl").open("a") as stream:
                    stream.write(json.dumps({"what": finding, "mutations": told, "input": data.hex()}) + "\n")

    if engine == "atheris":
        (folder / "corpus").mkdir(exist_ok=True)
        options = (
            "-timeout=0",
            "-rss_limit_mb=0",
            f"-max_len={LONGEST}",
            f"-max_total_time={round(seconds)}",
            f"-artifact_prefix={folder}/",
        )
        atheris.Setup([sys.argv[0], *options, f"-seed={seed + 1}", str(folder / "corpus")], one)
        atheris.Fuzz()
    pick = random.Random(seed)
    while time.monotonic() < end:
        one(pick.randbytes(pick.randint(1, LONGEST)))


def watch(folder: Path, engine: str, seconds: float, seed: int) -> list[dict]:
    """Have workers run, one after another when one dies or hangs; return what was found."""
    found, end, number = [], time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 1 and number < 20:
        command = [sys.executable, "-m", "tests.soak.fuzz", "--work", str(folder), "--engine", engine]
        command += ["--seconds", str(left), "--seed", str(seed + number)]
        with (folder / "log").open("ab") as log:
            worker = subprocess.Popen(command, stderr=log, stdout=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        hung = False
        while worker.poll() is None:
            time.sleep(0.2)
            hung = _idle(folder / "current", worker) > PATIENCE
            if hung or time.monotonic() > end + PATIENCE:
                worker.kill()
                worker.wait()
        data = (folder / "current").read_bytes() if (folder / "current").exists() else b""
        if hung or worker.returncode:
            code = worker.returncode
            how = "hangs" if hung else f"dies of {signal.Signals(-code).name}" if code < 0 else f"ends with {code}"
            found.append({"what": f"the process {how}", "mutations": [], "input": data.hex()})
        number += 1
    lines = (folder / "found.jsonl").read_text().splitlines() if (folder / "found.jsonl").exists() else []
    return found + [json.loads(line) for line in lines]


def _idle(current: Path, worker: subprocess.Popen) -> float:
    """Return for how many seconds a worker has been at one trial."""
    if worker.poll() is not None or not current.exists():
        return 0.0
    return time.time() - current.stat().st_mtime


def replay(data: bytes) -> int:
    """Run one trial and print what was wrong."""
    from tests.soak.trial import Sandbox

    with tempfile.TemporaryDirectory() as folder:
        told, findings = Sandbox(Path(folder)).run(data)
    print(*told, sep=", ")
    print(*findings or ["nothing found"], sep="\n")
    return 1 if findings else 0


def main() -> int:
    """Fuzz, print what was found, write the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["atheris", "random"])
    parser.add_argument("--json", type=Path, default=RESULTS / f"fuzz-{date.today()}.json")
    parser.add_argument("--replay", type=bytes.fromhex, metavar="HEX")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay is not None:
        return replay(args.replay)
    engine = args.engine or ("atheris" if find_spec("atheris") else "random")
    if args.work:
        work(args.work, engine, args.seconds, args.seed)
        return 0
    if engine == "random":
        print("atheris is not installed (pip install 'gapprobe[soak]'): mutations are random")
    # On a disk in memory a trial takes half the time.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        found = watch(folder, engine, args.seconds, args.seed)
        runs = sum(int(file.read_text() or 0) for file in folder.glob("runs-*"))
        log = (folder / "log").read_text(errors="replace")
    covered = re.findall(r"cov: (\d+) ft: (\d+)", log)
    for finding in found:
        print(finding["what"], f"  {', '.join(finding['mutations'])}; --replay {finding['input']}", sep="\n")
    told = f", {covered[-1][0]} places of gapprobe.store covered" if covered else ""
    print(f"{runs:,} trials in {args.seconds:.0f} s with {engine}{told}: {len(found)} findings")
    if not runs:
        print(log[-2000:])
    result = {
        "machine": machine(), "versions": versions(*(["atheris"] if engine == "atheris" else [])), "engine": engine,
        "seed": args.seed, "seconds": args.seconds, "trials": runs,
        "covered": int(covered[-1][0]) if covered else None, "findings": found,
    }  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if found or not runs else 0


if __name__ == "__main__":
    sys.exit(main())
