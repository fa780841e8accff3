"""Records that anybody may append, made to bring the dispatcher down. It must answer each of them:
one that it dies of would kill it again at every start, and stop all jobs of all tenants."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from infra.eventlog import NewRecord
from schemas.jobs import JOB_TYPE, new_job_id, rfc3339

if TYPE_CHECKING:
    from producers.client import Client
    from tests.conftest import Stack

Audit = Callable[..., dict[str, Any]]

FAR = "9999-12-31T23:59:59Z"
FIRST = "0001-01-01T00:00:00+23:59"

RECORDS: dict[str, dict[str, str]] = {
    "sent in the year 9999": {"ce_time": FAR},
    "sent in the year 9999, for no model": {"ce_time": FAR, "ce_model": "nope"},
    "sent in the year 1, with a deadline": {"ce_time": FIRST, "ce_deadline": FAR},
    "trace without parts": {"ce_traceparent": "garbage"},
    "number beyond 64 bits": {"ce_params": '{"n": 1000000000000000000000000}'},
    "params nested 997 deep": {"ce_params": '{"n":' + "[" * 997 + "]" * 997 + "}"},
    "claims attempts": {"ce_attempt": "999999999999999"},
    "claims to be suspect": {"ce_suspect": "1"},
    "reply to nowhere": {"ce_replyto": "a\nb" * 1000},
    "object of no bytes": {"ce_dataref": "x", "ce_datasize": "0", "ce_datasha256": "0" * 64},
}


def one() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(1, np.float32))
    return file.getvalue()


def good(**changes: str) -> dict[str, str]:
    return {
        "ce_type": JOB_TYPE,
        "ce_id": new_job_id("default"),
        "ce_tenant": "default",
        "ce_model": "noop",
        **changes,
    }


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_record_is_answered_and_harms_nobody(
    stack: Stack, client: Client, audit: Audit, name: str
) -> None:
    restarts = stack.restarts("dispatcher")
    headers = good(**RECORDS[name])
    key = headers["ce_id"]
    client.log.append([NewRecord("jobs.tensor.standard", key, headers, one())])
    neighbour = client.submit("noop", np.zeros(1, np.float32))
    assert neighbour.wait(timeout_s=20).status == "succeeded"
    stack.until(lambda: not stack.lag(), 10)
    assert stack.restarts("dispatcher") == restarts
    found = audit(stack, [key])
    assert found["twice"] == []
    # Answered: an outcome, or a dead letter where it cannot stand for a job.
    assert found["missing"] == [] or found["dead_letters"] == {key: 1}


def test_params_of_the_client_cannot_bring_the_dispatcher_down(
    stack: Stack, client: Client
) -> None:
    from schemas.errors import InvalidJob

    restarts = stack.restarts("dispatcher")
    try:
        job = client.submit("noop", np.zeros(1, np.float32), params={"n": 2**64})
    except InvalidJob:
        pass
    else:
        assert job.wait(timeout_s=10).code == "params_unknown"
    assert client.submit("noop", np.zeros(1, np.float32)).wait(10).status == "succeeded"
    assert stack.restarts("dispatcher") == restarts


def test_a_job_that_waits_for_its_time_still_keeps_its_deadline(
    stack: Stack, client: Client, audit: Audit
) -> None:
    headers = good(ce_notbefore=FAR, ce_deadline=rfc3339(time.time() + 1))
    key = headers["ce_id"]
    client.log.append([NewRecord("jobs.tensor.standard", key, headers, one())])
    stack.until(lambda: not stack.lag(), 10)
    assert audit(stack, [key])["statuses"] == {"expired": 1}


def test_a_job_that_waits_for_its_time_is_cancelled_at_once(
    stack: Stack, client: Client, audit: Audit
) -> None:
    headers = good(ce_notbefore=rfc3339(time.time() + 3600))
    key = headers["ce_id"]
    client.log.append([NewRecord("jobs.tensor.standard", key, headers, one())])
    client.cancel(key)
    stack.until(lambda: not stack.lag(), 10)
    assert audit(stack, [key])["statuses"] == {"cancelled": 1}
