"""Proof that an entry of the engine cache is what was built: one flipped bit answers differently.

`manifest.json` names every file with its SHA-256, signed as a whole. It is written last and checked
first. The files are compared in full once; then their inodes, sizes and times are noted beside
them, and they are accepted by those until one of them changes. Where the files may not be on disk yet,
the note counts until the machine starts anew: after a power cut they are compared again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import TypeVar

import msgspec
from msgspec import Struct

from pipelines.engines.signing import Keyring, Signature

T = TypeVar("T")

ARTEFACT = "artefact"
MANIFEST = "manifest.json"
ACCEPTED = "accepted.json"

MANIFEST_LIMIT_BYTES = 8 * 1024 * 1024

PIECE_BYTES = 8 * 1024 * 1024
"""Files are hashed, and moved between machines, in pieces of this size."""

UNDECODABLE = (UnicodeDecodeError, msgspec.MsgspecError, RecursionError)
"""What decoding bytes from anywhere may raise; the last is of JSON that is nested too deeply."""

Stamp = tuple[int, int, int, int]
"""Inode, size, times of the last change to bytes and to the inode, in ns. The last cannot be set
by a program, so a file that was overwritten and dated back has another stamp."""


class Rejected(Exception):
    """An entry must not be served; the text says why. An answer, not a failure of the cache."""


class FileEntry(Struct, frozen=True):
    """sha256: of each piece of the file, in order."""

    size_bytes: int
    sha256: tuple[str, ...]


class BuildNote(Struct, frozen=True):
    """How an artefact was made, for people. at: seconds since the epoch. log: the builder's, its end
    if it is long."""

    at: float = 0.0
    seconds: float = 0.0
    host: str = ""
    log: str = ""


class Manifest(Struct, frozen=True):
    """key_parts: what the key is the hash of. label: which model it was first built for, for people.
    files: by path within the entry."""

    key: str
    key_parts: dict[str, object]
    label: str
    files: dict[str, FileEntry]
    build: BuildNote

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


class _Signed(Struct, frozen=True):
    """What is in the file: the manifest as the very bytes that were signed."""

    signature: Signature
    manifest: msgspec.Raw


class _Accepted(Struct, frozen=True):
    """The files as they were when they were found to be good. boot: the run of the machine that this is
    good for; None: it is on disk for good, as they are."""

    stamps: dict[str, Stamp]
    boot: str | None


def key_of(key_parts: dict[str, object]) -> str:
    canonical = json.dumps(key_parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def stamp_of(path: Path) -> Stamp:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path.name} is not a plain file")
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def sha256_of(path: Path) -> tuple[str, ...]:
    """Of each piece of the file."""
    return tuple(hashlib.sha256(piece).hexdigest() for piece in pieces_of(path))


def pieces_of(path: Path) -> Iterator[memoryview]:
    """Each is overwritten by the next."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, path.stat().st_size)))
    with path.open("rb", buffering=0) as file:
        while buffer and (length := _fill(file, buffer)):
            yield buffer[:length]


def _fill(file: RawIOBase, buffer: memoryview) -> int:
    length = 0
    while more := file.readinto(buffer[length:]):
        length += more
    return length


def seal(
    entry: Path, key_parts: dict[str, object], keyring: Keyring, label: str, note: BuildNote
) -> None:
    """Sign what was built, and make it durable: it may have taken minutes."""
    paths = _files(entry)
    files = {_name(entry, path): FileEntry(path.stat().st_size, sha256_of(path)) for path in paths}
    manifest = Manifest(key_of(key_parts), key_parts, label, files, note)
    content = msgspec.json.encode(manifest)
    signed = _Signed(keyring.sign(content), msgspec.Raw(content))
    finish(entry, msgspec.json.encode(signed))


def finish(entry: Path, signed: bytes, *, durable: bool = True) -> None:
    """The last step of an entry whose files were compared with this manifest.

    durable: whether it has to survive a power cut; what does not, shows. The folders are not waited
    for: a name that a power cut takes away is found to be missing.
    """
    (entry / MANIFEST).write_bytes(signed)
    _accept(entry, _stamps(entry), durable=durable)


def open_manifest(signed: bytes, key: str, keyring: Keyring) -> Manifest:
    """Raises Rejected unless it is signed, undamaged, and the manifest of this key."""
    try:
        envelope = msgspec.json.decode(signed, type=_Signed)
        content = bytes(envelope.manifest)
        if fault := keyring.fault(content, envelope.signature):
            raise Rejected(f"the manifest is not to be believed: {fault}")
        manifest = msgspec.json.decode(content, type=Manifest)
    except UNDECODABLE as error:
        raise Rejected(f"the manifest is unreadable: {error}") from error
    if manifest.key != key or key_of(manifest.key_parts) != key:
        raise Rejected(f"expected the manifest of {key}, found that of {manifest.key}")
    if strange := [name for name in manifest.files if not _is_inside(name)]:
        raise Rejected(f"expected files of the artefact, the manifest names {strange}")
    if partial := [name for name, file in manifest.files.items() if not _has_all_pieces(file)]:
        raise Rejected(f"expected a SHA-256 for each {PIECE_BYTES} bytes, not so for {partial}")
    return manifest


def check(entry: Path, key: str, keyring: Keyring, *, full: bool = False) -> Manifest:
    """The manifest of an entry that may be served. full: compare the files even if they were accepted.

    Raises Rejected.
    """
    try:
        manifest = open_manifest((entry / MANIFEST).read_bytes(), key, keyring)
        stamps = _stamps(entry)
        if not full and _is_accepted(entry, stamps):
            return manifest
        compare(entry, manifest)
    except OSError as error:
        raise Rejected(f"unreadable: {error}") from error
    with contextlib.suppress(OSError):  # read-only or full: the next process compares again
        _accept(entry, stamps, durable=True)
    return manifest


def compare(entry: Path, manifest: Manifest) -> None:
    """Raises Rejected unless the entry has these files, and OSError."""
    found = {_name(entry, path): path for path in _files(entry)}
    if found.keys() != manifest.files.keys():
        raise Rejected(f"expected the files {sorted(manifest.files)}, found {sorted(found)}")
    for name, path in found.items():
        if sha256_of(path) != manifest.files[name].sha256:
            raise Rejected(f"expected another SHA-256 for {name}: it is not what was built")


def _accept(entry: Path, stamps: dict[str, Stamp], *, durable: bool) -> None:
    boot = None if durable else _boot()
    if boot is None:
        for name in stamps:
            _sync(entry / name)
    write_json(entry / ACCEPTED, _Accepted(stamps, boot))


def _is_accepted(entry: Path, stamps: dict[str, Stamp]) -> bool:
    note = read_json(entry / ACCEPTED, _Accepted)
    return note is not None and note.stamps == stamps and note.boot in (None, _boot())


@functools.cache
def _boot() -> str | None:
    """This run of the machine, from its start to its end. None where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or None
    except OSError:
        return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    inside = len(path.parts) > 1 and path.parts[0] == ARTEFACT and ".." not in path.parts
    return inside and path.as_posix() == name and "\0" not in name


def _has_all_pieces(file: FileEntry) -> bool:
    return file.size_bytes >= 0 and len(file.sha256) == -(-file.size_bytes // PIECE_BYTES)


def _files(entry: Path) -> list[Path]:
    return [
        Path(folder, name)
        for folder, _, names in os.walk(entry / ARTEFACT)
        for name in sorted(names)
    ]


def _stamps(entry: Path) -> dict[str, Stamp]:
    return {_name(entry, path): stamp_of(path) for path in [*_files(entry), entry / MANIFEST]}


def _name(entry: Path, path: Path) -> str:
    return path.relative_to(entry).as_posix()


def read_json(path: Path, type_: type[T]) -> T | None:
    """None if there is no such file or something else in it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except (FileNotFoundError, *UNDECODABLE):
        return None


def write_json(path: Path, content: object) -> None:
    """Write so that a reader sees all of it or none. After a power cut it may be gone or garbage,
    which `read_json` takes for nothing."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(content))
    partial.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
