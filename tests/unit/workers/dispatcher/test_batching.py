"""Jobs that wait, and which of them leave together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.models import ModelCard
from schemas.payloads import Payload
from schemas.topics import LANES, LIVE_LANES
from workers.dispatcher.batching import PASSED_OVER_S, Batcher
from workers.dispatcher.fairness import LaneClock
from workers.dispatcher.memory import OpenJob

MakeOpen = Callable[..., OpenJob]
MakeCard = Callable[..., ModelCard]


@pytest.fixture
def batcher() -> Batcher:
    return Batcher(LaneClock(), batch_bytes=1000)


def ids(jobs: list[OpenJob]) -> list[str]:
    return [job.job.id for job in jobs]


def drained(batcher: Batcher, now: float) -> list[list[str]]:
    batches = []
    while batch := batcher.next_batch(LANES, now):
        batches.append(ids(batch))
    return batches


def heap_entries(batcher: Batcher) -> int:
    """How many jobs the batcher keeps alive, those that wait and those that do not."""
    return sum(len(queue._heap) for lane in batcher._lanes.values() for queue in lane.values())


def test_nothing_waits_in_an_empty_batcher(batcher: Batcher, noon: float) -> None:
    assert batcher.next_batch(LANES, noon) == []
    assert batcher.ready_lanes(noon) == set()
    assert len(batcher) == 0


def test_a_single_job_leaves_at_once(batcher: Batcher, make_open: MakeOpen, noon: float) -> None:
    job = make_open()
    batcher.add([job])

    assert batcher.ready_lanes(noon) == {"standard"}
    assert batcher.next_batch(LANES, noon) == [job]
    assert len(batcher) == 0


def test_what_waits_leaves_by_priority_then_in_the_order_it_came(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    batcher.add(make_open(id=f"{i}-{p}", priority=p) for i, p in enumerate((0, 9, 0, 5, 9)))

    assert ids(batcher.next_batch(LANES, noon)) == ["1-9", "4-9", "3-5", "0-0", "2-0"]


def test_a_batch_has_at_most_max_jobs(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    card = make_card(max_jobs=3)
    batcher.add(make_open(card=card) for _ in range(7))

    assert [len(batch) for batch in drained(batcher, noon)] == [3, 3, 1]


def test_a_batch_has_at_most_so_many_inline_bytes(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    payload = Payload("text/plain", data=b"x" * 400)
    batcher.add(make_open(payload=payload) for _ in range(5))

    assert [len(batch) for batch in drained(batcher, noon)] == [2, 2, 1]


def test_a_job_larger_than_a_batch_leaves_by_itself(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    payload = Payload("text/plain", data=b"x" * 2000)
    batcher.add(make_open(payload=payload) for _ in range(2))

    assert [len(batch) for batch in drained(batcher, noon)] == [1, 1]


def test_versions_and_models_do_not_share_a_batch(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    cards = [make_card(), make_card(version=2), make_card(name="other")]
    for number in range(2):
        for card in cards:
            batcher.add([make_open(id=f"{card.name}-{card.version}-{number}", card=card)])

    assert sorted(drained(batcher, noon)) == [
        ["echo-1-0", "echo-1-1"],
        ["echo-2-0", "echo-2-1"],
        ["other-1-0", "other-1-1"],
    ]


def test_texts_of_like_length_share_a_batch(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    for length in (10, 200, 12, 250):
        batcher.add([make_open(id=str(length), payload=Payload("", data=b"x" * length))])

    assert sorted(drained(batcher, noon)) == [["10", "12"], ["200", "250"]]


def test_images_share_a_batch_whatever_their_length(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    card = make_card(modality="image")
    for length in (10, 200, 500):
        batcher.add([make_open(card=card, payload=Payload("", data=b"x" * length))])

    assert [len(batch) for batch in drained(batcher, noon)] == [3]


def test_a_batch_is_of_one_lane(batcher: Batcher, make_open: MakeOpen, noon: float) -> None:
    batcher.add(make_open(id=lane, lane=lane) for lane in reversed(LANES))

    assert drained(batcher, noon) == [["premium"], ["standard"], ["basic"], ["bulk"]]


def test_a_slot_for_live_lanes_takes_no_bulk(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    batcher.add([make_open(id="b", lane="bulk")])

    assert batcher.next_batch(LIVE_LANES, noon) == []
    assert batcher.ready_lanes(noon) == {"bulk"}
    assert ids(batcher.next_batch(LANES, noon)) == ["b"]


def test_the_oldest_of_the_most_urgent_decides_between_groups(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    one, other = make_card(name="one"), make_card(name="other")
    batcher.add([make_open(id="a", card=one), make_open(id="b", card=other)])
    batcher.add([make_open(id="c", card=other, priority=1), make_open(id="d", card=one)])

    assert drained(batcher, noon) == [["c", "b"], ["a", "d"]]


# ── waiting for company ──────────────────────────────────────────────────────────────────────────


def test_with_a_delay_a_job_waits_for_company_but_no_longer(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    batcher.add([make_open(id="a", card=make_card(max_delay_ms=50))])

    assert batcher.next_batch(LANES, noon + 0.04) == []
    assert batcher.ready_lanes(noon + 0.04) == set()
    assert ids(batcher.next_batch(LANES, noon + 0.06)) == ["a"]


def test_with_a_delay_a_full_batch_leaves_at_once(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    card = make_card(max_delay_ms=50, max_jobs=2)
    batcher.add(make_open(card=card) for _ in range(3))

    assert [len(batch) for batch in drained(batcher, noon)] == [2]
    assert len(batcher) == 1


def test_jobs_that_were_taken_out_are_no_company(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    card = make_card(max_delay_ms=50, max_jobs=3)
    batcher.add(make_open(id=id_, card=card) for id_ in "abc")
    batcher.remove("b")
    batcher.remove("c")

    assert batcher.next_batch(LANES, noon) == []


def test_a_group_that_waits_for_company_holds_up_no_other(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    batcher.add([make_open(id="slow", priority=9, card=make_card(name="s", max_delay_ms=50))])
    batcher.add([make_open(id="quick")])

    assert drained(batcher, noon) == [["quick"]]


# ── suspects ─────────────────────────────────────────────────────────────────────────────────────


def test_a_suspect_leaves_alone_and_at_once(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    card = make_card(max_delay_ms=1000)
    batcher.add(make_open(id=id_, card=card, suspect=True) for id_ in "ab")

    assert drained(batcher, noon) == [["a"], ["b"]]


def test_suspects_and_others_do_not_mix(batcher: Batcher, make_open: MakeOpen, noon: float) -> None:
    batcher.add([make_open(id="a"), make_open(id="s", suspect=True), make_open(id="b")])

    assert sorted(drained(batcher, noon)) == [["a", "b"], ["s"]]


def test_suspects_of_bulk_take_no_slot_of_live_lanes(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    batcher.add([make_open(lane="bulk", suspect=True)])

    assert batcher.next_batch(LIVE_LANES, noon) == []


# ── taken out ────────────────────────────────────────────────────────────────────────────────────


def test_a_job_that_was_taken_out_does_not_leave(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    a, b = make_open(id="a"), make_open(id="b")
    batcher.add([a, b])

    assert batcher.remove("a") is a
    assert batcher.remove("a") is None
    assert "a" not in batcher
    assert drained(batcher, noon) == [["b"]]


def test_a_new_job_under_the_id_of_one_taken_out_is_the_one_that_leaves(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    old, new = make_open(id="a"), make_open(id="a")
    batcher.add([old])
    batcher.remove("a")
    batcher.add([new])

    assert batcher.next_batch(LANES, noon) == [new]
    assert batcher.next_batch(LANES, noon) == []


def test_jobs_whose_deadline_came_are_taken_out(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    batcher.add(make_open(id=str(s), deadline_at=noon + s) for s in (30, 10, 20))

    assert ids(batcher.past_deadline(noon + 20)) == ["10", "20"]
    assert drained(batcher, noon) == [["30"]]


def test_after_a_send_that_failed_jobs_leave_as_they_would_have(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    batcher.add(make_open(id=id_) for id_ in "abc")
    batch = batcher.next_batch(LANES, noon)
    batcher.add([make_open(id="d")])

    batcher.add(batch)

    assert drained(batcher, noon) == [["a", "b", "c", "d"]]


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────


def test_100000_jobs_that_came_and_went_leave_nothing_behind(
    batcher: Batcher, make_open: MakeOpen, noon: float
) -> None:
    template = make_open()
    for number in range(100_000):
        job = msgspec.structs.replace(template.job, id=str(number))
        batcher.add([OpenJob(job, template.at, template.card, "standard", number, noon)])
        batcher.remove(str(number))
    batcher.ready_lanes(noon)

    assert heap_entries(batcher) == 0


@pytest.mark.parametrize("suspect", [False, True])
def test_jobs_that_came_and_went_behind_one_that_stays_leave_nothing_behind(
    batcher: Batcher, make_open: MakeOpen, noon: float, suspect: bool
) -> None:
    """No slot, a patient job in front, and thousands that are cancelled or expire behind it."""
    template = make_open(suspect=suspect)
    batcher.add([make_open(id="first", priority=9, suspect=suspect)])
    for number in range(10_000):
        job = msgspec.structs.replace(template.job, id=str(number), deadline_at=noon + 1)
        batcher.add([OpenJob(job, template.at, template.card, "standard", number, noon)])
        if number % 2:
            batcher.remove(str(number))
        if number % 1000 == 999:
            batcher.past_deadline(noon + 2)
            batcher.ready_lanes(noon + 2)

    assert len(batcher) == 1
    assert heap_entries(batcher) < 1000


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.sampled_from(LANES), st.integers(0, 2), st.booleans(), st.booleans()
        ),
        st.tuples(st.just("remove"), st.integers(0, 40)),
        st.tuples(st.just("send"), st.booleans()),
        st.tuples(st.just("fail")),
        st.tuples(st.just("expire"), st.integers(0, 3000)),
    ),
    max_size=60,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_each_job_leaves_once_and_none_is_forgotten(
    make_open: MakeOpen, make_card: MakeCard, noon: float, steps: list[tuple[Any, ...]]
) -> None:
    batcher = Batcher(LaneClock(), 1000)
    cards = [make_card(max_jobs=3), make_card(name="other", max_jobs=2)]
    waiting: dict[str, OpenJob] = {}
    numbers = iter(range(1000))

    def leave(lanes: Any) -> list[OpenJob]:
        batch = batcher.next_batch(lanes, noon)
        for job in batch:
            assert waiting.pop(job.job.id) is job
        assert len({(job.lane, job.group, job.job.suspect) for job in batch}) <= 1
        assert len(batch) <= (1 if batch and batch[0].job.suspect else 3)
        return batch

    for kind, *facts in steps:
        match kind:
            case "add":
                lane, priority, suspect, other = facts
                id_ = str(next(numbers))
                job = make_open(
                    id=id_, lane=lane, priority=priority, suspect=suspect, card=cards[other],
                    deadline_at=noon + 1000 + int(id_) * 50,
                )  # fmt: skip
                waiting[id_] = job
                batcher.add([job])
            case "remove":
                assert batcher.remove(str(facts[0])) is waiting.pop(str(facts[0]), None)
            case "send":
                lanes = LIVE_LANES if facts[0] else LANES
                ready = {job.lane for job in waiting.values()}
                assert bool(leave(lanes)) == bool(ready & set(lanes))
            case "fail":
                batch = leave(LANES)
                batcher.add(batch)
                waiting |= {job.job.id: job for job in batch}
            case "expire":
                now = noon + facts[0]
                due = {id_ for id_, job in waiting.items() if job.job.deadline_at <= now}
                assert {waiting.pop(id_).job.id for id_ in due} == set(
                    ids(batcher.past_deadline(now))
                )
        assert set(ids(list(batcher))) == waiting.keys()
        assert batcher.ready_lanes(noon) == {job.lane for job in waiting.values()}

    while leave(LANES):
        pass
    assert not waiting


def test_what_waits_is_told_by_lane(batcher: Batcher, make_open: MakeOpen) -> None:
    batcher.add([make_open(id="a"), make_open(id="b", lane="bulk"), make_open(id="c")])

    assert {lane: ids(jobs) for lane, jobs in batcher.summary().items()} == {
        "standard": ["a", "c"],
        "bulk": ["b"],
    }


def test_what_the_worker_has_loaded_goes_first_but_nothing_waits_for_that_for_long(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    cold = make_open(id="cold", card=make_card(name="cold"))
    hot = [make_open(id=f"hot {n}", card=make_card(name="hot", max_jobs=1)) for n in range(2)]
    batcher.add([cold, *hot])

    assert ids(batcher.next_batch(LANES, noon, {"hot/1"})) == ["hot 0"]
    assert ids(batcher.next_batch(LANES, noon + PASSED_OVER_S, {"hot/1"})) == ["cold"]


def test_a_worker_of_which_nothing_is_known_gets_what_is_due(
    batcher: Batcher, make_open: MakeOpen, make_card: MakeCard, noon: float
) -> None:
    batcher.add([make_open(id=name, card=make_card(name=name)) for name in ("first", "second")])

    assert ids(batcher.next_batch(LANES, noon)) == ["first"]
