"""One bucket of an S3 server: each request takes a bounded time, is tried again where that may help,
and what the client library raises is translated here, once.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from itertools import count, islice
from typing import NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit
from xml.etree.ElementTree import ParseError
from xml.sax.saxutils import escape

from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.datatypes import Object
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from minio.lifecycleconfig import (
    AbortIncompleteMultipartUpload,
    Expiration,
    LifecycleConfig,
    Rule,
)
from urllib3 import BaseHTTPResponse, PoolManager, Timeout
from urllib3.exceptions import HTTPError, SSLError

from infra.objects import ObjectExists
from infra.settings import S3Settings
from schemas.errors import InvalidJob, PipelineError, Transient

CONNECTIONS_KEPT = 32
PAGE_OBJECTS = 1000
BACKOFF_S = 0.1
ABORT_UPLOADS_DAYS = 1
RULES = "headrace-"
"""Lifecycle rules of this name are ours; others are left as they are."""

T = TypeVar("T")

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"

_NO_ROOM = ("XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded")
_PASSING = (
    *("InternalError", "ServiceUnavailable", "SlowDown", "SlowDownRead", "SlowDownWrite"),
    *("RequestTimeout", "OperationAborted", "ConditionalRequestConflict"),
)
_PASSING_STATUS = (408, 429)
_IN_THE_WAY = ("XMinioParentIsObject", "XMinioObjectExistsAsDirectory", "ExistingObjectIsDirectory")

_KEYS = "set HEADRACE_S3__ACCESS_KEY and HEADRACE_S3__SECRET_KEY to credentials of this server"
_REGION = "set HEADRACE_S3__REGION to the bucket's region"
_REFUSED = {
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "AccessDenied": f"{_KEYS} that may read, write, list and delete in this bucket",
    "RequestTimeTooSkewed": "synchronise the clocks of this machine and the server",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
}


class Address(NamedTuple):
    """host: with its port, if it is given one."""

    host: str
    bucket: str
    secure: bool

    def __str__(self) -> str:
        return f"bucket {self.bucket} at {self.host}"


class UploadGone(Transient):
    """The upload in parts is not there: never begun, given up, or complete and the answer lost."""


def parse(url: str) -> Address:
    """Of `s3://host:port/bucket?secure=false`; over TLS unless told otherwise.

    Raises PipelineError (settings_invalid); it does not repeat a password.
    """
    try:
        parts = urlsplit(url)
        known = parts.port is None or parts.port > 0
    except ValueError:
        known = False
    if known and not parts.username and not parts.password and not parts.fragment:
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        secure = {None: True, "true": True, "false": False}.get(query.pop("secure", None))
        bucket = parts.path[1:]
        if parts.hostname and _BUCKET.fullmatch(bucket) and secure is not None and not query:
            return Address(parts.netloc, bucket, secure)
    raise PipelineError(
        "settings_invalid",
        "Object store: expected s3://host:port/bucket or s3://host:port/bucket?secure=false, came"
        f" {url.rpartition('@')[2][:200]!r}; credentials go into HEADRACE_S3__ACCESS_KEY and"
        " HEADRACE_S3__SECRET_KEY.",
    )


class Bucket:
    """Safe to use from several threads. Every method raises Transient (storage_full,
    storage_unavailable) and PipelineError (storage_access, storage_refused, bucket_missing)."""

    def __init__(self, address: Address, settings: S3Settings) -> None:
        access_key, secret_key = (
            secret.get_secret_value() for secret in (settings.access_key, settings.secret_key)
        )
        if not access_key or not secret_key:
            raise PipelineError("settings_invalid", f"Object store, {address}: {_KEYS}.")
        self.address = address
        self._attempts = settings.attempts
        # The library's own would take 5 attempts of 300 s each.
        pool = PoolManager(
            timeout=Timeout(connect=settings.connect_s, read=settings.read_s),
            maxsize=CONNECTIONS_KEPT,
            retries=False,
        )
        self._client = Minio(
            address.host,
            access_key=access_key,
            secret_key=secret_key,
            region=settings.region,
            secure=address.secure,
            http_client=pool,
        )

    def send(
        self,
        method: str,
        key: str,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
        attempts: int | None = None,
    ) -> BaseHTTPResponse:
        """The answer, read. Raises ObjectExists where a condition in the headers is not met, and
        InvalidJob (object_missing)."""
        return self._tried(
            key, lambda: self._request(method, key, body, headers, query), attempts or self._attempts
        )

    def read(self, key: str, consume: Callable[[BaseHTTPResponse], T]) -> T:
        """What `consume` makes of an object's stream; it is called anew when the stream breaks.

        Raises InvalidJob (object_missing).
        """

        def once() -> T:
            response = self._client._execute(
                "GET", self.address.bucket, key, headers={}, preload_content=False
            )
            try:
                result = consume(response)
            except BaseException:
                response.close()  # the rest of it would be in the next answer's way
                raise
            finally:
                response.release_conn()
            return result

        return self._tried(key, once, self._attempts)

    def head(self, key: str) -> BaseHTTPResponse:
        """An object's headers. Raises InvalidJob (object_missing)."""
        try:
            return self.send("HEAD", key)
        except InvalidJob:
            # An answer to HEAD has no body: what is missing may be the bucket.
            if not self.exists():
                raise self._bucket_missing() from None
            raise

    def page(self, prefix: str, after: str | None) -> list[Object]:
        """The next objects whose names begin with the prefix, in order; less than PAGE_OBJECTS at
        the end only."""

        def once() -> list[Object]:
            objects = self._client.list_objects(
                self.address.bucket, prefix=prefix, recursive=True, start_after=after
            )
            return list(islice(objects, PAGE_OBJECTS))

        return self._tried(prefix, once, self._attempts)

    def begin_upload(self, key: str, headers: dict[str, str]) -> str:
        """An upload in parts; nothing is seen of it until it is complete. Returns its id."""
        answer = self.send("POST", key, headers=headers, query={"uploads": ""}).data.decode()
        found = re.search(r"<UploadId>([^<]+)</UploadId>", answer)
        if not found:
            raise self._refused(f"it began an upload without an id: {answer[:200]!r}")
        return found[1]

    def complete_upload(
        self, key: str, upload_id: str, etags: Sequence[str], headers: dict[str, str]
    ) -> None:
        """Make one object of the parts. Raises ObjectExists and UploadGone."""
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag></Part>"
            for number, etag in enumerate(etags, 1)
        )
        body = (
            f'<CompleteMultipartUpload xmlns="{_NAMESPACE}">{parts}</CompleteMultipartUpload>'
        ).encode()
        self.send("POST", key, body=body, headers=headers, query={"uploadId": upload_id})

    def exists(self) -> bool:
        return self._tried(
            "", lambda: self._client.bucket_exists(self.address.bucket), self._attempts
        )

    def ensure(self, folder: str, expire_days: int) -> None:
        """Make the bucket if there is none. The server deletes what lies in the folder at this age,
        and uploads that were never completed."""
        self._tried("", self._make, self._attempts)
        self._tried("", lambda: self._set_lifecycle(folder, expire_days), self._attempts)

    def _make(self) -> None:
        try:
            if not self._client.bucket_exists(self.address.bucket):
                self._client.make_bucket(self.address.bucket)
        except S3Error as error:
            if error.code != "BucketAlreadyOwnedByYou":
                raise

    def _set_lifecycle(self, folder: str, expire_days: int) -> None:
        found = self._client.get_bucket_lifecycle(self.address.bucket)
        others = [r for r in found.rules if not (r.rule_id or "").startswith(RULES)] if found else []
        expire = Rule(
            ENABLED,
            rule_filter=Filter(prefix=f"{folder}/"),
            rule_id=f"{RULES}expire-{folder}",
            expiration=Expiration(days=expire_days),
        )
        abort = Rule(
            ENABLED,
            rule_filter=Filter(prefix=""),
            rule_id=f"{RULES}abort-uploads",
            abort_incomplete_multipart_upload=AbortIncompleteMultipartUpload(ABORT_UPLOADS_DAYS),
        )
        self._client.set_bucket_lifecycle(
            self.address.bucket, LifecycleConfig([*others, expire, abort])
        )

    def _request(
        self,
        method: str,
        key: str,
        body: bytes | None,
        headers: dict[str, str] | None,
        query: dict[str, str] | None,
    ) -> BaseHTTPResponse:
        """put_object and its like cannot send conditions, `_execute` can."""
        response = self._client._execute(
            method,
            self.address.bucket,
            key,
            body=body,
            headers=dict(headers or {}),
            query_params=dict(query or {}),
        )
        if method == "POST" and b"<Error>" in response.data:
            # A server that completes an upload says 200 before it knows.
            raise S3Error.fromxml(response)
        return response

    def _tried(self, key: str, once: Callable[[], T], attempts: int) -> T:
        for attempt in count(1):
            try:
                return once()
            except (MinioException, HTTPError, ParseError, UnicodeDecodeError) as error:
                problem = self._translated(error, key)
                if type(problem) is not Transient or attempt == attempts:
                    raise problem from error
            time.sleep(random.uniform(0, BACKOFF_S * 2**attempt))
        raise AssertionError("unreachable")

    def _translated(self, error: Exception, key: str) -> Exception:
        if isinstance(error, S3Error):
            return self._answered(error.response.status, error.code or "", error.message or "", key)
        if isinstance(error, InvalidResponseError):
            return self._answered(error._code, "", str(error), key)
        if isinstance(error, ServerError):
            return self._answered(error.status_code, "", str(error), key)
        if isinstance(error, SSLError) and "EOF" not in str(error):
            return self._refused(f"no TLS with it: {error}; see ?secure= and its certificate")
        if isinstance(error, HTTPError):
            return self._unavailable(str(error))
        return self._refused(f"expected S3's XML, came other content: {error}; is it an S3 server?")

    def _answered(self, status: int, code: str, message: str, key: str) -> Exception:
        """What an answer means that is not the wanted one."""
        said = f"{code or status}: {message}"
        if code == "PreconditionFailed" or status == 412:
            return ObjectExists(key)
        if code == "NoSuchBucket":
            return self._bucket_missing()
        if code == "NoSuchUpload":
            return UploadGone("storage_unavailable", f"Object {key}: its upload in parts is gone.")
        if code == "NoSuchKey":
            return InvalidJob("object_missing", f"Object {key}: there is none; put it first.")
        if code in _IN_THE_WAY:
            return InvalidJob(
                "object_key_invalid",
                f"Object key {key}: it is a folder, or lies under an object; choose another.",
            )
        if code in _REFUSED:
            return PipelineError(
                "storage_access", f"Object store, {self.address}: {said}; {_REFUSED[code]}."
            )
        if code in _NO_ROOM or status == 507:
            return Transient(
                "storage_full", f"Object {key}: no room in {self.address}: {said}; free some."
            )
        if code in _PASSING or status in _PASSING_STATUS or status >= 500:
            return self._unavailable(said)
        return self._refused(said)

    def _unavailable(self, why: str) -> Transient:
        return Transient("storage_unavailable", f"Object store, {self.address}: {why}")

    def _refused(self, why: str) -> PipelineError:
        return PipelineError("storage_refused", f"Object store, {self.address}: {why}")

    def _bucket_missing(self) -> PipelineError:
        return PipelineError(
            "bucket_missing",
            f"Object store: there is no {self.address}; make it, or correct HEADRACE_OBJECTS_URL.",
        )
