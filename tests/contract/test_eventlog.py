"""What every event log must do. A new one joins by a parameter of `log_url`."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import pytest

from infra.eventlog import Consumer, EventLog, Fenced, Follower, NewRecord, Position, Record
from schemas.errors import InvalidJob, PipelineError

A = "jobs.image.standard"
B = "jobs.text.bulk"
RESULTS = "results"
PATIENCE_S = 20.0

Open = Callable[..., EventLog]
Take = Callable[[Consumer, int], list[Record]]
NothingMore = Callable[[Consumer], bool]


def new(topic: str, *keys: object, value: bytes = b"value") -> list[NewRecord]:
    return [NewRecord(topic, str(key), {}, value) for key in keys]


def keys(records: list[Record]) -> list[str]:
    return [record.key for record in records]


def positions(records: list[Record]) -> list[Position]:
    return [record.position for record in records]


def kept(log: EventLog, *topics: str) -> list[str]:
    return keys(list(log.read(topics, 0)))


def test_a_record_comes_back_as_it_was_appended(log: EventLog, take: Take) -> None:
    sent = NewRecord(A, "Schlüssel-鍵", {"naïve": "日本語 🦀", "": ""}, bytes(range(256)))
    log.append([sent])
    [record] = take(log.consumer("g", [A]), 1)
    assert record.position.topic == A
    assert (record.key, record.headers, record.value) == (sent.key, sent.headers, sent.value)


def test_empty_and_odd_text_is_kept(log: EventLog) -> None:
    log.append([NewRecord(A, "", {}, b""), NewRecord(A, "nul\0inside", {"a\0b": "\0"}, b"\0")])
    first, second = log.read([A], 0)
    assert (first.key, first.headers, first.value) == ("", {}, b"")
    assert (second.key, second.headers, second.value) == ("nul\0inside", {"a\0b": "\0"}, b"\0")


def test_order_holds_within_a_topic(log: EventLog, take: Take) -> None:
    for start in range(0, 30, 10):
        log.append(
            [record for i in range(start, start + 10) for record in (*new(A, i), *new(B, i))]
        )
    records = take(log.consumer("g", [A, B]), 60)
    expected = [str(i) for i in range(30)]
    assert [r.key for r in records if r.position.topic == A] == expected
    assert [r.key for r in records if r.position.topic == B] == expected


def test_nothing_to_append_is_nothing(log: EventLog) -> None:
    log.append([])
    assert kept(log, A, B) == []


@pytest.mark.parametrize(
    "bad",
    [
        NewRecord(A, "lone \ud800", {}, b""),
        NewRecord(A, "k", {"lone \ud800": "v"}, b""),
        NewRecord(A, "k", {"h": "lone \udfff"}, b""),
    ],
)
def test_a_lone_surrogate_refuses_the_whole_append(log: EventLog, bad: NewRecord) -> None:
    with pytest.raises(InvalidJob, match="surrogate") as caught:
        log.append([*new(A, "good"), bad])
    assert caught.value.code == "invalid_text"
    assert kept(log, A) == []


def test_a_topic_never_declared_is_refused_everywhere(log: EventLog) -> None:
    wrong = "jobs.smell.standard"
    consumer = log.consumer("g", [A])
    attempts: list[Callable[[], object]] = [
        lambda: log.append([*new(A, "good"), *new(wrong, "bad")]),
        lambda: log.consumer("h", [A, wrong]),
        lambda: log.read([wrong], 0),
        lambda: log.lag("g", [wrong]),
        lambda: log.trim({wrong: 0}),
        lambda: consumer.complete([], new(wrong, "bad")),
    ]
    for attempt in attempts:
        with pytest.raises(PipelineError, match=r"jobs\.smell\.standard") as caught:
            attempt()
        assert caught.value.code == "unknown_topic"
    assert kept(log, A) == []


def test_a_large_value_is_kept_and_does_not_block_those_behind_it(
    log: EventLog, take: Take
) -> None:
    large = bytes(1_000_000)
    log.append([*new(A, "large", value=large), *new(A, "small")])
    consumer = log.consumer("g", [A])
    [first] = consumer.receive(10, 1000, timeout_s=10)
    assert first.value == large
    assert keys(take(consumer, 1)) == ["small"]


def test_receive_stays_below_its_limits(log: EventLog) -> None:
    log.append(new(A, *range(20), value=bytes(100)))
    consumer = log.consumer("g", [A])
    assert len(consumer.receive(3, 2**30, timeout_s=10)) == 3
    assert len(consumer.receive(100, 550, timeout_s=10)) == 5
    assert consumer.receive(0, 2**30) == []


def test_a_busy_topic_does_not_starve_the_others(log: EventLog) -> None:
    log.append(new(A, *range(500)))
    log.append(new(B, *range(3)))
    consumer = log.consumer("g", [A, B])
    received = [consumer.receive(10, 2**30, timeout_s=10) for _ in range(2)]
    assert [r.key for r in itertools.chain(*received) if r.position.topic == B] == ["0", "1", "2"]


def test_topics_take_turns_one_record_at_a_time(log: EventLog) -> None:
    log.append([*new(A, *range(4)), *new(B, *range(4))])
    consumer = log.consumer("g", [A, B, RESULTS])
    received = [consumer.receive(1, 2**30, timeout_s=10)[0] for _ in range(4)]
    assert sorted(r.position.topic for r in received) == [A, A, B, B]


def test_receive_waits_for_a_record(log_factory: Open) -> None:
    consumer = log_factory().consumer("g", [A])
    assert consumer.receive(1, 2**30) == []
    writer = threading.Timer(0.05, lambda: log_factory().append(new(A, "late")))
    writer.start()
    assert keys(consumer.receive(1, 2**30, timeout_s=20)) == ["late"]
    writer.join()


def test_a_completion_and_its_outputs_are_one(log: EventLog, take: Take) -> None:
    log.append(new(A, 1, 2))
    consumer = log.consumer("g", [A])
    records = take(consumer, 2)
    with pytest.raises(PipelineError):
        consumer.complete(positions(records), [*new(RESULTS, 1), *new("no.such.topic", 2)])
    with pytest.raises(InvalidJob):
        consumer.complete(positions(records), [*new(RESULTS, 1), *new(RESULTS, "\ud800")])
    assert kept(log, RESULTS) == []
    assert log.lag("g", [A])[A].open == 2
    consumer.complete(positions(records), new(RESULTS, 1, 2))
    assert kept(log, RESULTS) == ["1", "2"]
    assert log.lag("g", [A])[A].open == 0


def test_a_member_may_read_its_own_outputs(log: EventLog, take: Take) -> None:
    log.append(new(A, 1))
    consumer = log.consumer("g", [A, "jobs.retry"])
    consumer.complete(positions(take(consumer, 1)), new("jobs.retry", "again"))
    assert keys(take(consumer, 1)) == ["again"]


def test_completing_twice_is_ignored(log: EventLog, take: Take) -> None:
    log.append(new(A, *range(3)))
    consumer = log.consumer("g", [A])
    records = take(consumer, 3)
    consumer.complete(positions(records[1:2]))
    consumer.complete(positions(records[:2]) * 2)
    assert consumer.lag()[A].open == 1


def test_completing_what_was_never_received_writes_nothing(log: EventLog, take: Take) -> None:
    log.append(new(A, 1, 2))
    [first] = take(log.consumer("g", [A]), 1)
    other = log.consumer("h", [A])
    with pytest.raises(ValueError, match="never received"):
        other.complete([first.position], new(RESULTS, "wrong"))
    assert kept(log, RESULTS) == []
    assert other.lag()[A].open == 2


def test_a_completion_that_failed_leaves_its_records_open(log_factory: Open, take: Take) -> None:
    log = log_factory()
    log.append(new(A, *range(4)))
    consumer = log.consumer("g", [A])
    records = take(consumer, 2)
    [unseen] = take(log.consumer("another group", [A]), 4)[3:]
    with pytest.raises(ValueError, match="never received"):
        consumer.complete([records[0].position, unseen.position])
    consumer.complete([records[1].position])
    assert keys(take(log_factory().consumer("g", [A]), 3)) == ["0", "2", "3"]


def test_a_paused_topic_gives_nothing_until_resumed(
    log: EventLog, take: Take, nothing_more: NothingMore
) -> None:
    log.append([*new(A, "a"), *new(B, "b")])
    consumer = log.consumer("g", [A, B])
    consumer.pause(A)
    assert keys(take(consumer, 1)) == ["b"]
    assert nothing_more(consumer)
    consumer.resume(A)
    assert keys(take(consumer, 1)) == ["a"]


def test_a_full_window_holds_back_only_its_topic(
    log: EventLog, take: Take, nothing_more: NothingMore
) -> None:
    log.append(new(A, *range(8)))
    consumer = log.consumer("g", [A, B], window=3)
    records = take(consumer, 3)
    assert nothing_more(consumer)
    log.append(new(B, "b"))
    assert keys(take(consumer, 1)) == ["b"]
    consumer.complete([records[1].position])
    assert keys(take(consumer, 1)) == ["3"]
    assert nothing_more(consumer)
    consumer.complete(positions([records[0], records[2]]))
    assert keys(take(consumer, 2)) == ["4", "5"]


def test_a_straggler_does_not_stop_the_others_while_the_bitmap_reaches(
    log: EventLog, take: Take
) -> None:
    log.append(new(A, *range(2000), value=b""))
    consumer = log.consumer("g", [A], window=100)
    straggler, *others = take(consumer, 100)
    for _ in range(19):
        consumer.complete(positions(others))
        others = take(consumer, 99)
    assert straggler.key == "0"
    assert others[-1].key == str(99 + 19 * 99)


def test_a_restart_gives_again_exactly_what_was_open(log_factory: Open, take: Take) -> None:
    log = log_factory()
    log.append(new(A, *range(10)))
    consumer = log.consumer("g", [A])
    records = take(consumer, 8)
    consumer.complete(positions([records[i] for i in (0, 1, 3, 6)]))
    consumer.close()
    log.close()
    again = log_factory().consumer("g", [A])
    assert keys(take(again, 6)) == ["2", "4", "5", "7", "8", "9"]
    assert again.lag()[A].open == 6


def test_groups_are_independent(log: EventLog, take: Take) -> None:
    log.append(new(A, 1, 2))
    first, second = log.consumer("first", [A]), log.consumer("second", [A])
    first.complete(positions(take(first, 2)))
    assert keys(take(second, 2)) == ["1", "2"]
    assert first.lag()[A].open == 0
    assert second.lag()[A].open == 2


def test_a_member_that_was_replaced_can_write_nothing(log_factory: Open, take: Take) -> None:
    log = log_factory()
    log.append(new(A, 1, 2))
    old = log.consumer("g", [A])
    held = take(old, 1)
    young = log_factory().consumer("g", [A])
    with pytest.raises(Fenced):
        old.complete(positions(held), new(RESULTS, "stale"))
    with pytest.raises(Fenced):
        old.complete([], new(RESULTS, "stale"))
    assert kept(log, RESULTS) == []
    assert keys(take(young, 2)) == ["1", "2"]


def test_a_member_that_was_replaced_is_told(log_factory: Open, take: Take) -> None:
    log = log_factory()
    log.append(new(A, 1, 2))
    old = log.consumer("g", [A])
    held = take(old, 1)
    log_factory().consumer("g", [A])

    def receive_until_it_shows() -> None:
        for _ in range(100):
            held.extend(old.receive(10, 2**30, timeout_s=0.1))

    with pytest.raises(Fenced):
        receive_until_it_shows()
    assert old.lost() == positions(held)
    assert old.lost() == []


def test_nothing_is_lost_while_the_owner_stays(log: EventLog, take: Take) -> None:
    log.append(new(A, 1, 2))
    consumer = log.consumer("g", [A])
    take(consumer, 2)
    log.consumer("another group", [A])
    assert consumer.lost() == []


def test_lag_counts_what_is_not_complete(log: EventLog, take: Take) -> None:
    log.append(new(A, *range(5)))
    assert log.lag("unheard of", [A, B])[A].open == 5
    consumer = log.consumer("g", [A, B])
    records = take(consumer, 3)
    consumer.complete(positions(records[1:]))
    for lag in (consumer.lag(), log.lag("g", [A, B])):
        assert lag[A].open == 3
        assert lag[A].oldest_age_s > 0
        assert lag[B] == (0, 0)
    consumer.complete(positions(records) + positions(take(consumer, 2)))
    assert log.lag("g", [A])[A] == (0, 0)


def test_read_gives_everything_since_a_time(log: EventLog) -> None:
    for i in range(6):
        log.append([*new(A, f"a{i}"), *new(B, f"b{i}")])
    times = {record.key: record.time for record in log.read([A, B], 0)}
    since = times["a3"]
    assert keys(list(log.read([B, A], since))) == [
        key for topic in "ba" for i in range(6) if times[key := f"{topic}{i}"] >= since
    ]
    assert list(log.read([A], time.time() + 1000)) == []


def test_read_ends_at_what_was_there_when_it_began(log: EventLog) -> None:
    log.append(new(A, *range(700)))
    reading = log.read([A], 0)
    first = next(reading)
    log.append(new(A, "later"))
    assert [first.key, *keys(list(reading))] == [str(i) for i in range(700)]


def test_read_disturbs_no_group(log: EventLog, take: Take) -> None:
    log.append(new(A, 1))
    consumer = log.consumer("g", [A])
    assert kept(log, A) == ["1"]
    assert keys(take(consumer, 1)) == ["1"]


def test_a_member_has_gained_something_when_it_joins_and_not_again(
    log: EventLog, take: Take
) -> None:
    log.append(new(A, 1))
    consumer = log.consumer("g", [A])
    take(consumer, 1)
    assert consumer.gained()
    assert not consumer.gained()
    assert consumer.lost() == []


def followed(follower: Follower, count: int) -> list[str]:
    """The keys of what comes, until so many came, waited for as long as a log may need."""
    deadline = time.monotonic() + PATIENCE_S
    found: list[str] = []
    while len(found) < count and time.monotonic() < deadline:
        found += keys(follower.receive())
    return found


def test_a_follower_is_given_what_comes_from_a_time_on(log_factory: Open) -> None:
    log = log_factory()
    for i in range(6):
        log.append(new(A, i))
    times = {record.key: record.time for record in log.read([A], 0)}
    since = times["3"]
    wanted = [key for key, at in times.items() if at >= since]
    following = log.follow([A, B], since)
    assert followed(following, len(wanted)) == wanted
    log_factory().append([*new(A, "a"), *new(B, "b")])
    log.append(new(A, "c"))
    assert sorted(followed(following, 3)) == ["a", "b", "c"]
    assert following.receive() == []
    following.close()


def test_every_follower_is_given_everything_and_no_group_notices(log: EventLog, take: Take) -> None:
    followers = [log.follow([A], 0) for _ in range(2)]
    log.append(new(A, *range(700)))
    for follower in followers:
        assert followed(follower, 700) == [str(i) for i in range(700)]
        follower.close()
    assert len(take(log.consumer("g", [A]), 700)) == 700


def test_a_follower_of_the_future_is_given_what_comes_from_now_on(log: EventLog) -> None:
    log.append(new(A, "past"))
    follower = log.follow([A], time.time() + 1000)
    log.append(new(A, "next"))
    assert followed(follower, 1) == ["next"]
    follower.close()


def test_rewind_gives_again_what_was_appended_since(log_factory: Open, take: Take) -> None:
    log = log_factory()
    for i in range(6):
        log.append(new(A, i))
    log.append(new(B, "untouched"))
    consumer = log.consumer("g", [A, B])
    records = take(consumer, 7)
    mine = [record for record in records if record.position.topic == A]
    consumer.complete([r.position for r in records if r.key not in ("1", "4")])
    since = mine[3].time
    consumer.rewind(since)
    assert consumer.lost() == positions([mine[1], mine[4]])
    again = [r.key for r in mine if r.key == "1" or r.time >= since] + ["untouched"]
    assert sorted(keys(take(consumer, len(again)))) == again
    consumer.close()
    assert sorted(keys(take(log_factory().consumer("g", [A, B]), len(again)))) == again


def test_trim_deletes_what_is_old_and_answered(log: EventLog, take: Take) -> None:
    log.append([*new(A, *range(5)), *new(B, "kept")])
    consumer = log.consumer("g", [A])
    records = take(consumer, 4)
    consumer.complete(positions([*records[:2], records[3]]))
    assert log.trim({A: 3600, B: 3600}) == 0
    assert log.trim({A: 0}) == 2
    assert kept(log, A, B) == ["2", "3", "4", "kept"]
    assert log.lag("g", [A])[A].open == 2
    consumer.complete([records[2].position])
    consumer.complete(positions(take(consumer, 1)))
    assert log.trim({A: 0}) == 3


def test_trim_keeps_what_the_slowest_group_has_open(log: EventLog, take: Take) -> None:
    log.append(new(A, 1, 2))
    slow, fast = log.consumer("slow", [A]), log.consumer("fast", [A])
    fast.complete(positions(take(fast, 2)))
    assert log.trim({A: 0}) == 0
    assert keys(take(slow, 2)) == ["1", "2"]


def test_a_group_that_comes_after_a_trim_starts_at_what_is_left(log: EventLog, take: Take) -> None:
    log.append(new(A, 1, 2))
    assert log.trim({A: 0}) == 2
    log.append(new(A, 3))
    consumer = log.consumer("g", [A])
    assert consumer.lag()[A].open == 1
    records = take(consumer, 1)
    assert keys(records) == ["3"]
    consumer.complete(positions(records))
    assert consumer.lag()[A].open == 0


def test_positions_are_not_reused_after_everything_was_trimmed(log: EventLog) -> None:
    log.append(new(A, 1))
    [before] = log.read([A], 0)
    log.trim({A: 0})
    log.append(new(A, 2))
    [after] = log.read([A], 0)
    assert after.position != before.position


def test_threads_may_append_at_once(log: EventLog, take: Take) -> None:
    def append(name: int) -> None:
        for i in range(50):
            log.append(new(A, f"{name}-{i}"))

    threads = [threading.Thread(target=append, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    received = keys(take(log.consumer("g", [A]), 200))
    for name in range(4):
        mine = [key for key in received if key.startswith(f"{name}-")]
        assert mine == [f"{name}-{i}" for i in range(50)]


def test_the_doorbell_rings_when_records_are_there_to_read(log_factory: Open, take: Take) -> None:
    reader = log_factory()
    seen: list[list[str]] = []
    log = log_factory(lambda: seen.append(kept(reader, A, RESULTS)))
    log.append(new(A, "job"))
    assert seen == [["job"]]
    consumer = log.consumer("g", [A])
    consumer.complete(positions(take(consumer, 1)), new(RESULTS, "result"))
    assert seen == [["job"], ["job", "result"]]
    with pytest.raises(PipelineError):
        log.append(new("no.such.topic", "job"))
    assert len(seen) == 2
