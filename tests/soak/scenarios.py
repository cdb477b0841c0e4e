"""What the crash soak plays through, and what it keeps a tally of."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scenario:
    """Who writes, on what disk, and how it dies.

    Attributes:
        share: of all kills.
        calls: writers die in the middle of a call that changes the disk, if they are not killed before.
        faults: probability that such a call fails or falls short.
        small: the disk is a small one, really full, that grows when writers gave up.
        tends: what another process does to the store meanwhile, and is killed at: compact or merge; or repair, which is
            done to a store that is damaged, without writers and readers.
    """

    name: str
    share: float
    writers: int = 1
    links: bool = True
    calls: bool = False
    faults: float = 0.0
    small: bool = False
    tends: str = ""


SCENARIOS = (
    Scenario("one writer", 0.2),
    Scenario("one writer, in mid-call", 0.1, calls=True),
    Scenario("three writers", 0.2, writers=3),
    Scenario("three writers, in mid-call", 0.1, writers=3, calls=True),
    Scenario("no hard links", 0.1, writers=3, links=False, calls=True),
    Scenario("failing disk", 0.05, writers=2, faults=0.03),
    Scenario("full disk", 0.05, small=True),
    Scenario("compacting beside a writer", 0.05, tends="compact"),
    Scenario("compacting, in mid-call", 0.05, tends="compact", calls=True),
    Scenario("merging beside a writer", 0.05, tends="merge", calls=True),
    Scenario("repairing, in mid-call", 0.05, writers=0, tends="repair", calls=True),
)


@dataclass
class Tally:
    """What happened in one scenario.

    Attributes:
        kills: processes really killed by a signal.
        resumes: processes started on a store that others had left, the last ones, which end well, included.
        gave_up: writers that ended because their disk failed too often.
        where: what the killed writers were doing, by what they left behind.
        sealed: rows sealed at the check before a kill, and after it.
        passes, rows_read: of the readers.
        again: how often a reader had to open the store anew, for files were cleared away that it was about to read.
        bad: reads that were not right.
        problems: whatever else was not right.
    """

    scenario: str
    stores: int = 0
    kills: int = 0
    resumes: int = 0
    gave_up: int = 0
    where: dict[str, int] = field(default_factory=dict)
    sealed: list[tuple[int, int]] = field(default_factory=list)
    passes: int = 0
    rows_read: int = 0
    again: int = 0
    bad: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    skipped: str = ""


def show(tallies: Sequence[Tally]) -> str:
    """Return the tallies as a table."""
    lines = [
        "| scenario | stores | kills | resumes | gave up | rows sealed at a kill | where the kills fell "
        "| reads | bad reads | problems | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for t in tallies:
        if t.skipped:
            lines.append(f"| {t.scenario} | left out: {t.skipped} |" + " |" * 9)
            continue
        grown = sum(after > before for before, after in t.sealed)
        sealed = sorted(after for _, after in t.sealed)
        span = f"{sealed[0]} to {sealed[-1]}, median {sealed[len(sealed) // 2]}; grew {grown} times" if sealed else ""
        where = ", ".join(f"{what} {count}" for what, count in Counter(t.where).most_common())
        lines.append(
            f"| {t.scenario} | {t.stores} | {t.kills} | {t.resumes} | {t.gave_up} | {span} | {where} "
            f"| {t.rows_read:,} in {t.passes:,} passes | {len(t.bad)} | {len(t.problems)} | {t.seconds:.0f} |"
        )
    return "\n".join(lines)
