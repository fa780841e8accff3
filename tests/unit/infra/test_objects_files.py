"""What only the object store in a folder has: a disk that fills up, fsync, leftovers."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.objects.files import UNFINISHED, UNFINISHED_KEPT_S, FileObjects
from schemas.errors import InvalidJob, Transient


def test_a_full_disk_is_transient_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the kernel refuses the same write."""
    program = f"""
from pathlib import Path
from infra.objects.files import FileObjects
from schemas.errors import Transient
objects = FileObjects(Path({str(tmp_path)!r}))
try:
    objects.put("large", bytes(3_000_000))
except Transient as error:
    print(error.code)
objects.put("small", b"fits")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000)),
    )
    assert done.stdout == "storage_full\n"
    assert [info.key for info in FileObjects(tmp_path).list()] == ["small"]
    assert list((tmp_path / UNFINISHED).iterdir()) == []


def test_a_folder_that_cannot_be_made_is_transient(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Transient) as caught:
        FileObjects(tmp_path / "file" / "store").put("a", b"x")
    assert caught.value.code == "storage_unavailable"


def test_an_object_is_on_disk_before_it_has_a_name_and_its_name_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int | str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        steps.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def recording_replace(source: Path, target: Path) -> None:
        steps.append("publish")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    objects = FileObjects(tmp_path)
    objects.put("new/object", b"x")
    objects.put("new/object", b"y")
    names = {path.stat().st_ino: path.name for path in tmp_path.rglob("*")}
    names[tmp_path.stat().st_ino] = "root"
    replaced = "no longer there"
    assert [step if step == "publish" else names.get(int(step), replaced) for step in steps] == [
        *("root", replaced, "root", "publish", "new"),
        *("object", "publish", "new"),
    ]


@pytest.mark.parametrize("key", ["folder", "folder/a/b"])
def test_a_key_is_never_the_folder_of_another(tmp_path: Path, key: str) -> None:
    objects = FileObjects(tmp_path)
    objects.put("folder/a", b"x")
    with pytest.raises(InvalidJob) as caught:
        objects.put(key, b"y")
    assert caught.value.code == "object_key_invalid"
    assert objects.get("folder/a", max_bytes=1) == b"x"


def test_what_killed_writers_left_is_deleted_after_a_day(tmp_path: Path) -> None:
    unfinished = tmp_path / UNFINISHED
    unfinished.mkdir()
    old = time.time() - UNFINISHED_KEPT_S - 60
    for name in ("old", "young"):
        (unfinished / name).write_bytes(b"half")
    os.utime(unfinished / "old", (old, old))
    objects = FileObjects(tmp_path)
    assert [path.name for path in unfinished.iterdir()] == ["young"]
    assert list(objects.list()) == []
