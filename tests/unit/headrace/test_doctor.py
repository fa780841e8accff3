from __future__ import annotations

import resource
from collections import namedtuple
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from headrace.cli import app, doctor
from infra.settings import DispatcherSettings, Settings

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Settings(data_dir=tmp_path / "data")


def found(settings: Settings) -> dict[str, str]:
    return {checked.check: checked.level for checked in doctor.examine(settings)}


def test_a_sound_machine_has_nothing_but_models_to_be_told_of(settings: Settings) -> None:
    levels = found(settings)

    assert levels.pop("models") == "warn"
    assert set(levels.values()) == {"ok"}


def test_whatever_is_not_well_comes_with_a_remedy(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 10**6))

    checks = {checked.check: checked for checked in doctor.examine(settings)}

    assert checks["open files"].level == "warn"
    assert checks["data folder"].level == "fail"
    assert all(checked.remedy for checked in checks.values() if checked.level != "ok")


def test_deadlines_beyond_the_logs_memory_fail(settings: Settings) -> None:
    long = settings.model_copy(update={"dispatcher": DispatcherSettings(max_deadline_s=30 * 86400)})

    finding = doctor.retention(long)

    assert finding.level == "fail"
    assert "HEADRACE_DISPATCHER__MAX_DEADLINE_S" in finding.remedy


def test_a_data_folder_that_cannot_be_written_fails(settings: Settings) -> None:
    settings.data_dir.write_text("a file")

    levels = found(settings)

    assert levels["data folder"] == levels["sqlite"] == levels["event log"] == "fail"


def test_a_redis_of_ones_own_must_answer(settings: Settings, tmp_path: Path) -> None:
    own = settings.model_copy(update={"redis_url": SecretStr(f"unix://{tmp_path}/none.sock")})

    finding = doctor.redis_eviction(own)

    assert finding.level == "fail"
    assert doctor.redis_server(own).level == "ok"


def test_a_redis_that_evicts_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evicting:
        def config_get(self, name: str) -> dict[str, str]:
            return {name: "allkeys-lru"}

        def close(self) -> None:
            pass

    monkeypatch.setattr(doctor, "connect_redis", lambda _: Evicting())

    assert doctor.redis_eviction(settings).level == "fail"


def test_a_store_that_overwrites_what_is_there_fails(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overwriting:
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            pass

        def delete(self, key: str) -> None:
            pass

    monkeypatch.setattr(doctor, "connect_objects", lambda _: Overwriting())

    assert doctor.object_store(settings).level == "fail"


def test_a_file_system_on_another_clock_is_warned_of(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.data_dir.mkdir()
    real = doctor.time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: real - 600)

    assert doctor.clock(settings).level == "warn"


def test_the_exit_code_is_1_only_if_something_fails(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["doctor", "--data", str(settings.data_dir)]
    assert CliRunner().invoke(app, arguments).exit_code == 0

    monkeypatch.setenv("HEADRACE_DISPATCHER__MAX_DEADLINE_S", "99999999")
    assert CliRunner().invoke(app, arguments).exit_code == 1
