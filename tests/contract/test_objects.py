"""What every object store must do. A new one joins by a parameter of `url`."""

from __future__ import annotations

import errno
import hashlib
import io
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from infra.objects import ObjectExists, ObjectStore, open_objects
from schemas.errors import InvalidJob, PipelineError
from schemas.payloads import Ref
from tests.servers.minio import minio_address, patience
from tests.servers.s3 import S3Server
from tests.servers.seaweedfs import seaweedfs_server

HOSTILE_KEYS = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../up",
    "a/../../up",
    "a/..",
    "./a",
    "a/./b",
    "a//b",
    "a/",
    "nul\0",
    "line\nfeed",
    "back\\slash",
    "%unfinished/a",
    "ünïcode",
    "lone\ud800",
    "a" * 201,
    "/".join(["abcd"] * 103),
]


@pytest.fixture(scope="module")
def minio() -> Iterator[S3Server]:
    with minio_address() as server:
        yield server


@pytest.fixture(scope="module")
def seaweedfs() -> Iterator[S3Server]:
    with seaweedfs_server() as server:
        yield server


@pytest.fixture(params=["file", pytest.param("minio", marks=patience()), "seaweedfs"])
def url(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path / 'a store'}"
        return
    server: S3Server = request.getfixturevalue(request.param)
    cache = tmp_path_factory.mktemp("cache")
    for name, value in (server.environment | {"HEADRACE_S3__CACHE_DIR": str(cache)}).items():
        monkeypatch.setenv(name, value)
    with server.bucket() as bucket:
        yield server.url(bucket)


@pytest.fixture
def objects(url: str) -> ObjectStore:
    return open_objects(url)


def content_of(info_key: str, objects: ObjectStore) -> bytes:
    return objects.get(info_key, max_bytes=1 << 26)


def fetched_into(objects: ObjectStore, ref: Ref) -> bytes:
    """What stands before it in the file stays."""
    file = io.BytesIO(b"head")
    file.seek(4)
    objects.fetch_into(ref, file)
    assert file.getvalue().startswith(b"head")
    return file.getvalue()[4:]


def start(url: str, program: str) -> subprocess.Popen[bytes]:
    """A process with `objects` open that runs the program."""
    source = (
        f"import sys\nfrom infra.objects import open_objects\nobjects = open_objects({url!r})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", source + program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("size_bytes", [0, 1, 40_000, 3 * 1024 * 1024 + 1])
@pytest.mark.parametrize("kind", ["bytes", "stream", "path"])
def test_what_is_put_comes_back(
    objects: ObjectStore, tmp_path: Path, kind: str, size_bytes: int
) -> None:
    content = bytes(range(256)) * (size_bytes // 256) + b"x" * (size_bytes % 256)
    (tmp_path / "source").write_bytes(content)
    data: dict[str, Any] = {
        "bytes": content,
        "stream": io.BytesIO(content),
        "path": tmp_path / "source",
    }
    ref = objects.put("tenants/a/payloads/1", data[kind])
    assert ref == Ref("tenants/a/payloads/1", size_bytes, hashlib.sha256(content).hexdigest())
    assert objects.get(ref.key, max_bytes=size_bytes) == content
    assert objects.fetch(ref) == content
    assert fetched_into(objects, ref) == content
    assert objects.local(ref.key).read_bytes() == content
    with objects.open(ref.key) as stream:
        assert stream.read() == content


def test_a_put_stream_stays_open_and_is_read_from_where_it_stands(objects: ObjectStore) -> None:
    stream = io.BytesIO(b"head body")
    stream.seek(5)
    objects.put("a", stream)
    assert content_of("a", objects) == b"body"
    assert not stream.closed


def test_a_source_that_fails_leaves_no_object_and_its_own_error(
    objects: ObjectStore, tmp_path: Path
) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise ConnectionResetError("upload cut off")

    with pytest.raises(ConnectionResetError):
        objects.put("a", Broken())
    with pytest.raises(FileNotFoundError):
        objects.put("a", tmp_path / "not there")
    assert list(objects.list()) == []


def test_get_refuses_more_than_asked_for(objects: ObjectStore) -> None:
    objects.put("a", b"12345")
    with pytest.raises(InvalidJob, match="at most 4 bytes, it has 5") as caught:
        objects.get("a", max_bytes=4)
    assert caught.value.code == "object_too_large"


@pytest.mark.parametrize(
    ("stored", "code"),
    [(b"fOur", "object_mismatch"), (b"fou", "object_mismatch"), (b"fours", "object_too_large")],
)
def test_fetch_gives_only_what_was_referred_to(
    objects: ObjectStore, stored: bytes, code: str
) -> None:
    ref = objects.put("a", b"four")
    objects.put("a", stored)
    for fetch in (objects.fetch, partial(fetched_into, objects)):
        with pytest.raises(InvalidJob) as caught:
            fetch(ref)
        assert caught.value.code == code


def test_an_error_of_the_file_to_fetch_into_comes_as_it_is(objects: ObjectStore) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        objects.fetch_into(objects.put("a", b"x"), Full())


READS: dict[str, Callable[[ObjectStore, str], object]] = {
    "get": lambda objects, key: objects.get(key, max_bytes=1),
    "fetch": lambda objects, key: objects.fetch(Ref(key, 1, "0" * 64)),
    "fetch into": lambda objects, key: objects.fetch_into(Ref(key, 1, "0" * 64), io.BytesIO()),
    "open": lambda objects, key: objects.open(key),
    "local": lambda objects, key: objects.local(key),
}
WRITES: dict[str, Callable[[ObjectStore, str], object]] = {
    "put": lambda objects, key: objects.put(key, b"x"),
    "put if absent": lambda objects, key: objects.put(key, b"x", if_absent=True),
    "delete": lambda objects, key: objects.delete(key),
}
CALLS = READS | WRITES


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("key", ["b", "folder", "folder/a/b", "folder/b"])
def test_reading_what_is_not_there(
    objects: ObjectStore, read: Callable[[ObjectStore, str], object], key: str
) -> None:
    objects.put("folder/a", b"x")
    with pytest.raises(InvalidJob) as caught:
        read(objects, key)
    assert caught.value.code == "object_missing"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("key", HOSTILE_KEYS, ids=lambda key: ascii(key[:20]))
def test_hostile_keys_are_refused(
    objects: ObjectStore, call: Callable[[ObjectStore, str], object], key: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidJob) as caught:
        call(objects, key)
    assert caught.value.code == "object_key_invalid"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [key for key in HOSTILE_KEYS if key])
def test_hostile_folders_are_refused(objects: ObjectStore, key: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        list(objects.list(key))
    assert caught.value.code == "object_key_invalid"


@pytest.mark.parametrize(
    "key", ["lake/tenant=a/model=b/date=2026-01-01/0.parquet", "..a", ".a", "a b", "a" * 200]
)
def test_odd_keys_that_are_fine(objects: ObjectStore, key: str) -> None:
    objects.put(key, b"x")
    assert [info.key for info in objects.list()] == [key]


def test_list_gives_the_objects_of_one_folder_at_any_depth(objects: ObjectStore) -> None:
    for key in ("a/b", "a/c/d", "ab/c", "b"):
        objects.put(key, key.encode())
    found = {info.key: info.size_bytes for info in objects.list("a")}
    assert found == {"a/b": 3, "a/c/d": 5}
    assert {info.key for info in objects.list()} == {"a/b", "a/c/d", "ab/c", "b"}
    assert list(objects.list("nothing")) == list(objects.list("b")) == []


def test_a_changed_object_is_listed_as_changed(objects: ObjectStore) -> None:
    objects.put("a", b"x")
    (before,) = objects.list()
    objects.put("a", b"xy")
    (after,) = objects.list()
    assert (after.size_bytes, after.modified >= before.modified) == (2, True)


def test_deleted_is_gone_and_may_be_deleted_again(objects: ObjectStore) -> None:
    objects.put("a/b", b"x")
    objects.delete("a/b")
    objects.delete("a/b")
    objects.delete("a")
    assert list(objects.list()) == []


def test_an_open_object_does_not_change(objects: ObjectStore) -> None:
    objects.put("a", b"old")
    with objects.open("a") as first, objects.open("a") as second:
        objects.put("a", b"new")
        assert first.read() == b"old"
        objects.delete("a")
        assert second.read() == b"old"


def test_local_copies_of_a_folder_lie_together(objects: ObjectStore) -> None:
    objects.put("m/graph.onnx", b"graph")
    objects.put("m/weights/0.bin", b"weights")
    folder = objects.local("m/graph.onnx").parent
    assert objects.local("m/weights/0.bin") == folder / "weights" / "0.bin"


def test_if_absent_keeps_the_first(objects: ObjectStore) -> None:
    objects.put("a", b"first", if_absent=True)
    with pytest.raises(ObjectExists):
        objects.put("a", b"second", if_absent=True)
    assert content_of("a", objects) == b"first"


def test_of_many_if_absent_writers_one_wins(objects: ObjectStore) -> None:
    gate = threading.Barrier(8)

    def write(number: int) -> int | None:
        gate.wait()
        try:
            objects.put("a", str(number).encode() * 100_000, if_absent=True)
        except ObjectExists:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(write, range(8)) if number is not None]
    assert len(winners) == 1
    assert content_of("a", objects) == str(winners[0]).encode() * 100_000


def test_readers_see_the_old_object_or_the_new_one(objects: ObjectStore) -> None:
    contents = [b"o" * 300_000, b"n" * 200_000]
    objects.put("a", contents[0])
    written = threading.Event()

    def write() -> None:
        for number in range(20):
            objects.put("a", contents[number % 2])
        written.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not written.is_set() and not writing.done():
            assert content_of("a", objects) in contents
        writing.result()


def test_a_writer_killed_in_the_middle_leaves_nothing_to_see(
    url: str, objects: ObjectStore
) -> None:
    program = """
class Pipe:
    def read(self, size):
        print("reading", flush=True)
        return sys.stdin.buffer.read(1024 * 1024)
objects.put("a/b", Pipe())
"""
    writer = start(url, program)
    assert writer.stdin
    assert writer.stdout
    writer.stdin.write(bytes(2 * 1024 * 1024))
    writer.stdin.flush()
    for _ in range(3):
        assert writer.stdout.readline() == b"reading\n"
    kill(writer)
    assert list(objects.list()) == []
    with pytest.raises(InvalidJob):
        objects.get("a/b", max_bytes=1 << 30)
    objects.put("a/b", b"whole", if_absent=True)
    assert content_of("a/b", objects) == b"whole"


def test_killed_at_any_moment_what_was_acknowledged_is_there_and_all_is_whole(
    url: str, objects: ObjectStore
) -> None:
    program = """
import hashlib, itertools
for number in itertools.count():
    content = hashlib.sha256(f"{sys.argv}{number}".encode()).digest() * 3000
    ref = objects.put("o/" + hashlib.sha256(content).hexdigest(), content)
    print(ref.key, flush=True)
"""
    acknowledged = set()
    for kills in range(4):
        writer = start(url, program.replace("{sys.argv}", str(kills)))
        assert writer.stdout
        for _ in range(5 + kills):
            acknowledged.add(writer.stdout.readline().decode().strip())
        kill(writer)
    listed = {info.key for info in objects.list("o")}
    assert acknowledged <= listed
    for key in listed:
        assert key == "o/" + hashlib.sha256(content_of(key, objects)).hexdigest()


@pytest.mark.parametrize("wrong", ["", "/tmp/x", "file:", "file://", "file://relative", "ftp://x/"])
def test_an_unknown_address_is_refused(wrong: str) -> None:
    with pytest.raises(PipelineError, match="file:///") as caught:
        open_objects(wrong)
    assert caught.value.code == "settings_invalid"
