"""The lake: every outcome as a row of Parquet in the object store. Its layout, and finding an old job in it.

    lake/tenant=T/model=M/date=YYYY-MM-DD/<segment>.parquet    the rows; all that queries need
    lake/_index/date=YYYY-MM-DD/…                              job id -> file of rows: infra/lake_index.py
    lake/_segments/<segment>                                   where each segment ends
    lake/_erased/…                                             what has been erased and must not come back

The archiver (workers/archiver/) writes it. docs/lake.md is for those who query it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from infra.lake_index import Run, files_of, runs, runs_near
from infra.objects import ObjectStore
from schemas.errors import InvalidJob, PipelineError
from schemas.models import MODEL_NAME
from schemas.results import Outcome

if TYPE_CHECKING:
    import pyarrow as pa

GROUP = "archiver"
"""The consumer group that reads the results for the lake."""

LAKE = "lake"
SEGMENTS = f"{LAKE}/_segments"
ERASED = f"{LAKE}/_erased"
OTHER_MODELS = "_other"
"""The folder of jobs that asked for a model by what is no model's name. Their rows have it as it came."""

FILE_LIMIT_BYTES = 1024**3
LOOKS = 3
"""How often a lookup begins again because the index was merged under it."""

_FILE = re.compile(rf"{LAKE}/tenant=([^/]+)/model=([^/]+)/date=(\d{{4}}-\d\d-\d\d)/[^/]+\.parquet")


class LakeFile(NamedTuple):
    """A file of rows. modified: seconds since the epoch, by the store's clock."""

    key: str
    tenant: str
    model: str
    date: date
    size_bytes: int
    modified: float


def rows_key(tenant: str, model: str, day: date, segment: str) -> str:
    """segment: `<partition>-<first>-<last>-<mark>`, so that a repeated write is the same file."""
    folder = model if MODEL_NAME.fullmatch(model) else OTHER_MODELS
    return f"{tenant_folder(tenant)}/model={folder}/date={day.isoformat()}/{segment}.parquet"


def tenant_folder(tenant: str) -> str:
    return f"{LAKE}/tenant={tenant}"


def tenant_of(key: str) -> str:
    """Whose rows are in the file with this key."""
    return key.split("/", 2)[1].removeprefix("tenant=")


def day_of(outcome: Outcome) -> date:
    """The date that an outcome is filed under: when it came about, in UTC."""
    return datetime.fromtimestamp(outcome.finished_at or 0.0, UTC).date()


def lake_files(objects: ObjectStore, tenant: str | None = None) -> Iterator[LakeFile]:
    """The files of rows, in no order."""
    for found in objects.list(LAKE if tenant is None else tenant_folder(tenant)):
        if parts := _FILE.fullmatch(found.key):
            owner, model, day = parts.groups()
            yield LakeFile(
                found.key, owner, model, date.fromisoformat(day), found.size_bytes, found.modified
            )


def find_in_lake(objects: ObjectStore, job_id: str, most_days: float) -> Outcome | None:
    """The outcome of an archived job, the newest if it has several; None if the lake has none.

    most_days: how long after its submission a job may end, unless it failed and was redriven: that may be
    any time later. Raises PipelineError (extra_missing, lake_corrupt), Transient.
    """
    found: list[Outcome] = []
    for listed in (partial(runs_near, objects, job_id, most_days), partial(runs, objects)):
        for key in _look(objects, job_id, listed):
            found += _rows(objects, key, job_id)
        newest = max(found, key=lambda outcome: outcome.finished_at or 0.0, default=None)
        if newest and newest.status == "succeeded":
            break
    return newest


def locate(objects: ObjectStore, job_id: str) -> set[str]:
    """Keys of the files that hold this job, or held it. Looks through the whole index."""
    return _look(objects, job_id, partial(runs, objects))


def read_rows(objects: ObjectStore, key: str) -> pa.Table | None:
    """A file of rows; None if it is not there (any more). Raises PipelineError (lake_corrupt)."""
    from infra.lake_rows import read_parquet

    try:
        return read_parquet(objects.get(key, max_bytes=FILE_LIMIT_BYTES), key)
    except InvalidJob as error:
        if error.code == "object_missing":
            return None
        raise


def need_pyarrow() -> None:
    """Raises PipelineError (extra_missing)."""
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise PipelineError(
            "extra_missing",
            f"The lake needs the package {error.name}; pip install 'headrace[lake]'.",
        ) from error


def _look(objects: ObjectStore, job_id: str, listed: Callable[[], list[Run]]) -> set[str]:
    """Look through these runs of the index. They go when they have been merged: then look again."""
    for look in range(LOOKS):
        found = listed()
        if not found:
            return set()
        need_pyarrow()
        try:
            return files_of(objects, found, job_id)
        except InvalidJob as error:
            if error.code != "object_missing" or look == LOOKS - 1:
                raise
    raise AssertionError


def _rows(objects: ObjectStore, key: str, job_id: str) -> list[Outcome]:
    from infra.lake_rows import outcomes_of

    table = read_rows(objects, key)
    return [] if table is None else outcomes_of(table, job_id)
