"""Archiver processes on the embedded log with files, and on Kafka with MinIO: killed, joined, erased from, asked."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import duckdb
import msgspec
import pytest
from typer.testing import CliRunner

from headrace.cli import app
from infra.embedded import announced_ready
from infra.eventlog import EventLog, NewRecord
from infra.eventlog.open import connect_log
from infra.lake import GROUP, lake_files, locate
from infra.objects import ObjectStore, connect_objects
from infra.settings import Settings, load_settings
from schemas.jobs import new_job_id
from schemas.payloads import payload_key
from schemas.results import Outcome, encode_outcome, result_headers
from schemas.topics import RESULTS
from tests.servers.kafka import fresh_topics

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("archiver_process.py")
PATIENCE_S = 40.0
NEVER = -1


class Fork:
    """An archiver process."""

    def __init__(self, pid: int, forks: Forks) -> None:
        self.pid = pid
        self._forks = forks

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._forks.code(self.pid)

    def wait(self) -> int:
        until(lambda: self.code is not None)
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def end(self) -> int:
        if self.code is None:
            os.kill(self.pid, signal.SIGTERM)
        return self.wait()


class Forks:
    """Starts archiver processes by way of archiver_process.py."""

    def __init__(self, server: subprocess.Popen[bytes]) -> None:
        assert server.stdin
        assert server.stdout
        self._orders, self._answers = server.stdin, server.stdout
        self._codes: dict[int, int] = {}

    def start(self, environment: dict[str, str], moment: int = NEVER) -> Fork:
        order = {"environment": environment, "moment": moment}
        self._orders.write(json.dumps(order).encode() + b"\n")
        while len(answer := self._answers.readline().split()) == 2:
            self._note(answer)
        return Fork(int(answer[0]), self)

    def code(self, pid: int) -> int | None:
        while select.select([self._answers], [], [], 0)[0]:
            self._note(self._answers.readline().split())
        return self._codes.get(pid)

    def _note(self, answer: list[bytes]) -> None:
        pid, code = map(int, answer)
        self._codes[pid] = code


class Place(NamedTuple):
    """Where a lake is. environment: what a process needs to find it."""

    settings: Settings
    environment: dict[str, str]
    log: EventLog
    objects: ObjectStore
    forks: Forks

    def append(self, *job_ids: str, **facts: Any) -> None:
        self.log.append(
            [
                NewRecord(RESULTS, outcome.job_id, result_headers(outcome), encode_outcome(outcome))
                for outcome in (outcome_of(job_id, **facts) for job_id in job_ids)
            ]
        )

    def append_garbage(self) -> None:
        self.log.append([NewRecord(RESULTS, "garbage", {}, b"\xff garbage")])

    @property
    def open(self) -> int:
        return self.log.lag(GROUP, [RESULTS])[RESULTS].open

    def files(self) -> dict[str, bytes]:
        """Every file of rows, by its key."""
        keys = [file.key for file in lake_files(self.objects)]
        return {key: self.objects.get(key, max_bytes=2**26) for key in keys}

    def rows(self, columns: str) -> list[tuple[Any, ...]]:
        """Of the whole lake, in order, as DuckDB reads them from copies of the files."""
        with TemporaryDirectory(dir=self.settings.data_dir) as folder:
            for key, data in self.files().items():
                copy = Path(folder) / key
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(data)
            files = f"read_parquet('{folder}/lake/**/*.parquet')"
            return duckdb.sql(f"SELECT {columns} FROM {files} ORDER BY ALL").fetchall()

    @contextmanager
    def archiver(self, **more: object) -> Iterator[Fork]:
        own = {f"HEADRACE_{name}": str(value) for name, value in more.items()}
        fork = self.forks.start(self.environment | own)
        try:
            until(lambda: announced_ready(self.settings, "archiver", fork.pid))
            yield fork
        finally:
            fork.kill()


def headrace(*arguments: str, code: int = 0) -> Any:
    """What a command prints as JSON, or on stderr if it fails."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if not code else done.stderr


def outcome_of(job_id: str, **facts: Any) -> Outcome:
    now = time.time()
    given: dict[str, Any] = {
        "status": "succeeded",
        "tenant": "acme",
        "model": "sentiment",
        "version": 1,
        "answer": msgspec.Raw(b'{"type":"label","label":"good","probability":0.5}'),
        "submitted_at": now,
        "finished_at": now + 0.5,
    }
    return Outcome(job_id=job_id, **given | facts)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s in vain"
        time.sleep(0.05)  # to ask Kafka costs as much as the archivers do


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        bufsize=0,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        yield Forks(server)


@pytest.fixture(params=["files", "servers"])
def place(
    request: pytest.FixtureRequest, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A log and an object store that nobody has used."""
    own = {"HEADRACE_DATA_DIR": str(tmp_path), "HEADRACE_ARCHIVER__FILE_AGE_S": "0.000001"}
    with ExitStack() as made:
        if request.param != "files":
            partitions = 2 if request.param == "partitioned" else 1
            broker, s3 = request.getfixturevalue("broker"), request.getfixturevalue("s3")
            own |= s3.environment
            own["HEADRACE_LOG_URL"] = made.enter_context(
                fresh_topics(broker.url, [RESULTS], partitions)
            )
            own["HEADRACE_OBJECTS_URL"] = s3.url(made.enter_context(s3.bucket()))
            own["HEADRACE_S3__CACHE_DIR"] = str(tmp_path / "cache")
            own["HEADRACE_KAFKA__SESSION_TIMEOUT_S"] = "6"
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        settings = load_settings()
        log = made.enter_context(closing(connect_log(settings)))
        yield Place(settings, own, log, connect_objects(settings), forks)


def test_killed_at_every_write_it_writes_the_same_again(place: Place) -> None:
    """With garbage in between, and more to write for each life."""
    expected: list[tuple[str, str]] = []
    written: dict[str, bytes] = {}
    for moment in range(100):
        for tenant in ("acme", "other"):
            mine = [new_job_id(tenant) for _ in range(3)]
            place.append(*mine, tenant=tenant)
            place.append_garbage()
            expected += ((job_id, tenant) for job_id in mine)
        fork = place.forks.start(place.environment, moment)
        until(lambda fork=fork: fork.code is not None or not place.open)  # type: ignore[misc]
        code = fork.end()
        files = place.files()
        assert written.items() <= files.items()
        written = files
        if code != -signal.SIGKILL:
            break
    assert code == 0
    assert moment >= 8  # a claim, two files, an entry in the index, and the completion
    assert place.open == 0
    assert place.rows("job_id, tenant") == sorted(expected)
    assert all(len(locate(place.objects, job_id)) == 1 for job_id, _ in expected[::7])


def test_an_old_job_is_shown_queried_erased_and_pruned(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    month_s = 30 * 86_400
    old = {"submitted_at": time.time() - month_s, "finished_at": time.time() - month_s + 5}
    first, second, third = (new_job_id("acme", key) for key in ("1", "2", "3"))
    place.append(first, second, **old)
    place.append(third, tenant="other")
    place.objects.put(payload_key("acme", second, "0123abcd"), b"payload")
    with place.archiver() as fork:
        until(lambda: not place.open)
        assert fork.end() == 0
    held = headrace("lake", "show")
    assert [(one["tenant"], one["model"]) for one in held] == [
        ("acme", "sentiment"),
        ("other", "sentiment"),
    ]
    assert place.rows("tenant, answer->>'label'") == [("acme", "good")] * 2 + [("other", "good")]

    # The log and the view of a younger installation know nothing of it.
    monkeypatch.setenv("HEADRACE_LOG_URL", f"sqlite://{tmp_path}/empty.db")
    shown = headrace("jobs", "show", second)
    assert (shown["status"], shown["answer"]["label"]) == ("succeeded", "good")

    planned = headrace("lake", "erase", "--job", second, "--dry-run")
    assert (planned["files"], planned["blobs"]) == (1, 1)
    headrace("lake", "erase", "--job", second, "--yes")
    headrace("lake", "erase", "--tenant", "other", "--yes")
    assert list(place.objects.list("tenants")) == []
    assert "No job" in headrace("jobs", "show", second, code=2)

    # What the log still has, or gets, of what was erased is not archived any more.
    place.append(second, **old)
    place.append(third, tenant="other", **old)
    with place.archiver():
        until(lambda: not place.open)
    assert place.rows("job_id") == [(first,)]
    assert locate(place.objects, second) == locate(place.objects, third) == set()

    assert headrace("lake", "prune")["files"] == 0
    assert headrace("lake", "prune", "--days", "31", "--dry-run")["files"] == 0
    assert headrace("lake", "prune", "--days", "29", "--yes")["files"] == 1
    assert headrace("lake", "show") == []


@pytest.mark.parametrize("place", ["partitioned"], indirect=True)
def test_archivers_come_and_go_and_each_job_is_in_the_lake_once(place: Place) -> None:
    expected: list[str] = []

    def more() -> None:
        ids = [new_job_id("acme") for _ in range(200)]
        for start in range(0, 200, 20):
            place.append(*ids[start : start + 20])
        expected.extend(ids)

    def drained_by(*forks: Fork) -> Callable[[], bool]:
        def drained() -> bool:
            assert all(fork.code is None for fork in forks)
            return not place.open

        return drained

    more()
    with place.archiver() as first:
        until(drained_by(first))
        with place.archiver(ARCHIVER__SLOT=1) as second:
            more()
            until(drained_by(first, second))
            first.kill()
            more()
            until(drained_by(second))
            with place.archiver() as third:
                more()
                until(drained_by(second, third))
                assert third.end() == 0
    assert place.rows("job_id") == [(job_id,) for job_id in sorted(expected)]


@pytest.mark.parametrize("place", ["files"], indirect=True)
def test_a_second_archiver_on_the_embedded_log_puts_the_first_out(place: Place) -> None:
    with place.archiver() as first:
        place.append("a")
        until(lambda: not place.open)
        with place.archiver() as second:
            assert first.wait() == 75
            place.append("b")
            until(lambda: not place.open)
            assert second.end() == 0
    assert place.rows("job_id") == [("a",), ("b",)]
