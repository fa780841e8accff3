"""From the results topic to files of rows: where they go, when, and that each outcome is there once."""

from __future__ import annotations

import threading
from typing import Any

import duckdb
import msgspec
import pytest

from infra.eventlog import Fenced
from infra.lake import GROUP, SEGMENTS, find_in_lake, read_rows
from infra.lake_rows import parquet
from schemas.errors import PipelineError
from schemas.payloads import Ref
from schemas.results import encode_outcome
from schemas.topics import RESULTS
from workers.archiver.archive import Claim
from workers.archiver.segments import OVERHEAD_BYTES, Limits

DAY_S = 86_400.0


def lag(world: Any) -> int:
    return int(world.log.lag(GROUP, [RESULTS])[RESULTS].open)


def test_rows_go_to_their_tenant_model_and_date(world: Any, make_outcome: Any) -> None:
    finished_at = make_outcome("").finished_at
    world.append(
        make_outcome("a"),
        make_outcome("b", tenant="other"),
        make_outcome("c", model="speech"),
        make_outcome("d", finished_at=finished_at + DAY_S),
    )
    world.archive()
    (mark,) = {key.rpartition("-")[2] for key in world.files()}
    assert world.files() == [
        f"lake/tenant=acme/model=sentiment/date=2026-01-01/0-1-4-{mark}",
        f"lake/tenant=acme/model=sentiment/date=2026-01-02/0-1-4-{mark}",
        f"lake/tenant=acme/model=speech/date=2026-01-01/0-1-4-{mark}",
        f"lake/tenant=other/model=sentiment/date=2026-01-01/0-1-4-{mark}",
    ]
    assert world.jobs() == list("abcd")
    assert lag(world) == 0


def test_what_is_no_models_name_has_a_folder_and_keeps_its_name_in_the_row(
    world: Any, make_outcome: Any
) -> None:
    names = ["../../up", "Ünï/côde", "x" * 250, ""]
    world.append(*(make_outcome(str(n), model=name) for n, name in enumerate(names)))
    world.archive()
    (key,) = world.files()
    assert key.startswith("lake/tenant=acme/model=_other/date=2026-01-01/")
    assert [find_in_lake(world.objects, str(n), 3).model for n in range(4)] == names  # type: ignore[union-attr]


@pytest.mark.parametrize("by", ["records", "bytes"])
def test_a_file_is_written_when_it_is_large_enough(world: Any, make_outcomes: Any, by: str) -> None:
    enough = 7
    size_bytes = enough * (len(encode_outcome(*make_outcomes([0]))) + OVERHEAD_BYTES)
    archiver = world.archiver(
        Limits(enough, 2**25, 900) if by == "records" else Limits(16_384, size_bytes, 900)
    )
    for n in range(enough):
        assert world.files() == []
        world.append(*make_outcomes([n]))
        archiver.step()
    assert len(world.files()) == 1
    assert len(world.jobs()) == enough


def test_a_file_is_written_when_its_first_record_has_waited(world: Any, make_outcomes: Any) -> None:
    archiver = world.archiver()
    for n in range(3):
        world.append(*make_outcomes([n]))
        archiver.step()
        world.clock.now += 300
    assert world.files() == []
    archiver.step()
    assert world.jobs() == ["0", "1", "2"]


def test_a_full_memory_is_written_before_more_is_taken(world: Any, make_outcomes: Any) -> None:
    archiver = world.archiver(memory_bytes=50_000)
    world.append(*make_outcomes(range(3000)))
    most = 0
    for _ in range(6):
        archiver.step()
        most = max(most, archiver.pending)
    assert most <= 1000  # what one receive gives
    assert len(world.jobs()) == 3000


def test_garbage_is_counted_and_left_out(world: Any, make_outcome: Any) -> None:
    world.append(make_outcome("a"))
    world.append_raw(b"", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"job_id":1}')
    world.append(make_outcome("b"))
    wrong = [
        make_outcome("c", tenant="../acme"),
        make_outcome("d", status="running"),
        make_outcome("e/../f"),
        make_outcome("g", finished_at=1e300),
        make_outcome("h", submitted_at=-1.0),
        make_outcome("i", answer=msgspec.Raw(str(2**70).encode()), version=2**62),
        make_outcome("j", attempts=2**63 - 1, ref=Ref("k", 2**63, "s")),
    ]
    world.append_raw(*map(encode_outcome, wrong))
    archiver = world.archive()
    assert world.jobs() == ["a", "b", "i"]
    assert archiver.counts == {"archived": 3, "rejected": 11}
    assert lag(world) == 0


def test_only_garbage_is_completed_too(world: Any) -> None:
    world.append_raw(b"garbage")
    world.archive()
    assert world.files() == []
    assert lag(world) == 0


def moments_of_a_life(world: Any, moments: Any, make_outcomes: Any) -> int:
    """How many there are; the log has nothing left then."""
    counted = moments()
    world.append(*two_kinds(make_outcomes, 0))
    world.archive(counted)
    assert counted.count > 10
    return int(counted.count)


def two_kinds(make_outcomes: Any, life: int) -> Any:
    """Such that one segment is two files."""
    mine = make_outcomes([f"{life}-a{n}" for n in range(3)])
    return mine + make_outcomes([f"{life}-b{n}" for n in range(2)], tenant="other")


def test_killed_at_any_moment_every_job_is_there_once(
    world: Any, moments: Any, killed: Any, make_outcomes: Any
) -> None:
    count = moments_of_a_life(world, moments, make_outcomes)
    for life in range(1, count + 1):
        world.append(*two_kinds(make_outcomes, life))
        with pytest.raises(killed):
            world.archive(moments(at=life - 1))
        assert len(world.jobs()) == len(set(world.jobs()))
        # The next life is given more, and would cut elsewhere.
        world.append(*make_outcomes([f"{life}-later"]))
        world.archive()
        assert lag(world) == 0
        assert len(world.jobs()) == len(set(world.jobs())) == 5 + 6 * life
    for job_id in world.jobs()[::17]:
        assert find_in_lake(world.objects, job_id, 3)


def test_killed_again_and_again_on_the_same_records(
    world: Any, moments: Any, killed: Any, make_outcomes: Any
) -> None:
    """Each life gets one moment further, with one more record."""
    expected = 0
    for life in range(1000):
        world.append(*two_kinds(make_outcomes, life))
        expected += 5
        try:
            world.archive(moments(at=life))
        except killed:
            assert len(world.jobs()) == len(set(world.jobs()))
        else:
            break
    world.archive()
    assert life > 10
    assert len(world.jobs()) == len(set(world.jobs())) == expected
    assert lag(world) == 0


def test_one_that_stalls_at_any_moment_and_comes_back_late_changes_nothing(
    world: Any, moments: Any, make_outcomes: Any
) -> None:
    count = moments_of_a_life(world, moments, make_outcomes)
    for life in range(1, count + 1):
        world.append(*two_kinds(make_outcomes, life))
        stalled, go_on = threading.Event(), threading.Event()

        def stall(stalled: Any = stalled, go_on: Any = go_on) -> None:
            stalled.set()
            assert go_on.wait(20)

        errors: list[BaseException] = []

        def live(at: int = life - 1, stall: Any = stall, errors: Any = errors) -> None:
            try:
                world.archive(moments(at=at, then=stall))
            except Fenced as error:
                errors.append(error)

        thread = threading.Thread(target=live)
        thread.start()
        assert stalled.wait(20)
        world.append(*make_outcomes([f"{life}-later"]))
        world.archive()
        before = {key: world.objects.get(key, max_bytes=2**20) for key in world.files()}
        go_on.set()
        thread.join()
        assert {key: world.objects.get(key, max_bytes=2**20) for key in world.files()} == before
        assert len(world.jobs()) == len(set(world.jobs())) == 5 + 6 * life
        assert lag(world) == 0


def test_an_earlier_life_with_larger_files_is_continued(
    world: Any, moments: Any, killed: Any, make_outcomes: Any
) -> None:
    """What it claimed is waited for, beyond the limits of now."""
    world.append(*make_outcomes(range(2500)))
    first = world.archiver(moments=(dying := moments()))
    for _ in range(3):
        first.step()
    dying.at = dying.count + 4  # the claim, and the first file
    with pytest.raises(killed):
        first.step(draining=True)
    first._consumer.close()

    second = world.archiver(Limits(10, 1000, 1), memory_bytes=2000)
    for _ in range(4):
        second.step()
    assert len(world.files()) == 1
    assert len(world.jobs()) == len(set(world.jobs())) == 2500


def test_another_log_with_the_same_positions_overwrites_nothing(
    world: Any, make_outcomes: Any
) -> None:
    world.append(*make_outcomes("abc"))
    world.archive()
    world.log.close()
    world.log = world.open_log("after-a-disaster")
    world.append(*make_outcomes("def"))
    world.archive()
    assert world.jobs() == list("abcdef")


def test_duckdb_reads_the_lake_as_it_is(world: Any, make_outcome: Any) -> None:
    world.append(
        make_outcome("a"),
        make_outcome("b", tenant="other", status="failed", answer=b"null", code="step_failed"),
    )
    world.archive()
    files = f"{world.folder}/objects/lake/tenant=*/model=*/date=*/*.parquet"
    rows = duckdb.sql(
        f"""SELECT tenant, model, date::VARCHAR, job_id, status, code, answer->>'label',
            epoch(finished_at - submitted_at), run_ms
            FROM read_parquet('{files}', hive_partitioning = true) ORDER BY job_id"""
    ).fetchall()
    assert rows == [
        ("acme", "sentiment", "2026-01-01", "a", "succeeded", None, "good", 1.5, 4.0),
        ("other", "sentiment", "2026-01-01", "b", "failed", "step_failed", None, 1.5, 4.0),
    ]
    nothing_else = duckdb.sql(
        f"SELECT count(*) FROM read_parquet('{world.folder}/objects/lake/**/*.parquet')"
    ).fetchall()
    assert nothing_else == [(2,)]


def test_duckdb_reads_files_of_older_versions_beside_newer(world: Any, make_outcomes: Any) -> None:
    for job_id in "ab":
        world.append(*make_outcomes(job_id))
        world.archive()
    older = read_rows(world.objects, world.files()[0]).drop_columns(["trace_id"])  # type: ignore[union-attr]
    world.objects.put(world.files()[0], parquet(older))
    rows = duckdb.sql(
        f"""SELECT job_id, trace_id
            FROM read_parquet('{world.folder}/objects/lake/**/*.parquet', union_by_name = true)
            ORDER BY job_id"""
    ).fetchall()
    assert rows == [("a", None), ("b", "a" * 32)]


def test_a_claim_that_is_none_stops_the_archiver_and_is_named(
    world: Any, make_outcomes: Any
) -> None:
    world.append(*make_outcomes("a"))
    world.archive()
    (claim,) = (info.key for info in world.objects.list(SEGMENTS))
    world.log.close()
    world.log = world.open_log("again")
    world.append(*make_outcomes("a"))
    world.objects.put(claim, b"no claim")
    with pytest.raises(PipelineError, match=claim) as caught:
        world.archive()
    assert caught.value.code == "lake_corrupt"
    assert lag(world) == 1


def test_a_claim_is_read_by_later_versions() -> None:
    assert msgspec.json.encode(Claim(7)) == b'{"last":7}'
