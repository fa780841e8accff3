"""The lake's index: which file of rows holds a job, by a hash of its id.

    lake/_index/date=YYYY-MM-DD/<run>/<bits>-<bucket>.index    Parquet: hash, file; sorted by hash

Only an erasure changes a run. It is cut into 2^bits buckets by the first bits of the hash, so that a lookup
reads one small object of each run. The archiver writes a small run with each segment, and merges the runs of
a day. A run counts once all its buckets are there; an entry may be in two runs, or point to a file that has
gone.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from infra.objects import ObjectInfo, ObjectStore
from schemas.jobs import submitted_near

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "lake/_index"
HASH_BITS = 64
BUCKET_LIMIT_BYTES = 64 * 1024**2
READS_AT_ONCE = 8
CLOCKS_DAYS = 1.0
"""How far the clock that made an id may be from the dispatcher's."""

_BUCKET = re.compile(rf"({INDEX}/date=(\d{{4}}-\d\d-\d\d)/[^/]+)/(\d\d?)-(\d+)\.index")


class Run(NamedTuple):
    """A whole run. size_bytes: of all its buckets. modified: when one of them was last written."""

    folder: str
    day: date
    bits: int
    size_bytes: int
    modified: float

    @property
    def name(self) -> str:
        return self.folder.rpartition("/")[2]

    def bucket_key(self, bucket: int) -> str:
        return bucket_key(self.folder, self.bits, bucket)

    def bucket_keys(self) -> Iterator[str]:
        return map(self.bucket_key, range(1 << self.bits))


def day_folder(day: date) -> str:
    return f"{INDEX}/date={day.isoformat()}"


def bucket_key(folder: str, bits: int, bucket: int) -> str:
    return f"{folder}/{bits}-{bucket}.index"


def hash_of(job_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(job_id.encode(), digest_size=HASH_BITS // 8).digest())


def bucket_of(id_hash: int, bits: int) -> int:
    return id_hash >> (HASH_BITS - bits)


def runs(objects: ObjectStore) -> list[Run]:
    """All runs, oldest day first."""
    return sorted(whole_and_rest(objects.list(INDEX))[0], key=lambda run: run.day)


def runs_of_day(objects: ObjectStore, day: date) -> list[Run]:
    return whole_and_rest(objects.list(day_folder(day)))[0]


def runs_near(objects: ObjectStore, job_id: str, most_days: float) -> list[Run]:
    """The runs of the days on which a job may have ended, going by the time in its id; none if it has none."""
    made_at = submitted_near(job_id)
    if made_at is None or not 0 <= made_at < time.time() + CLOCKS_DAYS * 86400:
        return []
    made_on = datetime.fromtimestamp(made_at, UTC)
    day = (made_on - timedelta(days=CLOCKS_DAYS)).date()
    last = (made_on + timedelta(days=most_days + CLOCKS_DAYS)).date()
    found: list[Run] = []
    while day <= last:
        found += runs_of_day(objects, day)
        day += timedelta(days=1)
    return found


def whole_and_rest(listed: Iterable[ObjectInfo]) -> tuple[list[Run], list[ObjectInfo]]:
    """The runs of a listing, and what lies there of runs that are not whole."""
    found: dict[tuple[str, str, int], list[ObjectInfo]] = defaultdict(list)
    rest: list[ObjectInfo] = []
    for info in listed:
        if parts := _BUCKET.fullmatch(info.key):
            folder, day, bits, _ = parts.groups()
            found[folder, day, int(bits)].append(info)
        else:
            rest.append(info)
    whole: list[Run] = []
    for (folder, day, bits), buckets in found.items():
        if len(buckets) == 1 << bits:
            size_bytes = sum(info.size_bytes for info in buckets)
            modified = max(info.modified for info in buckets)
            whole.append(Run(folder, date.fromisoformat(day), bits, size_bytes, modified))
        else:
            rest += buckets
    return whole, rest


def files_of(objects: ObjectStore, searched: list[Run], job_id: str) -> set[str]:
    """The files that these runs name for a job. Raises InvalidJob (object_missing) if a run has just gone."""
    id_hash = hash_of(job_id)

    def search(run: Run) -> set[str]:
        table = read_bucket(objects, run, bucket_of(id_hash, run.bits))
        start, stop = span(table, id_hash, id_hash + 1)
        return set(table["file"].slice(start, stop - start).to_pylist())

    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return set().union(*pool.map(search, searched))


def read_bucket(objects: ObjectStore, run: Run, bucket: int) -> pa.Table:
    from infra.lake_rows import read_parquet

    key = run.bucket_key(bucket)
    return read_parquet(objects.get(key, max_bytes=BUCKET_LIMIT_BYTES), key)


def span(table: pa.Table, low: int, high: int) -> tuple[int, int]:
    """Where the entries with low <= hash < high begin and end; high may be 2^64."""
    import numpy as np

    hashes = table["hash"].to_numpy()
    start = int(np.searchsorted(hashes, np.uint64(low)))
    if high >> HASH_BITS:
        return start, len(hashes)
    return start, int(np.searchsorted(hashes, np.uint64(high)))
