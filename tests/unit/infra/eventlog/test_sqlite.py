"""What only the SQLite log has: its address, its file's troubles, its clock. The rest is in tests/contract."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.eventlog import NewRecord, sqlite_consumer, sqlite_file, sqlite_records
from infra.eventlog.open import open_log
from infra.eventlog.sqlite import TRIM_RECORDS, SqliteLog
from schemas.errors import PipelineError, Transient

A = "jobs.image.standard"
B = "jobs.text.bulk"
RESULTS = "results"
ROOT = Path(__file__).parents[4]


def new(topic: str, *keys: object, value: bytes = b"value") -> list[NewRecord]:
    return [NewRecord(topic, str(key), {}, value) for key in keys]


def kept(log: SqliteLog, topic: str) -> list[str]:
    return [record.key for record in log.read([topic], 0)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def open_sqlite(path: Path) -> Iterator[Callable[..., SqliteLog]]:
    opened: list[SqliteLog] = []

    def open_it(options: str = "") -> SqliteLog:
        log = open_log(f"sqlite://{path}{options}")
        assert isinstance(log, SqliteLog)
        opened.append(log)
        return log

    yield open_it
    for log in opened:
        log.close()


@pytest.fixture
def log(open_sqlite: Callable[..., SqliteLog]) -> SqliteLog:
    return open_sqlite()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only element."""
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    return now


@pytest.fixture
def statements() -> Callable[[sqlite3.Connection], list[str]]:
    """Lists what a connection executes from now on."""

    def trace(connection: sqlite3.Connection) -> list[str]:
        seen: list[str] = []
        connection.set_trace_callback(seen.append)
        return seen

    return trace


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://host/log.db",
        "sqlite://",
        "sqlite:///",
        "sqlite:///log.db?synchronous=off",
        "sqlite:///log.db?max_bytes=lots",
        "sqlite:///log.db?max_bytes=1024",
        "sqlite:///log.db?cache=1",
    ],
)
def test_a_wrong_address_is_refused_with_the_right_form(url: str) -> None:
    with pytest.raises(PipelineError, match="sqlite:///absolute/path") as caught:
        open_log(url)
    assert caught.value.code == "settings_invalid"
    assert url in caught.value.message


@pytest.mark.parametrize("url", ["", "/var/log.db", "nats://localhost"])
def test_an_unknown_scheme_names_those_known(url: str) -> None:
    with pytest.raises(PipelineError, match="sqlite://") as caught:
        open_log(url)
    assert caught.value.code == "settings_invalid"


def test_a_path_may_hold_any_character(tmp_path: Path) -> None:
    log = open_log(f"sqlite:///{tmp_path}/what%3F%20%25 ever.db")
    log.close()
    assert (tmp_path / "what? % ever.db").exists()


@pytest.mark.parametrize(("options", "level"), [("", 1), ("?synchronous=full", 2)])
def test_synchronous_is_set_on_every_connection(
    options: str, level: int, open_sqlite: Callable[..., SqliteLog]
) -> None:
    log = open_sqlite(options)
    consumer = log.consumer("g", [A])
    for connection in (*log._idle, consumer._connection):
        assert connection.execute("PRAGMA synchronous").fetchone() == (level,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_missing_folder_may_come_back(tmp_path: Path) -> None:
    with pytest.raises(Transient, match="folder exists") as caught:
        open_log(f"sqlite://{tmp_path}/missing/log.db")
    assert caught.value.code == "log_unavailable"


def test_a_file_that_is_no_log_is_not_worth_a_retry(path: Path) -> None:
    path.write_bytes(b"some notes of mine " * 1000)
    with pytest.raises(PipelineError, match="recover") as caught:
        open_log(f"sqlite://{path}")
    assert caught.value.code == "log_corrupt"
    assert not isinstance(caught.value, Transient)


def test_a_truncated_file_is_noticed(path: Path, open_sqlite: Callable[..., SqliteLog]) -> None:
    log = open_sqlite()
    log.append(new(A, *range(1000), value=bytes(1000)))
    log.close()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(PipelineError) as caught:
        kept(open_sqlite(), A)
    assert caught.value.code == "log_corrupt"


def test_damaged_cursors_are_not_taken_for_an_empty_group(log: SqliteLog) -> None:
    consumer = log.consumer("g", [A])
    consumer._connection.execute("UPDATE cursors SET bitmap = 'ä'")
    for attempt in (lambda: log.consumer("g", [A]), lambda: log.lag("g", [A])):
        with pytest.raises(PipelineError, match="damaged") as caught:
            attempt()
        assert caught.value.code == "log_corrupt"


def test_a_full_log_still_takes_outcomes_and_recovers_by_trimming(
    open_sqlite: Callable[..., SqliteLog],
) -> None:
    log = open_sqlite("?max_bytes=2000000")
    consumer = log.consumer("g", [A])
    accepted = 0

    def append_without_end() -> None:
        nonlocal accepted
        while True:
            log.append(new(A, *range(10), value=bytes(1000)))
            accepted += 10

    with pytest.raises(Transient, match="raise max_bytes") as caught:
        append_without_end()
    assert caught.value.code == "log_full"
    assert len(kept(log, A)) == accepted
    held = consumer.receive(10_000, 2**30)
    assert len(held) == accepted
    consumer.complete([r.position for r in held], new(RESULTS, *range(30), value=bytes(1000)))
    assert log.trim({A: 0}) == accepted
    log.append(new(A, "again", value=bytes(1000)))


def test_what_could_not_be_committed_can_be_completed_again(
    open_sqlite: Callable[..., SqliteLog],
) -> None:
    log = open_sqlite("?max_bytes=1048576")
    log.append(new(A, 1, 2))
    consumer = log.consumer("g", [A])
    first, second = (record.position for record in consumer.receive(2, 2**30))
    with pytest.raises(Transient) as caught:
        consumer.complete([first], new(RESULTS, "too large", value=bytes(2**20)))
    assert caught.value.code == "log_full"
    consumer.complete([second])
    assert consumer.lag()[A].open == 1
    consumer.complete([first], new(RESULTS, "small"))
    assert consumer.lag()[A].open == 0
    assert kept(log, RESULTS) == ["small"]


def test_a_lock_held_too_long_is_said_and_readers_do_not_mind(
    log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_S", 0.02)
    log.append(new(A, 1))
    consumer = log.consumer("g", [A])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Transient, match="locked") as caught:
        log.append(new(A, 2))
    assert caught.value.code == "log_busy"
    [record] = consumer.receive(1, 2**30)
    with pytest.raises(Transient):
        consumer.complete([record.position])
    other.close()
    log.append(new(A, 2))
    consumer.complete([record.position])
    assert kept(log, A) == ["1", "2"]


def test_a_clock_set_back_changes_no_order_and_hides_nothing(
    log: SqliteLog, clock: list[float]
) -> None:
    for at in (1000.0, 1010.0, 400.0, 1005.0):
        clock[0] = at
        log.append(new(A, f"{at:g}"))
    assert [record.key for record in log.read([A], 1004)] == ["1010", "1005"]
    consumer = log.consumer("g", [A])
    received = consumer.receive(9, 2**30)
    assert [record.key for record in received] == ["1000", "1010", "400", "1005"]
    consumer.rewind(1004)
    assert [record.key for record in consumer.receive(9, 2**30)] == [r.key for r in received]


def test_the_age_is_that_of_the_oldest_open_record(log: SqliteLog, clock: list[float]) -> None:
    for at in (1000.0, 1010.0, 1020.0):
        clock[0] = at
        log.append(new(A, at))
    clock[0] = 1030.0
    consumer = log.consumer("g", [A])
    first, second, third = (record.position for record in consumer.receive(3, 2**30))
    consumer.complete([second])
    assert consumer.lag()[A] == (2, 30)
    consumer.complete([first])
    assert consumer.lag()[A] == (1, 10)
    consumer.complete([third])
    assert consumer.lag()[A] == (0, 0)


def test_the_age_is_never_negative(log: SqliteLog, clock: list[float]) -> None:
    log.append(new(A, 1))
    clock[0] -= 600
    assert log.lag("g", [A])[A] == (1, 0)


def test_retention_is_by_age(log: SqliteLog, clock: list[float]) -> None:
    log.append(new(A, *range(2 * TRIM_RECORDS + 1), value=b""))
    clock[0] += 100
    log.append(new(A, "young"))
    assert log.trim({A: 100}) == 0
    clock[0] += 1
    assert log.trim({A: 100}) == 2 * TRIM_RECORDS + 1
    assert kept(log, A) == ["young"]


def test_one_receive_is_shared_among_the_topics(log: SqliteLog) -> None:
    log.append([*new(A, *range(500)), *new(B, *range(3)), *new(RESULTS, *range(40))])
    consumer = log.consumer("g", [A, B, RESULTS])
    topics = [record.position.topic for record in consumer.receive(60, 2**30)]
    assert [topics.count(topic) for topic in (A, B, RESULTS)] == [29, 3, 28]


def test_an_idle_receive_only_looks_whether_the_file_changed(
    log: SqliteLog, statements: Callable[[sqlite3.Connection], list[str]]
) -> None:
    consumer = log.consumer("g", [A, B])
    log.append(new(A, 1))
    assert len(consumer.receive(10, 2**30)) == 1
    seen = statements(consumer._connection)
    assert consumer.receive(10, 2**30) == []
    assert seen == ["PRAGMA data_version"]


def test_a_trim_with_nothing_old_takes_no_lock(
    log: SqliteLog, statements: Callable[[sqlite3.Connection], list[str]]
) -> None:
    log.append(new(A, 1))
    seen = statements(log._idle[-1])
    assert log.trim({A: 3600}) == 0
    assert not any(statement.startswith("BEGIN") for statement in seen)


def test_what_was_received_before_a_failure_is_handed_out(
    log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append([*new(A, "a"), *new(B, "b")])
    consumer = log.consumer("g", [A, B])

    def select_but_of_b(*arguments: object) -> object:
        if B in arguments:
            raise Transient("log_unavailable", "the disk is unwell")
        return sqlite_records.select(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sqlite_consumer, "select", select_but_of_b)
    assert [record.key for record in consumer.receive(10, 2**30)] == ["a"]
    with pytest.raises(Transient):
        consumer.receive(10, 2**30)
    monkeypatch.undo()
    assert [record.key for record in consumer.receive(10, 2**30)] == ["b"]


KILLED_AT = """
import os, signal, sys
from infra.eventlog import NewRecord
from infra.eventlog.open import open_log

log = open_log(sys.argv[1])
consumer = log.consumer("g", ["jobs.image.standard"])
held = consumer.receive(10, 2**30)
steps = iter(range(int(sys.argv[2])))
consumer._connection.set_trace_callback(
    lambda statement: next(steps, None) is None and os.kill(os.getpid(), signal.SIGKILL)
)
consumer.complete([held[1].position], [NewRecord("results", "1", {}, b"")])
"""


def test_a_kill_at_any_statement_leaves_all_of_a_completion_or_nothing(
    path: Path, open_sqlite: Callable[..., SqliteLog]
) -> None:
    log = open_sqlite()
    for step in range(20):
        log.append(new(A, 0, 1))
        before = (len(kept(log, RESULTS)), log.lag("g", [A])[A].open)
        ended = subprocess.run(
            [sys.executable, "-c", KILLED_AT, f"sqlite://{path}", str(step)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        after = (len(kept(log, RESULTS)), log.lag("g", [A])[A].open)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL
        assert after == before
    assert step >= 5
    assert after == (before[0] + 1, before[1] - 1)
