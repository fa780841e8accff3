"""Archivers on a real log and a real store, in this process; at any of their calls something can happen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from infra.eventlog import EventLog, NewRecord
from infra.eventlog.open import open_log
from infra.lake import GROUP, lake_files, read_rows
from infra.objects import ObjectStore
from infra.objects.files import FileObjects
from schemas.results import Outcome, StageTimes, encode_outcome, result_headers
from schemas.topics import RESULTS
from workers.archiver.archive import Archive
from workers.archiver.loop import Archiver
from workers.archiver.segments import Limits

NOON = 1_767_268_800.0
"""2026-01-01, 12:00 UTC."""

LARGE = Limits(records=16_384, size_bytes=2**25, age_s=900)


class Killed(BaseException):
    """kill -9, as far as it can be played in one process: nothing that is ours runs after it."""


class Moments:
    """Counts the moments before and after each call to store and log; at one of them, `then` is called."""

    def __init__(self, at: int = -1, then: Callable[[], None] | None = None) -> None:
        self.count = 0
        self.at = at
        self.then = then or self.kill
        self.dead = False
        self._lock = threading.Lock()

    def kill(self) -> None:
        self.dead = True

    def pass_by(self) -> None:
        with self._lock:
            now = self.count
            self.count += 1
        if now == self.at:
            self.then()
        if self.dead:
            raise Killed

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            self.pass_by()
            answer = call(*args, **options)
            if isinstance(answer, Iterator):
                answer = list(answer)
            self.pass_by()
            return answer

        return run


class Watched:
    """An object of which some calls are moments."""

    def __init__(self, inner: Any, calls: tuple[str, ...], moments: Moments) -> None:
        self._inner = inner
        for name in calls:
            setattr(self, name, moments.around(getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def watch(objects: ObjectStore, moments: Moments) -> Any:
    return Watched(objects, ("put", "get", "delete", "list"), moments)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: ObjectStore = FileObjects(folder / "objects")
        self.clock = Clock()
        self.log = self.open_log()

    def open_log(self, name: str = "log") -> EventLog:
        return open_log(f"sqlite://{self.folder / name}.db")

    def archiver(
        self, limits: Limits = LARGE, moments: Moments | None = None, **more: Any
    ) -> Archiver:
        moments = moments or Moments()

        def join() -> Any:
            consumer = self.log.consumer(GROUP, [RESULTS], window=16_384)
            return Watched(consumer, ("complete",), moments)

        objects: Any = watch(self.objects, moments)
        more = {"memory_bytes": 2**26, "clock": self.clock} | more
        return Archiver(join, Archive(objects), limits, **more)

    def archive(self, moments: Moments | None = None) -> Archiver:
        """A whole life of an archiver, which writes all there is."""
        archiver = self.archiver(moments=moments)
        try:
            archiver.step()
            while archiver.drainable:
                archiver.step(draining=True)
        finally:
            archiver.close()
        return archiver

    def append(self, *outcomes: Outcome) -> None:
        self.log.append(
            [NewRecord(RESULTS, o.job_id, result_headers(o), encode_outcome(o)) for o in outcomes]
        )

    def append_raw(self, *values: bytes) -> None:
        self.log.append([NewRecord(RESULTS, "garbage", {}, value) for value in values])

    def files(self, tenant: str | None = None) -> list[str]:
        return sorted(file.key for file in lake_files(self.objects, tenant))

    def jobs(self) -> list[str]:
        """Of every row of the lake."""
        tables = [read_rows(self.objects, key) for key in self.files()]
        return sorted(job for t in tables if t is not None for job in t["job_id"].to_pylist())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("workers.archiver.loop.RECEIVE_S", 0)
    monkeypatch.setattr("os.fsync", lambda file: None)  # no power is cut here
    made = World(tmp_path)
    yield made
    made.log.close()


@pytest.fixture
def make_outcome() -> Callable[..., Outcome]:
    def make(job_id: str, **facts: Any) -> Outcome:
        given: dict[str, Any] = {
            "status": "succeeded",
            "tenant": "acme",
            "model": "sentiment",
            "version": 3,
            "answer": msgspec.Raw(b'{"type":"classes","label":"good"}'),
            "attempts": 1,
            "submitted_at": NOON,
            "finished_at": NOON + 1.5,
            "times": StageTimes(1.0, 2.0, 3.0, 4.0, 5.0),
            "worker": "worker-0",
            "trace_id": "a" * 32,
        }
        return Outcome(job_id=job_id, **given | facts)

    return make


@pytest.fixture
def make_outcomes(make_outcome: Callable[..., Outcome]) -> Callable[..., list[Outcome]]:
    def make(job_ids: Iterable[object], **facts: Any) -> list[Outcome]:
        return [make_outcome(str(job_id), **facts) for job_id in job_ids]

    return make


@pytest.fixture
def moments() -> type[Moments]:
    return Moments


@pytest.fixture
def killed() -> type[Killed]:
    return Killed


@pytest.fixture
def watched() -> Callable[[ObjectStore, Moments], Any]:
    return watch
