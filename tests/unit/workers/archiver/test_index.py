"""The lake's index: what is written is found, merged or not, whoever dies while merging."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from infra.lake import find_in_lake, locate
from infra.lake_index import INDEX, Run, files_of, hash_of, read_bucket, runs, runs_near
from infra.objects.files import FileObjects
from schemas.errors import InvalidJob
from schemas.jobs import new_job_id
from workers.archiver import index
from workers.archiver.index import merge, tidy, unindex, write_run

DAY = date(2026, 1, 1)
ON_THE_DAY = datetime(2026, 1, 1, 18, tzinfo=UTC).timestamp()
MUCH_LATER = ON_THE_DAY + 10 * 86_400


def fill(objects: Any, count: int, each: int, day: date = DAY) -> dict[str, str]:
    """So many runs with so many jobs each; by job id, its file."""
    files: dict[str, str] = {}
    for run in range(count):
        jobs = {f"{run}-{n}": f"lake/file-{run}-{n % 3}" for n in range(each)}
        write_run(objects, day, f"run-{run}", jobs.items())
        files |= jobs
    return files


def found(objects: Any, job_ids: Any) -> dict[str, str]:
    listed = runs(objects)
    hits = {job_id: files_of(objects, listed, job_id) for job_id in job_ids}
    return {job_id: file for job_id, files in hits.items() for file in files}


def entries(objects: Any) -> set[tuple[int, str]]:
    """All that counts of the index."""
    buckets = [
        read_bucket(objects, run, bucket)
        for run in runs(objects)
        for bucket in range(1 << run.bits)
    ]
    return {(row["hash"], row["file"]) for table in buckets for row in table.to_pylist()}


def test_every_job_is_found_in_merged_runs_and_nothing_else(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "BUCKET_BYTES", 2000)
    files = fill(world.objects, count=9, each=100)
    folder = merge(world.objects, runs(world.objects)[:5])
    (first,) = (run for run in runs(world.objects) if run.folder == folder)
    assert first.bits >= 2
    merge(world.objects, runs(world.objects))
    (whole,) = runs(world.objects)
    assert whole.bits > first.bits
    assert found(world.objects, files) == files
    assert found(world.objects, [f"9-{n}" for n in range(100)]) == {}


def test_a_lookup_reads_one_bucket_of_a_run(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "BUCKET_BYTES", 2000)
    files = fill(world.objects, count=6, each=200)
    merge(world.objects, runs(world.objects))
    read: list[str] = []
    get = world.objects.get
    monkeypatch.setattr(
        world.objects, "get", lambda key, **more: read.append(key) or get(key, **more)
    )
    assert found(world.objects, list(files)[:1])
    assert len(read) == 1
    assert len(get(read[0], max_bytes=2**20)) < 8000


def test_killed_at_any_moment_of_a_merge_every_job_is_found(
    tmp_path: Path, moments: Any, killed: Any, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "BUCKET_BYTES", 1500)
    for at in range(1000):
        objects = FileObjects(tmp_path / str(at))
        files = fill(objects, count=5, each=20)
        try:
            tidy(watched(objects, moments(at=at)), MUCH_LATER)
        except killed:
            assert entries(objects) == {(hash_of(job), file) for job, file in files.items()}
        else:
            break
        # The next merger has another run before it.
        write_run(objects, DAY, "late", [("late", "lake/late")])
        files["late"] = "lake/late"
        tidy(objects, MUCH_LATER)
        assert len(runs(objects)) == 1
        assert entries(objects) == {(hash_of(job), file) for job, file in files.items()}
    assert at > 20


def test_what_is_unindexed_at_any_moment_of_a_merge_is_gone_after_it(
    tmp_path: Path, moments: Any, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "BUCKET_BYTES", 1500)
    gone = pa.scalar(hash_of("2-7"), pa.uint64())

    def unindex_all(objects: Any) -> None:
        """As an erasure does."""
        seen: set[Run] = set()
        while new := [run for run in runs(objects) if run not in seen]:
            seen.update(new)
            for run in new:
                unindex(objects, run, lambda table: pc.not_equal(table["hash"], gone))

    for at in range(1000):
        objects = FileObjects(tmp_path / str(at))
        files = fill(objects, count=3, each=20)
        passing = moments(at=at, then=partial(unindex_all, objects))
        tidy(watched(objects, passing), MUCH_LATER)
        if passing.count <= at:
            break
        assert len(runs(objects)) == 1
        left = {(hash_of(job), file) for job, file in files.items() if job != "2-7"}
        assert entries(objects) == left
    assert at > 20


def test_what_killed_mergers_left_goes_after_a_day(world: Any) -> None:
    world.objects.put(f"{INDEX}/date=2026-01-01/half/2-0.index", b"")
    fill(world.objects, count=1, each=1)
    tidy(world.objects, time.time())
    assert len(list(world.objects.list(INDEX))) == 2
    tidy(world.objects, time.time() + 86_401)
    assert len(list(world.objects.list(INDEX))) == 1


def test_a_day_that_goes_on_keeps_few_runs_and_one_that_is_over_one(world: Any) -> None:
    files = fill(world.objects, count=40, each=2)
    tidy(world.objects, ON_THE_DAY)
    assert 1 < len(runs(world.objects)) <= index.RUNS_OF_A_DAY
    tidy(world.objects, MUCH_LATER)
    assert len(runs(world.objects)) == 1
    assert found(world.objects, files) == files


def test_a_lookup_begins_again_when_its_run_was_merged(
    world: Any, make_outcomes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job_id in "ab":
        world.append(*make_outcomes(job_id))
        world.archive()
    get = world.objects.get
    merged = []

    def merge_first(key: str, **more: Any) -> bytes:
        if not merged:
            merged.append(key)
            merge(world.objects, runs(world.objects))
        return bytes(get(key, **more))

    monkeypatch.setattr(world.objects, "get", merge_first)
    assert find_in_lake(world.objects, "a", 3)
    monkeypatch.setattr(world.objects, "get", lambda key, **more: get("lake/nothing", **more))
    with pytest.raises(InvalidJob):
        locate(world.objects, "a")


def test_the_time_in_an_id_says_where_to_look(world: Any) -> None:
    made_today = new_job_id("acme")
    today = datetime.now(UTC).date()
    fill(world.objects, count=1, each=1, day=today)
    fill(world.objects, count=1, each=1, day=DAY)
    assert [run.day for run in runs_near(world.objects, made_today, most_days=3)] == [today]
    assert runs_near(world.objects, "an id of another kind", most_days=3) == []
    assert runs_near(world.objects, "ffffffff-ffff-7fff-bfff-ffffffffffff", most_days=3) == []


def test_a_job_that_ended_on_another_day_than_its_id_says_is_found_all_the_same(
    world: Any, make_outcomes: Any
) -> None:
    job_id = new_job_id("acme")
    world.append(*make_outcomes([job_id]))  # ended on 2026-01-01, long before or after
    world.archive()
    found = find_in_lake(world.objects, job_id, 3)
    assert found is not None
    assert found.job_id == job_id
    assert find_in_lake(world.objects, new_job_id("acme"), 3) is None


def test_of_a_job_that_ran_again_the_newest_outcome_is_found(world: Any, make_outcome: Any) -> None:
    ended = make_outcome("a").finished_at
    world.append(make_outcome("a", finished_at=ended + 90_000, worker="second"))
    world.append(make_outcome("a", worker="first"))
    world.archive()
    assert find_in_lake(world.objects, "a", 3).worker == "second"  # type: ignore[union-attr]


def test_of_a_job_that_was_redriven_weeks_later_the_last_outcome_is_found(
    world: Any, make_outcome: Any
) -> None:
    made_at = time.time()
    job_id = new_job_id("acme")
    world.append(make_outcome(job_id, status="failed", code="step_failed", finished_at=made_at))
    world.archive()
    assert find_in_lake(world.objects, job_id, 3).status == "failed"  # type: ignore[union-attr]
    world.append(make_outcome(job_id, finished_at=made_at + 20 * 86_400))
    world.archive()
    assert find_in_lake(world.objects, job_id, 3).status == "succeeded"  # type: ignore[union-attr]
