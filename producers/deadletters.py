"""Dead letters: finding them on the `<topic>.dlq` topics, and redriving them, which submits the same job again.

Letters are read as they stream by, so that a million of them take no more memory than one.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from msgspec import Struct

from infra.eventlog import EventLog, Position, Record
from producers.letters import DEAD_LETTER_TOPICS, DeadLetter, Found, job_again, read_letter
from schemas.admission import check_deadline
from schemas.errors import InvalidJob
from schemas.jobs import DEFAULT_DEADLINE_S, submitted_near
from schemas.proof import TenantKeys
from schemas.topics import dead_letter_topic

APPEND_MOST = 100
PACES_A_SECOND = 10
CLOCK_MARGIN_S = 3600.0


class LetterFilter(Struct, frozen=True, kw_only=True):
    """Which letters are meant: those that agree with all that is set. topic: of the job or its dead
    letters. since: seconds since the epoch."""

    topic: str | None = None
    since: float = 0.0
    job: str | None = None
    tenant: str | None = None
    model: str | None = None
    code: str | None = None

    @property
    def topics(self) -> tuple[str, ...]:
        """Raises InvalidJob (topic_unknown)."""
        if self.topic is None:
            return DEAD_LETTER_TOPICS
        for name in (self.topic, dead_letter_topic(self.topic)):
            if name in DEAD_LETTER_TOPICS:
                return (name,)
        raise InvalidJob(
            "topic_unknown",
            f"Expected a topic with dead letters, came {self.topic!r}; see `headrace topics list`.",
        )

    def wants(self, letter: DeadLetter) -> bool:
        return (
            self.job in (None, letter.job)
            and self.tenant in (None, letter.tenant)
            and self.model in (None, letter.model)
            and self.code in (None, letter.code)
        )


class Selection(Struct, frozen=True):
    """Letters that are to be redriven: those that were there when it was made, and none that comes later.

    letters: how many. codes: why they failed, and how often. left_out: those with an obstacle.
    ends: by topic and partition, the last one.
    """

    wanted: LetterFilter
    force: bool
    letters: int
    codes: Counter[str]
    left_out: int
    ends: dict[tuple[str, int], Position]


class DeadLetters:
    """keys: of the tenants whose signed jobs can be redriven from here. clock: monotonic.

    Every method raises Transient when the log does not answer.
    """

    def __init__(
        self,
        log: EventLog,
        keys: TenantKeys,
        max_deadline_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._log = log
        self._keys = keys
        self._max_deadline_s = max_deadline_s
        self._clock = clock
        self._sleep = sleep

    def find(self, wanted: LetterFilter) -> Iterator[Found]:
        """Those that are there by now, oldest first per topic and partition."""
        made_at = submitted_near(wanted.job) if wanted.job else None
        since = max(wanted.since, (made_at or 0.0) - CLOCK_MARGIN_S)
        for record in self._log.read(wanted.topics, since):
            letter = read_letter(record, self._keys)
            if wanted.wants(letter):
                yield Found(letter, record)

    def newest(self, wanted: LetterFilter, limit: int) -> list[DeadLetter]:
        """At most so many, newest first."""
        found = ((record.time, record.position, letter) for letter, record in self.find(wanted))
        return [letter for _, _, letter in heapq.nlargest(limit, found)]

    def codes(self, wanted: LetterFilter) -> Counter[str]:
        """How many letters there are of each error code."""
        return Counter(letter.code for letter, _ in self.find(wanted))

    def get(self, name: str) -> Found:
        """The letter of this id, or the newest of the job of this id. Raises InvalidJob (letter_unknown)."""
        topic, slash, _ = name.partition("/")
        if slash:
            letters = self.find(LetterFilter(topic=topic))
            found = next((each for each in letters if each.letter.id == name), None)
        else:
            letters = self.find(LetterFilter(job=name))
            found = max(letters, key=lambda each: each.record.time, default=None)
        if found is None:
            raise InvalidJob(
                "letter_unknown", f"No dead letter, and no job with one, has the id {name[:200]!r}."
            )
        return found

    def select(
        self, wanted: LetterFilter, *, limit: int | None = None, force: bool = False
    ) -> Selection:
        """What `redrive` would take. force: also letters with an obstacle. limit: the first so many."""
        codes: Counter[str] = Counter()
        left_out = letters = 0
        ends = {}
        for letter, record in self.find(wanted):
            if letters == limit:
                break
            if letter.obstacle and not force:
                left_out += 1
                continue
            letters += 1
            codes[letter.code] += 1
            ends[_partition(record)] = record.position
        return Selection(wanted, force, letters, codes, left_out, ends)

    def each(self, selection: Selection) -> Iterator[Found]:
        """The selected letters, read again."""
        for found in self.find(selection.wanted):
            end = selection.ends.get(_partition(found.record))
            if end is None or found.record.position > end:
                continue
            if selection.force or not found.letter.obstacle:
                yield found

    def redrive(
        self,
        selection: Selection,
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
        rate: float | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> int:
        """Submit the letters' jobs again; returns how many. deadline_s: from now. rate: most a second.
        progress: told how many more have gone.

        After an error, redrive again: what went is known by its replay id, and does not run twice.
        Raises InvalidJob (deadline_past, deadline_too_far) before anything goes.
        """
        if not deadline_s > 0:
            raise InvalidJob(
                "deadline_past", f"Expected a deadline in the future, came {deadline_s} s from now."
            )
        check_deadline(deadline_s, self._max_deadline_s, now=0.0)
        redriven = 0
        for group in self._paced(self.each(selection), rate):
            deadline_at = time.time() + deadline_s
            self._log.append([job_again(found, deadline_at, self._keys) for found in group])
            redriven += len(group)
            progress(len(group))
        return redriven

    def _paced(self, letters: Iterator[Found], rate: float | None) -> Iterator[list[Found]]:
        """Groups of letters, each when it may go."""
        size = min(APPEND_MOST, max(1, int(rate / PACES_A_SECOND))) if rate else APPEND_MOST
        due = self._clock()
        while group := list(islice(letters, size)):
            if rate:
                self._sleep(max(0.0, due - self._clock()))
                due = max(due, self._clock()) + len(group) / rate
            yield group


def _partition(record: Record) -> tuple[str, int]:
    return record.position.topic, record.position.partition
