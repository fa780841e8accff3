"""One builder among machines that share a store of files."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.objects.files import FileObjects
from pipelines.engines.leases import BuildLease
from pipelines.engines.reach import StoreUnavailable
from schemas.errors import Transient

KEY = "engines/ab/abc/lease.json"
LONG_S = 1000.0
PATIENCE_S = 20.0


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def objects(tmp_path: Path) -> FileObjects:
    return FileObjects(tmp_path)


@pytest.fixture
def holder(objects: FileObjects) -> Iterator[BuildLease]:
    lease = BuildLease(objects, KEY, "one", LONG_S)
    assert lease.take()
    yield lease
    lease.release()


def is_there(objects: FileObjects) -> bool:
    return [info.key for info in objects.list()] == [KEY]


def until(condition: object) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < give_up_at
        threading.Event().wait(0.005)


def test_one_of_many_gets_it(objects: FileObjects) -> None:
    leases = [BuildLease(objects, KEY, f"host-{n}", LONG_S) for n in range(8)]
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(BuildLease.take, leases))
    assert taken.count(True) == 1
    leases[taken.index(True)].release()
    assert not is_there(objects)


def test_a_lease_that_stays_as_it_is_passes_to_who_has_watched_it(
    objects: FileObjects, holder: BuildLease
) -> None:
    clock = Clock()
    waiter = BuildLease(objects, KEY, "two", LONG_S, clock)
    assert not waiter.take()
    clock.now_s = LONG_S - 1
    assert not waiter.take()
    clock.now_s = LONG_S
    assert waiter.take()
    holder.release()
    assert is_there(objects), "who lost it leaves the next holder's alone"
    waiter.release()
    assert not is_there(objects)


def test_who_comes_late_watches_for_as_long(objects: FileObjects, holder: BuildLease) -> None:
    """However old it is: clocks of two machines are not compared."""
    clock = Clock()
    clock.now_s = 10 * LONG_S
    waiter = BuildLease(objects, KEY, "two", LONG_S, clock)
    assert not waiter.take()
    clock.now_s += LONG_S - 1
    assert not waiter.take()


def test_a_holder_that_lives_keeps_it(objects: FileObjects) -> None:
    holder = BuildLease(objects, KEY, "one", 0.2)
    assert holder.take()
    clock = Clock()
    waiter = BuildLease(objects, KEY, "two", 0.2, clock)
    for _ in range(3):
        assert not waiter.take()
        seen = objects.get(KEY, max_bytes=4096)
        until(lambda seen=seen: objects.get(KEY, max_bytes=4096) != seen)
        clock.now_s += 0.2
    assert not waiter.take()
    holder.release()


def test_a_store_that_hangs_is_not_waited_for_longer_than_the_lease(
    objects: FileObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = BuildLease(objects, KEY, "one", 0.05)
    assert lease.take()
    hangs, go_on = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        hangs.set()
        assert go_on.wait(PATIENCE_S)

    monkeypatch.setattr(objects, "put", hang)
    assert hangs.wait(PATIENCE_S)
    releasing = threading.Thread(target=lease.release)
    releasing.start()
    releasing.join(PATIENCE_S / 2)
    waits_on = releasing.is_alive()
    go_on.set()
    releasing.join()
    assert not waits_on


def test_a_builder_of_the_same_host_must_be_dead(objects: FileObjects, holder: BuildLease) -> None:
    """It held the lock of the key that this one holds now."""
    successor = BuildLease(objects, KEY, "one", LONG_S)
    assert successor.take()
    successor.release()


@pytest.mark.parametrize("garbage", [b"\xff garbage", b"[1]", b'{"more":' + b"[" * 4000])
def test_garbage_is_over_after_its_time(objects: FileObjects, garbage: bytes) -> None:
    objects.put(KEY, garbage)
    clock = Clock()
    lease = BuildLease(objects, KEY, "one", 30, clock)
    assert not lease.take()
    clock.now_s = 30
    assert lease.take()
    lease.release()


def test_what_was_not_taken_is_not_released(objects: FileObjects, holder: BuildLease) -> None:
    BuildLease(objects, KEY, "two", LONG_S).release()
    assert is_there(objects)


class Gone(FileObjects):
    gone = False

    def put(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        if self.gone:
            raise Transient("storage_unavailable", "gone")
        return super().put(*args, **kwargs)  # type: ignore[arg-type]

    def get(self, *args: object, **kwargs: object) -> bytes:  # type: ignore[override]
        if self.gone:
            raise Transient("storage_unavailable", "gone")
        return super().get(*args, **kwargs)  # type: ignore[arg-type]


def test_without_the_store_there_is_no_lease(tmp_path: Path) -> None:
    objects = Gone(tmp_path)
    objects.gone = True
    with pytest.raises(StoreUnavailable, match="gone"):
        BuildLease(objects, KEY, "one", 30).take()


def test_a_store_that_goes_while_it_is_held_does_not_end_the_build(tmp_path: Path) -> None:
    objects = Gone(tmp_path)
    lease = BuildLease(objects, KEY, "one", 0.02)
    assert lease.take()
    objects.gone = True
    lease.release()
    objects.gone = False
    assert is_there(objects), "it is over after its time"
