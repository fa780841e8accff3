"""Erasing a job or a tenant: from the lake, its index, and the object store.

The erasure is written down first, so that the archiver leaves out what it reads from the log later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from infra.lake import lake_files, locate, read_rows, tenant_folder, tenant_of
from infra.lake_index import hash_of, runs
from infra.lake_rows import parquet
from infra.objects import ObjectStore
from schemas.payloads import TENANTS
from workers.archiver.erasures import Erasure, read_erasures, record_erasure
from workers.archiver.index import unindex

CLOCKS_S = 3600.0
"""How far the clocks of dispatcher, object store and whoever erases may be apart."""

AT_ONCE = 8

Report = Callable[[int, int], None]
"""Called with how many steps are done, and of how many."""


class Found(NamedTuple):
    """What an erasure meets. whole: keys of files of rows that go as they are; mixed: of those that may
    hold rows of others, and are written again without. blobs: keys of payloads and results."""

    whole: list[str]
    mixed: list[str]
    blobs: list[str]


def find(objects: ObjectStore, erasure: Erasure) -> Found:
    """What there is to erase. Changes nothing."""
    if erasure.kind == "tenant":
        whole: list[str] = []
        mixed: list[str] = []
        for file in lake_files(objects, erasure.name):
            (whole if file.modified < erasure.at - CLOCKS_S else mixed).append(file.key)
        blobs = objects.list(f"{TENANTS}/{erasure.name}")
        return Found(whole, mixed, [b.key for b in blobs if b.modified <= erasure.at])
    files = sorted(locate(objects, erasure.name))
    return Found([], files, list(_blobs_of(objects, erasure.name, {tenant_of(f) for f in files})))


def erase(objects: ObjectStore, erasure: Erasure, report: Report) -> Found:
    """Erase; may be done again after any failure. Raises Transient."""
    record_erasure(objects, erasure)
    found = find(objects, erasure)
    steps = [
        *(partial(objects.delete, key) for key in found.whole),
        *(partial(rewrite, objects, key) for key in found.mixed),
        *(partial(objects.delete, key) for key in found.blobs),
    ]
    indexed = runs(objects)
    total = len(steps) + len(indexed)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = _carry_out(pool, steps, lambda done: report(done, total))
        gone = _gone(objects, erasure)
        steps = [partial(unindex, objects, run, gone) for run in indexed]
        _carry_out(pool, steps, lambda more: report(done + more, total))
    return found


def rewrite(objects: ObjectStore, key: str) -> None:
    """Write a file of rows without what has been erased by anybody; again, until nothing of that is in it:
    somebody else's rewrite may have crossed this one."""
    while (table := read_rows(objects, key)) is not None:
        erasures = read_erasures(objects)
        columns = ("job_id", "tenant", "submitted_at", "finished_at")
        rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
        keep = [
            not erasures.covers(job_id, tenant, began.timestamp(), ended and ended.timestamp())
            for job_id, tenant, began, ended in rows
        ]
        if all(keep):
            return
        if any(keep):
            objects.put(key, parquet(table.filter(pa.array(keep))))
        else:
            objects.delete(key)


def _blobs_of(objects: ObjectStore, job_id: str, tenants: set[str]) -> Iterator[str]:
    """Keys of a job's payloads and results. Looks through all tenants' where its own is not known."""
    for folder in [f"{TENANTS}/{tenant}" for tenant in tenants] or [TENANTS]:
        for info in objects.list(folder):
            name, _, _unique = info.key.rpartition("/")[2].rpartition(".")
            if name == job_id:
                yield info.key


def _gone(objects: ObjectStore, erasure: Erasure) -> Callable[[pa.Table], pa.ChunkedArray]:
    """Says of each entry of the index whether it stays."""
    if erasure.kind == "job":
        id_hash = pa.scalar(hash_of(erasure.name), pa.uint64())
        return lambda table: pc.not_equal(table["hash"], id_hash)
    left = pa.array([file.key for file in lake_files(objects, erasure.name)], pa.string())
    prefix = f"{tenant_folder(erasure.name)}/"

    def stays(table: pa.Table) -> pa.ChunkedArray:
        others = pc.invert(pc.starts_with(table["file"], prefix))
        return pc.or_(others, pc.is_in(table["file"], left))

    return stays


def _carry_out(
    pool: ThreadPoolExecutor, steps: Sequence[Callable[[], None]], report: Callable[[int], None]
) -> int:
    done = 0
    for done, _ in enumerate(pool.map(lambda step: step(), steps), start=1):
        report(done)
    return done
