"""Jobs that failed: found, shown and submitted again, each redrive once."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from infra.eventlog import NewRecord
from producers.deadletters import LetterFilter
from schemas.jobs import JOB_TYPE, new_job_id
from schemas.results import decode_outcome

if TYPE_CHECKING:
    from producers.client import Client
    from tests.conftest import Stack

pytestmark = pytest.mark.timeout(600)  # the first test brings the stack up and may download models

TOPIC = "jobs.tensor.standard"
numbers = itertools.count(1)


@pytest.fixture
def failed(stack: Stack, client: Client) -> Callable[..., str]:
    """`failed("soon", key="k")`: a job for a model that is not installed, once it has failed."""

    def fail(model: str, key: str | None = None) -> str:
        job_id = new_job_id("default", key)
        headers = {
            "ce_specversion": "1.0",
            "ce_type": JOB_TYPE,
            "ce_id": job_id,
            "ce_tenant": "default",
            "ce_model": model,
            "ce_color": "blue",
            "content-type": "application/x-npy",
        } | ({} if key is None else {"ce_idempotencykey": key})
        value = io.BytesIO()
        np.save(value, np.zeros(1, np.float32))
        client.log.append([NewRecord(TOPIC, job_id, headers, value.getvalue())])
        stack.until(lambda: stack.dead_letters(job_id))
        return job_id

    return fail


@pytest.fixture
def disobedient(stack: Stack, client: Client, tmp_path: Path) -> tuple[str, Path]:
    """A job that has failed, and will again; and the file that has a line for each of its runs."""
    runs = tmp_path / "runs"
    job = client.submit("obey", json.dumps({"mark": str(runs), "fail": "no"}).encode())
    assert job.wait().status == "failed"
    stack.until(lambda: not stack.lag())
    return job.id, runs


def redrive(stack: Stack, client: Client, job_id: str, **options: Any) -> int:
    """How many letters of the job were redriven, once all that came of it has ended."""
    letters = client.dead_letters
    count = letters.redrive(letters.select(LetterFilter(job=job_id)), **options)
    stack.until(lambda: not stack.lag())
    return count


def statuses(stack: Stack, job_id: str) -> list[str]:
    return [decode_outcome(record.value).status for record in stack.results(job_id)]


def test_a_failed_job_is_listed_counted_and_shown(
    stack: Stack, disobedient: tuple[str, Path], tmp_path: Path
) -> None:
    job_id, _ = disobedient

    (letter,) = stack.json("deadletters", "list", "--job", job_id)
    assert (letter["model"], letter["version"], letter["topic"]) == ("obey", 1, TOPIC)
    assert letter["obstacle"] is None
    counts = stack.json("deadletters", "list", "--summary", "--job", job_id)
    assert counts == {letter["code"]: 1}

    shown = stack.json("deadletters", "show", letter["id"], "--payload", tmp_path / "payload")
    assert shown["headers"]["ce_id"] == job_id
    assert json.loads((tmp_path / "payload").read_bytes())["fail"] == "no"


@pytest.mark.parametrize("key", [None, "a-key"], ids=["no key", "key"])
def test_a_job_that_can_run_by_now_runs_once_however_often_it_is_redriven(
    stack: Stack,
    client: Client,
    failed: Callable[..., str],
    make_tensor_bundle: Callable[..., Path],
    key: str | None,
) -> None:
    model = f"soon-{next(numbers)}"
    job_id = failed(model, key)
    stack.headrace("models", "add", make_tensor_bundle(model))

    for _ in range(2):
        assert redrive(stack, client, job_id) == 1
        assert statuses(stack, job_id) == ["failed", "succeeded"]
    (outcome,) = client.outcomes([job_id])
    assert outcome.status == "succeeded"


def test_a_redriven_job_keeps_what_it_came_with(
    stack: Stack, client: Client, failed: Callable[..., str]
) -> None:
    job_id = failed("never-installed")
    (before,) = stack.dead_letters(job_id)

    redrive(stack, client, job_id, deadline_s=60)

    (_, again) = (record for record in stack.records(TOPIC) if record.key == job_id)
    assert again.value == before.value
    assert again.headers["ce_color"] == "blue"
    assert again.headers["x-replay-id"] == "/".join(map(str, before.position))
    assert not [name for name in again.headers if name.startswith(("x-original", "x-error"))]


def test_a_job_that_fails_again_has_another_letter_which_may_be_redriven(
    stack: Stack, client: Client, disobedient: tuple[str, Path]
) -> None:
    job_id, runs = disobedient
    for so_far in (1, 2, 3):
        assert stack.lines(runs) == so_far
        assert len(stack.dead_letters(job_id)) == so_far
        # The older letters go too, and are known.
        assert redrive(stack, client, job_id) == so_far
    assert stack.lines(runs) == 4
    assert statuses(stack, job_id) == ["failed"] * 4


def test_a_record_that_is_no_job_stays_where_it_is(stack: Stack, client: Client) -> None:
    client.log.append([NewRecord(TOPIC, "not a job", {"what": "is this"}, b"\0")])
    stack.until(lambda: stack.dead_letters("not a job"))

    (letter,) = stack.json("deadletters", "list", "--job", "not a job")
    assert letter["obstacle"]
    options = ("deadletters", "redrive", "--job", "not a job", "--yes")
    assert stack.json(*options) == {"redriven": 0, "left_out": 1}
    assert stack.json(*options, "--force") == {"redriven": 1, "left_out": 0}
    stack.until(lambda: len(stack.dead_letters("not a job")) == 2)
