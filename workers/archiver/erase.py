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
from infra.lake_index import Run, hash_of, runs
from infra.lake_rows import outcomes_of, parquet
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


def erase(objects: ObjectStore, erasure: Erasure, report: Report) -> tuple[Found, list[str]]:
    """Erase; may be done again after any failure. Raises PipelineError (lake_corrupt), Transient.

    Returns what was met, and the keys of the files that have something left of this job or tenant: what came
    later than the erasure, by the clocks of those who wrote it.
    """
    record_erasure(objects, erasure)
    found = find(objects, erasure)
    steps = [
        *(partial(objects.delete, key) for key in found.whole),
        *(partial(rewrite, objects, key) for key in found.mixed),
        *(partial(objects.delete, key) for key in found.blobs),
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        _carry_out(pool, steps, report)
        left = _left(objects, erasure, found)
        stays = _stays(erasure, left)
        seen: set[Run] = set()
        # What was merged under our hands is a run that was not there before.
        while new := [run for run in runs(objects) if run not in seen]:
            seen.update(new)
            _carry_out(pool, [partial(unindex, objects, run, stays) for run in new], report)
    return found, left


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


def _left(objects: ObjectStore, erasure: Erasure, found: Found) -> list[str]:
    """The files that still hold something of the job or tenant."""
    if erasure.kind == "tenant":
        return [file.key for file in lake_files(objects, erasure.name)]
    tables = ((key, read_rows(objects, key)) for key in found.mixed)
    return [key for key, rows in tables if rows and outcomes_of(rows, erasure.name)]


def _stays(erasure: Erasure, left: list[str]) -> Callable[[pa.Table], pa.ChunkedArray]:
    """Says of each entry of the index whether it stays."""
    id_hash = pa.scalar(hash_of(erasure.name), pa.uint64())
    prefix = f"{tenant_folder(erasure.name)}/"

    def of_others(table: pa.Table) -> pa.ChunkedArray:
        if erasure.kind == "job":
            return pc.not_equal(table["hash"], id_hash)
        return pc.invert(pc.starts_with(table["file"], prefix))

    kept = pa.array(left, pa.string())
    return lambda table: pc.or_(of_others(table), pc.is_in(table["file"], kept))


def _carry_out(
    pool: ThreadPoolExecutor, steps: Sequence[Callable[[], None]], report: Report
) -> None:
    for done, _ in enumerate(pool.map(lambda step: step(), steps), start=1):
        report(done, len(steps))
