"""Erasing a job or a tenant, also from what the archiver has not read yet, and what others write meanwhile."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from infra.lake import find_in_lake, locate, rows_key
from infra.lake_index import runs
from schemas.errors import InvalidJob
from schemas.payloads import payload_key, result_key
from workers.archiver.erase import erase, find, rewrite
from workers.archiver.erasures import Erasures, new_erasure, read_erasures, record_erasure
from workers.archiver.index import merge, write_run


@pytest.fixture
def now(make_outcome: Any) -> float:
    """Not long after everything has happened."""
    return float(make_outcome("").finished_at) + 60


@pytest.fixture
def of_job(now: float) -> Any:
    return lambda job_id: new_erasure("job", job_id, now)


def blobs(world: Any) -> list[str]:
    return sorted(info.key for info in world.objects.list("tenants"))


def quietly(done: int, total: int) -> None:
    assert 0 < done <= total


def test_a_job_goes_from_rows_index_and_store_and_others_stay(
    world: Any, make_outcomes: Any, of_job: Any
) -> None:
    world.append(*make_outcomes("abc"))
    world.append(*make_outcomes(["a.b"], tenant="other"))
    world.archive()
    for job_id in ("a", "b", "a.b"):
        world.objects.put(payload_key("acme", job_id, "0123abcd"), b"payload")
        world.objects.put(result_key("acme", job_id, "feedbeef"), b"result")
    found, left = erase(world.objects, of_job("a"), quietly)
    assert (len(found.mixed), len(found.blobs), left) == (1, 2, [])
    assert world.jobs() == ["a.b", "b", "c"]
    assert locate(world.objects, "a") == set()
    assert find_in_lake(world.objects, "b", 3)
    assert blobs(world) == sorted(
        make("acme", job_id, unique)
        for make, unique in ((payload_key, "0123abcd"), (result_key, "feedbeef"))
        for job_id in ("b", "a.b")
    )


def test_a_dry_run_says_the_same_and_changes_nothing(
    world: Any, make_outcomes: Any, of_job: Any
) -> None:
    world.append(*make_outcomes("ab"))
    world.archive()
    world.objects.put(payload_key("acme", "a", "0123abcd"), b"payload")
    before = {info.key for info in world.objects.list()}
    planned = find(world.objects, of_job("a"))
    assert {info.key for info in world.objects.list()} == before
    assert erase(world.objects, of_job("a"), quietly)[0] == planned


def test_a_tenant_goes_whole(world: Any, make_outcomes: Any, now: float) -> None:
    world.append(*make_outcomes("ab"), *make_outcomes("cd", tenant="acme-2"))
    world.archive()
    world.append(*make_outcomes("e"))
    world.archive()
    merge(world.objects, runs(world.objects))
    world.objects.put(payload_key("acme", "a", "1"), b"payload")
    world.objects.put(payload_key("acme-2", "c", "1"), b"payload")
    newest = max(info.modified for info in world.objects.list())
    for at in (newest, newest + 7200):  # rows read one by one; files known to be old enough
        erase(world.objects, new_erasure("tenant", "acme", at), quietly)
    assert world.jobs() == ["c", "d"]
    assert locate(world.objects, "a") == set()
    assert find_in_lake(world.objects, "c", 3)
    assert blobs(world) == [payload_key("acme-2", "c", "1")]


def test_files_that_are_old_enough_go_unread(
    world: Any, make_outcomes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.append(*make_outcomes("ab"))
    world.archive()
    newest = max(info.modified for info in world.objects.list())
    found = find(world.objects, new_erasure("tenant", "acme", newest + 7200))
    assert (found.whole, found.mixed) == (world.files(), [])


def test_what_a_tenant_does_after_its_erasure_stays(
    world: Any, make_outcomes: Any, now: float
) -> None:
    world.append(*make_outcomes("ab"))
    world.append(*make_outcomes("c", submitted_at=now + 1, finished_at=now + 2))
    world.append(*make_outcomes("d", submitted_at=now - 1, finished_at=now + 2))
    world.archive()
    world.objects.put(payload_key("acme", "c", "1"), b"put long after `now`")
    _, left = erase(world.objects, new_erasure("tenant", "acme", now), quietly)
    assert left == world.files()
    assert world.jobs() == ["c"]
    assert find_in_lake(world.objects, "c", 3)
    assert len(blobs(world)) == 1


def test_a_job_submitted_again_after_its_erasure_stays_and_can_be_erased_too(
    world: Any, make_outcomes: Any, now: float
) -> None:
    world.append(*make_outcomes("ab"))
    world.append(*make_outcomes("a", submitted_at=now + 1, finished_at=now + 2))
    world.archive()
    _, left = erase(world.objects, new_erasure("job", "a", now), quietly)
    assert left == world.files()
    assert world.jobs() == ["a", "b"]
    assert find_in_lake(world.objects, "a", 3).finished_at == now + 2  # type: ignore[union-attr]
    _, left = erase(world.objects, new_erasure("job", "a", now + 10), quietly)
    assert left == []
    assert world.jobs() == ["b"]
    assert locate(world.objects, "a") == set()


def test_what_is_erased_before_it_is_archived_never_comes(
    world: Any, make_outcomes: Any, of_job: Any, now: float
) -> None:
    world.append(*make_outcomes("ab"), *make_outcomes("cd", tenant="other"))
    world.objects.put(payload_key("acme", "a", "1"), b"payload")
    erase(world.objects, of_job("a"), quietly)
    erase(world.objects, new_erasure("tenant", "other", now), quietly)
    world.archive()
    assert world.jobs() == ["b"]
    assert locate(world.objects, "c") == set()
    assert blobs(world) == []


def test_an_erasure_at_any_moment_of_archiving_holds(
    world: Any, moments: Any, make_outcomes: Any, now: float
) -> None:
    counted = moments()
    world.append(*make_outcomes(["0-a", "0-b"]), *make_outcomes(["0-c"], tenant="other"))
    world.archive(counted)
    for life in range(1, counted.count + 1):
        world.append(*make_outcomes([f"{life}-a", f"{life}-b"]))
        world.append(*make_outcomes([f"{life}-c"], tenant="other"))

        def erase_two(life: int = life) -> None:
            for job_id in (f"{life}-a", f"{life}-c"):
                erase(world.objects, new_erasure("job", job_id, now), quietly)

        world.archive(moments(at=life - 1, then=erase_two))
        assert [job for job in world.jobs() if job.startswith(f"{life}-")] == [f"{life}-b"]
        assert locate(world.objects, f"{life}-b")
        assert locate(world.objects, f"{life}-a") == set()


def test_archiving_at_any_moment_of_an_erasure_brings_nothing_back(
    world: Any, moments: Any, watched: Any, make_outcomes: Any, of_job: Any
) -> None:
    for at in range(1000):
        world.append(*make_outcomes([f"{at}-a", f"{at}-b"]))
        passing = moments(at=at, then=world.archive)
        erase(watched(world.objects, passing), of_job(f"{at}-a"), quietly)
        world.archive()
        assert [job for job in world.jobs() if job.startswith(f"{at}-")] == [f"{at}-b"]
        assert locate(world.objects, f"{at}-a") == set()
        merge(world.objects, runs(world.objects))
        if passing.count <= at:
            break
    assert at > 4


def test_an_erasure_between_two_lives_holds_for_what_the_first_wrote(
    world: Any, moments: Any, killed: Any, make_outcomes: Any, now: float
) -> None:
    counted = moments()
    world.append(*make_outcomes(["0-a"]))
    world.archive(counted)
    for life in range(1, counted.count + 1):
        world.append(*make_outcomes([f"{life}-a"]))
        with pytest.raises(killed):
            world.archive(moments(at=life - 1))
        erase(world.objects, new_erasure("job", f"{life}-a", now), quietly)
        world.archive()
        assert world.jobs() == ["0-a"]


def test_a_merge_at_any_moment_of_an_erasure_brings_no_entry_back(
    world: Any, moments: Any, watched: Any, of_job: Any
) -> None:
    file = rows_key("acme", "sentiment", date(2026, 1, 1), "0-1-1-abcd")
    for at in range(1000):
        for job_id in (f"{at}-a", f"{at}-b"):
            write_run(world.objects, date(2026, 1, 1), job_id, [(job_id, file)])
        passing = moments(at=at, then=lambda: merge(world.objects, runs(world.objects)))
        erase(watched(world.objects, passing), of_job(f"{at}-a"), quietly)
        assert locate(world.objects, f"{at}-a") == set()
        assert locate(world.objects, f"{at}-b")
        if passing.count <= at:
            break
    assert at > 8


def test_rewrites_that_cross_lose_neither_erasure(
    world: Any, moments: Any, watched: Any, make_outcomes: Any, of_job: Any
) -> None:
    world.append(*make_outcomes(["keep", "0"]))
    world.archive()
    (key,) = world.files()
    counted = moments()
    record_erasure(world.objects, of_job("0"))
    rewrite(watched(world.objects, counted), key)
    for at in range(counted.count):
        world.append(*make_outcomes([f"keep-{at}", f"a-{at}", f"b-{at}"]))
        world.archive()
        (key,) = locate(world.objects, f"a-{at}")
        record_erasure(world.objects, of_job(f"a-{at}"))

        def another(at: int = at) -> None:
            erase(world.objects, of_job(f"b-{at}"), quietly)

        rewrite(watched(world.objects, moments(at=at, then=another)), key)
        assert [job for job in world.jobs() if job.endswith(f"-{at}")] == [f"keep-{at}"]


def test_an_erasure_is_done_again_after_a_failure(
    world: Any, moments: Any, killed: Any, watched: Any, make_outcomes: Any, now: float
) -> None:
    world.append(*make_outcomes("ab"), *make_outcomes("c", tenant="other"))
    world.archive()
    world.objects.put(payload_key("acme", "a", "1"), b"payload")
    newest = max(info.modified for info in world.objects.list())
    wanted = new_erasure("tenant", "acme", newest + 1)
    for at in range(1000):
        try:
            erase(watched(world.objects, moments(at=at)), wanted, quietly)
        except killed:
            continue
        break
    assert at > 5
    assert world.jobs() == ["c"]
    assert blobs(world) == []


@pytest.mark.parametrize(("kind", "name"), [("job", ""), ("job", "a/b"), ("tenant", "../x")])
def test_what_is_no_name_is_refused(kind: Any, name: str) -> None:
    with pytest.raises(InvalidJob):
        new_erasure(kind, name, 0.0)


@pytest.mark.parametrize("job_id", [".", "..", "x" * 128, "a:b.c_d-e"])
def test_every_job_id_can_be_erased(world: Any, job_id: str) -> None:
    record_erasure(world.objects, new_erasure("job", job_id, 5.0))
    record_erasure(world.objects, new_erasure("job", job_id, 3.0))
    assert read_erasures(world.objects) == Erasures({job_id: 5.0}, {})
