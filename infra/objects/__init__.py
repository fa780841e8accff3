"""The object store's contract. On a job's path: large payloads before a job is appended, large
results before its outcome is written, and the models that workers load.

An object is whole or absent, and on disk when `put` returns.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol
from urllib.parse import unquote

from schemas.errors import InvalidJob, PipelineError
from schemas.payloads import Ref

if TYPE_CHECKING:
    from infra.settings import S3Settings, Settings

KEY_LIMIT_BYTES = 512
SEGMENT_LIMIT_BYTES = 200
"""A segment is a file name in the file store; the rest of 255 is room for a suffix of its own."""

_SEGMENT = re.compile(r"[A-Za-z0-9._=+@:,() -]+")


class ObjectInfo(NamedTuple):
    """modified: seconds since the epoch, by the store's clock."""

    key: str
    size_bytes: int
    modified: float


class ObjectStore(Protocol):
    """Safe to use from several threads.

    Every method raises InvalidJob (object_key_invalid; object_missing where it reads) and
    Transient (storage_full, storage_unavailable). A key is never the folder of another key.
    """

    def put(self, key: str, data: bytes | BinaryIO | Path, *, if_absent: bool = False) -> Ref:
        """Store an object, in place of an older one. Durable on return; readers see old or new.

        data: a file is read in pieces from where it stands, and stays the caller's to close; what
        goes wrong in reading it comes as it is. Raises ObjectExists with if_absent: of several
        such writers one wins.
        """

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """Raises InvalidJob (object_too_large) before it reads more than max_bytes."""

    def fetch(self, ref: Ref) -> bytes:
        """The bytes that were referred to, size and SHA-256 checked.

        Raises InvalidJob (object_mismatch; object_too_large without reading them).
        """

    def fetch_into(self, ref: Ref, file: BinaryIO) -> None:
        """The same, written to a file from where it stands, as the bytes come: where this raises, what was
        written is worth nothing. What goes wrong in writing comes as it is."""

    def open(self, key: str) -> BinaryIO:
        """For reading in pieces; the caller closes it. A later put or delete does not change it."""

    def local(self, key: str) -> Path:
        """A whole copy on this machine's disk, read-only. Objects of one folder lie in one folder,
        under the last segment of their keys. Valid until the object is deleted; where it is a copy,
        for an hour at least, and open files for as long as they are open."""

    def list(self, folder: str = "") -> Iterator[ObjectInfo]:
        """Objects whose keys begin with `folder/`, or all of them; in no order. What is put or
        deleted meanwhile may or may not be among them."""

    def delete(self, key: str) -> None:
        """Deleting what is not there is no error."""


class ObjectExists(Exception):
    """put(if_absent=True) found an object at its key. An answer, not a failure of the store."""


def open_objects(url: str, s3: S3Settings | None = None) -> ObjectStore:
    """The store at `file:///folder`, made at the first put; the path is percent-decoded. Or the one
    at `s3://host:port/bucket?secure=false`.

    s3: read from the environment if it is not given. Raises PipelineError (settings_invalid).
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "file" and separator and rest.startswith("/"):
        from infra.objects.files import FileObjects

        return FileObjects(Path(unquote(rest)))
    if scheme == "s3" and separator:
        return _open_s3(url, s3)
    raise PipelineError(
        "settings_invalid",
        "Object store: expected file:///an/absolute/folder or s3://host:port/bucket, came"
        f" {url.rpartition('@')[2]!r}.",
    )


def connect_objects(settings: Settings) -> ObjectStore:
    """The store of the settings."""
    return open_objects(settings.objects_address, settings.s3)


def _open_s3(url: str, settings: S3Settings | None) -> ObjectStore:
    from infra.settings import load_settings

    try:
        from infra.objects.s3 import S3Objects
    except ModuleNotFoundError as error:
        raise PipelineError(
            "extra_missing",
            f"Object store: s3:// needs the package {error.name}; pip install 'headrace[s3]'.",
        ) from error
    return S3Objects(url, settings or load_settings().s3)


def check_key(key: str) -> str:
    """The key itself. Raises InvalidJob (object_key_invalid)."""
    segments = key.split("/")
    if len(key.encode(errors="replace")) > KEY_LIMIT_BYTES or not all(map(_is_sane, segments)):
        raise InvalidJob(
            "object_key_invalid",
            f"Object key: expected at most {KEY_LIMIT_BYTES} bytes of segments parted by '/', each"
            f" of letters, digits and ._=+@:,()- and none of them '.', '..', empty or over"
            f" {SEGMENT_LIMIT_BYTES} bytes; came {key[:80]!r}.",
        )
    return key


def check_content(ref: Ref, data: bytes) -> bytes:
    """The data itself. Raises InvalidJob (object_mismatch) unless it is what the reference says."""
    check_digest(ref, len(data), hashlib.sha256(data).hexdigest())
    return data


def check_digest(ref: Ref, size_bytes: int, sha256: str) -> None:
    """Raises InvalidJob (object_mismatch) unless they are what the reference says."""
    if (size_bytes, sha256) != (ref.size_bytes, ref.sha256):
        raise InvalidJob(
            "object_mismatch",
            f"Object {ref.key}: expected {ref.size_bytes} bytes with SHA-256 {ref.sha256}, found"
            f" {size_bytes} bytes with {sha256}; put it again and refer to what `put` returned.",
        )


def _is_sane(segment: str) -> bool:
    return (
        len(segment) <= SEGMENT_LIMIT_BYTES
        and segment not in (".", "..")
        and _SEGMENT.fullmatch(segment) is not None
    )
