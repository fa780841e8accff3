"""Copies of remote objects on this machine's disk: whole or absent, of one version, bounded."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from infra.objects.local_copies import KEPT_S, UNFINISHED, LocalCopies
from schemas.errors import InvalidJob, Transient


@pytest.fixture
def copies(tmp_path: Path) -> LocalCopies:
    return LocalCopies(tmp_path / "cache", 1000)


def add(copies: LocalCopies, key: str, content: bytes, version: str = "1") -> Path:
    with copies.written_aside(key) as file:
        file.write(content)
        return copies.publish(file, key, version)


def make_old(path: Path) -> None:
    """As if nobody had asked for it for more than an hour; the older ones are made old first."""
    seconds = time.time() - KEPT_S - 1
    os.utime(path, ns=(int(seconds * 1e9), path.stat().st_mtime_ns))


def test_a_copy_is_found_by_its_version(copies: LocalCopies) -> None:
    path = add(copies, "m/graph", b"graph", '"e1"')
    assert copies.find("m/graph", '"e1"') == path
    assert path.read_bytes() == b"graph"
    assert copies.find("m/graph", '"e2"') is None
    assert copies.find("m/other", '"e1"') is None
    assert copies.find("m/graph/under", '"e1"') is None


def test_a_new_version_takes_the_place_of_the_old_one(copies: LocalCopies) -> None:
    add(copies, "a", b"old", "1")
    path = add(copies, "a", b"new", "2")
    assert copies.find("a", "1") is None
    assert copies.find("a", "2") == path
    assert path.read_bytes() == b"new"


def test_what_is_not_published_leaves_nothing(copies: LocalCopies, tmp_path: Path) -> None:
    def break_off() -> None:
        with copies.written_aside("a") as file:
            file.write(b"half")
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        break_off()
    copies.scratch("a").close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_above_the_limit_the_longest_unused_copies_go(copies: LocalCopies) -> None:
    paths = [add(copies, f"m/{number}", bytes(400)) for number in range(2)]
    for path in paths:
        make_old(path)
    assert copies.find("m/0", "1") == paths[0]
    add(copies, "m/2", bytes(400))
    assert not paths[1].exists()
    assert paths[0].exists()


def test_no_copy_goes_within_an_hour_of_its_use(copies: LocalCopies) -> None:
    paths = [add(copies, f"m/{number}", bytes(600)) for number in range(3)]
    assert all(path.exists() for path in paths)


def test_what_killed_processes_left_goes_with_the_rest(copies: LocalCopies, tmp_path: Path) -> None:
    add(copies, "a", b"x")
    left = tmp_path / "cache" / UNFINISHED / "left"
    left.write_bytes(bytes(900))
    os.utime(left, (0, 0))
    add(copies, "b", bytes(200))
    assert not left.exists()
    assert copies.find("a", "1")


def test_forgetting_what_is_not_there_is_no_error(copies: LocalCopies) -> None:
    path = add(copies, "a", b"x")
    copies.forget("a")
    copies.forget("a")
    assert not path.exists()


@pytest.mark.parametrize("key", ["folder", "folder/a/b"])
def test_a_key_is_never_the_folder_of_another(copies: LocalCopies, key: str) -> None:
    add(copies, "folder/a", b"x")
    with pytest.raises(InvalidJob) as caught:
        add(copies, key, b"y")
    assert caught.value.code == "object_key_invalid"


def test_a_full_disk_is_transient_and_says_where(
    copies: LocalCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(Transient, match="HEADRACE_S3__CACHE_DIR") as caught:
        add(copies, "a", b"x")
    assert caught.value.code == "storage_full"
    assert copies.find("a", "1") is None


def test_a_folder_that_cannot_be_made_is_transient(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Transient) as caught:
        add(LocalCopies(tmp_path / "file" / "cache", 1000), "a", b"x")
    assert caught.value.code == "storage_unavailable"
