"""Proof that an entry of the engine cache is what was built: one flipped bit answers differently.

`seal` writes a SHA-256 of every file. `fault_of` compares them in full once, notes the files'
inodes, sizes and times beside them, and accepts the entry by those until one of them changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

T = TypeVar("T")

ARTEFACT = "artefact"
MANIFEST = "manifest.json"
ACCEPTED = "accepted.json"

Stamp = tuple[int, int, int, int]
"""Inode, size, times of the last change to bytes and to the inode, in ns. The last cannot be set
by a program, so a file that was overwritten and dated back has another stamp."""


class FileEntry(Struct, frozen=True):
    size_bytes: int
    sha256: str


class Manifest(Struct, frozen=True):
    """key_parts: what the key is the hash of, for people. files: by path within the entry."""

    key: str
    key_parts: dict[str, object]
    files: dict[str, FileEntry]


def stamp_of(path: Path) -> Stamp:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path.name} is not a plain file")
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(entry: Path, key: str, key_parts: dict[str, object]) -> None:
    """Make the entry's files durable, then write the manifest: an entry that has one is complete."""
    paths = _files(entry)
    for path in paths:
        _sync(path)
    files = {_name(entry, path): FileEntry(path.stat().st_size, sha256_of(path)) for path in paths}
    for folder, _, _ in os.walk(entry / ARTEFACT):
        _sync(Path(folder))
    write_json(entry / MANIFEST, Manifest(key, key_parts, files))
    write_json(entry / ACCEPTED, _stamps(entry))
    _sync(entry)


def fault_of(entry: Path, key: str) -> str | None:
    """Why this entry must not be served, or None if it may be."""
    try:
        stamps = _stamps(entry)
        if stamps == read_json(entry / ACCEPTED, dict[str, Stamp]):
            return None
        manifest = read_json(entry / MANIFEST, Manifest)
        if manifest is None:
            return "the manifest is unreadable"
        if fault := _difference(entry, key, manifest):
            return fault
    except OSError as error:
        return f"unreadable: {error}"
    with contextlib.suppress(OSError):  # read-only or full: the next process compares again
        write_json(entry / ACCEPTED, stamps)
    return None


def _difference(entry: Path, key: str, manifest: Manifest) -> str | None:
    if manifest.key != key:
        return f"expected the manifest of {key}, found that of {manifest.key}"
    found = {_name(entry, path): path for path in _files(entry)}
    if found.keys() != manifest.files.keys():
        return f"expected the files {sorted(manifest.files)}, found {sorted(found)}"
    for name, path in found.items():
        if sha256_of(path) != manifest.files[name].sha256:
            return f"expected the SHA-256 {manifest.files[name].sha256} for {name}, found another"
    return None


def _files(entry: Path) -> list[Path]:
    return [
        Path(folder, name)
        for folder, _, names in os.walk(entry / ARTEFACT)
        for name in sorted(names)
    ]


def _stamps(entry: Path) -> dict[str, Stamp]:
    return {_name(entry, path): stamp_of(path) for path in [entry / MANIFEST, *_files(entry)]}


def _name(entry: Path, path: Path) -> str:
    return path.relative_to(entry).as_posix()


def read_json(path: Path, type_: type[T]) -> T | None:
    """None if there is no such file or something else in it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except (FileNotFoundError, UnicodeDecodeError, msgspec.MsgspecError):
        return None


def write_json(path: Path, content: object) -> None:
    """Write so that a reader sees all of it or none, durably."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(content))
    _sync(partial)
    partial.replace(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
