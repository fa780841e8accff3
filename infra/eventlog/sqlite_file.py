"""The file under the embedded log: its tables, connections and transactions, and what its errors mean.

Every connection is in WAL mode: readers never wait for the writer, one writer at a time.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from schemas.errors import PipelineError, Transient
from schemas.topics import TOPICS

Synchronous = Literal["normal", "full"]

BUSY_S = 5.0
"""How long to wait for another process's transaction."""

OUTCOME_RESERVE = 16
"""One part in this many of the file is kept from `append`: a log full of jobs can still be answered."""

GROUPS_TABLE = """
CREATE TABLE IF NOT EXISTS groups(
    grp TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID"""

CURSORS_TABLE = """
CREATE TABLE IF NOT EXISTS cursors(
    grp TEXT, topic TEXT, next INTEGER NOT NULL, bitmap TEXT NOT NULL,
    PRIMARY KEY (grp, topic)) WITHOUT ROWID"""

TOPIC_TABLE = """
CREATE TABLE IF NOT EXISTS {table}(
    offset INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL,
    key TEXT NOT NULL, headers BLOB NOT NULL, value BLOB NOT NULL)"""


def table_name(topic: str) -> str:
    return f"topic:{topic}"


class SqliteFile:
    """One database file. synchronous: `full` survives a power cut, `normal` the death of any process."""

    def __init__(self, path: Path, synchronous: Synchronous, max_bytes: int) -> None:
        self.path = path
        self._synchronous = synchronous
        self._max_bytes = max_bytes

    def prepare(self, connection: sqlite3.Connection) -> None:
        """Create the tables that the file has not got yet."""
        wanted = {table_name(topic.name) for topic in TOPICS} | {"cursors", "groups"}
        with self.errors():
            rows = self.query(connection, "SELECT name FROM sqlite_master WHERE type = 'table'")
            missing = wanted - {name for (name,) in rows}
        if not missing:
            return
        with self.transaction(connection):
            connection.execute(GROUPS_TABLE)
            connection.execute(CURSORS_TABLE)
            for topic in TOPICS:
                name = table_name(topic.name)
                connection.execute(TOPIC_TABLE.format(table=f'"{name}"'))
                connection.execute(f'CREATE INDEX IF NOT EXISTS "{name}:time" ON "{name}"(time)')

    def connect(self, *, for_outcomes: bool = False) -> sqlite3.Connection:
        """A connection for one thread at a time. for_outcomes: may fill the file to the last page."""
        with self.errors():
            connection = sqlite3.connect(
                self.path,
                timeout=0,  # waiting is done in `_patiently`
                isolation_level=None,
                check_same_thread=False,
                cached_statements=256,
            )
            try:
                self._configure(connection, for_outcomes)
            except BaseException:
                connection.close()
                raise
        return connection

    def _configure(self, connection: sqlite3.Connection, for_outcomes: bool) -> None:
        (mode,) = self.query(connection, "PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise PipelineError(
                "log_unsupported",
                f"The event log {self.path} needs a file system that can share memory between "
                f"processes (SQLite's WAL mode), and this one cannot: put it on a local disk.",
            )
        (page_bytes,) = self.query(connection, "PRAGMA page_size").fetchone()
        pages = self._max_bytes // page_bytes
        if not for_outcomes:
            pages -= pages // OUTCOME_RESERVE
        self.query(connection, f"PRAGMA max_page_count = {pages}")
        self.query(connection, f"PRAGMA synchronous = {self._synchronous}")
        self.query(connection, "PRAGMA secure_delete = OFF")  # trimming would rewrite every page

    @contextmanager
    def transaction(self, connection: sqlite3.Connection) -> Iterator[None]:
        """The write lock is held inside: all of the block is written, or nothing."""
        with self.errors(), self._between(connection, "BEGIN IMMEDIATE"):
            yield

    @contextmanager
    def snapshot(self, connection: sqlite3.Connection) -> Iterator[None]:
        """All reads inside see the file as it was at the first. Keep it short: the WAL grows meanwhile."""
        with self.errors(), self._between(connection, "BEGIN"):
            yield

    @contextmanager
    def _between(self, connection: sqlite3.Connection, begin: str) -> Iterator[None]:
        self.query(connection, begin)
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite may have rolled back by itself
                connection.execute("ROLLBACK")
            raise

    def query(
        self, connection: sqlite3.Connection, sql: str, values: tuple[object, ...] = ()
    ) -> sqlite3.Cursor:
        """Execute, waiting for a lock another connection holds. Its cursor is still to be read."""
        return _patiently(lambda: connection.execute(sql, values))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Translates what SQLite raises."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            translated = self._translate(error)
            if translated is None:
                raise
            raise translated from error

    def _translate(self, error: sqlite3.DatabaseError) -> PipelineError | None:
        """None for what is a bug of ours."""
        match _primary_code(error):
            case sqlite3.SQLITE_FULL:
                return Transient(
                    "log_full",
                    f"The event log {self.path} is full: free disk space, raise max_bytes "
                    f"(now {self._max_bytes}), or shorten the retention.",
                )
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return Transient(
                    "log_busy",
                    f"The event log {self.path} was locked for more than {BUSY_S:g} s: find the "
                    f"process that holds it (a stopped one, a backup, an SQLite shell).",
                )
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return PipelineError(
                    "log_corrupt",
                    f"The event log {self.path} is damaged ({error}): stop everything that uses "
                    f"it, keep a copy, and rebuild it with `sqlite3 {self.path} .recover`.",
                )
        if isinstance(error, sqlite3.OperationalError):
            return Transient(
                "log_unavailable",
                f"The event log {self.path} cannot be used ({error}): check that its folder "
                f"exists and is writable, and that the disk is well.",
            )
        return None


def _patiently(step: Callable[[], sqlite3.Cursor]) -> sqlite3.Cursor:
    """Try again while the file is locked. SQLite's own waiting backs off to 100 ms and so loses
    every race against a process that appends in a tight loop; short naps do not."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            return step()
        except sqlite3.OperationalError as error:
            if _primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.0002, 0.001))


def _primary_code(error: sqlite3.Error) -> int:
    """SQLite's result code without its extension; 0 where the module itself raised."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
