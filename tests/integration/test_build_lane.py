"""No worker builds: a job for an engine that is not there waits, uncharged, until the builder has made it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from producers.explain import explain_job

if TYPE_CHECKING:
    from tests.conftest import Stack


@contextmanager
def stopped(stack: Stack, child: str) -> Iterator[None]:
    """Inside the block the child does nothing."""
    stack.kill(child, signal.SIGSTOP)
    try:
        yield
    finally:
        stack.kill(child, signal.SIGCONT)


def test_a_job_waits_for_the_engine_to_be_built_and_then_succeeds_at_its_first_attempt(
    make_stack: Callable[..., Stack], small_bundles: list[Path], tmp_path: Path
) -> None:
    stack = make_stack(ENGINES__CACHE_DIR=tmp_path)
    stack.up()
    client = stack.client()
    with stopped(stack, "builder"):
        stack.headrace("models", "add", small_bundles[0])
        shutil.rmtree(tmp_path / "objects")
        job = client.submit("noop", np.float32([7]))

        def told() -> str:
            return " ".join(explain_job(client, job.id))

        stack.until(lambda: "the engine of noop/1 to be built" in told())
        assert "(engine_not_built)" in told()
        assert "See that a builder runs" in told()
        assert not list(tmp_path.glob("objects/*/*")), "the worker built it"

    result = job.result()

    assert (result.attempts, result.answer["outputs"]) == (1, {"y": [7.0]})
    waited = stack.records("jobs.retry")
    assert {record.headers["ce_attempt"] for record in waited} == {"0"}
    assert {record.headers["ce_waitsfor"] for record in waited} == {"engine_not_built"}
    assert stack.healthy
