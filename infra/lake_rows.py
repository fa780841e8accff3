"""A row of the lake: an outcome, column by column. Importing this needs pyarrow."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import PipelineError
from schemas.payloads import Ref
from schemas.results import NO_ANSWER, Outcome, StageTimes

_TIME = pa.timestamp("us", tz="UTC")
_STAGES = StageTimes.__struct_fields__

SCHEMA = pa.schema(
    [
        ("job_id", pa.string()),
        ("tenant", pa.string()),
        ("model", pa.string()),
        ("version", pa.int64()),
        ("status", pa.string()),
        ("code", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int64()),
        ("submitted_at", _TIME),
        ("finished_at", _TIME),
        *((stage, pa.float64()) for stage in _STAGES),
        ("worker", pa.string()),
        ("answer", pa.string()),
        ("ref_key", pa.string()),
        ("ref_size_bytes", pa.int64()),
        ("ref_sha256", pa.string()),
        ("fingerprint", pa.string()),
        ("trace_id", pa.string()),
    ]
)
"""answer: JSON, null when there is none or it is an object (ref_…). Columns are only ever added."""


def table_of(outcomes: Sequence[Outcome]) -> pa.Table:
    return pa.Table.from_pylist([_row(outcome) for outcome in outcomes], SCHEMA)


def parquet(table: pa.Table) -> bytes:
    """The same bytes for the same rows, as long as pyarrow is the same."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(data: bytes, key: str) -> pa.Table:
    """What lies in the object with this key. Raises PipelineError (lake_corrupt)."""
    try:
        return pq.ParquetFile(BytesIO(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise PipelineError(
            "lake_corrupt",
            f"Object {key}: expected Parquet, came other ({error}): restore it from a copy, or delete it.",
        ) from error


def outcomes_of(table: pa.Table, job_id: str) -> list[Outcome]:
    """The rows of one job. Columns that an older file has not got are taken as empty."""
    rows = table.filter(pc.equal(table["job_id"], job_id))
    whole = pa.concat_tables([SCHEMA.empty_table(), rows], promote_options="default")
    return [_outcome(row) for row in whole.to_pylist()]


def _row(outcome: Outcome) -> dict[str, Any]:
    times, ref = outcome.times, outcome.ref
    return {
        "job_id": outcome.job_id,
        "tenant": outcome.tenant,
        "model": outcome.model,
        "version": outcome.version,
        "status": outcome.status,
        "code": outcome.code,
        "message": outcome.message,
        "attempts": outcome.attempts,
        "submitted_at": datetime.fromtimestamp(outcome.submitted_at, UTC),
        "finished_at": _moment(outcome.finished_at),
        **({stage: getattr(times, stage) for stage in _STAGES} if times else {}),
        "worker": outcome.worker,
        "answer": None if outcome.answer == NO_ANSWER else bytes(outcome.answer).decode(),
        "ref_key": ref.key if ref else None,
        "ref_size_bytes": ref.size_bytes if ref else None,
        "ref_sha256": ref.sha256 if ref else None,
        "fingerprint": outcome.fingerprint,
        "trace_id": outcome.trace_id,
    }


def _outcome(row: dict[str, Any]) -> Outcome:
    finished_at, answer, ref_key = row["finished_at"], row["answer"], row["ref_key"]
    timed = row["waited_ms"] is not None
    return Outcome(
        job_id=row["job_id"],
        status=row["status"],
        tenant=row["tenant"],
        model=row["model"],
        version=row["version"],
        answer=NO_ANSWER if answer is None else msgspec.Raw(answer.encode()),
        ref=Ref(ref_key, row["ref_size_bytes"], row["ref_sha256"]) if ref_key else None,
        code=row["code"],
        message=row["message"],
        attempts=row["attempts"],
        submitted_at=row["submitted_at"].timestamp(),
        finished_at=finished_at.timestamp() if finished_at else None,
        times=StageTimes(*(row[stage] for stage in _STAGES)) if timed else None,
        worker=row["worker"],
        fingerprint=row["fingerprint"],
        trace_id=row["trace_id"],
    )


def _moment(when: float | None) -> datetime | None:
    return None if when is None else datetime.fromtimestamp(when, UTC)
