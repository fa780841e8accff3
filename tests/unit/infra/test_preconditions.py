from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from infra.checks import Finding
from infra.preconditions import preconditions
from infra.redis_checks import Facts, eviction, persistence, version
from infra.settings import DispatcherSettings, Settings
from schemas.errors import PipelineError, Transient


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


def test_the_embedded_stack_meets_them_unasked(settings: Settings) -> None:
    preconditions(settings)


def test_whatever_fails_is_told_at_once_with_its_remedy(settings: Settings) -> None:
    def ask(_: Settings) -> list[Finding]:
        return [
            Finding("one", "fail", "is wrong", "Mend it."),
            Finding("two", "warn", "is odd", "Look at it."),
            Finding("three", "fail", "is wrong too", "Mend that."),
        ]

    with pytest.raises(PipelineError) as caught:
        preconditions(settings, [ask])

    assert caught.value.code == "precondition_failed"
    for part in ("one: is wrong. Mend it.", "three: is wrong too. Mend that."):
        assert part in caught.value.message
    assert "two" not in caught.value.message


def test_deadlines_beyond_the_logs_memory_are_refused(settings: Settings) -> None:
    long = settings.model_copy(update={"dispatcher": DispatcherSettings(max_deadline_s=30 * 86400)})

    with pytest.raises(PipelineError, match="HEADRACE_DISPATCHER__MAX_DEADLINE_S"):
        preconditions(long)


def test_who_does_not_answer_is_waited_for_by_others(settings: Settings) -> None:
    preconditions(settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1")}))


def test_who_refuses_us_ends_it(settings: Settings) -> None:
    def ask(_: Settings) -> list[Finding]:
        raise Transient("redis_forbidden", "Redis refuses us.")

    with pytest.raises(PipelineError) as caught:
        preconditions(settings, [ask])

    assert not isinstance(caught.value, Transient)


def of(version: str = "7.2.4", policy: str = "noeviction", persistent: bool | None = True) -> Facts:
    return Facts(version, policy, persistent, 0.0)


@pytest.mark.parametrize(
    ("found", "level"), [("6.2.14", "fail"), ("7.0.0", "ok"), ("7.0", "ok"), ("10.1.1", "ok")]
)
def test_redis_must_be_7(found: str, level: str) -> None:
    assert version("redis version", of(version=found)).level == level


def test_a_redis_that_evicts_fails() -> None:
    assert eviction(of()).level == "ok"
    assert eviction(of(policy="allkeys-lru")).level == "fail"


def test_a_redis_that_keeps_nothing_is_warned_of() -> None:
    assert persistence(of()).level == "ok"
    assert persistence(of(persistent=False)).level == "warn"
    assert persistence(of(persistent=None)).level == "ok"
