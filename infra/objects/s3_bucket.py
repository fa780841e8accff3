"""One bucket of an S3 server: each request takes a bounded time, is tried again where that may help,
and what the client library raises is translated here, once.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit
from xml.etree.ElementTree import ParseError
from xml.sax.saxutils import escape

from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.datatypes import Object
from minio.error import MinioException, S3Error
from minio.lifecycleconfig import (
    AbortIncompleteMultipartUpload,
    Expiration,
    LifecycleConfig,
    Rule,
)
from urllib3 import BaseHTTPResponse, PoolManager, Timeout
from urllib3.exceptions import HTTPError

from infra.objects.s3_errors import CREDENTIALS, bucket_missing, refused, translated
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
_RULE_UNKNOWN = ("InvalidArgument", "MalformedXML", "NotImplemented")
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class Address(NamedTuple):
    """host: with its port, if it is given one."""

    host: str
    bucket: str
    secure: bool

    def __str__(self) -> str:
        return f"bucket {self.bucket} at {self.host}"


def parse(url: str) -> Address:
    """Of `s3://host:port/bucket?secure=false`; over TLS unless told otherwise.

    Raises PipelineError (settings_invalid), which repeats no password.
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
        "Object store: expected s3://host:port/bucket, with ?secure=false where there is no TLS, came"
        f" {url.rpartition('@')[2].partition('?')[0]!r}; credentials go into HEADRACE_S3__ACCESS_KEY and"
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
            raise PipelineError("settings_invalid", f"Object store, {address}: {CREDENTIALS}.")
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
            key,
            lambda: self._request(method, key, body, headers, query),
            attempts or self._attempts,
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
                raise bucket_missing(str(self.address)) from None
            raise

    def list(self, prefix: str) -> Iterator[Object]:
        """The objects whose names begin with the prefix, a page at a time."""
        after: str | None = None

        def once() -> Sequence[Object]:
            objects = self._client.list_objects(
                self.address.bucket, prefix=prefix, recursive=True, start_after=after
            )
            return tuple(islice(objects, PAGE_OBJECTS))

        while page := self._tried(prefix, once, self._attempts):
            yield from page
            if len(page) < PAGE_OBJECTS:
                return
            after = page[-1].object_name

    def begin_upload(self, key: str, headers: dict[str, str]) -> str:
        """An upload in parts; nothing is seen of it until it is complete. Returns its id."""
        answer = self.send("POST", key, headers=headers, query={"uploads": ""}).data.decode()
        found = re.search(r"<UploadId>([^<]+)</UploadId>", answer)
        if not found:
            raise refused(str(self.address), f"it began an upload without an id: {answer[:200]!r}")
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

    def expire_days(self, folder: str) -> int | None:
        """At what age the server deletes what lies in the folder; None if it does not."""
        found = self._tried(
            "",
            lambda: self._client.get_bucket_lifecycle(self.address.bucket),
            self._attempts,
        )
        ages = [
            rule.expiration.days
            for rule in (found.rules if found else [])
            if rule.status == ENABLED
            and rule.expiration
            and rule.expiration.days
            and rule.rule_filter
            and rule.rule_filter.prefix == f"{folder}/"
        ]
        return min(ages, default=None)

    def _make(self) -> None:
        try:
            if not self._client.bucket_exists(self.address.bucket):
                self._client.make_bucket(self.address.bucket)
        except S3Error as error:
            if error.code != "BucketAlreadyOwnedByYou":
                raise

    def _set_lifecycle(self, folder: str, expire_days: int) -> None:
        found = self._client.get_bucket_lifecycle(self.address.bucket)
        others = (
            [r for r in found.rules if not (r.rule_id or "").startswith(RULES)] if found else []
        )
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
        try:
            self._set_rules([*others, expire, abort])
        except S3Error as error:
            if error.code not in _RULE_UNKNOWN:
                raise
            # MinIO has no rule for uploads: by itself it deletes those that are a day old.
            self._set_rules([*others, expire])

    def _set_rules(self, rules: Sequence[Rule]) -> None:
        self._client.set_bucket_lifecycle(self.address.bucket, LifecycleConfig([*rules]))

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
            except (MinioException, HTTPError, ParseError, ValueError) as error:
                problem = translated(error, key, str(self.address))
                if type(problem) is not Transient or attempt == attempts:
                    raise problem from error
            time.sleep(random.uniform(0, BACKOFF_S * 2**attempt))
        raise AssertionError("unreachable")
