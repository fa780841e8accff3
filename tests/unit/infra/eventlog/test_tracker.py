from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from infra.eventlog.tracker import METADATA_LIMIT, SPAN, Tracker


def received(*offsets: int, next: int = 0) -> Tracker:
    tracker = Tracker(next)
    for offset in offsets:
        tracker.received(offset)
    return tracker


class AgainstSets(RuleBasedStateMachine):
    """The tracker beside two sets that remember everything."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = Tracker(0)
        self.existing: set[int] = set()
        self.done: set[int] = set()
        self.end = 0

    @property
    def open(self) -> set[int]:
        return self.existing - self.done

    @rule(gap=st.one_of(st.just(0), st.integers(0, 40), st.integers(0, 3 * SPAN)))
    def receive(self, gap: int) -> None:
        offset = self.end + gap
        if not self.tracker.accepts(offset):
            assert offset - min(self.open) >= SPAN
            return
        assert self.tracker.received(offset) == (offset in self.done)
        self.existing.add(offset)
        self.end = offset + 1

    @precondition(lambda self: self.existing)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.existing)))
        assert self.tracker.complete(offset) == (offset not in self.done)
        self.done.add(offset)

    @rule()
    def restart(self) -> None:
        self.tracker = Tracker.decode(*self.tracker.encode())
        self.receive_again()

    @rule()
    def copy(self) -> None:
        before = self.tracker.encode()
        twin = self.tracker.copy()
        for offset in self.open:
            twin.complete(offset)
        assert self.tracker.encode() == before

    @precondition(lambda self: self.existing)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        since = data.draw(st.sampled_from(sorted(self.existing)))
        self.done = {offset for offset in self.done if offset < since}
        self.tracker = self.tracker.rewound(since)
        self.receive_again()

    def receive_again(self) -> None:
        """Everything from `next` on comes again, in the same order, as far as there is room."""
        assert self.tracker.open == 0
        for offset in sorted(o for o in self.existing if o >= self.tracker.next):
            if not self.tracker.accepts(offset):
                self.existing = {o for o in self.existing if o < offset}
                self.done &= self.existing
                self.end = max(self.existing) + 1
                return
            assert self.tracker.received(offset) == (offset in self.done)

    @invariant()
    def agree(self) -> None:
        assert self.tracker.open == len(self.open)
        assert set(self.tracker.open_offsets()) == self.open
        if self.open:
            assert self.tracker.next == min(self.open)
        elif self.existing:
            assert self.tracker.next == max(self.existing) + 1

    @invariant()
    def metadata_fits(self) -> None:
        assert len(self.tracker.encode()[1]) <= METADATA_LIMIT


TestAgainstSets = AgainstSets.TestCase


@given(
    next=st.integers(0, 2**62),
    above=st.sets(st.integers(1, SPAN - 1), max_size=50),
)
def test_completions_survive_the_metadata(next: int, above: set[int]) -> None:
    tracker = Tracker(next, sum(1 << place for place in above))
    restored = Tracker.decode(*tracker.encode())
    assert restored.next == next
    assert restored.complete_above_next == len(above)
    assert not restored.received(next)
    for place in sorted(above):
        assert restored.received(next + place)


def test_a_full_span_fits_the_metadata_exactly() -> None:
    tracker = received(*range(SPAN))
    assert not tracker.accepts(SPAN)
    for offset in range(1, SPAN):
        tracker.complete(offset)
    assert len(tracker.encode()[1]) == METADATA_LIMIT
    assert tracker.next == 0
    tracker.complete(0)
    assert tracker.encode() == (SPAN, "")
    assert tracker.accepts(SPAN)


def test_a_gap_does_not_hold_back_next() -> None:
    tracker = received(3, 7)
    assert tracker.next == 3
    tracker.complete(3)
    assert tracker.next == 7
    tracker.complete(7)
    assert tracker.next == 8


def test_a_gap_of_any_width_is_free_when_nothing_is_open() -> None:
    tracker = received(2**60)
    assert tracker.encode() == (2**60, "")


def test_completions_that_come_again_are_told_also_below_next() -> None:
    stored = received(0, 1, 2)
    stored.complete(1)
    tracker = Tracker.decode(*stored.encode())
    tracker.received(0)
    tracker.complete(0)
    assert tracker.next == 2
    assert tracker.received(1)
    assert not tracker.received(2)


def test_receiving_an_open_offset_twice_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="received before"):
        received(0, 1, 1)


def test_completing_what_was_never_received_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="never received"):
        received(0).complete(1)


def test_completing_twice_is_ignored() -> None:
    tracker = received(0, 1, 2)
    assert tracker.complete(1)
    assert not tracker.complete(1)
    assert tracker.complete(0)
    assert not tracker.complete(0)
    assert tracker.open == 1


@pytest.mark.parametrize("metadata", ["A", "!!!!", "ÄÖÜ", "AA=A", "A" * (METADATA_LIMIT + 4)])
def test_malformed_metadata_is_refused(metadata: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Tracker.decode(0, metadata)


@given(st.text(max_size=40))
def test_any_metadata_is_read_or_refused(metadata: str) -> None:
    try:
        tracker = Tracker.decode(5, metadata)
    except ValueError:
        return
    assert Tracker.decode(*tracker.encode()).encode() == tracker.encode()
    assert tracker.next >= 5
