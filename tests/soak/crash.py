"""Crash soak of the store: writers die or meet a failing disk, readers look on, and in the end no bit may be missing.

    python -m tests.soak.crash [--kills 240] [--seed 0] [--json FILE] [--only SCENARIO]

`actors` holds the processes; here they are started, killed and judged. README.md says what is checked.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing.connection import wait
from pathlib import Path

import torch

from gapprobe.store.care.repairing import repair_store
from gapprobe.store.care.verify import verify_store
from gapprobe.store.format import MANIFEST_FILE, ROWS, SHARDS, STORE_FILE
from gapprobe.store.reader import open_store
from gapprobe.store.writer import StoreWriter
from tests.soak.actors import GAVE_UP, HEADER, Life, live, save_rows, watch
from tests.soak.report import machine, versions
from tests.soak.scenarios import SCENARIOS, Scenario, Tally, show
from tests.soak.wreck import Unable, small_disk, whereabouts
from tests.store.rows import equal, write

RESULTS = Path(__file__).parent / "results"
KILLED = -9
DEADLY = ("posix_fallocate", "pwrite", "fsync", "link", "rename", "write", "unlink", "replace")
KILLS_A_STORE = 12


@dataclass
class Slot:
    """A place at a store, taken by one process after another.

    Attributes:
        rows: numbers of the rows that it is to write.
        tends: what it does in place of writing, if anything.
        done: a process has done all there is to do and ended well.
    """

    rows: Sequence[int]
    tends: str = ""
    process: multiprocessing.Process | None = None
    done: bool = False

    @property
    def alive(self) -> bool:
        """Whether a process is at work here."""
        return self.process is not None and self.process.is_alive()


class Soak:
    """The rows, an uninterrupted run to compare with, and a server that forks children which have torch already.

    Args:
        folder: for all stores; on the disk that is to be tried.
        seed: of everything but the moments at which things happen.
        count: of rows.
        shrink: makes rows that much shorter, for tests in a hurry.
    """

    def __init__(self, folder: Path, seed: int, count: int = 200, shrink: int = 1) -> None:
        self.folder, self.pick = folder, random.Random(seed)
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["tests.soak.actors"])
        self.rows_file = folder / "rows.pt"
        self.rows = save_rows(self.rows_file, count, shrink)
        write(folder / "reference", self.rows, HEADER, batch=count, shard_bytes=256 << 20)
        self.reference = open_store(folder / "reference")
        self.sources = [folder / "source 0", folder / "source 1"]
        for source, rows in zip(self.sources, (self.rows[: count * 2 // 3], self.rows[count // 3 :]), strict=True):
            write(source, rows, HEADER, batch=5)
        self._names = iter(range(1_000_000_000))
        for name in ("warm", "calm"):
            slot = Slot(range(count))
            self._start(Scenario(name, 0.0), folder / name, slot)
            begun = time.monotonic()
            slot.process.join()
            # How long a writer lives that nobody kills; the first one warmed the server up.
            self.lifetime = time.monotonic() - begun

    def run(self, scenario: Scenario, kills: int) -> Tally:
        """Kill that many processes, on one store after another."""
        tally, begun = Tally(scenario.name), time.monotonic()
        while tally.kills < kills and len(tally.problems) + len(tally.bad) < 10:
            path = self._path()
            path.mkdir()
            readers = nullcontext() if scenario.tends == "repair" else self._readers(scenario, path / "s", tally)
            try:
                with small_disk(path, scenario.small) as grow, readers:
                    tally.stores += 1
                    if scenario.tends == "repair":
                        self._damaged_store(scenario, path / "s", tally, min(KILLS_A_STORE, kills - tally.kills))
                    else:
                        self._one_store(scenario, path / "s", tally, min(KILLS_A_STORE, kills - tally.kills), grow)
            except Unable as error:
                tally.skipped = str(error)
                break
            if not tally.bad and not tally.problems:
                shutil.rmtree(path)
        tally.seconds = time.monotonic() - begun
        return tally

    def _one_store(self, scenario: Scenario, path: Path, tally: Tally, kills: int, grow: Callable[[int], None]) -> None:
        """Kill writers of a store, and who tends it, until it is complete or that many have died; then complete it."""
        slots, end, before = self._slots(scenario), tally.kills + kills, frozenset()
        while tally.kills < end and not all(slot.done for slot in slots):
            self._one_round(scenario, path, tally, slots)
            died = self._reap(slots, tally, grow)
            if died:
                after = self._check(path, before, tally, slots)
                tally.sealed += [(len(before), len(after))] * died
                before = after
        if scenario.tends == "compact":
            # It waits for a store, and every writer may have died before it had made one.
            StoreWriter(path, HEADER).close()
        self._wait(slots)
        self._reap(slots, tally, grow)
        grow(256 << 20)
        self._finish(path, tally)

    def _damaged_store(self, scenario: Scenario, path: Path, tally: Tally, kills: int) -> None:
        """Kill repairs of a damaged store; in the end it must be what a repair makes of it that nothing interrupts."""
        write(path, self.rows, HEADER, batch=5)
        self._damage(path)
        control = self._path()
        shutil.copytree(path, control)
        repair_store(control, progress=False)
        kept, end = sorted(open_store(control).ids), tally.kills + kills
        wanted = {row.id: row for row in self.rows}
        while tally.kills < end:
            slots = [Slot((), "repair")]
            self._one_round(scenario, path, tally, slots)
            self._wait(slots)
            if not self._reap(slots, tally, lambda _: None):
                break
            tally.where["in a repair"] = tally.where.get("in a repair", 0) + 1
        repair_store(path, progress=False)
        store = open_store(path)
        tally.problems += [f"after repair: {problem}" for problem in verify_store(path, progress=False)]
        if sorted(store.ids) != kept:
            tally.problems.append(f"after repair: {len(store)} rows, and {len(kept)} without a kill")
        tally.problems += [f"after repair: {i} differs" for i in store.ids if not equal(store.row(i), wanted[i])]
        shutil.rmtree(control)
        self._finish(path, tally)

    def _damage(self, path: Path) -> None:
        """Do to a few shards, tables and lines what disks and people do."""
        numbers = self.pick.sample(sorted(int(file.stem) for file in (path / SHARDS).iterdir()), 6)
        shards = [path / SHARDS / f"{number:06d}.safetensors" for number in numbers]
        tables = [path / ROWS / f"{number:06d}.parquet" for number in numbers]
        for shard in shards[:2]:
            with shard.open("r+b") as stream:
                stream.seek(self.pick.randrange(shard.stat().st_size))
                stream.write(b"\x55\xaa")
        shards[2].write_bytes(shards[2].read_bytes()[:-1])
        shards[3].unlink()
        tables[4].unlink()
        lines = (path / MANIFEST_FILE).read_bytes().splitlines(keepends=True)
        lines[self.pick.randrange(len(lines))] = b'{"line_sha256":"0"}\n'
        (path / MANIFEST_FILE).write_bytes(b"".join(lines))

    def _one_round(self, scenario: Scenario, path: Path, tally: Tally, slots: Sequence[Slot]) -> None:
        """Have somebody at work in each place, wait for a moment, and kill one or all of them."""
        for slot in slots:
            if not slot.done and not slot.alive:
                tally.resumes += (path / STORE_FILE).exists()
                self._start(scenario, path, slot)
        alive = [slot for slot in slots if slot.alive]
        if scenario.calls:
            wait([slot.process.sentinel for slot in alive], timeout=self.lifetime)
        else:
            # Most kills fall early in a life, so that many fall on one store.
            time.sleep(self.pick.expovariate(3 / self.lifetime))
        victims = alive if self.pick.random() < 0.4 else self.pick.sample(alive, min(1, len(alive)))
        for slot in victims if not scenario.calls or self.pick.random() < 0.3 else []:
            slot.process.kill()
            slot.process.join()

    def _slots(self, scenario: Scenario) -> list[Slot]:
        """Overlapping parts of all rows, and who tends the store."""
        count, n = len(self.rows), scenario.writers
        order = list(range(count))
        self.pick.shuffle(order)
        tending = [Slot((), scenario.tends)] if scenario.tends else []
        if n == 1:
            return [Slot(order), *tending]
        return [Slot(order[count * i // (n + 1) : count * (i + 2) // (n + 1)]) for i in range(n)] + tending

    def _start(self, scenario: Scenario, path: Path, slot: Slot) -> None:
        pick, started = self.pick, self._path()
        rows = list(slot.rows)
        if pick.random() < 0.5:
            pick.shuffle(rows)
        life = Life(
            store=path,
            rows_file=self.rows_file,
            rows=rows,
            batch=pick.choice((1, 2, 5, 16)),
            shard_bytes=pick.choice((1, 1 << 18, 2 << 20, 16 << 20)),
            waits=pick.random() < 0.5,
            links=scenario.links,
            # A repair makes few calls.
            dies_at=(pick.choice(DEADLY), int(2 ** pick.uniform(0, 2 if slot.tends == "repair" else 5)))
            if scenario.calls
            else None,
            faults=scenario.faults,
            patience=2 if scenario.small else 60,
            seed=pick.getrandbits(32),
            tends=slot.tends,
            sources=self.sources,
        )
        slot.process = self.processes.Process(target=live, args=(life, started))
        slot.process.start()
        while not started.exists() and slot.process.is_alive():
            time.sleep(0.001)

    def _wait(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            if slot.process is not None:
                slot.process.join()

    def _reap(self, slots: Iterable[Slot], tally: Tally, grow: Callable[[int], None]) -> int:
        """Take note of processes that ended; return how many were killed."""
        died = 0
        for slot in slots:
            process = slot.process
            if process is None or process.is_alive():
                continue
            process.join()
            slot.process = None
            if process.exitcode == KILLED:
                died += 1
            elif process.exitcode == GAVE_UP:
                tally.gave_up += 1
                grow(1 << 20)
            elif process.exitcode == 0:
                slot.done = True
            else:
                tally.problems.append(
                    f"a {slot.tends or 'write'} ended with exit code {process.exitcode}; its traceback is above"
                )
                slot.done = True
        tally.kills += died
        return died

    def _check(self, path: Path, before: frozenset[str], tally: Tally, slots: Sequence[Slot]) -> frozenset[str]:
        """Judge a store as killed processes left it, others perhaps at work; return the ids of its sealed rows."""
        place = whereabouts(path)
        tally.where[place] = tally.where.get(place, 0) + 1
        if not (path / STORE_FILE).exists():
            return before
        busy = any(slot.alive for slot in slots)
        if busy and any(slot.tends for slot in slots):
            # Files go under our hands; the readers look, again when they must, and the end will be judged.
            return before
        sealed = frozenset(open_store(path).ids)
        if lost := before - sealed:
            tally.problems.append(f"{len(lost)} sealed rows are gone")
        tally.problems += [
            f"after a kill{' while others write' if busy else ''}: {problem}"
            for problem in verify_store(path, progress=False)
            if "published but not sealed" not in problem.what
        ]
        return sealed

    def _finish(self, path: Path, tally: Tally) -> None:
        """Resume to the end, and compare with the run that nothing interrupted."""
        slot = Slot(range(len(self.rows)))
        self._start(Scenario("calm", 0.0), path, slot)
        self._wait([slot])
        tally.resumes += 1
        # Files of which some rows were sealed elsewhere go when the next writer finds all of them sealed.
        StoreWriter(path, HEADER).close()
        tally.problems += [f"at the end: {told}" for told in self.differences(path)]

    def differences(self, path: Path) -> list[str]:
        """Say in what a store differs from the reference by content, or is not sound."""
        store, reference, told = (
            open_store(path),
            self.reference,
            [str(problem) for problem in verify_store(path, progress=False)],
        )
        if sorted(store.ids) != sorted(reference.ids):
            return [*told, f"{len(store)} rows instead of {len(reference)}"]
        told += [f"{name} differs" for name in reference.ids if not equal(store.row(name), reference.row(name))]
        names = reference.table.column_names
        if not store.table.select(names).sort_by("id").equals(reference.table.sort_by("id")):
            told.append("the tables of rows differ")
        full = [row.id for row in self.rows if len(row.token_ids)]
        for layer in HEADER.layers:
            for position in (None, *HEADER.positions):
                ids = None if position is None else full
                if position and not store.layer(layer, position, ids).equal(reference.layer(layer, position, ids)):
                    told.append(f"layer {layer} at {position} differs")
                a, b = store.moments(layer, position), reference.moments(layer, position)
                near = a.mean.allclose(b.mean, atol=1e-4) and a.std.allclose(b.std, 1e-4)
                if a.count != b.count or not near:
                    told.append(f"moments of layer {layer} at {position} differ")
        left = [str(file.relative_to(path)) for file in path.rglob(".tmp-*")]
        if left or {f.stem for f in (path / SHARDS).iterdir()} != {f.stem for f in (path / ROWS).iterdir()}:
            told.append(f"files are left over: {left or 'unpaired shards or tables'}")
        return told

    @contextmanager
    def _readers(self, scenario: Scenario, path: Path, tally: Tally) -> Generator[None, None, None]:
        """Have two processes read all the time: one opens the store each time, one refreshes."""
        stop, reports, cleared = self._path(), [self._path(), self._path()], bool(scenario.tends)
        readers = [
            self.processes.Process(target=watch, args=(path, self.rows_file, stop, report, anew, cleared))
            for report, anew in zip(reports, (True, False), strict=True)
        ]
        for reader in readers:
            reader.start()
        try:
            yield
        finally:
            stop.touch()
            for reader, report in zip(readers, reports, strict=True):
                reader.join()
                if not report.exists():
                    tally.bad.append(f"a reader ended with exit code {reader.exitcode}")
                    continue
                seen = json.loads(report.read_text())
                tally.passes += seen.get("passes", 0)
                tally.rows_read += seen.get("rows", 0)
                tally.again += seen.get("again", 0)
                tally.bad += seen["bad"]
                tally.problems += [f"a reader was warned: {told}" for told in seen["warnings"]]

    def _path(self) -> Path:
        return self.folder / f"{next(self._names)}"


def main() -> int:
    """Run all scenarios, print a table, write the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.crash", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / f"crash-{date.today()}.json")
    parser.add_argument("--only", choices=[scenario.name for scenario in SCENARIOS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [scenario for scenario in SCENARIOS if args.only in (None, scenario.name)]
    total = sum(scenario.share for scenario in chosen)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), args.seed)
        tallies = []
        for scenario in chosen:
            tallies.append(soak.run(scenario, round(args.kills * scenario.share / total)))
            print(show(tallies[-1:]).splitlines()[-1], flush=True)
    wrong = [f"{t.scenario}: {what}" for t in tallies for what in (*t.bad, *t.problems)]
    print("\n" + show(tallies), *wrong[:20], sep="\n")
    print(f"{sum(t.kills for t in tallies)} kills, {sum(len(t.bad) for t in tallies)} bad reads")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(), "versions": versions(), "seed": args.seed,
        "kills": sum(t.kills for t in tallies), "rows": [asdict(t) for t in tallies],
    }  # fmt: skip
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
