"""Writing a segment to the lake, so that doing it again changes nothing.

1. Claim it: of all who ever begin a segment at this record, the first says where it ends. After that its
   files are a function of the log alone, and a second writer, or a stalled one, writes the same again.
2. Write its rows, one file per tenant, model and date, without those that have been erased.
3. Write its part of the index.
4. Look whether something was erased meanwhile; if so, again from 2.

Only then are its records completed. Whoever erases says so first and looks for files afterwards, so an
erasure meets every row: in step 4 or in a file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import date
from functools import partial

import msgspec

from infra.lake import SEGMENTS, day_of, rows_key
from infra.lake_rows import parquet, table_of
from infra.logs import get_logger
from infra.objects import ObjectExists, ObjectStore
from schemas.errors import PipelineError
from schemas.results import Outcome
from workers.archiver.erasures import Erasures, read_erasures
from workers.archiver.index import write_run
from workers.archiver.segments import Segment, Unreadable, read_outcome

WRITES_AT_ONCE = 4
ALIVE_EVERY_S = 5.0
CLAIM_LIMIT_BYTES = 1024
REJECTS_SHOWN = 10

logger = get_logger("archiver")

Rows = dict[date, dict[str, list[Outcome]]]
"""By date, and the key of the file they go to."""


class Claim(msgspec.Struct, frozen=True):
    """last: the offset of the segment's last record."""

    last: int


class Archive:
    """counts: rows archived, records rejected because they are no outcomes."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._pool = ThreadPoolExecutor(WRITES_AT_ONCE, thread_name_prefix="lake")
        self.counts = Counter(archived=0, rejected=0)

    def claim(self, segment: Segment) -> int:
        """The offset at which this segment ends: its last, unless another was claimed before.

        Raises PipelineError (lake_corrupt), Transient.
        """
        key = f"{SEGMENTS}/{segment.claim}"
        try:
            self._objects.put(key, msgspec.json.encode(Claim(segment.last.offset)), if_absent=True)
        except ObjectExists:
            found = self._objects.get(key, max_bytes=CLAIM_LIMIT_BYTES)
            return _claimed(key, found)
        return segment.last.offset

    def store(self, segment: Segment, alive: Callable[[], object]) -> None:
        """Write a claimed segment; all of it is durable on return. alive: called now and then meanwhile."""
        rows, rejects = _read(segment)
        erased: Erasures | None = None
        while erased != (found := read_erasures(self._objects)):
            erased = found
            kept = {
                day: {key: _without(outcomes, erased) for key, outcomes in files.items()}
                for day, files in rows.items()
            }
            files = [item for day in kept.values() for item in day.items()]
            self._each((partial(self._put_rows, *item) for item in files), alive)
            self._each((partial(self._put_index, segment, *item) for item in kept.items()), alive)
        self._count(segment, rejects)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _put_rows(self, key: str, outcomes: list[Outcome]) -> None:
        if outcomes:
            self._objects.put(key, parquet(table_of(outcomes)))
        else:
            self._objects.delete(key)  # an earlier life may have written it before the erasure

    def _put_index(self, segment: Segment, day: date, files: dict[str, list[Outcome]]) -> None:
        entries = ((one.job_id, key) for key, outcomes in files.items() for one in outcomes)
        write_run(self._objects, day, segment.name, entries)

    def _each(self, writes: Iterable[Callable[[], None]], alive: Callable[[], object]) -> None:
        """Several at once. Raises what one of them raises, once all have ended: what is written late would
        stand in the way of what is written next."""
        running = [self._pool.submit(write) for write in writes]
        try:
            while wait(running, ALIVE_EVERY_S).not_done:
                alive()
        finally:
            wait(running)
        for write in running:
            write.result()

    def _count(self, segment: Segment, rejects: list[str]) -> None:
        self.counts["archived"] += len(segment.entries) - len(rejects)
        self.counts["rejected"] += len(rejects)
        for reject in rejects[:REJECTS_SHOWN]:
            logger.warning("record_rejected", reason=reject, action="left out of the lake")
        logger.info(
            "archived",
            segment=segment.name,
            records=len(segment.entries),
            rejected=len(rejects),
            rejected_in_all=self.counts["rejected"],
        )


def _claimed(key: str, found: bytes) -> int:
    try:
        return msgspec.json.decode(found, type=Claim).last
    except msgspec.MsgspecError as error:
        raise PipelineError(
            "lake_corrupt",
            f"Object {key}: expected where a segment ends, came other ({error}): restore it from a copy. "
            f"Without it, what was written of the segment may be in the lake twice.",
        ) from error


def _read(segment: Segment) -> tuple[Rows, list[str]]:
    """The rows of a segment in the log's order, and why other records of it are none."""
    rows: Rows = defaultdict(lambda: defaultdict(list))
    rejects: list[str] = []
    for position, value in segment.entries:
        try:
            outcome = read_outcome(value)
        except Unreadable as fault:
            rejects.append(f"{position.topic}/{position.partition}@{position.offset}: {fault}")
        else:
            day = day_of(outcome)
            key = rows_key(outcome.tenant, outcome.model, day, segment.name)
            rows[day][key].append(outcome)
    return rows, rejects


def _without(outcomes: list[Outcome], erased: Erasures) -> list[Outcome]:
    return [
        one
        for one in outcomes
        if not erased.covers(one.job_id, one.tenant, one.submitted_at, one.finished_at)
    ]
