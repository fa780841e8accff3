"""Kill anything at any time: accepted jobs end exactly once, and nobody pays for another's death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from schemas.errors import Transient

if TYPE_CHECKING:
    from producers.client import Client
    from tests.conftest import Stack

pytestmark = pytest.mark.timeout(900)

Audit = Callable[..., dict[str, Any]]
JOBS = 1000


def order(**words: Any) -> bytes:
    return json.dumps(words).encode()


def all_once(found: dict[str, Any]) -> None:
    """Everything accepted has ended, nothing twice, nothing is left open."""
    assert found["never_submitted"] == []
    assert found["missing"] == []
    assert found["twice"] == []
    assert found["open"] == 0


def drained(stack: Stack) -> None:
    stack.until(lambda: not stack.lag(), 60)
    stack.until(lambda: stack.healthy, 60)


# ── one process at a time ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("child", ["redis", "dispatcher", "worker-0"])
def test_a_process_killed_in_the_middle_loses_nothing_and_doubles_nothing(
    stack: Stack, client: Client, audit: Audit, factor: int, child: str
) -> None:
    jobs = client.submit_many("obey", [order(sleep_s=0.002)] * JOBS * factor)
    arriving = client.outcomes(jobs, timeout_s=300)
    for _ in range(factor):
        restarts = stack.restarts(child)
        seen = [next(arriving) for _ in range(200)]
        assert {outcome.status for outcome in seen} == {"succeeded"}
        stack.kill(child)
        stack.until_restarted(child, restarts)
        stack.until(lambda: stack.healthy)
    assert {outcome.status for outcome in arriving} == {"succeeded"}
    drained(stack)
    found = audit(stack, [job.id for job in jobs])
    all_once(found)
    assert found["statuses"] == {"succeeded": JOBS * factor}
    assert found["dead_letters"] == {}
    if child != "worker-0":
        assert set(found["attempts"].values()) == {1}  # nobody pays for these two


def test_a_worker_that_is_told_to_stop_charges_nobody(
    stack: Stack, client: Client, audit: Audit
) -> None:
    restarts = stack.restarts("worker-0")
    jobs = client.submit_many("obey", [order(sleep_s=0.002)] * JOBS)
    arriving = client.outcomes(jobs, timeout_s=120)
    for _ in range(200):
        next(arriving)
    stack.kill("worker-0", signal.SIGTERM)
    assert {outcome.status for outcome in arriving} == {"succeeded"}
    drained(stack)
    found = audit(stack, [job.id for job in jobs])
    all_once(found)
    assert stack.restarts("worker-0") == restarts + 1
    assert set(found["attempts"].values()) == {1}


def test_a_dispatcher_that_is_told_to_stop_finishes_what_is_out(
    stack: Stack, client: Client, audit: Audit
) -> None:
    mark = stack.data / "mark-drain"
    jobs = client.submit_many("obey", [order(sleep_s=0.002, mark=str(mark))] * JOBS)
    arriving = client.outcomes(jobs, timeout_s=120)
    for _ in range(200):
        next(arriving)
    stack.kill("dispatcher", signal.SIGTERM)
    assert {outcome.status for outcome in arriving} == {"succeeded"}
    drained(stack)
    all_once(audit(stack, [job.id for job in jobs]))
    assert stack.lines(mark) == JOBS  # what was out came home: nothing was run a second time


# ── poison and overrun ───────────────────────────────────────────────────────────────────────────


def in_one_batch(stack: Stack, client: Client, model: str, payloads: list[bytes]) -> list[str]:
    """Submitted while nothing can run, so that they leave together."""
    with stack.held(client):
        ids = [job.id for job in client.submit_many(model, payloads)]

        def waiting() -> int:
            beat = next(iter(client.fleet.dispatchers()), None)
            return beat.models.get(f"{model}/1", 0) if beat else 0

        stack.until(lambda: waiting() == len(payloads))
    return ids


def test_poison_in_a_batch_of_32_ends_as_one_dead_letter(
    stack: Stack, client: Client, audit: Audit
) -> None:
    mark = stack.data / "mark-poison"
    poison = order(mark=str(mark), exit=9)
    payloads = [order(number=i) for i in range(31)]
    ids = in_one_batch(stack, client, "obey", [*payloads[:13], poison, *payloads[13:]])
    ends = {outcome.job_id: outcome for outcome in client.outcomes(ids, timeout_s=120)}
    drained(stack)
    found = audit(stack, ids)
    all_once(found)
    dead = ends.pop(ids[13])
    assert (dead.status, dead.code, dead.attempts) == ("failed", "worker_died", 3)
    assert found["dead_letters"] == {dead.job_id: 1}
    assert stack.lines(mark) == 3  # exactly as many attempts as the model allows
    assert {outcome.status for outcome in ends.values()} == {"succeeded"}
    numbers = [int(client.result_of(o).answer["outputs"]["y"][0]) for o in ends.values()]
    assert sorted(numbers) == list(range(31))
    (letter,) = stack.dead_letters(dead.job_id)
    assert letter.headers["x-error"] == "worker_died"
    assert letter.headers["x-attempt"] == "3"
    assert letter.value == poison


def test_a_job_that_overruns_is_ended_by_the_watchdog(
    stack: Stack, client: Client, audit: Audit
) -> None:
    mark = stack.data / "mark-overrun"
    hangs = order(mark=str(mark), wait_for=str(stack.data / "never"))
    ids = in_one_batch(stack, client, "hasty", [order(), order(), hangs, order()])
    other = client.submit("noop", np.ones(1, np.float32))
    ends = {outcome.job_id: outcome for outcome in client.outcomes(ids, timeout_s=120)}
    assert other.wait(60).status == "succeeded"
    drained(stack)
    all_once(audit(stack, ids))
    dead = ends.pop(ids[2])
    assert (dead.status, dead.code, dead.attempts) == ("failed", "worker_died", 2)
    assert "overran 1 s" in (dead.message or "")
    assert stack.lines(mark) == 2
    assert {outcome.status for outcome in ends.values()} == {"succeeded"}


def test_a_long_run_within_its_time_keeps_its_lease(stack: Stack, client: Client) -> None:
    """Longer than two leases, renewed meanwhile: run once, charged once."""
    mark = stack.data / "mark-long"
    outcome = client.submit("obey", order(mark=str(mark), sleep_s=5)).wait(60)
    assert (outcome.status, outcome.attempts) == ("succeeded", 1)
    assert stack.lines(mark) == 1


# ── everything at once ───────────────────────────────────────────────────────────────────────────


def test_a_second_up_finishes_what_a_killed_stack_left_open(
    stack: Stack, client: Client, audit: Audit
) -> None:
    jobs = client.submit_many("obey", [order(sleep_s=0.002)] * JOBS)
    arriving = client.outcomes(jobs, timeout_s=120)
    before = [next(arriving) for _ in range(200)]
    stack.kill_all()
    late = client.submit_many("noop", [np.zeros(1, np.float32)] * 50)  # the log alone takes them
    stack.up()
    drained(stack)
    found = audit(stack, [job.id for job in [*jobs, *late]])
    all_once(found)
    assert found["statuses"] == {"succeeded": JOBS + 50}
    assert {client.status(outcome.job_id).status for outcome in before} == {"succeeded"}
    assert {outcome.status for outcome in client.outcomes(late)} == {"succeeded"}


def test_a_stop_keeps_what_waits_for_the_next_up(
    stack: Stack, client: Client, audit: Audit
) -> None:
    jobs = client.submit_many("obey", [order(sleep_s=0.004)] * JOBS)
    arriving = client.outcomes(jobs, timeout_s=120)
    for _ in range(100):
        next(arriving)
    stack.stop()
    left = sum(lag.open for lag in stack.lag().values())
    assert 0 < left < JOBS
    stack.up()
    drained(stack)
    found = audit(stack, [job.id for job in jobs])
    all_once(found)
    assert set(found["attempts"].values()) == {1}


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of its own. Where that may not be had (it takes root) the test says so."""
    folder = Path(tempfile.mkdtemp(prefix="hr-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip(
            "mounting a small file system takes root; on a CI machine it must not be missing"
        )
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
    folder.rmdir()


def fill(folder: Path) -> Path:
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast


def submitted_until_refused(client: Client, accepted: list[str]) -> Transient:
    for _ in range(2000):
        try:
            accepted.append(client.submit("noop", np.ones(500, np.float32)).id)
        except Transient as refused:
            return refused
    raise AssertionError("a full disk took 2,000 jobs")


def test_a_full_disk_refuses_new_jobs_and_loses_none_that_it_took(
    small_disk: Path, new_stack: Callable[..., Stack], audit: Audit
) -> None:
    """Jobs run while the disk is full too: their outcomes come when there is room, each once."""
    stack = new_stack(small_disk / "d")
    client = stack.client()
    with stack.held(client):
        payloads = [np.full(1000, i, np.float32) for i in range(500)]
        accepted = [job.id for job in client.submit_many("noop", payloads)]
        ballast = fill(small_disk)
        assert submitted_until_refused(client, accepted).code in {"log_full", "log_unavailable"}
        with pytest.raises(Transient) as too_large:
            client.submit("noop", np.ones(500_000, np.float32))
        assert too_large.value.code == "storage_full"
    stack.until(lambda: trouble(client))
    ballast.unlink()
    accepted.append(client.submit("noop", np.ones(1, np.float32)).id)
    ends = list(client.outcomes(accepted, 120))
    assert {(outcome.status, outcome.code) for outcome in ends} == {("succeeded", None)}
    drained(stack)
    all_once(audit(stack, accepted))
    stack.down()


def trouble(client: Client) -> str | None:
    beat = next(iter(client.fleet.dispatchers()), None)
    return beat.trouble if beat else None


# ── at length ────────────────────────────────────────────────────────────────────────────────────


def has_results(stack: Stack, count: int) -> bool:
    return len(stack.records("results")) >= count or not stack.lag()


@pytest.mark.skipif(os.environ.get("HEADRACE_FAULTS") != "long", reason="make test-long runs it")
def test_whatever_is_killed_whenever(stack: Stack, client: Client, audit: Audit) -> None:
    """20,000 jobs while every second or so something is killed, seeded."""
    random = np.random.default_rng(20261121)
    jobs = client.submit_many("obey", [order(sleep_s=0.002)] * 20_000)
    ids = [job.id for job in jobs]
    while stack.lag():
        child = str(random.choice(["redis", "dispatcher", "worker-0"]))
        if stack.pid(child):
            stack.kill(child, random.choice([signal.SIGKILL, signal.SIGTERM]))
        more = len(stack.records("results")) + int(random.integers(200, 2000))
        stack.until(partial(has_results, stack, more), 120)
    drained(stack)
    found = audit(stack, ids)
    all_once(found)
    assert found["statuses"].keys() <= {"succeeded", "failed"}
