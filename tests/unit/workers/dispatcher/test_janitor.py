"""Disk use stays bounded, and nothing goes that a record may still name."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from infra.objects import ObjectInfo
from schemas.errors import Transient
from schemas.topics import CONTROL, KEYS, TOPICS
from workers.dispatcher.janitor import KEEP_OBJECTS_S, Janitor

WITHOUT_PAYLOADS = {CONTROL, KEYS, f"{CONTROL}.dlq"}


class FakeObjects:
    def __init__(self, *found: ObjectInfo) -> None:
        self.held = {info.key: info for info in found}

    def list(self, folder: str = "") -> list[ObjectInfo]:
        return [info for key, info in self.held.items() if key.startswith(f"{folder}/")]

    def delete(self, key: str) -> None:
        del self.held[key]


@pytest.fixture
def objects(noon: float) -> FakeObjects:
    old, young = noon - KEEP_OBJECTS_S - 1, noon - KEEP_OBJECTS_S + 1
    return FakeObjects(
        ObjectInfo("tenants/a/payloads/old", 1, old),
        ObjectInfo("tenants/a/results/old", 1, old),
        ObjectInfo("tenants/b/payloads/young", 1, young),
        ObjectInfo("models/echo/1/card.json", 1, 0.0),
    )


@pytest.fixture
def janitor(log: Any, objects: Any, clock: Any) -> Janitor:
    return Janitor(log, objects, clock.wall)


def test_old_objects_of_tenants_go_and_nothing_else(janitor: Janitor, objects: FakeObjects) -> None:
    assert janitor.sweep_objects(threading.Event()) == 2
    assert objects.held.keys() == {"tenants/b/payloads/young", "models/echo/1/card.json"}


def test_a_sweep_ends_when_it_is_told_to(janitor: Janitor, objects: FakeObjects) -> None:
    stop = threading.Event()
    stop.set()

    assert janitor.sweep_objects(stop) == 0


def test_an_object_outlives_every_record_that_may_name_it() -> None:
    """A dead letter is for people to look into and to redrive: its payload must still be there."""
    for topic in TOPICS:
        if topic.name not in WITHOUT_PAYLOADS:
            assert topic.retention_s <= KEEP_OBJECTS_S, topic.name


def test_each_topic_is_trimmed_by_its_own_retention(janitor: Janitor, log: Any) -> None:
    janitor.trim_log()

    assert log.trims == [{topic.name: topic.retention_s for topic in TOPICS}]


def test_trouble_does_not_end_the_janitor(
    janitor: Janitor, log: Any, objects: FakeObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = iter([False, False, False, True])
    stop: Any = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda timeout: next(rounds))
    trim = log.trim

    def fail_once(retention_s: dict[str, float]) -> int:
        monkeypatch.setattr(log, "trim", trim)
        raise Transient("log_busy", "busy")

    monkeypatch.setattr(log, "trim", fail_once)
    janitor.run(stop)

    assert len(log.trims) == 2
    assert len(objects.held) == 2
