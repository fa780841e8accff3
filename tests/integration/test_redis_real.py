"""A Redis of one's own under the whole stack: passwords, TLS, two servers, connections that are cut, a server that
stands still."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import redis

from infra.fleet import Fleet, SlotToken, WorkerBeat
from infra.job_view import _MARKS as MARKS
from infra.job_view import LEFT, JobView
from schemas.batches import Batch
from tests.servers.redis import RedisServer, TlsFiles, redis_server, tls_before

if TYPE_CHECKING:
    from producers.client import Client
    from tests.conftest import Stack

LONG = os.environ.get("HEADRACE_FAULTS") == "long"
KILLS = 100 if LONG else 20
FREEZES_S = (12.0, 15.0) if LONG else (1.5,)
"""Connections time out after 10 s."""

pytestmark = pytest.mark.timeout(600)


class Watched:
    """A stack on servers of its own, and a client of it."""

    def __init__(self, stack: Stack, client: Client, servers: list[RedisServer]) -> None:
        self.stack = stack
        self.client = client
        self.servers = servers

    def connection(self, server: int = 0) -> Any:
        return redis.Redis.from_url(self.servers[server].url)

    def submit(self, count: int) -> list[str]:
        """Each job is a batch of its own: so many tasks for Celery."""
        work = json.dumps({"sleep_s": 0.002}).encode()
        return [job.id for job in self.client.submit_many("single", [work] * count)]


@pytest.fixture(scope="module")
def run(
    make_stack: Callable[..., Stack], small_bundles: list[Path]
) -> Callable[..., AbstractContextManager[Watched]]:
    """`run(servers, REDIS_URL=...)`: a stack with these settings, and a client with the same."""

    @contextmanager
    def running(servers: list[RedisServer], **settings: str) -> Iterator[Watched]:
        stack = make_stack(DISPATCHER__LEASE_S=2, **settings)
        stack.headrace("models", "add", small_bundles[-1])
        stack.up()
        with pytest.MonkeyPatch.context() as environment:
            for name, value in settings.items():
                environment.setenv(f"HEADRACE_{name}", value)
            yield Watched(stack, stack.client(), servers)
        stack.down()

    return running


@pytest.fixture(scope="module")
def watched(run: Callable[..., AbstractContextManager[Watched]]) -> Iterator[Watched]:
    """On one server that keeps its data, as deployments should have it."""
    with redis_server(persistent=True) as server, run([server], REDIS_URL=server.url) as running:
        yield running


def once_each(watched: Watched, job_ids: list[str]) -> None:
    """All of them end, and nothing of theirs is there twice."""
    statuses = Counter(o.status for o in watched.client.outcomes(job_ids, timeout_s=120))
    assert statuses == {"succeeded": len(job_ids)}
    results = Counter(record.key for record in watched.stack.records("results"))
    assert {results[job_id] for job_id in job_ids} == {1}


def test_broker_and_view_on_two_servers_with_passwords_over_tls(
    run: Callable[..., AbstractContextManager[Watched]], tmp_path: Path
) -> None:
    files = TlsFiles(tmp_path)
    tls = {name.removeprefix("HEADRACE_"): value for name, value in files.environment.items()}
    with (
        redis_server() as broker,
        redis_server() as view,
        tls_before(broker, files) as broker_url,
        tls_before(view, files) as view_url,
        run([broker, view], REDIS_URL=broker_url, VIEW_URL=view_url, **tls) as watched,
    ):
        jobs = watched.submit(20)
        once_each(watched, jobs)

        with watched.connection(0) as on_broker, watched.connection(1) as on_view:
            assert on_view.exists(*[f"headrace:job:{job}" for job in jobs]) == len(jobs)
            assert on_broker.keys("headrace:job:*") == []
            assert on_broker.exists("headrace:worker:worker-0")
            assert on_view.keys("headrace:worker:*") == []
        for password in (broker.password, view.password):
            assert password not in shown(watched.stack)


def shown(stack: Stack) -> str:
    """All that people and other processes get to see of it."""
    assert stack.state is not None
    pids = [stack.state.pid, *(child.pid for child in stack.state.children)]
    said = [" ".join(psutil.Process(pid).cmdline()) for pid in pids]
    for command in ("status", "doctor"):
        for options in ((), ("--json",)):
            done = stack.headrace(command, *options)
            said += [done.stdout, done.stderr]
    said += [path.read_text() for path in (stack.data / "logs").iterdir()]
    said += [path.read_text() for path in (stack.data / "run").iterdir()]
    assert all(said[: len(pids)])
    return "\n".join(said)


def test_cut_connections_hang_nobody(watched: Watched) -> None:
    """Mostly those that are not waiting for work: a worker that loses that one begins anew, which heals all."""
    jobs = watched.submit(100)
    cut = 0
    with watched.connection() as admin:
        for number in range(KILLS):
            jobs += watched.submit(20)
            time.sleep(random.uniform(0, 0.05))  # anywhere in what they are doing
            for client in admin.client_list():
                if client["cmd"] != "brpop" or number % 10 == 9:
                    cut += admin.client_kill_filter(_id=client["id"], skipme=True)
    assert cut >= KILLS
    once_each(watched, jobs)
    nobody_had_to_die(watched)


@pytest.mark.parametrize("seconds", FREEZES_S)
def test_a_server_that_stands_still_hangs_nobody(watched: Watched, seconds: float) -> None:
    jobs = watched.submit(200)
    next(watched.client.outcomes(jobs))

    with standing_still(watched.servers[0].process.pid):
        jobs += watched.submit(50)
        time.sleep(seconds)

    once_each(watched, jobs)
    nobody_had_to_die(watched)


def test_a_server_that_keeps_its_data_is_killed_and_comes_back(watched: Watched) -> None:
    jobs = watched.submit(200)
    next(watched.client.outcomes(jobs))

    watched.servers[0].process.kill()
    jobs += watched.submit(20)
    watched.servers[0].process.start()

    once_each(watched, jobs)
    nobody_had_to_die(watched)


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def nobody_had_to_die(watched: Watched) -> None:
    """It was not a supervisor's restart that made it go on."""
    stack = watched.stack
    assert [stack.restarts(child) for child in ("dispatcher", "worker-0")] == [0, 0]


def test_a_view_that_lost_the_latest_it_was_told_is_not_taken_for_complete() -> None:
    """As after a failover to a replica that lagged, or a file of which the end is missing."""
    with redis_server() as server, redis.Redis.from_url(server.url) as connection:
        mine, other = JobView(connection, 0), JobView(connection, 1)
        mine.rebuild_from(1.0)
        other.rebuild_from(1.0)
        assert mine.ended([], 60, 2.0)
        before: Any = connection.hgetall(MARKS)
        assert mine.ended([], 60, 3.0)

        connection.hset(MARKS, mapping=before)

        assert not mine.ended([], 60, 4.0)
        assert mine.marks() == {0: 2.0, 1: 1.0}
        assert other.ended([], 60, 5.0)
        assert mine.move_marks([0, 1], 6.0)
        assert mine.marks() == {0: 6.0, 1: 5.0}
        assert mine.ended([], 60, 7.0)


def test_who_signs_off_last_leaves_its_mark_and_whoever_stays_is_not_held_back_by_it() -> None:
    with redis_server() as server, redis.Redis.from_url(server.url) as connection:
        mine, other = JobView(connection, 0), JobView(connection, 1)
        for view in (mine, other):
            view.rebuild_from(1.0)
        assert mine.ended([], 60, 2.0)
        mine.sign_off()
        assert other.ended([], 60, 3.0)
        assert other.marks() == {1: 3.0}

        other.sign_off()
        assert JobView(connection, 0).marks() == {LEFT: 3.0}

        connection.delete(MARKS)
        mine.sign_off()
        assert mine.marks() == {}


def test_a_slot_is_exchanged_for_one_of_a_wanted_worker_or_kept() -> None:
    with redis_server() as server, redis.Redis.from_url(server.url) as connection:
        fleet = Fleet(connection)
        mine, theirs = (SlotToken(worker, "life", 1, "any") for worker in ("a", "b"))
        fleet.offer(theirs)

        assert fleet.exchange(mine, ["c"]) == mine
        assert fleet.exchange(mine, ["b", "c"]) == theirs
        assert fleet.offered([mine, theirs]) == [True, False]


def test_workers_are_those_that_gave_a_sign_of_life() -> None:
    with redis_server() as server, redis.Redis.from_url(server.url) as connection:
        fleet = Fleet(connection)
        beat = WorkerBeat(
            worker="w", life="l", pid=1, started_at=0.0, ready=True, draining=False, slots=1,
            batches=[], engines=["m/1"], memory_bytes=0, jobs_done=0,
        )  # fmt: skip
        fleet.beat(beat, [], 1000)
        assert fleet.workers() == [beat]

        connection.delete("headrace:worker:w")

        assert fleet.workers() == []
        assert connection.smembers("headrace:workers") == set()


def test_a_lease_begins_anew_with_the_run_of_its_batch() -> None:
    batch = Batch("b", "m", 1, 0, 60.0, 60.0, False, [])
    with redis_server() as server, redis.Redis.from_url(server.url) as connection:
        fleet = Fleet(connection)
        fleet.lease(batch, "w")
        connection.pexpire("headrace:lease:b", 1000)

        assert fleet.begin(batch)

        assert connection.pttl("headrace:lease:b") > 1000
        connection.delete("headrace:lease:b")
        assert not fleet.begin(batch)
