"""The object store in a bucket of an S3 server, MinIO for one. What is put is there when the server has
answered; workers read models from copies on their own disk.
"""

from __future__ import annotations

import hashlib
import io
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import ProtocolError

from infra.objects import ObjectExists, ObjectInfo, check_content, check_digest, check_key
from infra.objects.local_copies import LocalCopies, on_disk
from infra.objects.s3_bucket import Bucket, parse
from infra.objects.s3_errors import UploadGone
from infra.settings import S3Settings
from schemas.errors import InvalidJob, PipelineError
from schemas.payloads import TENANTS, Ref

LARGE_BYTES = 64 * 1024 * 1024
"""What is larger goes in parts."""

PART_BYTES = 16 * 1024 * 1024
PARTS_AT_ONCE = 3
CHUNK_BYTES = 1024 * 1024
FETCH_CHUNK_BYTES = 256 * 1024
"""Small, because the last one is waited for: hashed and written when all else is."""

SHA256 = "x-amz-meta-sha256"
PUT_ID = "x-amz-meta-put"
IF_ABSENT = {"If-None-Match": "*"}

PROBE = "%probe"
"""The object that conditional writes are tried on. No key can name it, so it is never listed."""


class Source(NamedTuple):
    """What is to be put, held so that it can be read again."""

    file: BinaryIO
    size_bytes: int
    sha256: str


class S3Objects:
    """Implements `infra.objects.ObjectStore`; raises what `Bucket` does besides."""

    def __init__(self, url: str, settings: S3Settings) -> None:
        self._bucket = Bucket(parse(url), settings)
        name = hashlib.sha256(str(self._bucket.address).encode()).hexdigest()[:16]
        self._copies = LocalCopies(settings.cache_dir / name, settings.cache_bytes)
        self._probing = threading.Lock()
        self._probed = False

    def put(self, key: str, data: bytes | BinaryIO | Path, *, if_absent: bool = False) -> Ref:
        check_key(key)
        if if_absent:
            self.probe()
        with self._held(data, key) as source:
            headers = {SHA256: source.sha256, PUT_ID: uuid.uuid4().hex}
            condition = IF_ABSENT if if_absent else {}
            try:
                if source.size_bytes > LARGE_BYTES:
                    self._put_in_parts(key, source, headers, condition)
                else:
                    with on_disk(key):
                        body = source.file.read()
                    self._bucket.send("PUT", key, body=body, headers=headers | condition)
            except (ObjectExists, UploadGone):
                # If an answer was lost, it is this very put that is in the way of its repetition.
                if not self._is_from(key, headers[PUT_ID]):
                    raise
        return Ref(key, source.size_bytes, source.sha256)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        def consume(response: BaseHTTPResponse) -> bytes:
            _check_size(response, key, max_bytes)
            return response.read(decode_content=False)

        return self._bucket.read(check_key(key), consume)

    def fetch(self, ref: Ref) -> bytes:
        return check_content(ref, self.get(ref.key, max_bytes=ref.size_bytes))

    def fetch_into(self, ref: Ref, file: BinaryIO) -> None:
        """Hashes and writes what has come while the rest is on its way."""
        start = file.tell()

        def consume(response: BaseHTTPResponse) -> None:
            _check_size(response, ref.key, ref.size_bytes)
            file.seek(start)
            digest = hashlib.sha256()
            for chunk in response.stream(FETCH_CHUNK_BYTES, decode_content=False):
                digest.update(chunk)
                file.write(chunk)
            check_digest(ref, file.tell() - start, digest.hexdigest())

        self._bucket.read(check_key(ref.key), consume)

    def open(self, key: str) -> BinaryIO:
        """All of it is read before the first byte is given: what goes wrong goes wrong here."""
        check_key(key)
        file = self._copies.scratch(key)
        try:
            self._download(key, file)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def local(self, key: str) -> Path:
        """The server is asked each time whether the copy is still the object."""
        version = self._bucket.head(check_key(key)).headers["etag"]
        if copy := self._copies.find(key, version):
            return copy
        with self._copies.written_aside(key) as file:
            version = self._download(key, file)
            return self._copies.publish(file, key, version)

    def list(self, folder: str = "") -> Iterator[ObjectInfo]:
        prefix = f"{check_key(folder)}/" if folder else ""
        for found in self._bucket.list(prefix):
            key = found.object_name or ""
            if _is_key(key):
                modified = found.last_modified.timestamp() if found.last_modified else 0.0
                yield ObjectInfo(key, found.size or 0, modified)

    def delete(self, key: str) -> None:
        check_key(key)
        with suppress(InvalidJob):
            self._bucket.send("DELETE", key)
        self._copies.forget(key)

    def probe(self) -> None:
        """See that the server enforces conditional writes; once it does, it is not asked again.

        Raises PipelineError (conditional_writes_ignored).
        """
        with self._probing:
            if not self._probed:
                self._expect_refusal("PUT", self._probe_whole)
                self._expect_refusal("CompleteMultipartUpload", self._probe_parts)
                self._probed = True

    def ensure_bucket(self, expire_days: int) -> None:
        """Make the bucket if there is none, and have the server delete tenants' objects at this age.

        expire_days: longer than any record lives that may name an object.
        """
        self._bucket.ensure(TENANTS, expire_days)

    def _put_in_parts(
        self, key: str, source: Source, headers: dict[str, str], condition: dict[str, str]
    ) -> None:
        upload_id = self._bucket.begin_upload(key, headers)
        try:
            etags = self._upload_parts(key, source, upload_id)
            self._bucket.complete_upload(key, upload_id, etags, condition)
        except BaseException:
            with suppress(PipelineError):
                self._bucket.send("DELETE", key, query={"uploadId": upload_id}, attempts=1)
            raise

    def _upload_parts(self, key: str, source: Source, upload_id: str) -> Sequence[str]:
        reading = threading.Lock()

        def upload(number: int) -> str:
            with reading, on_disk(key):
                source.file.seek((number - 1) * PART_BYTES)
                body = source.file.read(PART_BYTES)
            query = {"partNumber": str(number), "uploadId": upload_id}
            return self._bucket.send("PUT", key, body=body, query=query).headers["etag"]

        parts = -(-source.size_bytes // PART_BYTES)
        with ThreadPoolExecutor(PARTS_AT_ONCE, "part") as pool:
            return tuple(pool.map(upload, range(1, parts + 1)))

    def _download(self, key: str, file: BinaryIO) -> str:
        """Write an object to a file. Returns its version."""

        def consume(response: BaseHTTPResponse) -> str:
            digest = hashlib.sha256()
            with on_disk(key):
                file.seek(0)
                file.truncate()
            for chunk in response.stream(CHUNK_BYTES, decode_content=False):
                digest.update(chunk)
                with on_disk(key):
                    file.write(chunk)
            with on_disk(key):
                file.flush()
            if response.headers.get(SHA256) not in (None, digest.hexdigest()):
                raise ProtocolError(f"object {key} arrived with other content than was put")
            return response.headers["etag"]

        return self._bucket.read(key, consume)

    @contextmanager
    def _held(self, data: bytes | BinaryIO | Path, key: str) -> Iterator[Source]:
        """Its size and digest are sent ahead of the data, and parts are sent again: so a stream is
        copied to disk first."""
        if isinstance(data, bytes):
            yield Source(io.BytesIO(data), len(data), hashlib.sha256(data).hexdigest())
            return
        opened = data.open("rb") if isinstance(data, Path) else nullcontext(data)
        with opened as stream, self._copies.scratch(key) as file:
            digest = hashlib.sha256()
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                with on_disk(key):
                    file.write(chunk)
            with on_disk(key):
                size_bytes = file.tell()
                file.seek(0)
            yield Source(file, size_bytes, digest.hexdigest())

    def _is_from(self, key: str, put_id: str) -> bool:
        try:
            return self._bucket.head(key).headers.get(PUT_ID) == put_id
        except InvalidJob:
            return False

    def _expect_refusal(self, what: str, write: Callable[[], object]) -> None:
        """Of two writes, the second at the latest must find the object there."""
        with suppress(ObjectExists):
            for _ in range(2):
                write()
            raise PipelineError(
                "conditional_writes_ignored",
                f"Object store, {self._bucket.address}: expected {what} with If-None-Match: * to be"
                " refused where there is an object, but it overwrote it; use a server that enforces"
                " conditional writes (AWS S3, MinIO).",
            )

    def _probe_whole(self) -> None:
        self._bucket.send("PUT", PROBE, body=b"probe", headers=IF_ABSENT)

    def _probe_parts(self) -> None:
        self._put_in_parts(PROBE, Source(io.BytesIO(b"probe"), 5, ""), {}, IF_ABSENT)


def _is_key(name: str) -> bool:
    """Consoles and other programs may have put what no key can name."""
    try:
        return bool(check_key(name))
    except InvalidJob:
        return False


def _check_size(response: BaseHTTPResponse, key: str, max_bytes: int) -> None:
    size_bytes = _size_bytes(response)
    if size_bytes > max_bytes:
        raise InvalidJob(
            "object_too_large",
            f"Object {key}: expected at most {max_bytes} bytes, it has {size_bytes}.",
        )


def _size_bytes(response: BaseHTTPResponse) -> int:
    try:
        return int(response.headers["content-length"])
    except (KeyError, ValueError):
        raise ProtocolError("an answer without its length") from None
