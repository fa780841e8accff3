"""Outcomes, as clients and the view read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import msgspec
import pytest

from schemas.jobs import Job
from schemas.payloads import Ref
from schemas.results import Status, decode_outcome, encode_outcome, outcome_of, result_headers


def test_an_answer_passes_through_byte_for_byte(make_job: Callable[..., Job]) -> None:
    answer = b'{"b": 1.50,  "a":"\xc3\xa9"}'
    outcome = outcome_of(make_job(), "succeeded", answer=msgspec.Raw(answer))

    read = decode_outcome(encode_outcome(outcome))

    assert bytes(read.answer) == answer
    assert read.json() == {"b": 1.5, "a": "\u00e9"}


def test_an_outcome_without_an_inline_answer_has_none(make_job: Callable[..., Job]) -> None:
    ref = Ref("tenants/default/results/x", 9, "0" * 64)

    read = decode_outcome(encode_outcome(outcome_of(make_job(), "succeeded", ref=ref)))

    assert (read.json(), read.ref) == (None, ref)


@pytest.mark.parametrize("status", get_args(Status))
def test_a_job_has_ended_in_four_ways(make_job: Callable[..., Job], status: Status) -> None:
    outcome = outcome_of(make_job(), status)

    assert outcome.ended == (status in ("succeeded", "failed", "expired", "cancelled"))


def test_only_a_job_with_a_key_tells_its_fingerprint(make_job: Callable[..., Job]) -> None:
    job = make_job(key="k")

    assert outcome_of(job, "queued").fingerprint == job.fingerprint
    assert outcome_of(make_job(), "queued").fingerprint is None


def test_a_results_headers_tell_whose_it_is_and_how_it_ended(make_job: Callable[..., Job]) -> None:
    headers = result_headers(outcome_of(make_job(id="a"), "expired", finished_at=1_800_000_000.0))

    assert headers["ce_id"] == "a"
    assert headers["ce_status"] == "expired"
    assert headers["ce_time"] == "2027-01-15T08:00:00.000000+00:00"
