"""A new version of a model comes while jobs for the model are on their way: none is lost or answered by both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from headrace import Client
    from producers.client import JobHandle
    from tests.conftest import Stack

pytestmark = pytest.mark.timeout(600)  # the first test brings the stack up and may download models

PAUSE_S = 0.005
LIMIT = 10_000


@contextmanager
def submitting(client: Client, model: str) -> Iterator[list[JobHandle]]:
    """Inside the block jobs for the model are submitted all the time, number after number."""
    jobs: list[JobHandle] = []
    enough = threading.Event()

    def submit() -> None:
        while not enough.wait(PAUSE_S) and len(jobs) < LIMIT:
            jobs.append(client.submit(model, np.float32([len(jobs)])))

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        yield jobs
    finally:
        enough.set()
        thread.join(60)
        assert not thread.is_alive()


def test_a_new_version_takes_over_between_two_jobs(
    stack: Stack, client: Client, make_tensor_bundle: Callable[..., Path]
) -> None:
    stack.headrace("models", "add", make_tensor_bundle("swapped"))
    client.submit("swapped", np.float32([0])).result()
    with submitting(client, "swapped") as jobs:
        stack.until(lambda: len(jobs) > 50)
        new = make_tensor_bundle("swapped", version=2, plus=0.5)
        stack.headrace("models", "add", new)
        stack.until(lambda: client.result_of(jobs[-1].wait()).version == 2)
        seen = len(jobs)
        stack.until(lambda: len(jobs) > seen + 50)

    ends = {outcome.job_id: outcome for outcome in client.outcomes(jobs)}

    results = [client.result_of(ends[job.id]) for job in jobs]
    versions = [result.version for result in results]
    assert set(versions) == {1, 2}
    assert versions == sorted(versions), "once it is there, no job goes back to the old one"
    answers = [result.answer["outputs"]["y"] for result in results]
    assert answers == [[n + (0.5 if v == 2 else 0)] for n, v in enumerate(versions)]
    assert {result.attempts for result in results} == {1}
    told = [record.key for record in stack.records("results") if record.key in ends]
    assert sorted(told) == sorted(ends), "one outcome each"
