from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from kombu import Connection
from kombu.transport.redis import Channel
from pydantic import SecretStr

from infra.redis_client import connect_redis, connect_view, redis_errors
from infra.settings import RedisSettings, Settings, load_settings
from infra.tasks import make_app
from schemas.errors import PipelineError, Transient


def at(redis_url: str = "", view_url: str = "", **more: Any) -> Settings:
    return Settings(redis_url=SecretStr(redis_url), view_url=SecretStr(view_url), **more)


def place(client: redis.Redis) -> dict[str, Any]:
    options = client.connection_pool.connection_kwargs
    return {name: options[name] for name in ("host", "port", "db", "path") if name in options}


def test_the_view_is_with_the_broker_unless_it_has_an_address_of_its_own() -> None:
    one = at("redis://first:1/2")
    two = at("redis://first:1/2", "redis://second:3/4")

    assert place(connect_view(one)) == place(connect_redis(one)) == place(connect_redis(two))
    assert place(connect_view(two)) == {"host": "second", "port": 3, "db": 4}


def test_without_an_address_both_are_the_embedded_one(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)

    assert place(connect_redis(settings)) == {"path": str(tmp_path / "redis.sock")}
    assert place(connect_view(settings)) == {"path": str(tmp_path / "redis.sock")}


@pytest.mark.parametrize(
    "url",
    [
        "redis://:xyz#zy@host:6379/0",
        "redis://user:xyz/zy@host:6379/0",
        "redis://:xyz?zy@host",
        "redis://:xyzzy@host:port/0",
        "redis://:xyzzy@",
        "redis://:xyzzy@host/0?timeout=3",
        "http://:xyzzy@host",
        "xyzzy@host",
    ],
)
@pytest.mark.parametrize("variable", ["HEADRACE_REDIS_URL", "HEADRACE_VIEW_URL"])
def test_a_wrong_address_is_named_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, variable: str, url: str
) -> None:
    monkeypatch.setenv(variable, url)

    with pytest.raises(PipelineError, match=variable) as caught:
        load_settings()

    assert caught.value.code == "settings_invalid"
    assert caught.value.__suppress_context__
    assert "xyz" not in caught.value.message


def test_celery_goes_where_we_go_with_the_same_user_and_database() -> None:
    ours = at("redis://user:p%23w@first:1/2")

    connection: Connection = make_app(ours).connection_for_write()

    assert (connection.hostname, connection.port, connection.virtual_host) == ("first", 1, "2")
    assert (connection.userid, connection.password) == ("user", "p#w")
    assert "p#w" not in connection.as_uri()


def test_a_socket_takes_a_database_and_a_password_in_both(tmp_path: Path) -> None:
    ours = at(f"unix://:secret@{tmp_path}/r.sock?db=3")

    channel = Channel.__new__(Channel)  # one that is made by kombu connects at once
    channel.connection = SimpleNamespace(
        client=make_app(ours).connection_for_write(), default_port=0
    )
    theirs = channel._connparams()

    client = connect_redis(ours)
    assert place(client) == {"path": f"{tmp_path}/r.sock", "db": 3}
    for options in (theirs, client.connection_pool.connection_kwargs):
        assert options["path"] == f"{tmp_path}/r.sock"
        assert (options["db"], options["password"]) == (3, "secret")


def test_with_tls_the_server_must_prove_its_name_to_us_and_to_celery(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.touch()
    ours = at("rediss://first:1/2", redis=RedisSettings(ca_file=file))

    options = connect_redis(ours).connection_pool.connection_kwargs

    for found in (options, make_app(ours).connection_for_write().ssl):
        assert found["ssl_cert_reqs"] == "required"
        assert found["ssl_check_hostname"] is True
        assert found["ssl_ca_certs"] == str(file)
        assert "ssl_keyfile" not in found


def test_a_tls_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_REDIS__CA_FILE", "/no/such/file")

    with pytest.raises(PipelineError, match="HEADRACE_REDIS__CA_FILE"):
        load_settings()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (redis.ConnectionError("refused"), "redis_unavailable"),
        (redis.TimeoutError("late"), "redis_unavailable"),
        (redis.ResponseError("what?"), "redis_unavailable"),
        (redis.AuthenticationError("WRONGPASS"), "redis_forbidden"),
        (redis.exceptions.NoPermissionError("NOPERM"), "redis_forbidden"),
    ],
)
def test_errors_are_ours_and_may_pass(error: Exception, code: str) -> None:
    with pytest.raises(Transient) as caught, redis_errors():
        raise error

    assert caught.value.code == code
    assert "HEADRACE_REDIS_URL" in caught.value.message
