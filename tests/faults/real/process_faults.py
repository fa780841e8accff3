"""Processes that die, stop, freeze or stall."""

from __future__ import annotations

import functools
import signal
import sys
import time

from tests.faults.real.bent_process import BENT_LINE, EXIT_BENT
from tests.faults.real.keeper import until
from tests.faults.real.servers import SERVERS
from tests.faults.real.stack import LEASE_S, SESSION_S
from tests.faults.real.suite import STUCK_S, Run, Scale, fault

BENT = [sys.executable, "-m", "tests.faults.real.bent_process"]


def kill(run: Run, name: str, signum: signal.Signals = signal.SIGKILL) -> float:
    """Returns the monotonic time of it, once there is another process that is ready."""
    pid = run.stack.keeper.signal(name, signum)
    at = time.monotonic()
    run.recovered(at)
    run.stack.keeper.until_ready(name, but=pid)
    return at


@fault(1, "everything killed once", long=Scale(1, 10_000), short=Scale(1, 2_000))
def everything_killed(run: Run) -> None:
    with run.load(rate=300) as load:
        for name in ("worker-0", "dispatcher-0"):
            kill(run, name)
        for server in SERVERS:
            run.recovered(run.servers.restart(server))
        load.crash()
        run.recovered(time.monotonic())


@fault(2, "dispatcher killed", long=Scale(50, 15_000), short=Scale(2, 1_000))
def dispatcher_killed(run: Run) -> None:
    with run.load():
        for _ in range(run.scale.repeats):
            run.pause(2)
            kill(run, "dispatcher-0")


@fault(3, "worker killed", long=Scale(100, 20_000), short=Scale(2, 1_000), limit_s=LEASE_S + 5)
def worker_killed(run: Run) -> None:
    """Until all that was in hand has its outcome. Jobs take long enough for every worker to have some."""
    with run.load(rate=100, sleep_s=0.03) as load:
        for number in range(run.scale.repeats):
            run.pause(1)
            name = f"worker-{number % 2}"
            until(load.in_hand, STUCK_S, "a job in hand")
            pid, at = run.stack.keeper.signal(name, signal.SIGKILL), time.monotonic()
            run.answered(load.in_hand(), at)
            run.stack.keeper.until_ready(name, but=pid)


@fault(10, "dispatcher frozen past its session", long=Scale(5, 4_000), short=Scale(1, 500))
def dispatcher_frozen(run: Run) -> None:
    with run.load():
        for _ in range(run.scale.repeats):
            pid = run.stack.keeper.signal("dispatcher-0", signal.SIGSTOP)
            time.sleep(1.5 * SESSION_S)
            at = time.monotonic()
            run.stack.keeper.signal("dispatcher-0", signal.SIGCONT)
            run.recovered(at)
            run.stack.keeper.until_ready("dispatcher-0", but=0)
            run.note(f"the same process: {run.stack.keeper.pid('dispatcher-0') == pid}")


@fault(10.1, "dispatcher stalled past max.poll.interval", long=Scale(3, 3_000), short=Scale(1, 300))
def dispatcher_stalled(run: Run) -> None:
    """It goes on sending heartbeats, but does not come back for records."""
    with run.load():
        for _ in range(run.scale.repeats):
            run_bent(run, "dispatcher-0", "intake.receive", "before", stall_s=12, poll_s=6)


@fault(14, "crash at every step boundary", long=Scale(3, 10_000), short=Scale(1, 1_000))
def crash_at_step(run: Run) -> None:
    steps = [
        (name, step, when)
        for name, steps in (("dispatcher-0", DISPATCHER_STEPS), ("worker-0", WORKER_STEPS))
        for step in steps
        for when in ("before", "after")
    ]
    with run.load(large=0.1):
        for _ in range(run.scale.repeats):
            run.chance.shuffle(steps)
            for name, step, when in steps[: len(steps) if run.scale.repeats > 1 else SHORT_STEPS]:
                run_bent(run, name, step, when)


DISPATCHER_STEPS = (
    "fleet.wait",
    "fleet.lease",
    "dispatcher.mailboxes.send",
    "intake.receive",
    "settlement.settle",
    "consumer.complete",
    "consumer._transactions._producer.begin_transaction",
    "consumer._transactions._producer.send_offsets_to_transaction",
    "consumer._transactions._producer.commit_transaction",
    "dispatcher.view_writer.show",
)
WORKER_STEPS = (
    "fleet.fetch",
    "fleet.begin",
    "runner._stages.run",
    "objects.put",
    "fleet.complete",
    "fleet.offer",
    "fleet.beat",
)
SHORT_STEPS = 4


def run_bent(
    run: Run, name: str, step: str, when: str, *, stall_s: float = 0, poll_s: float = 0
) -> None:
    """Let the process's next life end, or stall, at its k-th time at this step; then wait for recovery."""
    keeper = run.stack.keeper
    role = name.partition("-")[0]
    turn = run.chance.randint(1, 12)
    words = [role, step, when, str(turn), str(stall_s), str(poll_s)]
    before, bends = len(keeper.exits(name)), run.stack.output(name).count(BENT_LINE)
    keeper.start_next_with(name, [*BENT, *words])
    keeper.signal(name, signal.SIGTERM)
    if stall_s:
        said = functools.partial(run.stack.output, name)
        until(lambda: said().count(BENT_LINE) > bends, STUCK_S, f"{name} stalls {when} {step}")
        time.sleep(stall_s)
    else:
        until(
            lambda: EXIT_BENT in keeper.exits(name)[before:], STUCK_S, f"{name} ends {when} {step}"
        )
    run.recovered(time.monotonic())
    keeper.until_ready(name)


@fault(23, "rolling restart", long=Scale(10, 6_000), short=Scale(1, 600))
def rolling_restart(run: Run) -> None:
    with run.load():
        for _ in range(run.scale.repeats):
            for name in run.stack.keeper.names:
                pid = run.stack.keeper.signal(name, signal.SIGTERM)
                run.stack.keeper.until_ready(name, but=pid)
                run.recovered(time.monotonic())
    run.expect(not run.finding.recomputed, f"{run.finding.recomputed} jobs were run again")
