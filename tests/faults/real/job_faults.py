"""Jobs that do harm, jobs run by two at once, dispatchers that come and go, and clocks that are wrong."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.faults.real.keeper import until
from tests.faults.real.load import Load
from tests.faults.real.suite import STUCK_S, Run, Scale, fault

SLOTS = 3
"""Batches that a worker holds at once: two of any lane, one more of the live ones."""

BATCH_JOBS = 32
MAX_ATTEMPTS = 3
MINUTES_10_S = 600.0


def order(**words: object) -> bytes:
    return json.dumps(
        {name: str(w) if isinstance(w, Path) else w for name, w in words.items()}
    ).encode()


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


# ── 9: dispatchers come and go ───────────────────────────────────────────────────────────────────


@fault(9, "dispatchers 1→3→1", long=Scale(20, 20_000), short=Scale(1, 600))
def dispatchers_come_and_go(run: Run) -> None:
    """Every other time those that go are killed, and come back before they are told to stop."""
    with run.load():
        for number in range(run.scale.repeats):
            for count in (2, 3):
                run.stack.scale(dispatchers=count)
                run.recovered(time.monotonic())
            run.pause(2)
            if number % 2:
                for name in ("dispatcher-1", "dispatcher-2"):
                    pid = run.stack.keeper.signal(name, signal.SIGKILL)
                    run.recovered(time.monotonic())
                    run.stack.keeper.until_ready(name, but=pid)
            for count in (2, 1):
                run.stack.scale(dispatchers=count)
                run.recovered(time.monotonic())


# ── 13: the same job with two workers ────────────────────────────────────────────────────────────


@fault(13, "the same job with two workers", long=Scale(12, 1_000), short=Scale(1, 32))
def raced(run: Run) -> None:
    """A worker is frozen until its batches are with another one; then both run them, and both report."""
    with run.submitted() as load:
        for number in range(run.scale.repeats):
            _race(run, load, number)
    races = run.finding.recomputed
    run.note(f"{races} jobs were run by two workers")
    run.expect(races >= run.scale.jobs, f"wanted {run.scale.jobs} races, there were {races}")


def _race(run: Run, load: Load, number: int) -> None:
    """All slots of both workers hold jobs that wait at a gate. It opens as the frozen worker wakes."""
    gate = run.stack.folder / f"gate-race-{number}-{time.monotonic_ns()}"
    jobs = 2 * SLOTS * BATCH_JOBS
    before = len(load.in_hand())
    ids = load.submit_marked("obey", jobs, wait_for=str(gate), tier="premium")
    # One job of each executor's part is begun with, and waits; its batch is in hand all the same.
    until(lambda: len(load.in_hand()) > before, STUCK_S, "a batch is in hand")
    time.sleep(1)
    name = f"worker-{number % 2}"
    redispatched = run.stack.beat()["redispatched"]
    run.stack.keeper.signal(name, signal.SIGSTOP)
    try:
        until(
            lambda: run.stack.beat().get("redispatched", 0) > redispatched, STUCK_S, "a lease ends"
        )
        gate.touch()
        run.pause(0.3)
    finally:
        run.stack.keeper.signal(name, signal.SIGCONT)
    run.answered(ids, time.monotonic())


# ── 15: poison ───────────────────────────────────────────────────────────────────────────────────


@fault(15, "poison in a batch of 32", long=Scale(10, 320), short=Scale(1, 32), workers=1)
def poison(run: Run) -> None:
    """Neither its neighbours nor anybody else pays for it, and it ends after exactly as many attempts as
    its model allows."""
    with run.submitted(statuses=("succeeded", "failed")) as load:
        for number in range(run.scale.repeats):
            _poison_once(run, load, number)
    total = run.finding.statuses
    failed = {"failed": run.scale.repeats}
    run.expect(
        {k: v for k, v in total.items() if k == "failed"} == failed,
        f"only poison may fail: {total}",
    )
    run.expect(
        run.finding.codes == {"worker_died": run.scale.repeats}, f"codes {run.finding.codes}"
    )


def _poison_once(run: Run, load: Load, number: int) -> None:
    mark = run.stack.folder / f"poison-{number}-{time.monotonic_ns()}"
    bad = order(mark=mark, exit=9)
    good = [order() for _ in range(BATCH_JOBS - 1)]
    place = run.chance.randrange(BATCH_JOBS)
    with ExitStack() as held:
        _hold_all_slots(run, load, held)
        at = time.monotonic()
        ids = load.submit("obey", [*good[:place], bad, *good[place:]])
        waiting = partial(run.stack.beat)
        until(
            lambda: waiting().get("models", {}).get("obey/1") == BATCH_JOBS, STUCK_S, "32 jobs wait"
        )
    run.answered(ids, at)
    run.expect(lines(mark) == MAX_ATTEMPTS, f"{lines(mark)} attempts instead of {MAX_ATTEMPTS}")


def _hold_all_slots(run: Run, load: Load, held: ExitStack) -> None:
    """Until `held` is closed, the only worker has jobs that wait at a gate in all its slots."""
    stamp = time.monotonic_ns()
    gate, marks = run.stack.folder / f"gate-{stamp}", run.stack.folder / f"held-{stamp}"
    held.callback(gate.touch)
    for taken in range(SLOTS):
        load.submit("obey", [order(mark=marks, wait_for=gate)], tier="premium")
        until(lambda n=taken: lines(marks) > n, STUCK_S, f"slot {taken} is taken")  # type: ignore[misc]


# ── 17: redrive ──────────────────────────────────────────────────────────────────────────────────


@fault(17, "redriven twice at once", long=Scale(1, 1_000), short=Scale(1, 40), alone=True)
def redriven(run: Run) -> None:
    """Two people redrive the same letters, and the dispatcher dies meanwhile: each job runs once more."""
    with run.submitted(statuses=("failed",), outcomes=2) as load:
        ids = load.submit_marked("obey", run.scale.jobs, tier="standard", fail="on purpose")
        run.answered(ids, time.monotonic())
        command = ("deadletters", "redrive", "--code", "step_failed", "--yes")
        redrives = [run.stack.headrace(*command) for _ in range(2)]
        count = run.stack.watcher.count
        until(lambda: run.stack.watcher.count > count, STUCK_S, "a redriven job has ended")
        run.stack.keeper.signal("dispatcher-0", signal.SIGKILL)
        for redrive in redrives:
            said, _ = redrive.communicate(timeout=STUCK_S)
            run.expect(not redrive.returncode, f"a redrive failed: {said[-200:]}")
        again = len(ids) + count
        until(lambda: run.stack.watcher.count >= again, STUCK_S, f"{len(ids)} second outcomes")


# ── 22: clocks ───────────────────────────────────────────────────────────────────────────────────

SKEWED = [sys.executable, "-m", "tests.faults.real.skewed_process"]


@fault(
    22, "clocks 10 minutes off, and set anew", long=Scale(3, 8_000), short=Scale(1, 500), alone=True
)
def clocks(run: Run) -> None:
    """Each process has a clock of its own, ten minutes early or late; they jump while jobs run. A worker dies
    under each setting, so that leases and retries meet it too."""
    names = ["dispatcher-0", "worker-0", "worker-1"]
    files = {name: run.stack.folder / f"clock-{name}" for name in names}
    for name, file in files.items():
        file.write_text("0")
        _start_skewed(run, name, file)
    settings = [(600, -600, 0), (-600, 600, 600), (0, 0, 0)]
    with run.load(rate=100, sleep_s=0.02) as load:
        for _ in range(run.scale.repeats):
            for setting in settings:
                for file, offset_s in zip(files.values(), setting, strict=True):
                    file.write_text(str(offset_s))
                run.recovered(time.monotonic())
                pid, at = run.stack.keeper.signal("worker-0", signal.SIGKILL), time.monotonic()
                run.answered(load.in_hand(), at)
                run.stack.keeper.until_ready("worker-0", but=pid)


@fault(
    22.1,
    "dispatchers' clocks 20 minutes apart",
    long=Scale(5, 4_000),
    short=None,
    dispatchers=2,
    alone=True,
)
def clocks_apart(run: Run) -> None:
    """What one dispatcher puts off to a time, the other one may have to let go on."""
    names = ["dispatcher-0", "dispatcher-1"]
    files = {name: run.stack.folder / f"clock-{name}" for name in names}
    for name, file in files.items():
        file.write_text("0")  # a process whose clock is off does not start
        _start_skewed(run, name, file)
    for offset, file in zip((600, -600), files.values(), strict=True):
        file.write_text(str(offset))
    with run.load(rate=100, sleep_s=0.02) as load:
        for _ in range(run.scale.repeats):
            pid, at = run.stack.keeper.signal("worker-0", signal.SIGKILL), time.monotonic()
            run.answered(load.in_hand(), at)
            run.stack.keeper.until_ready("worker-0", but=pid)


def _start_skewed(run: Run, name: str, clock: Path) -> None:
    role, _, number = name.partition("-")
    run.stack.keeper.remove(name)
    run.stack.start(role, int(number), [*SKEWED, role, str(clock)])  # type: ignore[arg-type]
    run.stack.keeper.until_ready(name)
