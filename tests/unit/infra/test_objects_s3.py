"""What only the object store on an S3 server has: its address, parts, a network that fails, local copies."""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule

from infra.objects import ObjectExists, ObjectStore, open_objects, s3, s3_bucket
from infra.objects.s3 import S3Objects
from infra.objects.s3_bucket import Address, parse
from infra.settings import S3Settings
from schemas.errors import InvalidJob, PipelineError, Transient
from schemas.payloads import Ref
from tests.servers.minio import MinioServer, minio_address, minio_server, patience
from tests.servers.proxy import Proxy, proxy_before
from tests.servers.s3 import REGION, S3Server

pytestmark = patience()

HASTY = {"connect_s": 1, "read_s": 1, "attempts": 2}
MIB = 1024 * 1024
REF = Ref("a", 1, hashlib.sha256(b"x").hexdigest())

CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "put": lambda objects: objects.put("a", b"x"),
    "put if absent": lambda objects: objects.put("a", b"x", if_absent=True),
    "get": lambda objects: objects.get("a", max_bytes=9),
    "fetch": lambda objects: objects.fetch(REF),
    "fetch into": lambda objects: objects.fetch_into(REF, io.BytesIO()),
    "open": lambda objects: objects.open("a").close(),
    "local": lambda objects: objects.local("a"),
    "list": lambda objects: list(objects.list()),
    "delete": lambda objects: objects.delete("a"),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with minio_address() as address:
        yield address


@pytest.fixture
def bucket(server: S3Server) -> Iterator[str]:
    with server.bucket() as name:
        yield name


@pytest.fixture
def objects(server: S3Server, bucket: str, tmp_path: Path) -> S3Objects:
    return S3Objects(server.url(bucket), server.settings(tmp_path))


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with proxy_before(server.host) as made:
        yield made


@pytest.fixture
def far(server: S3Server, bucket: str, proxy: Proxy, tmp_path: Path) -> S3Objects:
    """The same store behind a network that fails as the proxy is told."""
    return S3Objects(server.url(bucket, proxy.host), server.settings(tmp_path / "far", **HASTY))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """The smallest parts that servers take; returns the size of an object that is of three."""
    monkeypatch.setattr(s3, "LARGE_BYTES", 6 * MIB)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)
    return 11 * MIB


def client_of(server: S3Server) -> Minio:
    return Minio(
        server.host, server.access_key, server.secret_key, secure=server.secure, region=REGION
    )


def open_uploads(server: S3Server, bucket: str, key: str) -> int:
    found = client_of(server)._list_multipart_uploads(bucket, prefix=key)
    return len(found.uploads)


# ── address and credentials ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("s3://127.0.0.1:9000/jobs?secure=false", Address("127.0.0.1:9000", "jobs", False)),
        ("s3://minio.example/my-jobs", Address("minio.example", "my-jobs", True)),
        ("s3://[::1]:9000/jobs?secure=true", Address("[::1]:9000", "jobs", True)),
    ],
)
def test_an_address_says_host_bucket_and_whether_it_is_tls(url: str, address: Address) -> None:
    assert parse(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///jobs",
        "s3://host",
        "s3://host/",
        "s3://host/UPPER",
        "s3://host/jobs/folder",
        "s3://host:port/jobs",
        "s3://host:99999/jobs",
        "s3://host/jobs?secure=no",
        "s3://host/jobs?region=x",
        "s3://host/jobs#x",
    ],
)
def test_a_wrong_address_is_refused(url: str) -> None:
    with pytest.raises(PipelineError, match="expected s3://host:port/bucket") as caught:
        open_objects(url, S3Settings.model_validate({"access_key": "a", "secret_key": "b"}))
    assert caught.value.code == "settings_invalid"


@pytest.mark.parametrize("url", ["s3://me:hush@host/jobs", "s3://host/jobs?secret_key=hush"])
def test_credentials_in_an_address_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(PipelineError, match="HEADRACE_S3__SECRET_KEY") as caught:
        open_objects(url)
    assert "hush" not in caught.value.message


def test_without_credentials_it_says_which_settings_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HEADRACE_S3__ACCESS_KEY", raising=False)
    with pytest.raises(PipelineError, match="HEADRACE_S3__ACCESS_KEY") as caught:
        open_objects("s3://host/jobs")
    assert caught.value.code == "settings_invalid"


def test_settings_do_not_show_the_credentials() -> None:
    settings = S3Settings.model_validate({"access_key": "known", "secret_key": "hush"})
    assert "known" not in repr(settings)
    assert "hush" not in repr(settings)


@every_call
@pytest.mark.parametrize("wrong", ["access_key", "secret_key"])
def test_wrong_credentials_are_an_error_with_the_remedy(
    server: S3Server,
    bucket: str,
    tmp_path: Path,
    call: Callable[[ObjectStore], object],
    wrong: str,
) -> None:
    settings = server.settings(tmp_path, **{wrong: "not-the-one-there-is"})
    with pytest.raises(PipelineError, match="Set HEADRACE_S3__ACCESS_KEY") as caught:
        call(S3Objects(server.url(bucket), settings))
    assert type(caught.value) is PipelineError
    assert caught.value.code == "storage_access"
    assert server.secret_key not in caught.value.message


@every_call
def test_a_missing_bucket_is_not_a_missing_object(
    server: S3Server, tmp_path: Path, call: Callable[[ObjectStore], object]
) -> None:
    objects = S3Objects(server.url("never-made"), server.settings(tmp_path))
    with pytest.raises(PipelineError, match="no bucket never-made") as caught:
        call(objects)
    assert caught.value.code == "bucket_missing"


# ── the bucket ───────────────────────────────────────────────────────────────────────────────────


def test_a_bucket_is_made_once_and_expires_tenants_objects(
    server: S3Server, tmp_path: Path
) -> None:
    name = f"made-{secrets.token_hex(8)}"
    objects = S3Objects(server.url(name), server.settings(tmp_path))
    client = client_of(server)
    objects.ensure_bucket(30)
    try:
        own = Rule(
            ENABLED, rule_filter=Filter(prefix="x/"), rule_id="a", expiration=Expiration(days=2)
        )
        found = client.get_bucket_lifecycle(name)
        assert found is not None
        client.set_bucket_lifecycle(name, LifecycleConfig([*found.rules, own]))
        objects.ensure_bucket(8)
        found = client.get_bucket_lifecycle(name)
        assert found is not None
        rules = {
            rule.rule_id: (rule.rule_filter.prefix, rule.expiration.days)
            for rule in found.rules
            if rule.rule_filter and rule.expiration
        }
        assert rules == {"a": ("x/", 2), "headrace-expire-tenants": ("tenants/", 8)}
    finally:
        client.remove_bucket(name)


def test_a_list_goes_on_where_a_page_ends(
    objects: S3Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_bucket, "PAGE_OBJECTS", 2)
    keys = {f"folder/{number}" for number in range(4)}
    for key in keys:
        objects.put(key, b"x")
    listed = [info.key for info in objects.list("folder")]
    assert len(listed) == 4
    assert set(listed) == keys


def test_what_no_key_can_name_is_not_listed(
    server: S3Server, bucket: str, objects: S3Objects
) -> None:
    objects.put("a/b", b"x", if_absent=True)
    client_of(server).put_object(bucket, "a/ünïcode", io.BytesIO(b"x"), 1)
    client_of(server).put_object(bucket, "a/folder/", io.BytesIO(b""), 0)
    assert [info.key for info in objects.list()] == ["a/b"]


# ── large objects ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["bytes", "stream", "path"])
def test_a_large_object_goes_in_parts_and_comes_back(
    server: S3Server,
    bucket: str,
    objects: S3Objects,
    tmp_path: Path,
    small_parts: int,
    kind: str,
) -> None:
    content = secrets.token_bytes(small_parts)
    (tmp_path / "source").write_bytes(content)
    data = {"bytes": content, "stream": io.BytesIO(content), "path": tmp_path / "source"}[kind]
    ref = objects.put("a", data)  # type: ignore[arg-type]
    assert objects.fetch(ref) == content
    assert objects.local("a").read_bytes() == content
    stored = client_of(server).stat_object(bucket, "a")
    assert stored.etag is not None
    assert stored.etag.endswith("-3")
    assert stored.metadata is not None
    assert stored.metadata[s3.SHA256] == ref.sha256


def test_of_many_large_if_absent_writers_one_wins(
    server: S3Server, bucket: str, objects: S3Objects, small_parts: int
) -> None:
    def write(number: int) -> int | None:
        try:
            objects.put("a", bytes([number]) * small_parts, if_absent=True)
        except ObjectExists:
            return None
        return number

    with ThreadPoolExecutor(3) as pool:
        winners = [number for number in pool.map(write, range(3)) if number is not None]
    assert len(winners) == 1
    assert objects.get("a", max_bytes=small_parts) == bytes(winners) * small_parts
    assert open_uploads(server, bucket, "a") == 0


def test_an_upload_that_fails_leaves_no_parts(
    server: S3Server,
    bucket: str,
    objects: S3Objects,
    small_parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise Transient("storage_unavailable", "as it may be")

    monkeypatch.setattr(objects._bucket, "complete_upload", fail)
    with pytest.raises(Transient, match="as it may be"):
        objects.put("a", bytes(small_parts))
    assert open_uploads(server, bucket, "a") == 0
    assert list(objects.list()) == []


# ── local copies ─────────────────────────────────────────────────────────────────────────────────


def test_a_copy_is_made_once_for_all_processes_of_a_machine(
    server: S3Server, bucket: str, objects: S3Objects, tmp_path: Path
) -> None:
    objects.put("m/graph", b"graph")
    first = objects.local("m/graph")
    again = S3Objects(server.url(bucket), server.settings(tmp_path))
    inode = first.stat().st_ino
    assert again.local("m/graph") == first
    assert first.stat().st_ino == inode


def test_a_copy_follows_its_object(objects: S3Objects) -> None:
    objects.put("a", b"old")
    copy = objects.local("a")
    objects.put("a", b"new")
    assert objects.local("a").read_bytes() == b"new"
    objects.delete("a")
    assert not copy.exists()


def test_a_copy_of_what_another_machine_deleted_is_not_given(
    server: S3Server, bucket: str, objects: S3Objects
) -> None:
    objects.put("a", b"x")
    objects.local("a")
    client_of(server).remove_object(bucket, "a")
    with pytest.raises(InvalidJob) as caught:
        objects.local("a")
    assert caught.value.code == "object_missing"


def test_damaged_content_is_not_given_as_a_copy(
    server: S3Server, bucket: str, tmp_path: Path
) -> None:
    metadata: dict[str, str | list[str] | tuple[str]] = {"sha256": "0" * 64}
    client_of(server).put_object(bucket, "a", io.BytesIO(b"x"), 1, metadata=metadata)
    objects = S3Objects(server.url(bucket), server.settings(tmp_path, **HASTY))
    for read in (objects.local, objects.open):
        with pytest.raises(Transient, match="other content than was put"):
            read("a")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ── a network that fails ─────────────────────────────────────────────────────────────────────────


@every_call
@pytest.mark.parametrize("mode", ["reset", "blackhole"])
def test_a_dead_network_is_transient_after_a_bounded_number_of_attempts(
    objects: S3Objects,
    far: S3Objects,
    proxy: Proxy,
    call: Callable[[ObjectStore], object],
    mode: str,
) -> None:
    """Each attempt is bounded by `connect_s` and `read_s`, so that their number bounds the whole."""
    objects.put("a", b"x")
    proxy.mode = mode  # type: ignore[assignment]
    with pytest.raises(Transient) as caught:
        call(far)
    assert caught.value.code == "storage_unavailable"
    assert proxy.accepted == HASTY["attempts"]


@every_call
def test_one_reset_is_not_noticed(
    objects: S3Objects, far: S3Objects, proxy: Proxy, call: Callable[[ObjectStore], object]
) -> None:
    if call is not CALLS["put if absent"]:
        objects.put("a", b"x")
    proxy.resets_left = 1
    call(far)
    assert proxy.resets_left == 0


def test_a_connection_that_died_while_idle_is_replaced(far: S3Objects, proxy: Proxy) -> None:
    far.put("a", b"x")
    proxy.mode = "reset"
    with pytest.raises(Transient):
        far.put("a", b"y")
    proxy.mode = "pass"
    assert far.get("a", max_bytes=1) == b"x"


def test_an_answer_lost_after_the_write_is_not_taken_for_another_writer(
    far: S3Objects, proxy: Proxy
) -> None:
    far.probe()
    proxy.lose_answer_to = (b"PUT ", b"/a ")
    ref = far.put("a", b"mine", if_absent=True)
    assert proxy.lost_answers == 1
    assert far.fetch(ref) == b"mine"


def test_an_answer_lost_does_not_hide_that_another_was_first(
    objects: S3Objects, far: S3Objects, proxy: Proxy
) -> None:
    far.probe()
    objects.put("a", b"same")
    proxy.lose_answer_to = (b"PUT ", b"/a ")
    with pytest.raises(ObjectExists):
        far.put("a", b"same", if_absent=True)
    assert proxy.lost_answers == 1


@pytest.mark.parametrize("if_absent", [False, True])
def test_an_answer_lost_after_the_last_part_is_not_a_failure(
    server: S3Server,
    bucket: str,
    far: S3Objects,
    proxy: Proxy,
    small_parts: int,
    if_absent: bool,
) -> None:
    far.probe()
    proxy.lose_answer_to = (b"POST ", b"?uploadId=")
    ref = far.put("a", bytes(small_parts), if_absent=if_absent)
    assert proxy.lost_answers == 1
    assert far.fetch(ref) == bytes(small_parts)
    assert open_uploads(server, bucket, "a") == 0


def test_a_server_that_comes_back_is_used_again(tmp_path: Path) -> None:
    with minio_server() as own, own.s3.bucket() as name:
        objects = S3Objects(own.s3.url(name), own.s3.settings(tmp_path, **HASTY))
        ref = objects.put("a", b"durable")
        _expect_transient(own, objects)
        own.process.start()
        assert objects.fetch(ref) == b"durable"


def _expect_transient(own: MinioServer, objects: S3Objects) -> None:
    own.process.kill()
    for call in CALLS.values():
        with pytest.raises(Transient):
            call(objects)


def test_threads_share_a_store(objects: S3Objects) -> None:
    def write_and_read(number: int) -> bool:
        content = str(number).encode() * 1000
        ref = objects.put(f"a/{number}", content)
        return objects.fetch(ref) == content == objects.local(ref.key).read_bytes()

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(write_and_read, range(64)))
    assert len(list(objects.list("a"))) == 64
