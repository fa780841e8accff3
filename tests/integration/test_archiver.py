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
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import msgspec
import pytest
from typer.testing import CliRunner

from headrace.cli import app
from infra.embedded import announced_ready
from infra.eventlog import EventLog, NewRecord
from infra.eventlog.open import connect_log
from infra.lake import GROUP, lake_files, locate, read_rows
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
KILLED = -signal.SIGKILL


class Place(NamedTuple):
    """Where a lake is. environment: what a process needs to find it."""

    settings: Settings
    environment: dict[str, str]
    log: EventLog
    objects: ObjectStore

    def append(self, *job_ids: str, **facts: Any) -> None:
        self.log.append(
            [
                NewRecord(RESULTS, outcome.job_id, result_headers(outcome), encode_outcome(outcome))
                for outcome in (outcome_of(job_id, **facts) for job_id in job_ids)
            ]
        )

    @property
    def open(self) -> int:
        return self.log.lag(GROUP, [RESULTS])[RESULTS].open

    def jobs(self) -> list[str]:
        """Of every row of the lake."""
        tables = [read_rows(self.objects, file.key) for file in lake_files(self.objects)]
        return sorted(job for t in tables if t is not None for job in t["job_id"].to_pylist())

    @contextmanager
    def archiver(self, **more: object) -> Iterator[subprocess.Popen[bytes]]:
        own = {f"HEADRACE_{name}": str(value) for name, value in more.items()}
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.archiver.main"],
            cwd=ROOT,
            env={**self.environment, **own},
        )
        try:
            until(lambda: announced_ready(self.settings, "archiver", process.pid))
            yield process
        finally:
            process.kill()
            process.wait()

    @contextmanager
    def mortals(self) -> Iterator[Callable[[int], int]]:
        """Called with a moment: the exit code of an archiver that is killed then, if it gets so far; else
        it is told to stop when it has nothing to do."""
        with subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            env={**self.environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as parent:
            assert parent.stdin is not None
            assert parent.stdout is not None
            stdin, stdout = parent.stdin, parent.stdout

            def live(moment: int) -> int:
                print(moment, file=stdin, flush=True)
                pid = int(stdout.readline())
                until(lambda: select.select([stdout], [], [], 0)[0] or not self.open)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                return int(stdout.readline())

            yield live
            stdin.close()


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


def copy_to(folder: Path, objects: ObjectStore) -> None:
    for info in objects.list("lake"):
        (folder / info.key).parent.mkdir(parents=True, exist_ok=True)
        (folder / info.key).write_bytes(objects.get(info.key, max_bytes=2**26))


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s in vain"
        time.sleep(0.1)  # to ask Kafka costs as much as the archivers do


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


@pytest.fixture(params=["files", "servers"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A log and an object store that nobody has used."""
    own = {"HEADRACE_DATA_DIR": str(tmp_path), "HEADRACE_ARCHIVER__FILE_AGE_S": "0.05"}
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
        yield Place(settings, {**os.environ, **own}, log, connect_objects(settings))


def test_killed_at_every_write_each_job_is_in_the_lake_once(place: Place) -> None:
    expected: list[str] = []
    with place.mortals() as live:
        for moment in range(100):
            expected += (mine := [new_job_id("acme") for _ in range(6)])
            place.append(*mine[:3])
            place.append(*mine[3:], tenant="other")
            code = live(moment)
            rows = place.jobs()
            assert len(rows) == len(set(rows))
            if code != KILLED:
                break
        assert code == 0
    assert moment >= 8  # a claim, two files, an entry in the index, and the completion
    assert place.open == 0
    assert rows == sorted(expected)
    assert all(len(locate(place.objects, job_id)) == 1 for job_id in expected[::7])


def test_garbage_is_no_obstacle(place: Place) -> None:
    place.log.append([NewRecord(RESULTS, str(n), {}, b"\xff garbage") for n in range(5)])
    place.append("a", "b")
    with place.archiver() as process:
        until(lambda: not place.open)
        end(process)
    assert place.jobs() == ["a", "b"]


def test_an_old_job_is_shown_queried_erased_and_pruned(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    month_s = 30 * 86_400
    old = {"submitted_at": time.time() - month_s, "finished_at": time.time() - month_s + 5}
    first, second, third = (new_job_id("acme", key) for key in ("1", "2", "3"))
    place.append(first, second, **old)
    place.append(third, tenant="other")
    place.objects.put(payload_key("acme", second, "0123abcd"), b"payload")
    with place.archiver() as process:
        until(lambda: not place.open)
        end(process)
    held = headrace("lake", "show")
    assert [(one["tenant"], one["model"]) for one in held] == [
        ("acme", "sentiment"),
        ("other", "sentiment"),
    ]

    copy_to(tmp_path / "copy", place.objects)
    found = duckdb.sql(
        f"SELECT tenant, count(*) FROM read_parquet('{tmp_path}/copy/lake/**/*.parquet')"
        " GROUP BY tenant ORDER BY tenant"
    ).fetchall()
    assert found == [("acme", 2), ("other", 1)]

    # The log and the view of a younger installation know nothing of it.
    monkeypatch.setenv("HEADRACE_LOG_URL", f"sqlite://{tmp_path}/empty.db")
    shown = headrace("jobs", "show", second)
    assert (shown["status"], shown["answer"]["label"]) == ("succeeded", "good")

    planned = headrace("lake", "erase", "--job", second, "--dry-run")
    assert (planned["files"], planned["blobs"]) == (1, 1)
    headrace("lake", "erase", "--job", second, "--yes")
    assert place.jobs() == sorted([first, third])
    assert list(place.objects.list("tenants")) == []
    assert "No job" in headrace("jobs", "show", second, code=2)

    assert headrace("lake", "prune")["files"] == 0
    assert headrace("lake", "prune", "--days", "29", "--dry-run")["files"] >= 1
    headrace("lake", "prune", "--days", "29")
    assert place.jobs() == [third]
    headrace("lake", "erase", "--tenant", "other", "--yes")
    assert headrace("lake", "show") == []


@pytest.mark.parametrize("place", ["partitioned"], indirect=True)
def test_archivers_come_and_go_and_each_job_is_in_the_lake_once(place: Place) -> None:
    expected: list[str] = []

    def more() -> None:
        ids = [new_job_id("acme") for _ in range(200)]
        for start in range(0, 200, 20):
            place.append(*ids[start : start + 20])
        expected.extend(ids)

    def has(process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None
        return not place.open

    more()
    with place.archiver() as first:
        until(lambda: has(first))
        with place.archiver(ARCHIVER__SLOT=1) as second:
            more()
            until(lambda: has(first) and has(second))
            first.kill()
            first.wait()
            more()
            until(lambda: has(second))
            with place.archiver() as third:
                more()
                until(lambda: has(second) and has(third))
                end(third)
    assert place.jobs() == sorted(expected)


@pytest.mark.parametrize("place", ["files"], indirect=True)
def test_a_second_archiver_on_the_embedded_log_puts_the_first_out(place: Place) -> None:
    with place.archiver() as first:
        place.append("a")
        until(lambda: not place.open)
        with place.archiver() as second:
            assert first.wait(PATIENCE_S) == 75
            place.append("b")
            until(lambda: not place.open)
            end(second)
    assert place.jobs() == ["a", "b"]
