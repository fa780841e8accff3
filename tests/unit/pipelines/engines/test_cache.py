"""The cache with builds that only write bytes: it knows no backend."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infra.logs import get_logger
from pipelines.engines import disk, manifest
from pipelines.engines.cache import Artefact, EngineCache
from pipelines.engines.manifest import key_of
from pipelines.engines.signing import Keyring
from schemas.errors import InvalidModel, Transient

PARTS: dict[str, object] = {"model": "abc", "version": 1}
CONTENT = b"compiled" * 1000
RunPython = Callable[..., subprocess.Popen[str]]


class Builder:
    """Writes two files, one in a folder, and counts how often it was asked to."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.calls = 0
        self._content = content

    def __call__(self, into: Path) -> None:
        self.calls += 1
        (into / "engine.bin").write_bytes(self._content)
        (into / "plans").mkdir()
        (into / "plans" / "bucket-1").write_bytes(b"plan")


def entry_of(cache: EngineCache, parts: dict[str, object] = PARTS) -> Path:
    key = key_of(parts)
    return cache.root / "objects" / key[:2] / key


def is_served(artefact: Artefact, content: bytes = CONTENT) -> bool:
    return (artefact.path / "engine.bin").read_bytes() == content


def left_in_building(cache: EngineCache) -> list[str]:
    return sorted(path.name for path in (cache.root / "building").iterdir())


def test_a_hit_builds_nothing(cache: EngineCache) -> None:
    build = Builder()
    first = cache.get_or_build(PARTS, build)
    second = EngineCache(cache.root, max_bytes=1 << 30).get_or_build(PARTS, build)
    assert build.calls == 1
    assert first.path == second.path == entry_of(cache) / "artefact"
    assert is_served(second)
    assert (second.path / "plans" / "bucket-1").read_bytes() == b"plan"
    assert left_in_building(cache) == []


def test_every_part_counts_and_their_order_does_not(cache: EngineCache) -> None:
    keys = {
        key_of(parts)
        for parts in (PARTS, {"model": "abc", "version": 2}, {"model": "abd", "version": 1})
    }
    assert len(keys) == 3
    assert key_of({"version": 1, "model": "abc"}) == key_of(PARTS)
    with pytest.raises(ValueError, match="JSON compliant"):
        key_of({"threshold": float("nan")})


def test_a_hit_reads_no_artefact(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.get_or_build(PARTS, Builder())
    monkeypatch.setattr(manifest, "sha256_of", lambda path: pytest.fail(f"{path} was hashed"))
    assert is_served(cache.get_or_build(PARTS, Builder()))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_a_bit_and_date_back(path: Path) -> None:
    times = path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_by_a_link(path: Path) -> None:
    elsewhere = path.rename(path.parents[5] / "elsewhere")
    path.symlink_to(elsewhere)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "one flipped bit": ("artefact/engine.bin", flip_a_bit),
    "one flipped bit, dated back": ("artefact/engine.bin", flip_a_bit_and_date_back),
    "a flipped bit in a folder": ("artefact/plans/bucket-1", flip_a_bit),
    "truncated": ("artefact/engine.bin", lambda path: os.truncate(path, 100)),
    "empty": ("artefact/engine.bin", lambda path: os.truncate(path, 0)),
    "a missing file": ("artefact/plans/bucket-1", Path.unlink),
    "a link": ("artefact/engine.bin", replace_by_a_link),
    "one file too many": ("artefact/more", lambda path: path.write_bytes(b"")),
    "a flipped bit in the manifest": ("manifest.json", flip_a_bit),
    "no JSON in the manifest": ("manifest.json", lambda path: path.write_bytes(b"\xff\x00garbage")),
    "other JSON in the manifest": ("manifest.json", lambda path: path.write_text("[1]")),
    "no manifest": ("manifest.json", Path.unlink),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_rebuilt_and_never_served(
    cache: EngineCache, name: str, damage: Callable[[Path], object]
) -> None:
    build = Builder()
    cache.get_or_build(PARTS, build).release()
    before = manifest.read_json(entry_of(cache) / "accepted.json", dict)
    damage(entry_of(cache) / name)

    artefact = cache.get_or_build(PARTS, build)

    assert build.calls == 2, f"accepted as {before}"
    assert is_served(artefact)
    manifest.check(entry_of(cache), key_of(PARTS), Keyring(), full=True)
    assert left_in_building(cache) == []


def test_the_manifest_of_another_key_is_not_believed(cache: EngineCache) -> None:
    other: dict[str, object] = {"model": "other"}
    cache.get_or_build(other, Builder(b"other"))
    target = entry_of(cache)
    target.parent.mkdir(exist_ok=True)
    shutil.copytree(entry_of(cache, other), target)
    assert is_served(cache.get_or_build(PARTS, Builder()))


def test_a_copied_cache_is_compared_in_full_once(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Builder()
    cache.get_or_build(PARTS, build)
    copy = EngineCache(tmp_path / "copy", max_bytes=1 << 30)
    shutil.copytree(cache.root, copy.root)
    hashed: list[str] = []
    sha256_of = manifest.sha256_of
    monkeypatch.setattr(
        manifest, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path)
    )
    for _ in range(2):
        assert is_served(copy.get_or_build(PARTS, build))
    assert sorted(hashed) == ["bucket-1", "engine.bin"]
    assert build.calls == 1


def test_an_entry_replaced_while_it_is_looked_at_is_leased_as_it_is_now(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is served is another folder than the one that is kept from eviction."""
    cache.get_or_build(PARTS, Builder(b"old")).release()
    check = disk.check

    def overtaken(entry: Path, *args: Any) -> object:
        monkeypatch.setattr(disk, "check", check)
        shutil.rmtree(entry)
        EngineCache(cache.root, max_bytes=1 << 30).get_or_build(PARTS, Builder()).release()
        return check(entry, *args)

    monkeypatch.setattr(disk, "check", overtaken)
    artefact = cache.get_or_build(PARTS, Builder(b"never"))
    assert is_served(artefact)
    assert cache.prune(0) == []


@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_what_is_no_folder_in_an_entrys_place_gives_way(cache: EngineCache, kind: str) -> None:
    entry, elsewhere = entry_of(cache), cache.root / "elsewhere"
    entry.parent.mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    entry.write_bytes(b"") if kind == "a file" else entry.symlink_to(elsewhere)
    assert is_served(cache.get_or_build(PARTS, Builder()))
    assert (elsewhere / "kept").exists()
    assert left_in_building(cache) == []


def test_a_lock_is_let_go_where_its_file_cannot_be_removed(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that has become read-only."""

    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with cache.disk.lock(key_of(PARTS), wait_s=0):
            pass
    with cache.disk.lock(key_of(PARTS), wait_s=0):
        pass


def test_who_has_a_damaged_entry_open_keeps_it(cache: EngineCache) -> None:
    old = cache.get_or_build(PARTS, Builder())
    with (old.path / "engine.bin").open("rb") as mapped:
        flip_a_bit(old.path / "plans" / "bucket-1")
        assert is_served(cache.get_or_build(PARTS, Builder(b"new")), b"new")
        assert mapped.read() == CONTENT


def test_threads_racing_for_one_key_build_it_once(cache: EngineCache) -> None:
    build, waiting = Builder(), threading.Semaphore(0)

    def build_once_the_others_wait(into: Path) -> None:
        assert all(waiting.acquire(timeout=30) for _ in range(7))
        build(into)

    def ask(_: int) -> bool:
        return is_served(
            cache.get_or_build(PARTS, build_once_the_others_wait, on_wait=waiting.release)
        )

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(8))) == [True] * 8
    assert build.calls == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux to name open files")
def test_all_files_are_on_disk_before_the_entry_is_in_its_place(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else after a power cut the note of acceptance could vouch for what is not there."""
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    def see(folder: Path, target: Path) -> Path:
        if target != entry_of(cache):
            return rename(folder, target)
        files = [path.name for path in folder.rglob("*") if path.is_file()]
        assert sorted(files) == sorted([*synced, "accepted.json"])
        assert synced[-1] == "manifest.json"
        synced.append("in place")
        return rename(folder, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", see)
    cache.get_or_build(PARTS, Builder())
    assert synced[-1] == "in place"


QUIETLY = """
import sys, structlog
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
"""


@pytest.fixture
def run_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script in a process of its own, which does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *args: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", QUIETLY + script, *map(str, args)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


RACE = """if True:
    import sys, pathlib
    from pipelines.engines.cache import EngineCache
    def say(word):
        print(word, flush=True)
    def build(into):
        say("building")
        sys.stdin.readline()
        (into / "engine.bin").write_bytes(b"compiled" * 1000)
    cache = EngineCache(pathlib.Path(sys.argv[1]), max_bytes=1 << 30)
    artefact = cache.get_or_build({"model": "abc", "version": 1}, build, on_wait=lambda: say("waits"))
    say((artefact.path / "engine.bin").stat().st_size)
"""


def test_processes_racing_for_one_key_build_it_once(
    cache: EngineCache, run_python: RunPython
) -> None:
    racers = [run_python(RACE, cache.root) for _ in range(8)]
    first_words = [racer.stdout.readline() for racer in racers if racer.stdout]
    assert sorted(first_words) == ["building\n", *["waits\n"] * 7]
    for racer in racers:  # only the builder reads it
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    rests = [racer.communicate(timeout=60)[0] for racer in racers]
    assert rests == [f"{len(CONTENT)}\n"] * 8
    assert left_in_building(cache) == []


def test_who_waits_beside_a_builder_that_is_killed_builds(
    cache: EngineCache, run_python: RunPython
) -> None:
    killed = run_python(RACE, cache.root)
    assert killed.stdout
    assert killed.stdout.readline() == "building\n"
    waiter = run_python(RACE, cache.root)
    assert waiter.stdout
    assert waiter.stdout.readline() == "waits\n"
    killed.kill()
    assert waiter.stdout.readline() == "building\n"
    assert waiter.communicate("go\n", timeout=30)[0] == f"{len(CONTENT)}\n"
    manifest.check(entry_of(cache), key_of(PARTS), Keyring(), full=True)
    assert left_in_building(cache) == []


@pytest.mark.parametrize("next_parts", [PARTS, {"model": "other"}], ids=["same key", "other key"])
def test_a_killed_builder_leaves_no_entry_and_the_next_build_cleans_up(
    cache: EngineCache, run_python: RunPython, next_parts: dict[str, object]
) -> None:
    racer = run_python(RACE, cache.root)
    assert racer.stdout
    assert racer.stdout.readline() == "building\n"
    racer.kill()
    racer.communicate(timeout=30)
    assert len(left_in_building(cache)) == 2, "its folder and its lock file"
    assert not entry_of(cache).exists()

    build = Builder()
    assert is_served(cache.get_or_build(next_parts, build))
    assert build.calls == 1
    assert left_in_building(cache) == []


KILLED_AT_EACH_STEP = """if True:
    import itertools, os, pathlib, signal, sys, threading
    from infra.objects.files import FileObjects
    from pipelines.engines import manifest
    from pipelines.engines.cache import EngineCache
    from pipelines.engines.signing import Keyring
    from pipelines.engines.store import EngineStore
    root, parts = pathlib.Path(sys.argv[1]), {"model": "abc", "version": 1}
    keyring = Keyring({"k1": b"s" * 32})
    key = manifest.key_of(parts)
    STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime", "os.listdir",
             "os.scandir", "fcntl.flock"}
    def build(into):
        (into / "engine.bin").write_bytes(b"compiled" * 1000)
    def never(into):
        raise AssertionError("expected a hit")
    def open_cache(name, shared):
        store = EngineStore(FileObjects(root / "store"), keyring) if shared else None
        return EngineCache(root / name, 1 << 30, keyring=keyring, store=store)
    def one_attempt(cache, obtain, last_step):
        steps = itertools.count()
        def kill_at(event, args):
            if event in STEPS and next(steps) == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill_at)
        cache.get_or_build(parts, obtain)
        os._exit(0)
    shared = sys.argv[2] == "fetch"
    if shared:
        open_cache("builder", shared).get_or_build(parts, build)
    obtain = never if shared else build
    states = set()
    for last_step in itertools.count():
        cache = open_cache(str(last_step), shared)
        child = os.fork() or one_attempt(cache, obtain, last_step)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        entry = cache.disk.entry(key)
        states.add(entry.exists())
        if entry.exists():
            manifest.check(entry, key, keyring, full=True)
        artefact = cache.get_or_build(parts, obtain)
        assert (artefact.path / "engine.bin").read_bytes() == b"compiled" * 1000, last_step
        artefact.release()
        for thread in set(threading.enumerate()) - {threading.current_thread()}:
            thread.join()
        open_cache(str(last_step), False).get_or_build({"model": "other"}, build)
        assert not list((cache.root / "building").iterdir()), last_step
    assert states == {True, False}
    print(last_step)
"""


@pytest.mark.parametrize("how", ["build", "fetch"])
def test_who_is_killed_at_any_step_does_no_harm(
    tmp_path: Path, run_python: RunPython, how: str
) -> None:
    process = run_python(KILLED_AT_EACH_STEP, tmp_path, how)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert int(output) > 20, "that many steps were survived"


def test_a_build_that_takes_too_long_is_not_waited_for(cache: EngineCache) -> None:
    impatient = EngineCache(cache.root, max_bytes=1 << 30, build_wait_s=0)
    waits: list[str] = []

    def build(into: Path) -> None:
        with pytest.raises(Transient) as refused:
            impatient.get_or_build(PARTS, Builder(), on_wait=lambda: waits.append("once"))
        assert refused.value.code == "engine_build_busy"
        Builder()(into)

    assert is_served(cache.get_or_build(PARTS, build))
    assert waits == ["once"]


class Clock:
    now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_failed_build_is_remembered_for_a_while(tmp_path: Path) -> None:
    clock = Clock()
    cache = EngineCache(tmp_path, max_bytes=1 << 30, failure_memory_s=60, clock=clock)
    attempts: list[Path] = []

    def fail(into: Path) -> None:
        attempts.append(into)
        (into / "half").write_bytes(b"half")
        raise InvalidModel("unusable_onnx", "Expected a model, got none.")

    for _ in range(3):
        with pytest.raises(InvalidModel, match="Expected a model, got none") as refused:
            cache.get_or_build(PARTS, fail)
        assert refused.value.code == "unusable_onnx"
    assert "not tried again for 60 s" in refused.value.message
    assert len(attempts) == 1
    assert left_in_building(cache) == [f"{key_of(PARTS)}.failed"]

    with pytest.raises(InvalidModel):
        cache.get_or_build(PARTS, fail, force=True)
    assert len(attempts) == 2

    clock.now_s += 61
    assert is_served(cache.get_or_build(PARTS, Builder()))
    assert left_in_building(cache) == []


def test_a_clock_that_went_back_forgets_failures_and_serves_what_is_there(tmp_path: Path) -> None:
    clock = Clock()
    cache = EngineCache(tmp_path, max_bytes=1 << 30, failure_memory_s=60, clock=clock)

    def fail(into: Path) -> None:
        raise InvalidModel("unusable_onnx", "no")

    with pytest.raises(InvalidModel):
        cache.get_or_build({"model": "other"}, fail)
    cache.get_or_build(PARTS, Builder()).release()
    os.utime(entry_of(cache), (clock.now_s + 1e6,) * 2)
    clock.now_s -= 86400
    assert is_served(cache.get_or_build({"model": "other"}, Builder()))
    assert is_served(cache.get_or_build(PARTS, fail))


def test_the_builders_log_is_kept_with_the_engine_and_with_a_failure(
    cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "headrace.engines")
    logger = get_logger("engines.vendor")

    def in_a_thread_of_the_vendor(into: Path) -> None:
        thread = threading.Thread(target=lambda: logger.info("layer_fused", layer="conv1"))
        thread.start()
        thread.join()

    def fail(into: Path) -> None:
        logger.error("unsupported", node="Foo_17")
        raise InvalidModel("unusable_onnx", "no")

    logger.info("before")
    artefact = cache.get_or_build(PARTS, in_a_thread_of_the_vendor)
    with pytest.raises(InvalidModel):
        cache.get_or_build({"model": "other"}, fail)
    logger.info("after")

    log = manifest.check(artefact.path.parent, key_of(PARTS), Keyring()).build.log
    assert "layer='conv1'" in log
    assert "before" not in log
    [(key, failure)] = cache.disk.failures()
    assert key == key_of({"model": "other"})
    assert "node='Foo_17'" in failure.log
    assert "after" not in failure.log


def test_with_keys_what_was_built_without_is_built_anew(cache: EngineCache) -> None:
    cache.get_or_build(PARTS, Builder(b"unsigned")).release()
    signing = EngineCache(cache.root, 1 << 30, keyring=Keyring({"k1": b"s" * 32}))
    assert is_served(signing.get_or_build(PARTS, Builder()))
    assert is_served(signing.get_or_build(PARTS, Builder(b"other")))


def test_who_may_not_build_gets_what_is_there(cache: EngineCache) -> None:
    with pytest.raises(Transient, match="headrace engines build") as refused:
        cache.get_or_build(PARTS, Builder(), may_build=False)
    assert refused.value.code == "engine_not_built"
    cache.get_or_build(PARTS, Builder()).release()
    assert is_served(cache.get_or_build(PARTS, Builder(), may_build=False))


def test_a_trace_says_where_an_artefact_came_from(cache: EngineCache) -> None:
    first, second = (cache.get_or_build(PARTS, Builder()).trace for _ in range(2))
    assert (first.origin, first.key) == ("built", key_of(PARTS))
    assert first.build_s > 0
    assert (second.origin, second.build_s) == ("local", 0)


def test_bit_rot_that_no_stamp_shows_is_found_by_verify(cache: EngineCache) -> None:
    cache.get_or_build(PARTS, Builder()).release()
    entry, key = entry_of(cache), key_of(PARTS)
    assert cache.disk.verify(key, wait_s=0) is None
    flip_a_bit(entry / "artefact" / "engine.bin")
    manifest._accept(entry, manifest._stamps(entry), durable=True)
    assert not is_served(cache.get_or_build(PARTS, Builder())), "or this test shows nothing"

    assert "engine.bin" in (cache.disk.verify(key, wait_s=0) or "")
    assert is_served(cache.get_or_build(PARTS, Builder()))


def test_old_failures_are_forgotten_by_the_next_build(tmp_path: Path) -> None:
    clock = Clock()
    cache = EngineCache(tmp_path, max_bytes=1 << 30, failure_memory_s=60, clock=clock)

    def fail(into: Path) -> None:
        raise InvalidModel("unusable_onnx", "no")

    with pytest.raises(InvalidModel):
        cache.get_or_build(PARTS, fail)
    cache.get_or_build({"model": "other"}, Builder())
    assert len(left_in_building(cache)) == 1, "it is not old yet"
    clock.now_s += 61
    cache.get_or_build({"model": "third"}, Builder())
    assert left_in_building(cache) == []


@pytest.mark.parametrize(
    ("raised", "expected", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Transient, "disk_full"),
        (OSError(errno.EIO, "Input/output error"), Transient, "engine_cache_unavailable"),
        (Transient("device_out_of_memory", "no room"), Transient, "device_out_of_memory"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, None),
    ],
    ids=["disk full", "disk broken", "passing", "a bug stays bare"],
)
def test_what_may_pass_is_not_remembered_and_leaves_nothing(
    cache: EngineCache, raised: Exception, expected: type[Exception], code: str | None
) -> None:
    def fail(into: Path) -> None:
        (into / "half").write_bytes(b"half")
        raise raised

    with pytest.raises(expected) as failed:
        cache.get_or_build(PARTS, fail)
    assert getattr(failed.value, "code", None) == code
    assert left_in_building(cache) == []
    assert is_served(cache.get_or_build(PARTS, Builder()))


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Transient, match="check the disk and its permissions") as failed:
        EngineCache(tmp_path / "file" / "cache", max_bytes=1).get_or_build(PARTS, Builder())
    assert failed.value.code == "engine_cache_unavailable"


def parts(name: str) -> dict[str, object]:
    return {"model": name}


def last_used_at(cache: EngineCache, name: str, seconds: int) -> None:
    os.utime(entry_of(cache, parts(name)), (seconds, seconds))


def kept(cache: EngineCache, *names: str) -> list[str]:
    return [name for name in names if entry_of(cache, parts(name)).exists()]


@pytest.fixture
def small_cache(tmp_path: Path) -> EngineCache:
    """Room for two entries of CONTENT and not for three."""
    return EngineCache(tmp_path / "small", max_bytes=3 * len(CONTENT))


def test_the_least_recently_used_entry_leaves_first(small_cache: EngineCache) -> None:
    for number, name in enumerate(("a", "b")):
        small_cache.get_or_build(parts(name), Builder()).release()
        last_used_at(small_cache, name, 1_000_000 + number)
    small_cache.get_or_build(parts("a"), Builder()).release()
    small_cache.get_or_build(parts("c"), Builder()).release()
    assert kept(small_cache, "a", "b", "c") == ["a", "c"]
    assert left_in_building(small_cache) == []


def test_after_a_clock_went_back_what_is_used_now_stays(small_cache: EngineCache) -> None:
    for name in ("before", "now"):
        small_cache.get_or_build(parts(name), Builder()).release()
    last_used_at(small_cache, "before", int(time.time()) + 86400)
    small_cache.get_or_build(parts("new"), Builder()).release()
    assert kept(small_cache, "before", "now", "new") == ["now", "new"]


def test_pruning_by_hand_shows_what_would_go(small_cache: EngineCache) -> None:
    for number, name in enumerate(("a", "b")):
        small_cache.get_or_build(parts(name), Builder()).release()
        last_used_at(small_cache, name, 1_000_000 + number)
    held = small_cache.get_or_build(parts("a"), Builder())
    last_used_at(small_cache, "a", 1_000_000)
    [shown] = small_cache.prune(0, dry_run=True)
    assert kept(small_cache, "a", "b") == ["a", "b"]
    assert small_cache.prune(0) == [shown]
    assert kept(small_cache, "a", "b") == ["a"]
    held.release()


def test_a_disk_without_room_for_a_folder_can_be_pruned(
    small_cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_cache.get_or_build(parts("a"), Builder()).release()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "mkdir", full)
    assert len(small_cache.prune(0)) == 1
    assert kept(small_cache, "a") == []


def test_a_leased_entry_is_spared_until_it_is_released(small_cache: EngineCache) -> None:
    leases = {name: small_cache.get_or_build(parts(name), Builder()) for name in ("a", "b", "c")}
    assert kept(small_cache, "a", "b", "c") == ["a", "b", "c"], "more than there is room for"
    for number, name in enumerate(leases):
        last_used_at(small_cache, name, 1_000_000 + number)
    leases["b"].release()
    small_cache.get_or_build(parts("d"), Builder()).release()
    assert kept(small_cache, "a", "b", "c", "d") == ["a", "c", "d"]
    assert is_served(leases["a"])


LEASE = """if True:
    import sys, pathlib
    from pipelines.engines.cache import EngineCache
    def build(into):
        raise AssertionError("expected a hit")
    cache = EngineCache(pathlib.Path(sys.argv[1]), max_bytes=1 << 30)
    artefact = cache.get_or_build({"model": "a"}, build)
    print("leased", flush=True)
    sys.stdin.readline()
"""


def test_a_lease_of_another_process_ends_with_it(
    small_cache: EngineCache, run_python: RunPython
) -> None:
    small_cache.get_or_build(parts("a"), Builder()).release()
    holder = run_python(LEASE, small_cache.root)
    assert holder.stdout
    assert holder.stdout.readline() == "leased\n"
    for name in ("b", "c"):
        last_used_at(small_cache, "a", 1_000_000)
        small_cache.get_or_build(parts(name), Builder()).release()
    assert kept(small_cache, "a") == ["a"]

    holder.kill()
    holder.communicate(timeout=30)
    small_cache.get_or_build(parts("d"), Builder()).release()
    assert kept(small_cache, "a") == []


def test_who_may_not_build_does_not_wait_for_a_build(cache: EngineCache) -> None:
    """A worker's slot is for batches."""
    begun, go_on = threading.Event(), threading.Event()

    def build(into: Path) -> None:
        begun.set()
        assert go_on.wait(30)
        (into / "engine.bin").write_bytes(CONTENT)

    def obtain() -> None:
        cache.get_or_build(PARTS, build).release()

    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(obtain)
        assert begun.wait(30)
        try:
            with pytest.raises(Transient) as refused:
                cache.get_or_build(PARTS, build, may_build=False)
        finally:
            go_on.set()
        building.result()
    assert refused.value.code == "engine_not_built"
    cache.get_or_build(PARTS, build, may_build=False).release()
