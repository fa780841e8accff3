"""What is past its retention goes, and only that."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from infra.lake import ERASED, SEGMENTS, find_in_lake
from infra.lake_index import runs
from infra.objects.files import FileObjects
from schemas.errors import Transient
from workers.archiver.erasures import new_erasure, record_erasure
from workers.archiver.upkeep import (
    CLAIMS_KEPT_S,
    ERASURES_KEPT_S,
    FIRST_AFTER_S,
    UPKEEP_EVERY_S,
    Upkeep,
    find_expired,
)

DAY_S = 86_400.0
MIDNIGHT = datetime(2026, 1, 10, tzinfo=UTC).timestamp()


def archive_ten_days(world: Any, make_outcomes: Any) -> None:
    for day in range(10):
        at = MIDNIGHT - 9 * DAY_S + day * DAY_S + 60
        world.append(*make_outcomes([f"day-{day}"], submitted_at=at, finished_at=at))
        world.archive()


def test_rows_and_index_of_days_past_the_retention_go(world: Any, make_outcomes: Any) -> None:
    archive_ten_days(world, make_outcomes)
    Upkeep(world.objects, retention_days=3, wall=lambda: MIDNIGHT + 3600).once()
    assert world.jobs() == [f"day-{n}" for n in range(6, 10)]
    assert [run.day.day for run in runs(world.objects)] == [7, 8, 9, 10]
    assert find_in_lake(world.objects, "day-5", 3) is None
    assert find_in_lake(world.objects, "day-6", 3)


def test_without_a_retention_rows_stay(world: Any, make_outcomes: Any) -> None:
    archive_ten_days(world, make_outcomes)
    Upkeep(world.objects, retention_days=0, wall=lambda: MIDNIGHT + 3600 * DAY_S).once()
    assert len(world.jobs()) == 10
    assert find_in_lake(world.objects, "day-0", 3)


def test_claims_and_erasures_go_once_they_have_served(world: Any, make_outcomes: Any) -> None:
    for job_id in "ab":
        world.append(*make_outcomes(job_id))
        world.archive()
    record_erasure(world.objects, new_erasure("job", "b", time.time()))

    def folders(age_s: float) -> set[str]:
        notes = find_expired(world.objects, 0, time.time() + age_s).notes
        return {key.rsplit("/", 1)[0].removesuffix("/job/id=b") for key in notes}

    assert folders(CLAIMS_KEPT_S - 60) == set()
    assert folders(CLAIMS_KEPT_S + 60) == {SEGMENTS}
    assert folders(ERASURES_KEPT_S + 60) == {SEGMENTS, ERASED}


def test_the_claim_of_a_segment_that_is_not_complete_stays_however_old(
    world: Any, moments: Any, killed: Any, make_outcomes: Any
) -> None:
    world.append(*make_outcomes("abc"))
    with pytest.raises(killed):
        world.archive(moments(at=6))  # with some of its files written
    assert world.jobs()
    Upkeep(world.objects, retention_days=0, wall=lambda: time.time() + 2 * CLAIMS_KEPT_S).once()
    world.append(*make_outcomes("d"))
    world.archive()
    assert world.jobs() == list("abcd")


def test_it_begins_soon_goes_on_after_trouble_and_ends_when_told(monkeypatch: Any) -> None:
    waits: list[float] = []

    class Stop:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            return len(waits) == 3

    def in_trouble(upkeep: Upkeep) -> None:
        raise Transient("storage_unavailable", "gone for a moment")

    monkeypatch.setattr(Upkeep, "once", in_trouble)
    stop: Any = Stop()
    Upkeep(FileObjects(Path("nowhere")), retention_days=0).run(stop)
    assert waits == [FIRST_AFTER_S, UPKEEP_EVERY_S, UPKEEP_EVERY_S]
