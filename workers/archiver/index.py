"""Writing the lake's index: a small run with each segment, merged by day into larger ones.

Merging is safe against a crash and a second merger at any point: inputs go only once the output is whole,
an entry that is in two runs is found twice in the same place, and what is not whole does not count. Where an
erasure has changed an input meanwhile, the output is written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from infra.lake_index import (
    HASH_BITS,
    INDEX,
    Run,
    bucket_key,
    bucket_of,
    day_folder,
    hash_of,
    read_bucket,
    runs_of_day,
    span,
    whole_and_rest,
)
from infra.objects import ObjectStore
from schemas.errors import InvalidJob

SCHEMA = pa.schema([("hash", pa.uint64()), ("file", pa.string())])

ORDER = [("hash", "ascending"), ("file", "ascending")]

BUCKET_BYTES = 512 * 1024
"""A bucket of a merged run has between half as much and this, by what its inputs had."""

MERGED_AT_ONCE = 16
RUNS_OF_A_DAY = 32
"""A day that goes on has at most so many runs for long; one that is over has one."""

OVER_AFTER = timedelta(days=2)
REMAINS_KEPT_S = 24 * 3600.0
"""What is not whole may be another's work in progress."""


def write_run(
    objects: ObjectStore, day: date, name: str, entries: Iterable[tuple[str, str]]
) -> None:
    """One bucket of (job id, key of its file of rows)."""
    hashed = [(hash_of(job_id), file) for job_id, file in entries]
    columns = list(zip(*hashed, strict=True)) or [(), ()]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)
    objects.put(bucket_key(f"{day_folder(day)}/{name}", 0, 0), _encoded(table.sort_by(ORDER)))


def tidy(objects: ObjectStore, now: float) -> int:
    """Merge what has become many. Returns how many runs went."""
    merged = 0
    whole, rest = whole_and_rest(objects.list(INDEX))
    for info in rest:
        if info.modified < now - REMAINS_KEPT_S:
            objects.delete(info.key)
    for day, runs in groupby(sorted(whole, key=lambda run: run.day), lambda run: run.day):
        over = day < datetime.fromtimestamp(now, UTC).date() - OVER_AFTER
        merged += _tidy_day(objects, list(runs), 1 if over else RUNS_OF_A_DAY)
    return merged


def merge(objects: ObjectStore, runs: list[Run]) -> str:
    """Runs of one day made into one, whose folder is returned; the inputs are gone then. In memory: a bucket
    of each input."""
    day = runs[0].day
    names = "\0".join(sorted(run.folder for run in runs))
    folder = f"{day_folder(day)}/{hashlib.blake2b(names.encode(), digest_size=8).hexdigest()}"
    bits = (sum(run.size_bytes for run in runs) // BUCKET_BYTES).bit_length()
    before: list[Run] = []
    while before != runs:
        before = runs
        _write_merged(objects, runs, folder, bits)
        now = {(run.folder, run.bits): run for run in runs_of_day(objects, day)}
        runs = [now.get((run.folder, run.bits), run) for run in runs]
    for run in runs:
        for key in run.bucket_keys():
            objects.delete(key)
    return folder


def unindex(objects: ObjectStore, run: Run, keep: Callable[[pa.Table], pa.ChunkedArray]) -> None:
    """Write those buckets of a run again of which not every entry is kept. keep: says so of each, as booleans."""
    for bucket, key in enumerate(run.bucket_keys()):
        try:
            table = read_bucket(objects, run, bucket)
        except InvalidJob as error:
            if error.code == "object_missing":
                return  # it has been merged
            raise
        kept = table.filter(keep(table))
        if len(kept) < len(table):
            objects.put(key, _encoded(kept))


def _tidy_day(objects: ObjectStore, runs: list[Run], most: int) -> int:
    """Merge the smallest first, so that each entry is written again few times."""
    before = len(runs)
    while len(runs) > most:
        runs.sort(key=lambda run: run.size_bytes)
        merge(objects, runs[:MERGED_AT_ONCE])
        runs = runs_of_day(objects, runs[0].day)
    return before - len(runs)


def _write_merged(objects: ObjectStore, runs: list[Run], folder: str, bits: int) -> None:
    width = 1 << (HASH_BITS - bits)
    readers = [_Reader(objects, run) for run in runs]
    for bucket in range(1 << bits):
        parts = [reader.part(bucket * width, (bucket + 1) * width) for reader in readers]
        # What a merger that was killed left in input and output is the same entry once.
        table = pa.concat_tables(parts).group_by(SCHEMA.names).aggregate([]).sort_by(ORDER)
        objects.put(bucket_key(folder, bits, bucket), _encoded(table))


class _Reader:
    """Reads a run from its first bucket to its last, each of them once."""

    def __init__(self, objects: ObjectStore, run: Run) -> None:
        self._objects = objects
        self._run = run
        self._bucket = -1
        self._table = SCHEMA.empty_table()

    def part(self, low: int, high: int) -> pa.Table:
        """The entries with low <= hash < high."""
        first, last = (bucket_of(edge, self._run.bits) for edge in (low, high - 1))
        parts = []
        for bucket in range(first, last + 1):
            if bucket != self._bucket:
                self._table, self._bucket = read_bucket(self._objects, self._run, bucket), bucket
            start, stop = span(self._table, low, high)
            parts.append(self._table.slice(start, stop - start))
        return pa.concat_tables(parts)


def _encoded(table: pa.Table) -> bytes:
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=["file"])
    return buffer.getvalue()
