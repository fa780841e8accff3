"""The archiver in the embedded stack: from a submitted job to its row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

if TYPE_CHECKING:
    from tests.conftest import Stack


def test_jobs_that_end_are_rows_of_the_lake(
    make_stack: Callable[..., Stack], small_bundles: list[Path]
) -> None:
    stack = make_stack(STACK__ARCHIVER="true", ARCHIVER__FILE_AGE_S="0.2")
    stack.headrace("models", "add", small_bundles[0])
    stack.up()
    client = stack.client()
    jobs = client.submit_many("noop", [np.float32([n]) for n in range(20)])
    answers = {result.job_id for result in client.results(jobs)}  # type: ignore[union-attr]

    def rows() -> list[Any]:
        if not list(stack.data.glob("objects/lake/tenant=*/**/*.parquet")):
            return []
        files = f"{stack.data}/objects/lake/tenant=*/model=*/date=*/*.parquet"
        return duckdb.sql(f"SELECT job_id, tenant, model FROM read_parquet('{files}')").fetchall()

    stack.until(lambda: len(rows()) >= 20)
    assert {job_id for job_id, _, _ in rows()} == answers == {job.id for job in jobs}
    assert {row[1:] for row in rows()} == {("default", "noop")}
    assert len(rows()) == 20
    stack.until(lambda: stack.json("status")["lake"]["open"] == 0)
