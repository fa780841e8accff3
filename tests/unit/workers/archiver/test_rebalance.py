"""Two archivers share partitions, which move between them at any moment of a write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pytest

from infra.eventlog import Consumer, Moved, NewRecord, Position, Record
from schemas.errors import Transient
from schemas.results import Outcome, encode_outcome
from schemas.topics import RESULTS
from workers.archiver.archive import Archive
from workers.archiver.loop import Archiver
from workers.archiver.segments import Limits

AT_ONCE = Limits(records=1, size_bytes=1, age_s=1)
LATER = Limits(records=100, size_bytes=2**20, age_s=60)
GAP = 2
"""Between offsets: the ends of transactions have some too."""


class Group:
    """A log of two partitions and who owns them, by the contract of `infra.eventlog.Consumer`."""

    def __init__(self) -> None:
        self.records: list[list[Record]] = [[], []]
        self.committed = [0, 0]
        self.owners = ["a", "a"]
        self.deals = 0
        self.refusals = 0

    def append(self, number: int, outcomes: Iterable[Outcome]) -> None:
        partition = self.records[number]
        for outcome in outcomes:
            position = Position(RESULTS, number, GAP * len(partition))
            value = encode_outcome(outcome)
            partition.append(Record(position, outcome.job_id, {}, value, 0.0))

    def deal(self, *owners: str) -> None:
        self.owners = list(owners)
        self.deals += 1

    def join(self, slot: str) -> Consumer:
        if self.refusals:
            self.refusals -= 1
            raise Transient("log_unavailable", "not now")
        member: Any = Member(self, slot)
        return member  # type: ignore[no-any-return]

    @property
    def drained(self) -> bool:
        return all(
            at == (part[-1].position.offset + 1 if part else 0)
            for at, part in zip(self.committed, self.records, strict=True)
        )


class Member:
    def __init__(self, group: Group, slot: str) -> None:
        self.group = group
        self.slot = slot
        self.deal = -1
        self.open: dict[int, list[Record]] = {}
        self.ends: dict[int, int] = {}
        self.gone: list[Position] = []
        self.closed = False

    def follow(self) -> None:
        assert not self.closed
        if self.deal == self.group.deals:
            return
        mine = {n for n, owner in enumerate(self.group.owners) if owner == self.slot}
        kept = mine & self.open.keys() if self.group.deals == self.deal + 1 else set()
        for number in self.open.keys() - kept:
            self.gone += [record.position for record in self.open.pop(number)]
        for number in mine - kept:
            self.open[number], self.ends[number] = [], self.group.committed[number]
        self.deal = self.group.deals

    def receive(self, max_records: int, max_bytes: int, timeout_s: float = 0) -> list[Record]:
        self.follow()
        given: list[Record] = []
        for number in self.open:
            for record in self.group.records[number]:
                if len(given) < max_records and record.position.offset >= self.ends[number]:
                    self.open[number].append(record)
                    self.ends[number] = record.position.offset + 1
                    given.append(record)
        return given

    def complete(self, positions: Sequence[Position], outputs: Sequence[NewRecord] = ()) -> None:
        self.follow()
        if set(self.gone).intersection(positions):
            raise Moved
        number = positions[0].partition
        done, rest = self.open[number][: len(positions)], self.open[number][len(positions) :]
        assert [record.position for record in done] == positions  # in order, and none left out
        self.open[number] = rest
        self.group.committed[number] = positions[-1].offset + 1

    def lost(self) -> list[Position]:
        lost, self.gone = self.gone, []
        return lost

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def group() -> Group:
    return Group()


def member(
    world: Any, group: Group, slot: str, objects: Any = None, limits: Limits = AT_ONCE
) -> Archiver:
    archive = Archive(objects or world.objects)
    return Archiver(partial(group.join, slot), archive, limits, 2**26, world.clock)


def contents(world: Any) -> dict[str, bytes]:
    return {key: world.objects.get(key, max_bytes=2**20) for key in world.files()}


@pytest.mark.parametrize("dealt", [("b", "a"), ("a", "b")])
def test_partitions_that_move_at_any_moment_are_written_once(
    world: Any, moments: Any, watched: Any, make_outcomes: Any, group: Group, dealt: Any
) -> None:
    appended = 0

    def append(at: int, name: str) -> None:
        nonlocal appended
        for number in (0, 1):
            group.append(number, make_outcomes([f"{at}-{number}-{name}{n}" for n in range(3)]))
            appended += 3

    for at in range(1000):
        passing = moments(at=at)
        first = member(world, group, "a", watched(world.objects, passing))
        second = member(world, group, "b")
        written: dict[str, bytes] = {}

        def move(at: int = at, second: Archiver = second, written: Any = written) -> None:
            append(at, "later")
            group.deal(*dealt)
            second.step()
            written |= contents(world)

        passing.then = move
        append(at, "early")
        first.step()
        for _ in range(4):
            second.step()
            first.step()
        assert group.drained
        assert len(world.jobs()) == len(set(world.jobs())) == appended
        assert written.items() <= contents(world).items()
        group.deal("a", "a")
        for archiver in (first, second):
            archiver.close()
        if passing.count <= at:
            break
    assert at > 8


def test_what_moved_before_the_drain_is_left_to_its_new_owner(
    world: Any, make_outcomes: Any, group: Group
) -> None:
    first, second = (member(world, group, slot, limits=LATER) for slot in "ab")
    group.append(0, make_outcomes("ab"))
    first.step()
    group.deal("b", "b")
    first.step(draining=True)
    assert not first.drainable
    second.step()
    second.step(draining=True)
    assert group.drained
    assert world.jobs() == ["a", "b"]


def test_a_group_that_cannot_be_joined_again_at_once_is_joined_later(
    world: Any, make_outcomes: Any, group: Group
) -> None:
    archiver = member(world, group, "a", limits=LATER)
    group.append(0, make_outcomes("ab"))
    archiver.step()
    assert archiver.pending == 2
    group.deal("b", "b")
    archiver.step()
    assert archiver.pending == 0
    group.deal("a", "a")
    group.refusals = 2
    for _ in range(2):
        with pytest.raises(Transient):
            archiver.step()
    archiver.step()
    assert archiver.pending == 2
    archiver.step(draining=True)
    assert world.jobs() == ["a", "b"]
    assert group.drained
    archiver.close()
