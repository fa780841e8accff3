from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from infra.embedded.stack import child_specs, environment
from infra.settings import (
    DispatcherSettings,
    Settings,
    StackSettings,
    TenantSettings,
    WorkerSettings,
    load_settings,
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, stack=StackSettings(workers=2))


@pytest.fixture(autouse=True)
def run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()


def test_the_stack_is_redis_a_dispatcher_a_builder_and_the_workers_in_stopping_order(
    settings: Settings,
) -> None:
    specs = child_specs(settings)

    assert [(spec.name, spec.stage) for spec in specs] == [
        ("redis", 0),
        ("dispatcher", 1),
        ("builder", 1),
        ("worker-0", 2),
        ("worker-1", 2),
    ]


def test_each_worker_is_told_its_name_and_all_the_same_folder(settings: Settings) -> None:
    *_, first, second = child_specs(settings)

    assert first.environment["HEADRACE_WORKER__NAME"] == "worker-0"
    assert second.environment["HEADRACE_WORKER__NAME"] == "worker-1"
    assert second.environment["HEADRACE_DATA_DIR"] == str(settings.data_dir)


def test_a_redis_of_ones_own_is_used_and_none_is_started(tmp_path: Path) -> None:
    secret = "redis://:hidden@127.0.0.1:6379/0"
    settings = Settings(data_dir=tmp_path, redis_url=SecretStr(secret))

    specs = child_specs(settings)

    assert [spec.name for spec in specs] == ["dispatcher", "builder", "worker-0"]
    assert all(spec.environment["HEADRACE_REDIS_URL"] == secret for spec in specs)
    assert not any("hidden" in argument for spec in specs for argument in spec.command)


def test_python_children_run_by_this_interpreter_and_not_from_the_current_folder(
    settings: Settings,
) -> None:
    dispatcher = child_specs(settings)[1]

    assert dispatcher.command == (sys.executable, "-P", "-m", "workers.dispatcher.main")


def test_children_read_the_very_same_settings_from_their_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(
        data_dir=tmp_path,
        log_url="sqlite:////somewhere/else.db",
        redis_url=SecretStr("redis://:secret@127.0.0.1:1/0"),
        dispatcher=DispatcherSettings(lease_s=2.5),
        worker=WorkerSettings(models=["minilm", "whisper"], executors=3),
        stack=StackSettings(workers=4),
        tenants=TenantSettings(keys={"acme": ("a-first-secret-key", "a-second-secret-key")}),
    )
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)

    assert load_settings() == settings
