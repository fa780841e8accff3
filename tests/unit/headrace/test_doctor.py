from __future__ import annotations

import resource
from collections import namedtuple
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from headrace import machine_checks
from headrace.cli import app, doctor
from infra.settings import EngineSettings, Settings

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Settings(data_dir=tmp_path / "data")


def found(settings: Settings) -> dict[str, str]:
    return {finding.check: finding.level for finding in doctor.examine(settings)}


def test_a_sound_machine_has_nothing_but_models_to_be_told_of(settings: Settings) -> None:
    levels = found(settings)

    assert levels.pop("models") == "warn"
    assert set(levels.values()) == {"ok"}


def test_whatever_is_not_well_comes_with_a_remedy(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 10**6))

    findings = {finding.check: finding for finding in doctor.examine(settings)}

    assert findings["open files"].level == "warn"
    assert findings["data folder"].level == "fail"
    assert all(finding.remedy for finding in findings.values() if finding.level != "ok")


def test_a_data_folder_that_cannot_be_written_fails(settings: Settings) -> None:
    settings.data_dir.write_text("a file")

    levels = found(settings)

    assert levels["data folder"] == levels["sqlite"] == levels["event log"] == "fail"


def test_a_redis_of_ones_own_must_answer_and_ours_is_not_asked_for(
    settings: Settings, tmp_path: Path
) -> None:
    own = settings.model_copy(update={"redis_url": SecretStr(f"unix://{tmp_path}/none.sock")})

    levels = found(own)

    assert levels["redis"] == "fail"
    assert "redis server" not in levels
    assert levels["object store"] == "ok"


def test_a_store_that_overwrites_what_is_there_fails(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overwriting:
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            pass

        def delete(self, key: str) -> None:
            pass

    monkeypatch.setattr(machine_checks, "connect_objects", lambda _: Overwriting())

    assert machine_checks.object_folder(settings).level == "fail"


def test_a_file_system_on_another_clock_is_warned_of(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.data_dir.mkdir()
    real = machine_checks.time.time()
    monkeypatch.setattr(machine_checks.time, "time", lambda: real - 600)

    assert machine_checks.clock(settings).level == "warn"


def test_machines_that_share_a_store_are_told_that_engines_need_keys(
    settings: Settings, tmp_path: Path
) -> None:
    def engine_keys(**engines: object) -> list[str]:
        asked = Settings(data_dir=tmp_path, objects_url=store, engines=engines)
        return [finding.level for finding in machine_checks.engine_keys(asked)]

    store = ""
    assert engine_keys() == []
    assert engine_keys(keys={"k1": "k" * 32}) == ["ok"]
    store = "s3://store:9000/headrace"
    assert engine_keys() == ["warn"]
    assert engine_keys(keys={"k1": "k" * 32}) == ["ok"]


def test_a_wrong_file_of_keys_fails_and_is_not_shown(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"k1": "too-short-secret"}')
    wrong = EngineSettings(keys_file=tmp_path / "keys.json")
    findings = doctor.examine(settings.model_copy(update={"engines": wrong}))
    [found] = [finding for finding in findings if finding.check == "engine keys"]
    assert found.level == "fail"
    assert "keys.json must hold a JSON object" in found.detail
    assert "too-short" not in found.detail


def test_the_exit_code_is_1_only_if_something_fails(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["doctor", "--data", str(settings.data_dir)]
    assert CliRunner().invoke(app, arguments).exit_code == 0

    monkeypatch.setenv("HEADRACE_DISPATCHER__MAX_DEADLINE_S", "99999999")
    assert CliRunner().invoke(app, arguments).exit_code == 1
