"""Machines that share a store of files: each has a cache folder of its own."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from infra.logs import get_logger
from infra.objects.files import FileObjects
from pipelines.engines import flight, manifest, store
from pipelines.engines.cache import Artefact, EngineCache
from pipelines.engines.leases import BuildLease
from pipelines.engines.manifest import key_of
from pipelines.engines.signing import Keyring
from pipelines.engines.store import EngineStore
from schemas.errors import InvalidJob, InvalidModel, PipelineError, Transient
from schemas.payloads import Ref

PARTS: dict[str, object] = {"model": "abc", "version": 1}
KEY = key_of(PARTS)
FOLDER = f"engines/{KEY[:2]}/{KEY}"
CONTENT = b"compiled" * 1000
KEYRING = Keyring({"k1": b"s" * 32})
TOO_DEEP = b'{"manifest":' + b"[" * 100_000

Machine = Callable[..., EngineCache]


class Builder:
    def __init__(self, content: bytes = CONTENT) -> None:
        self.calls = 0
        self.content = content

    def __call__(self, into: Path) -> None:
        self.calls += 1
        (into / "engine.bin").write_bytes(self.content)
        (into / "plans").mkdir()
        (into / "plans" / "empty").write_bytes(b"")
        (into / "plans" / "same").write_bytes(self.content)


def never(into: Path) -> None:
    raise AssertionError("expected a hit")


class Objects(FileObjects):
    """A store that can be away, or read-only."""

    gone = False
    read_only = False

    def put(self, *args: Any, **kwargs: Any) -> Any:
        self._answer(writes=True)
        return super().put(*args, **kwargs)

    def get(self, *args: Any, **kwargs: Any) -> bytes:
        self._answer()
        return super().get(*args, **kwargs)

    def list(self, folder: str = "") -> Iterator[Any]:
        self._answer()
        return super().list(folder)

    def delete(self, key: str) -> None:
        self._answer(writes=True)
        super().delete(key)

    def _answer(self, writes: bool = False) -> None:
        if self.gone:
            raise Transient("storage_unavailable", "the store is gone")
        if writes and self.read_only:
            raise PipelineError("storage_denied", "read-only")


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(tmp_path / "store")


@pytest.fixture
def machine(tmp_path: Path, objects: Objects) -> Machine:
    """`machine("a")`: the cache of a machine, opened anew."""

    def open_(
        name: str, keyring: Keyring = KEYRING, lease_s: float = 30, **options: Any
    ) -> EngineCache:
        shared = EngineStore(objects, keyring, lease_s=lease_s)
        return EngineCache(tmp_path / name, 1 << 30, keyring=keyring, store=shared, **options)

    return open_


def is_whole(artefact: Artefact, content: bytes = CONTENT) -> bool:
    assert (artefact.path / "plans" / "empty").read_bytes() == b""
    files = [artefact.path / "engine.bin", artefact.path / "plans" / "same"]
    return [file.read_bytes() for file in files] == [content, content]


def logged(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    """The reasons with which an event was logged."""
    messages: list[Any] = [record.msg for record in caplog.records]
    return [message.get("reason", "") for message in messages if message["event"] == event]


def until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def stored(objects: Objects) -> set[str]:
    """Names under the key, digests left out."""
    names = {info.key.rpartition("/")[2] for info in FileObjects.list(objects, FOLDER)}
    return {name for name in names if len(name) != 64}


def test_what_one_machine_builds_the_others_fetch(machine: Machine, objects: Objects) -> None:
    built = machine("a").get_or_build(PARTS, Builder(), label="tiny/1 main")
    assert (built.trace.origin, built.trace.store_fault) == ("built", None)
    assert stored(objects) == {"manifest.json"}, "no lease is left"

    fetched = machine("b").get_or_build(PARTS, never)
    assert fetched.trace.origin == "store"
    assert is_whole(fetched)
    assert machine("b").get_or_build(PARTS, never).trace.origin == "local"
    info = manifest.check(fetched.path.parent, KEY, KEYRING, full=True)
    assert info.label == "tiny/1 main"


def test_a_hit_on_this_machine_does_not_ask_the_store(machine: Machine, objects: Objects) -> None:
    machine("a").get_or_build(PARTS, Builder())
    objects.gone = True
    hit = machine("a").get_or_build(PARTS, never)
    assert (hit.trace.origin, hit.trace.store_fault) == ("local", None)


def test_without_the_store_engines_are_built_here_and_it_is_said(
    machine: Machine, objects: Objects, caplog: pytest.LogCaptureFixture
) -> None:
    objects.gone = True
    artefact = machine("a").get_or_build(PARTS, Builder())
    assert is_whole(artefact)
    assert (artefact.trace.origin, artefact.trace.store_fault) == ("built", "the store is gone")
    assert logged(caplog, "engine_store_unavailable") == ["the store is gone"]
    objects.gone = False
    assert machine("a").share(KEY)
    assert machine("b").get_or_build(PARTS, never).trace.origin == "store"
    assert not machine("a").share(KEY), "it is there already"


def test_a_store_that_goes_during_a_download_is_as_one_that_was_away(
    machine: Machine, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("a").get_or_build(PARTS, Builder()).release()
    fetch = Objects.fetch

    def last(self: Objects, ref: Any) -> bytes:
        objects.gone = True
        return fetch(self, ref)

    monkeypatch.setattr(Objects, "fetch", last)
    with pytest.raises(Transient, match="the store is gone") as refused:
        machine("b").get_or_build(PARTS, never, may_build=False)
    assert refused.value.code == "engine_not_built"
    objects.gone = False
    artefact = machine("b").get_or_build(PARTS, Builder())
    assert (artefact.trace.origin, artefact.trace.store_fault) == ("built", "the store is gone")
    assert is_whole(artefact)


def test_a_store_that_is_away_is_an_error_that_may_pass(machine: Machine, objects: Objects) -> None:
    """Where there is nothing to go on with, as in `headrace engines verify --store`."""
    objects.gone = True
    shared = machine("a").store
    assert shared is not None
    for ask in (lambda: shared.verify(KEY), shared.entries, lambda: shared.prune(max_bytes=0)):
        with pytest.raises(Transient, match="the store is gone") as failed:
            ask()
        assert failed.value.code == "engine_store_unavailable"


def test_an_engine_found_damaged_when_it_is_to_be_shared_is_removed(
    machine: Machine, objects: Objects
) -> None:
    objects.gone = True
    artefact = machine("a").get_or_build(PARTS, Builder())
    objects.gone = False
    flip_a_bit(artefact.path / "engine.bin")
    entry = artefact.path.parent
    manifest._accept(entry, manifest._stamps(entry), durable=True)  # as if no stamp showed it
    with pytest.raises(Transient, match="built anew") as refused:
        machine("a").share(KEY)
    assert refused.value.code == "engine_rejected"
    assert not entry.exists()
    assert stored(objects) == set()
    machine("a").get_or_build(PARTS, Builder())
    assert is_whole(machine("b").get_or_build(PARTS, never))


def test_a_builder_that_says_a_lot_can_share_what_it_built(machine: Machine) -> None:
    def build(into: Path) -> None:
        Builder()(into)
        for _ in range(100):
            get_logger("engines.vendor").warning("graph", text="x" * 100_000)

    machine("a").get_or_build(PARTS, build)
    assert is_whole(machine("b").get_or_build(PARTS, never))


def test_what_is_fetched_makes_others_leave_soon(machine: Machine) -> None:
    machine("a").get_or_build(PARTS, Builder()).release()
    small = machine("b")
    small.get_or_build({"model": "old"}, Builder()).release()
    old = small.disk.entry(key_of({"model": "old"}))
    small = EngineCache(small.root, 3 * len(CONTENT), keyring=KEYRING, store=small.store)
    small.get_or_build(PARTS, never).release()
    until(lambda: not old.exists())


def test_a_store_that_goes_during_the_build_costs_only_the_copy(
    machine: Machine, objects: Objects
) -> None:
    def build(into: Path) -> None:
        Builder()(into)
        objects.gone = True

    artefact = machine("a", lease_s=0.05).get_or_build(PARTS, build)
    assert is_whole(artefact)
    assert artefact.trace.store_fault == "the store is gone"


def test_who_may_only_read_the_store_is_served(machine: Machine, objects: Objects) -> None:
    machine("a").get_or_build(PARTS, Builder())
    objects.read_only = True
    assert machine("b").get_or_build(PARTS, never).trace.origin == "store"
    other = machine("b").get_or_build({"model": "other"}, Builder())
    assert (other.trace.origin, other.trace.store_fault) == ("built", "read-only")


def blob(objects: Objects, content: bytes = CONTENT) -> Path:
    return objects.local(f"{FOLDER}/{hashlib.sha256(content).hexdigest()}")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Objects], object]] = {
    "a flipped bit": lambda objects: flip_a_bit(blob(objects)),
    "truncated": lambda objects: os.truncate(blob(objects), 100),
    "longer": lambda objects: os.truncate(blob(objects), 10_000),
    "empty": lambda objects: os.truncate(blob(objects), 0),
    "missing": lambda objects: blob(objects).unlink(),
    "a flipped bit in the manifest": lambda objects: flip_a_bit(
        objects.local(f"{FOLDER}/manifest.json")
    ),
    "an empty manifest": lambda objects: objects.put(f"{FOLDER}/manifest.json", b""),
    "garbage as manifest": lambda objects: objects.put(f"{FOLDER}/manifest.json", b"\xff\x00"),
    "a manifest nested too deeply": lambda objects: objects.put(
        f"{FOLDER}/manifest.json", TOO_DEEP
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_engine_of_the_store_is_built_anew_and_replaced(
    machine: Machine,
    objects: Objects,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Objects], object],
) -> None:
    machine("a").get_or_build(PARTS, Builder()).release()
    damage(objects)

    build = Builder()
    artefact = machine("b").get_or_build(PARTS, build)
    assert build.calls == 1
    assert is_whole(artefact)
    assert len(logged(caplog, "engine_store_entry_rejected")) == 1
    assert machine("x").store.verify(KEY) is None  # type: ignore[union-attr]
    assert is_whole(machine("c").get_or_build(PARTS, never))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_engine_of_the_store_is_shared_again_by_who_has_it(
    machine: Machine, objects: Objects, damage: Callable[[Objects], object]
) -> None:
    """Found by a worker, who may not build: or none would ever be served."""
    machine("a").get_or_build(PARTS, Builder()).release()
    damage(objects)
    with pytest.raises(Transient) as refused:
        machine("b").get_or_build(PARTS, never, may_build=False)
    assert refused.value.code == "engine_not_built"

    assert machine("a").share(KEY)
    assert not machine("a").share(KEY), "it is well now"

    artefact = machine("b").get_or_build(PARTS, never, may_build=False)
    assert is_whole(artefact)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_engine_that_verify_finds_is_shared_again_by_who_has_it(
    machine: Machine, objects: Objects, damage: Callable[[Objects], object]
) -> None:
    machine("a").get_or_build(PARTS, Builder()).release()
    damage(objects)
    assert machine("x").store.verify(KEY)  # type: ignore[union-attr]
    assert machine("a").share(KEY)
    assert machine("x").store.verify(KEY) is None  # type: ignore[union-attr]


def test_a_piece_that_arrives_damaged_is_asked_for_once_more(
    machine: Machine, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault may be of this machine, and the engine the only one that the fleet has."""
    machine("a").get_or_build(PARTS, Builder()).release()
    fetch, broken = objects.fetch_into, []

    def fetch_into(ref: Ref, file: Any) -> None:
        if ref.key not in broken:
            broken.append(ref.key)
            file.write(b"half of it")
            raise InvalidJob("object_mismatch", "another SHA-256")
        fetch(ref, file)

    monkeypatch.setattr(objects, "fetch_into", fetch_into)
    artefact = machine("b").get_or_build(PARTS, never)

    assert artefact.trace.origin == "store"
    assert is_whole(artefact)


def test_builders_whose_keys_have_nothing_in_common_do_not_replace_each_others_engine_for_ever(
    machine: Machine,
) -> None:
    caches = [
        machine(name, Keyring({name: name.encode() * 32}), build_wait_s=5) for name in ("a", "b")
    ]
    for cache in caches:
        cache.get_or_build(PARTS, Builder()).release()
    key = key_of(PARTS)

    shared = [cache.share(key) for _ in range(4) for cache in caches]

    assert shared.count(True) <= 2


def test_what_turns_out_damaged_while_it_is_published_is_not_served(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = EngineStore.publish

    def damaged(self: EngineStore, key: str, entry: Path, **options: Any) -> bool:
        file = entry / "artefact" / "engine.bin"
        file.write_bytes(file.read_bytes()[:-1])
        return publish(self, key, entry, **options)

    cache = machine("a")
    with monkeypatch.context() as patch:
        patch.setattr(EngineStore, "publish", damaged)
        with pytest.raises(Transient) as rejected:
            cache.get_or_build(PARTS, Builder())
    assert rejected.value.code == "engine_rejected"

    assert cache.get_or_build(PARTS, Builder()).trace.origin == "built"


def test_a_manifest_that_took_the_place_of_a_damaged_one_stays(
    machine: Machine, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("a").get_or_build(PARTS, Builder()).release()
    blob(objects).unlink()
    fetch = Objects.fetch

    def overtaken(self: Objects, ref: Any) -> bytes:
        monkeypatch.setattr(Objects, "fetch", fetch)
        machine("c").get_or_build(PARTS, Builder(b"another build")).release()
        return fetch(self, ref)

    monkeypatch.setattr(Objects, "fetch", overtaken)
    with pytest.raises(Transient):
        machine("b").get_or_build(PARTS, never, may_build=False)
    artefact = machine("b").get_or_build(PARTS, never, may_build=False)
    assert is_whole(artefact, b"another build")


def test_who_lacks_the_key_takes_no_manifest_away(machine: Machine) -> None:
    """Or one machine with wrong settings would take the engines from the fleet."""
    machine("a").get_or_build(PARTS, Builder()).release()
    stranger = machine("b", Keyring({"k2": b"x" * 32}))
    with pytest.raises(Transient):
        stranger.get_or_build(PARTS, never, may_build=False)
    assert stranger.store.verify(KEY)  # type: ignore[union-attr]
    assert is_whole(machine("c").get_or_build(PARTS, never))


def test_who_may_only_read_says_what_is_damaged_and_goes_on(
    machine: Machine, objects: Objects, caplog: pytest.LogCaptureFixture
) -> None:
    machine("a").get_or_build(PARTS, Builder()).release()
    flip_a_bit(blob(objects))
    objects.read_only = True
    for _ in range(2):
        with pytest.raises(Transient) as refused:
            machine("b").get_or_build(PARTS, never, may_build=False)
        assert refused.value.code == "engine_not_built"
    assert len(logged(caplog, "engine_store_entry_rejected")) == 2
    assert logged(caplog, "engine_store_entry_not_withdrawn") == ["read-only"] * 2
    assert stored(objects) == {"manifest.json"}


def test_what_is_built_anew_replaces_what_is_there(machine: Machine) -> None:
    old = machine("a").get_or_build(PARTS, Builder(b"old"))
    machine("b").get_or_build(PARTS, never).release()

    with (old.path / "engine.bin").open("rb") as loaded:
        new = machine("b").get_or_build(PARTS, Builder(b"new"), rebuild=True)
        assert new.trace.origin == "built"
        again = machine("a").get_or_build(PARTS, Builder(b"newer"), rebuild=True)
        assert loaded.read() == b"old", "who holds the old one keeps it"
    old.release()

    assert is_whole(new, b"new")
    assert is_whole(again, b"newer")
    assert is_whole(machine("a").get_or_build(PARTS, never), b"newer")
    assert is_whole(machine("c").get_or_build(PARTS, never), b"newer")


def test_what_cannot_be_built_anew_stays_as_it_was(machine: Machine) -> None:
    def fail(into: Path) -> None:
        raise InvalidModel("unusable_onnx", "Expected a model, got none.")

    machine("a").get_or_build(PARTS, Builder()).release()
    for _ in range(2):
        with pytest.raises(InvalidModel, match=r"got none\.$"):
            machine("a").get_or_build(PARTS, fail, rebuild=True)
    assert is_whole(machine("a").get_or_build(PARTS, never))
    assert is_whole(machine("b").get_or_build(PARTS, never))


def test_an_engine_by_a_wrong_key_is_never_read(
    machine: Machine, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Keyring({"k1": b"x" * 32})
    machine("a", stranger).get_or_build(PARTS, Builder(b"evil")).release()
    monkeypatch.setattr(Objects, "fetch", lambda *_: pytest.fail("it was read"))
    assert is_whole(machine("b").get_or_build(PARTS, Builder()))


def test_the_engine_of_another_key_is_not_taken(machine: Machine, objects: Objects) -> None:
    other = {"model": "other"}
    machine("a").get_or_build(other, Builder(b"other")).release()
    folder = f"engines/{key_of(other)[:2]}/{key_of(other)}"
    for info in list(objects.list(folder)):
        name = info.key.rpartition("/")[2]
        objects.put(f"{FOLDER}/{name}", objects.local(info.key))
    build = Builder()
    assert is_whole(machine("b").get_or_build(PARTS, build))
    assert build.calls == 1


@pytest.mark.parametrize("part", ["instruction_set", "version"])
def test_an_engine_for_another_machine_or_version_is_another(machine: Machine, part: str) -> None:
    here: dict[str, object] = {**PARTS, "instruction_set": ["avx2"]}
    machine("a").get_or_build(here, Builder(b"other")).release()
    assert is_whole(machine("b").get_or_build({**here, part: "newer"}, Builder()))


def test_files_go_in_pieces(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (manifest, store):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    content = bytes(number % 251 for number in range(10_500))
    machine("a").get_or_build(PARTS, Builder(content)).release()
    assert is_whole(machine("b").get_or_build(PARTS, never), content)


def test_keys_are_needed_to_share(objects: Objects) -> None:
    with pytest.raises(PipelineError, match="HEADRACE_ENGINES__KEYS") as refused:
        EngineStore(objects, Keyring())
    assert refused.value.code == "settings_invalid"


def test_machines_that_start_at_once_build_once(machine: Machine) -> None:
    build, waiting = Builder(), threading.Semaphore(0)

    def build_once_the_others_wait(into: Path) -> None:
        assert all(waiting.acquire(timeout=30) for _ in range(7))
        build(into)

    def ask(number: int) -> tuple[str, bool]:
        artefact = machine(f"m{number}").get_or_build(
            PARTS, build_once_the_others_wait, on_wait=waiting.release
        )
        return artefact.trace.origin, is_whole(artefact)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(8)))
    assert sorted(answers) == [("built", True), *[("store", True)] * 7]
    assert build.calls == 1


def test_a_machine_that_died_is_not_waited_for_longer_than_its_lease(
    machine: Machine, objects: Objects, caplog: pytest.LogCaptureFixture
) -> None:
    dead = BuildLease(objects, f"{FOLDER}/lease.json", "elsewhere", 0.2)
    dead._write()
    waits: list[str] = []
    artefact = machine("a").get_or_build(PARTS, Builder(), on_wait=lambda: waits.append("once"))
    assert is_whole(artefact)
    assert waits == ["once"]
    assert artefact.trace.wait_s >= 0.2
    assert logged(caplog, "engine_lease_taken_over")


def test_the_wait_for_another_machine_has_a_limit(machine: Machine, objects: Objects) -> None:
    BuildLease(objects, f"{FOLDER}/lease.json", "elsewhere", 1000)._write()
    with pytest.raises(Transient) as refused:
        machine("a", build_wait_s=0.1).get_or_build(PARTS, never)
    assert refused.value.code == "engine_build_busy"


def test_two_who_build_the_same_publish_one_whole_engine(machine: Machine) -> None:
    """As when a lease was lost: both believe that it is their turn."""

    def overtaken(into: Path) -> None:
        Builder(b"second")(into)
        first = machine("a")
        first.get_or_build(PARTS, Builder(b"first")).release()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BuildLease, "take", lambda self: True)
        mine = machine("b").get_or_build(PARTS, overtaken)
    assert is_whole(mine, b"second"), "who built it has it"
    assert is_whole(machine("c").get_or_build(PARTS, never), b"first"), "the first is published"


def test_a_failed_build_is_remembered_for_the_fleet(machine: Machine) -> None:
    now = [1_700_000_000.0]

    def fail(into: Path) -> None:
        raise InvalidModel("unusable_onnx", "Expected a model, got none.")

    with pytest.raises(InvalidModel):
        machine("a", clock=lambda: now[0]).get_or_build(PARTS, fail)
    now[0] += 10
    with pytest.raises(InvalidModel, match="not tried again for 290 s"):
        machine("b", clock=lambda: now[0]).get_or_build(PARTS, never)
    assert machine("c", clock=lambda: now[0]).get_or_build(PARTS, Builder(), force=True)
    now[0] -= 10
    assert machine("b", clock=lambda: now[0]).get_or_build(PARTS, never), "it is forgotten"


@pytest.mark.parametrize("content", [b"\xff\x00", b"[1]", TOO_DEEP])
def test_garbage_for_a_failure_is_none(machine: Machine, objects: Objects, content: bytes) -> None:
    objects.put(f"{FOLDER}/failed.json", content)
    assert is_whole(machine("a").get_or_build(PARTS, Builder()))


def test_a_failure_of_the_future_does_not_count(machine: Machine) -> None:
    def fail(into: Path) -> None:
        raise InvalidModel("unusable_onnx", "Expected a model, got none.")

    with pytest.raises(InvalidModel):
        machine("a").get_or_build(PARTS, fail)
    clock_moved_back = machine("a", clock=lambda: time.time() - 86400)
    assert is_whole(clock_moved_back.get_or_build(PARTS, Builder()))


def test_who_may_not_build_fetches(machine: Machine) -> None:
    with pytest.raises(Transient, match="tiny") as refused:
        machine("b").get_or_build(PARTS, never, label="tiny", may_build=False)
    assert refused.value.code == "engine_not_built"
    machine("a").get_or_build(PARTS, Builder())
    assert machine("b").get_or_build(PARTS, never, may_build=False).trace.origin == "store"


def test_who_may_not_build_does_not_wait_for_a_build_elsewhere(
    machine: Machine, objects: Objects
) -> None:
    BuildLease(objects, f"{FOLDER}/lease.json", "elsewhere", 1000)._write()
    with pytest.raises(Transient) as refused:
        machine("a").get_or_build(PARTS, never, may_build=False)
    assert refused.value.code == "engine_not_built"


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_after_a_part(self: Objects, ref: Ref, file: BinaryIO) -> None:
    file.write(self.fetch(ref)[: ref.size_bytes // 2])
    full()


@pytest.mark.parametrize(
    ("where", "name", "fail"),
    [(Objects, "fetch_into", full_after_a_part), (flight, "finish", full)],
    ids=["in the middle", "at its end"],
)
def test_a_disk_too_full_for_a_download_says_so_and_leaves_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, where: object, name: str, fail: object
) -> None:
    machine("a").get_or_build(PARTS, Builder()).release()
    with monkeypatch.context() as patched:
        patched.setattr(where, name, fail)
        with pytest.raises(Transient) as failed:
            machine("b").get_or_build(PARTS, never)
    assert failed.value.code == "disk_full"
    root = machine("b").root
    assert [path for name in ("objects", "building") for path in (root / name).rglob("*")] == []
    assert is_whole(machine("b").get_or_build(PARTS, never))


def age(objects: Objects, parts: dict[str, object], seconds: float) -> None:
    key = key_of(parts)
    for info in list(objects.list(f"engines/{key[:2]}/{key}")):
        os.utime(objects.local(info.key), (time.time() - seconds,) * 2)


DAY_S = 86400.0


@pytest.fixture
def shared(machine: Machine, objects: Objects) -> EngineStore:
    """Engines that were last fetched 3, 2, 1 and 0 days ago."""
    for days in range(4):
        machine("a").get_or_build({"days": days}, Builder()).release()
        age(objects, {"days": days}, days * DAY_S)
    found = machine("a").store
    assert found is not None
    return found


def left(engines: EngineStore) -> list[int]:
    keys = {key_of({"days": days}): days for days in range(4)}
    return sorted(keys[entry.key] for entry in engines.entries() if entry.whole)


def test_the_store_is_pruned_by_last_use(shared: EngineStore, objects: Objects) -> None:
    assert len(shared.prune(unused_s=1.5 * DAY_S, dry_run=True)) == 2
    assert left(shared) == [0, 1, 2, 3]
    shared.prune(unused_s=1.5 * DAY_S)
    assert left(shared) == [0, 1]
    assert len({info.key.split("/")[2] for info in objects.list("engines")}) == 2


def test_the_store_is_pruned_by_size_but_for_what_is_in_use(shared: EngineStore) -> None:
    [*_, newest] = shared.entries()
    shared.prune(max_bytes=int(2.5 * newest.size_bytes))
    assert left(shared) == [0, 1]
    shared.prune(max_bytes=0)
    assert left(shared) == [0], "used just now"


def test_a_fetch_counts_as_use(shared: EngineStore, machine: Machine) -> None:
    machine("b").get_or_build({"days": 3}, never)
    until(lambda: shared.entries()[0].key != key_of({"days": 3}))
    shared.prune(unused_s=1.5 * DAY_S)
    assert left(shared) == [0, 1, 3]


def test_a_fetch_that_finds_it_damaged_counts_as_none(
    machine: Machine, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a broken engine that everybody asks for would be the last to be pruned."""
    noted: list[str] = []
    monkeypatch.setattr(EngineStore, "_note_use", lambda self, key: noted.append(key))
    machine("a").get_or_build(PARTS, Builder()).release()
    machine("b").get_or_build(PARTS, never).release()
    assert noted == [KEY]
    flip_a_bit(blob(objects))
    with pytest.raises(Transient):
        machine("c").get_or_build(PARTS, never, may_build=False)
    assert noted == [KEY]


def test_what_builders_left_unfinished_is_pruned_when_it_is_old(
    shared: EngineStore, objects: Objects
) -> None:
    objects.delete(f"engines/{key_of({'days': 0})[:2]}/{key_of({'days': 0})}/manifest.json")
    shared.prune()
    assert len(shared.entries()) == 4, "somebody may be about to publish it"
    age(objects, {"days": 0}, DAY_S)
    shared.prune()
    assert len(shared.entries()) == 3


def test_a_clock_that_went_back_prunes_nothing(shared: EngineStore) -> None:
    assert shared.prune(max_bytes=0, clock=lambda: time.time() - 30 * DAY_S) == []


def test_what_is_pruned_while_it_is_fetched_is_built(
    machine: Machine, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("a").get_or_build(PARTS, Builder()).release()
    fetch = Objects.fetch

    def overtaken(self: Objects, ref: Any) -> bytes:
        EngineStore(objects, KEYRING).remove(KEY)
        return fetch(self, ref)

    monkeypatch.setattr(Objects, "fetch", overtaken)
    assert machine("b").get_or_build(PARTS, Builder()).trace.origin == "built"


def test_foreign_objects_are_left_alone(shared: EngineStore, objects: Objects) -> None:
    objects.put("engines/README", b"hello")
    assert len(shared.entries()) == 4
