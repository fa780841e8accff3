"""Keeps the lake in order: what is past its retention goes, and the index is merged."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from infra.lake import ERASED, SEGMENTS, LakeFile, lake_files
from infra.lake_index import Run, runs
from infra.logs import get_logger
from infra.objects import ObjectInfo, ObjectStore
from schemas.errors import PipelineError
from schemas.topics import DAY_S
from workers.archiver.index import tidy
from workers.archiver.segments import partition_of

FIRST_AFTER_S = 60.0
UPKEEP_EVERY_S = 3600.0

CLAIMS_KEPT_S = 30 * DAY_S
"""Longer than an archiver that lost its partition may go on as if it had not."""

ERASURES_KEPT_S = 400 * DAY_S
"""Longer than the log may hold an outcome that no archiver has read."""

logger = get_logger("archiver.upkeep")

Report = Callable[[int, int], None]


class Expired(NamedTuple):
    """What is past its time. notes: keys of claims and erasures that have served."""

    files: list[LakeFile]
    runs: list[Run]
    notes: list[str]


def find_expired(objects: ObjectStore, retention_days: int, now: float) -> Expired:
    """retention_days: rows of earlier days have expired; 0: rows never do."""
    claims = _but_latest(list(objects.list(SEGMENTS)))
    notes = [
        info.key
        for kept_s, found in ((CLAIMS_KEPT_S, claims), (ERASURES_KEPT_S, objects.list(ERASED)))
        for info in found
        if info.modified < now - kept_s
    ]
    if not retention_days:
        return Expired([], [], notes)
    oldest = datetime.fromtimestamp(now, UTC).date() - timedelta(days=retention_days)
    return Expired(
        [file for file in lake_files(objects) if file.date < oldest],
        [run for run in runs(objects) if run.day < oldest],
        notes,
    )


def _but_latest(claims: list[ObjectInfo]) -> Iterator[ObjectInfo]:
    """Without the latest of each partition: its segment may not be complete, however long ago it was begun."""
    claims.sort(key=lambda info: info.modified)
    latest = {partition_of(info.key): info for info in claims}
    return (info for info in claims if latest[partition_of(info.key)] is not info)


def prune(objects: ObjectStore, expired: Expired, report: Report = lambda done, total: None) -> int:
    """Delete it, the index last. Returns how many files of rows went."""
    index = [key for run in expired.runs for key in run.bucket_keys()]
    keys = [*(file.key for file in expired.files), *index, *expired.notes]
    for done, key in enumerate(keys, start=1):
        objects.delete(key)
        report(done, len(keys))
    return len(expired.files)


class Upkeep:
    """Works in a thread of its own, so that the archiver never waits for it."""

    def __init__(
        self, objects: ObjectStore, retention_days: int, wall: Callable[[], float] = time.time
    ) -> None:
        self._objects = objects
        self._retention_days = retention_days
        self._wall = wall

    def run(self, stop: threading.Event) -> None:
        wait_s = FIRST_AFTER_S
        while not stop.wait(wait_s):
            wait_s = UPKEEP_EVERY_S
            try:
                self.once()
            except PipelineError as error:
                logger.warning("upkeep_failed", error=error.message, action="tries again")

    def once(self) -> None:
        expired = find_expired(self._objects, self._retention_days, self._wall())
        pruned = prune(self._objects, expired)
        merged = tidy(self._objects, self._wall())
        if pruned or merged:
            logger.info("lake_tidied", files_deleted=pruned, index_runs_merged=merged)
