"""What the object store makes of a server's answers, by a server that answers as it is told."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from infra.objects import ObjectExists, ObjectStore
from infra.objects.s3 import S3Objects
from infra.settings import S3Settings
from schemas.errors import InvalidJob, PipelineError, Transient
from schemas.payloads import Ref

ATTEMPTS = 3


class Answer(NamedTuple):
    """missing: so many bytes of the body that it announces do not come before the connection ends."""

    status: int
    body: str = ""
    content_type: str = "application/xml"
    missing: int = 0


OK = Answer(200)
BEGUN = Answer(200, "<X><UploadId>u</UploadId></X>")


def failure(status: int, code: str) -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code><Message>as it says</Message></Error>")


EXISTS = failure(412, "PreconditionFailed")


class ScriptedServer(ThreadingHTTPServer):
    """answers: the next ones, the last of them for ever. requests: method and path of each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = []
        self.requests: list[str] = []

    def next_answer(self, request: str) -> Answer:
        self.requests.append(request)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.next_answer(f"{self.command} {self.path}")
        body = answer.body.encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(body) + answer.missing))
        self.send_header("ETag", '"e"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = answer.missing > 0

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        thread = threading.Thread(target=scripted.serve_forever, args=(0.01,))
        thread.start()
        yield scripted
        scripted.shutdown()
        thread.join()


@pytest.fixture
def objects(server: ScriptedServer, tmp_path: Path) -> Iterator[S3Objects]:
    keys = {"access_key": "a", "secret_key": "b"}
    settings = S3Settings.model_validate({**keys, "cache_dir": tmp_path, "attempts": ATTEMPTS})
    store = S3Objects(f"s3://127.0.0.1:{server.server_port}/jobs?secure=false", settings)
    yield store
    # The server waits for its connections to be closed.
    store._bucket._client._http.clear()


CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "put": lambda objects: objects.put("a", b"x"),
    "get": lambda objects: objects.get("a", max_bytes=9),
    "list": lambda objects: list(objects.list()),
    "delete": lambda objects: objects.delete("a"),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (failure(500, "InternalError"), "storage_unavailable"),
        (failure(503, "SlowDown"), "storage_unavailable"),
        (failure(503, "XMinioServerNotInitialized"), "storage_unavailable"),
        (failure(409, "OperationAborted"), "storage_unavailable"),
        (Answer(502, "<html>bad gateway</html>", "text/html"), "storage_unavailable"),
        (Answer(429, "later", "text/plain"), "storage_unavailable"),
        (failure(507, "XMinioStorageFull"), "storage_full"),
        (Answer(507, "full", "text/plain"), "storage_full"),
        (failure(400, "XMinioAdminBucketQuotaExceeded"), "storage_full"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.status} {value.body[13:30]}",
)
def test_what_may_pass_is_tried_again_and_then_transient(
    server: ScriptedServer,
    objects: S3Objects,
    call: Callable[[ObjectStore], object],
    answer: Answer,
    code: str,
) -> None:
    server.answers = [answer]
    with pytest.raises(Transient) as caught:
        call(objects)
    assert caught.value.code == code
    assert len(server.requests) == ATTEMPTS


@every_call
@pytest.mark.parametrize(
    ("answer", "code", "remedy"),
    [
        (failure(403, "SignatureDoesNotMatch"), "storage_access", "HEADRACE_S3__SECRET_KEY"),
        (failure(403, "AccessDenied"), "storage_access", "read, write, list and delete"),
        (failure(403, "RequestTimeTooSkewed"), "storage_access", "Synchronise the clocks"),
        (failure(400, "AuthorizationHeaderMalformed"), "storage_access", "HEADRACE_S3__REGION"),
        (failure(404, "NoSuchBucket"), "bucket_missing", "HEADRACE_OBJECTS_URL"),
        (failure(400, "NewInTheYear2030"), "storage_refused", "as it says"),
        (Answer(404, "<html>no such page</html>", "text/html"), "storage_refused", "404"),
        (Answer(400, "garbage <", "application/xml"), "storage_refused", "is it an S3 server"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.status} {value.body[13:30]}",
)
def test_what_will_not_pass_is_not_tried_again_and_names_the_remedy(
    server: ScriptedServer,
    objects: S3Objects,
    call: Callable[[ObjectStore], object],
    answer: Answer,
    code: str,
    remedy: str,
) -> None:
    server.answers = [answer]
    with pytest.raises(PipelineError, match=remedy) as caught:
        call(objects)
    assert (type(caught.value), caught.value.code) == (PipelineError, code)
    assert len(server.requests) == 1


def test_a_listing_that_is_none_is_refused(server: ScriptedServer, objects: S3Objects) -> None:
    server.answers = [Answer(200, "<html></html>")]
    with pytest.raises(PipelineError, match="is it an S3 server") as caught:
        list(objects.list())
    assert caught.value.code == "storage_refused"


@every_call
def test_a_server_that_is_busy_for_a_moment_is_not_noticed(
    server: ScriptedServer, objects: S3Objects, call: Callable[[ObjectStore], object]
) -> None:
    listing = (
        "<ListBucketResult><Name>jobs</Name><IsTruncated>false</IsTruncated></ListBucketResult>"
    )
    done = Answer(200, listing if call is CALLS["list"] else "")
    server.answers = [failure(503, "SlowDown"), failure(503, "SlowDown"), done]
    call(objects)
    assert len(server.requests) == ATTEMPTS


def test_a_key_under_an_object_is_refused(server: ScriptedServer, objects: S3Objects) -> None:
    server.answers = [failure(400, "XMinioParentIsObject")]
    with pytest.raises(InvalidJob) as caught:
        objects.put("a/b", b"x")
    assert caught.value.code == "object_key_invalid"


def test_a_server_that_ignores_conditions_is_found_out_before_anything_is_written(
    server: ScriptedServer, objects: S3Objects
) -> None:
    server.answers = [OK]
    for call in (lambda: objects.put("a", b"x", if_absent=True), objects.probe):
        with pytest.raises(PipelineError, match="expected PUT with If-None-Match") as caught:
            call()
        assert caught.value.code == "conditional_writes_ignored"
    assert set(server.requests) == {"PUT /jobs/%25probe"}


def test_a_server_that_ignores_conditions_for_parts_is_found_out(
    server: ScriptedServer, objects: S3Objects
) -> None:
    part = completed = OK
    server.answers = [EXISTS, *(BEGUN, part, completed) * 2]
    with pytest.raises(PipelineError, match="expected CompleteMultipartUpload") as caught:
        objects.probe()
    assert caught.value.code == "conditional_writes_ignored"


def test_what_the_probe_has_seen_is_not_asked_again(
    server: ScriptedServer, objects: S3Objects
) -> None:
    server.answers = [OK, EXISTS, BEGUN, OK, EXISTS, OK]
    objects.probe()
    asked = len(server.requests)
    objects.probe()
    objects.put("a", b"x", if_absent=True)
    assert server.requests[asked:] == ["PUT /jobs/a"]


def test_a_probe_that_found_no_server_asks_again(
    server: ScriptedServer, objects: S3Objects
) -> None:
    server.answers = [failure(503, "SlowDown")]
    with pytest.raises(Transient):
        objects.probe()
    server.answers = [EXISTS, BEGUN, OK, EXISTS, OK]
    objects.probe()


def test_a_failure_after_status_200_is_a_failure(
    server: ScriptedServer, objects: S3Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 says 200 before it has put the parts together."""
    monkeypatch.setattr("infra.objects.s3.LARGE_BYTES", 1)
    server.answers = [BEGUN, OK, failure(200, "InternalError")]
    with pytest.raises(Transient) as caught:
        objects.put("a", b"xx")
    assert caught.value.code == "storage_unavailable"
    completions = [r for r in server.requests if r == "POST /jobs/a?uploadId=u"]
    assert len(completions) == ATTEMPTS


def test_a_conflict_with_another_writer_is_decided_by_trying_again(
    server: ScriptedServer, objects: S3Objects
) -> None:
    probed = [EXISTS, BEGUN, OK, EXISTS, OK]
    server.answers = [*probed, failure(409, "ConditionalRequestConflict"), EXISTS, OK]
    with pytest.raises(ObjectExists):
        objects.put("a", b"x", if_absent=True)


def test_bytes_are_given_as_they_were_put_whatever_their_encoding_is_said_to_be(
    server: ScriptedServer, objects: S3Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a few bytes could become any number of them."""
    send_header = _Handler.send_header

    def as_gzip(handler: _Handler, keyword: str, value: str) -> None:
        send_header(handler, keyword, value)
        if keyword == "ETag":
            send_header(handler, "Content-Encoding", "gzip")

    monkeypatch.setattr(_Handler, "send_header", as_gzip)
    server.answers = [Answer(200, "not gzip", "text/plain")]
    assert objects.get("a", max_bytes=8) == b"not gzip"
    with objects.open("a") as file:
        assert file.read() == b"not gzip"


def test_a_download_that_ends_too_early_is_begun_anew(
    server: ScriptedServer, objects: S3Objects
) -> None:
    ref = Ref("a", 4, hashlib.sha256(b"good").hexdigest())
    server.answers = [Answer(200, "ba", missing=2), Answer(200, "good")]
    file = io.BytesIO(b"> ")
    file.seek(2)
    objects.fetch_into(ref, file)
    assert file.getvalue() == b"> good"
    server.answers = [Answer(200, "ba", missing=2)]
    with pytest.raises(Transient):
        objects.fetch_into(ref, io.BytesIO())
    assert len(server.requests) == 2 + ATTEMPTS
