"""What a fault is, one run of it, and what was found."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.real.keeper import TooLate, until
from tests.faults.real.load import Load
from tests.faults.real.stack import LEASE_S, RealStack

SEED = 20261121
STUCK_S = 60.0
"""So long nothing may come out while jobs are open."""

AT_ANY_TIME = ("ahead", "twice", "malformed")
AT_THE_END = ("lost", "not_in_log", "unasked", "changed", "wrong_letters")


@dataclass(frozen=True)
class Scale:
    """repeats: how often the fault is done. jobs: at least so many are accepted meanwhile. seconds: how long
    it lasts, where it lasts."""

    repeats: int
    jobs: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Fault:
    """limit_s: within which recovery is promised. short: None where it has no short form.
    lease_s: of its stack. alone: leaves its stack otherwise than others expect it.
    unable: why it cannot be done with these servers, "" if it can."""

    number: float
    name: str
    run: Callable[[Run], None]
    long: Scale
    short: Scale | None
    limit_s: float | None
    dispatchers: int
    workers: int
    proxied: bool
    alone: bool
    lease_s: float
    unable: Callable[[Any], str]

    @property
    def id(self) -> str:
        return f"{self.number:g}-{self.run.__name__}"


FAULTS: list[Fault] = []


def fault(
    number: float,
    name: str,
    *,
    long: Scale,
    short: Scale | None = None,
    limit_s: float | None = None,
    dispatchers: int = 1,
    workers: int = 2,
    proxied: bool = False,
    alone: bool = False,
    lease_s: float = LEASE_S,
    unable: Callable[[Any], str] = lambda servers: "",
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """number: in ../shared/reference/reliability.md's list, with a decimal where one has several parts."""

    def register(run: Callable[[Run], None]) -> Callable[[Run], None]:
        FAULTS.append(
            Fault(
                number,
                name,
                run,
                long,
                short,
                limit_s,
                dispatchers,
                workers,
                proxied,
                alone,
                lease_s,
                unable,
            )
        )
        FAULTS.sort(key=lambda one: one.number)
        return run

    return register


@dataclass
class Finding:
    """recovery_s: per repetition, from the fault, or from its end, to the first new outcome.
    recomputed: runs of jobs beyond the first. breaches: promises that were not kept. slow: within no limit."""

    number: float
    name: str
    repeats: int
    limit_s: float | None = None
    jobs: int = 0
    lost: int = 0
    twice: int = 0
    recomputed: int = 0
    recovery_s: list[float] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    breaches: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_run: str = ""
    took_s: float = 0.0

    @property
    def slow(self) -> bool:
        return self.limit_s is not None and max(self.recovery_s, default=0.0) > self.limit_s

    def as_dict(self) -> dict[str, Any]:
        times = self.recovery_s
        return asdict(self) | {
            "slow": self.slow,
            "recovery_p50_s": round(statistics.median(times), 3) if times else None,
            "recovery_max_s": round(max(times), 3) if times else None,
        }


class Run:
    """One run of a fault on a stack. Faults are written in its words."""

    def __init__(self, fault: Fault, scale: Scale, stack: RealStack) -> None:
        self.stack = stack
        self.servers = stack.servers
        self.scale = scale
        self.chance = random.Random(f"{SEED}/{fault.number}")
        self.finding = Finding(fault.number, fault.name, scale.repeats, fault.limit_s)
        self._loads = 0

    # ── work ─────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def load(
        self, rate: float = 150, statuses: Sequence[str] = ("succeeded",), **options: float
    ) -> Iterator[Load]:
        """Jobs come in at this rate inside the block, and until there were enough. After it, all of them
        have ended, and the checker has been asked. statuses: as which they may end."""
        load = self._new_load()
        load.start(rate, **options)
        try:
            try:
                self.recovered(time.monotonic(), note=False)
                yield load
                load.until_accepted(self.scale.jobs)
                self._look_at_any_time(load)
            finally:
                load.stop()
            self.drained(load)
        except TooLate:
            self._judge(load, statuses)  # what is the matter, besides
            raise
        self._judge(load, statuses)

    @contextmanager
    def submitted(
        self, statuses: Sequence[str] = ("succeeded",), outcomes: int = 1
    ) -> Iterator[Load]:
        """For jobs that the fault submits itself, by `load.submit`. After the block, all have ended.
        outcomes: how many each has then, more than one where jobs are redriven."""
        load = self._new_load()
        try:
            yield load
            self.drained(load)
        except TooLate:
            self._judge(load, statuses, outcomes)
            raise
        finally:
            load.close()
        self._judge(load, statuses, outcomes)

    def _new_load(self) -> Load:
        self._loads += 1
        return Load(self.stack, f"{self.finding.number:g}-{self._loads}-{time.monotonic_ns()}")

    # ── measuring ────────────────────────────────────────────────────────────────────────────────

    def recovered(self, since: float, *, note: bool = True) -> float:
        """Wait for the first outcome after a time. Returns how long it was in coming."""
        watcher = self.stack.watcher
        until(lambda: watcher.first_after(since) is not None, STUCK_S, "an outcome")
        took_s = (watcher.first_after(since) or since) - since
        if note:
            self.finding.recovery_s.append(round(took_s, 3))
        return took_s

    def answered(self, job_ids: Sequence[str], since: float) -> None:
        """Wait until all of these have ended; counts as the time to recover."""
        watcher = self.stack.watcher
        until(lambda: not watcher.unseen(job_ids), STUCK_S, f"{len(job_ids)} outcomes")
        last = max((watcher.when(job_id) or since for job_id in job_ids), default=since)
        self.finding.recovery_s.append(round(max(0.0, last - since), 3))

    def drained(self, load: Load) -> None:
        """Wait until all that was accepted has ended, as long as anything moves."""
        watcher = self.stack.watcher
        left = load.accepted
        moved_at, count = time.monotonic(), -1
        while left := watcher.unseen(left):
            now = time.monotonic()
            if watcher.count != count:
                moved_at, count = now, watcher.count
            if now - moved_at > STUCK_S:
                raise TooLate(f"{len(left)} jobs stay open: nothing moved for {STUCK_S:g} s")
            time.sleep(0.1)

    def pause(self, most_s: float) -> None:
        """A random while, so that the fault meets the system anywhere."""
        time.sleep(self.chance.uniform(0, most_s))

    # ── judging ──────────────────────────────────────────────────────────────────────────────────

    def expect(self, kept: object, promise: str) -> None:
        if not kept:
            self.finding.breaches.append(promise)

    def note(self, text: str) -> None:
        self.finding.notes.append(text)

    def _look_at_any_time(self, load: Load) -> None:
        found = self.stack.check(load.file, live=True)
        for name in AT_ANY_TIME:
            if found.get(name):
                self.expect(False, f"{name} under way: {len(found[name])}, {found[name][:3]}")

    def _judge(self, load: Load, statuses: Sequence[str], outcomes: int = 1) -> None:
        found = self.stack.check(load.file, outcomes=outcomes)
        finding = self.finding
        finding.jobs += found["accepted"]
        finding.lost += len(found["lost"])
        finding.twice += len(found["twice"])
        finding.recomputed += load.recomputed()
        for total, counts in ((finding.statuses, "statuses"), (finding.codes, "codes")):
            for word, count in found[counts].items():
                total[word] = total.get(word, 0) + count
        for name in (*AT_ANY_TIME, *AT_THE_END):
            if found.get(name):
                self.expect(False, f"{name}: {len(found[name])}, {found[name][:3]}")
        self.expect(not found["open"], f"{found['open']} positions stay open")
        self.expect(not any(found["view"].values()), f"the view is not the log: {found['view']}")
        other = {s: n for s, n in found["statuses"].items() if s not in statuses}
        self.expect(not other, f"jobs ended as {other} {found['codes']}")


def execute(fault: Fault, scale: Scale, stack: RealStack) -> Finding:
    """Never raises for what the fault brings about."""
    run = Run(fault, scale, stack)
    began = time.monotonic()
    try:
        stack.scale(dispatchers=fault.dispatchers, workers=fault.workers)
        fault.run(run)
    except TooLate as late:
        run.expect(False, str(late))
        stack.write_stacks()
    run.finding.took_s = round(time.monotonic() - began, 1)
    return run.finding


def keep_evidence(stack: RealStack, finding: Finding, folder: Path) -> None:
    """What the processes wrote, for whoever looks into a breach."""
    home = folder / f"{finding.number:g}"
    home.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.log", "*.stacks", "jobs-*"):
        for file in stack.folder.glob(pattern):
            shutil.copy(file, home)
