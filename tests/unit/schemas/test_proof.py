"""Who cannot sign for a tenant cannot send its jobs."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import InvalidJob
from schemas.jobs import Job, job_headers, job_value, new_job_id, read_job, retry_headers
from schemas.payloads import Payload, Ref
from schemas.proof import check_proof, signature, signed
from schemas.topics import RETRY

MakeJob = Callable[..., Job]

KEY, OTHER = b"k" * 32, b"o" * 32
KEYS = {"default": [KEY], "acme": [OTHER]}


def test_a_signature_is_what_the_documentation_says(make_job: MakeJob) -> None:
    job = make_job(id="job-1", deadline_at=1_800_000_000.25)
    digest = hashlib.sha256(b"hello").hexdigest()
    text = f"default\njob-1\n1800000000250000\n{digest}\necho"

    assert signature(job, KEY) == "v1=" + hmac.digest(KEY, text.encode(), "sha256").hex()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deadline_at=st.floats(1, 4_000_000_000))
def test_the_proof_survives_the_wire(make_job: MakeJob, deadline_at: float) -> None:
    job = signed(make_job(deadline_at=deadline_at, model="a\nb"), KEYS)

    for topic, headers in ((job.topic, job_headers(job)), (RETRY, retry_headers(job))):
        check_proof(read_job(topic, headers, job_value(job), 0.0), KEYS)


def test_a_version_pinned_and_attempts_made_do_not_change_the_proof(make_job: MakeJob) -> None:
    job = signed(make_job(), KEYS)

    check_proof(msgspec.structs.replace(job, version=3, attempt=2, suspect=True), KEYS)


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "acme"},
        {"id": "other"},
        {"model": "other"},
        {"payload": Payload("text/plain", data=b"bye")},
        {"payload": Payload("text/plain", ref=Ref("tenants/default/x", 5, "0" * 64))},
        {"deadline_at": 1_900_000_000.0},
        {"signature": None},
        {"signature": "v1="},
        {"signature": "\u00e9"},
        {"signature": "v2=" + "0" * 64},
    ],
)
def test_any_other_job_is_not_proven(make_job: MakeJob, change: dict[str, Any]) -> None:
    job = msgspec.structs.replace(signed(make_job(), KEYS), **change)

    with pytest.raises(InvalidJob, match="a proof that the job is of tenant") as caught:
        check_proof(job, KEYS)

    assert caught.value.code == "tenant_unproven"
    assert KEY.decode() not in caught.value.message


def test_a_tenants_key_proves_no_other_tenant(make_job: MakeJob) -> None:
    job = make_job(tenant="acme")
    forged = msgspec.structs.replace(job, signature=signature(job, KEY))

    with pytest.raises(InvalidJob):
        check_proof(forged, KEYS)


def test_a_tenant_without_a_key_signs_nothing_and_proves_nothing(make_job: MakeJob) -> None:
    job = make_job(tenant="nobody")

    assert signed(job, KEYS) == job
    with pytest.raises(InvalidJob, match="has no key"):
        check_proof(msgspec.structs.replace(job, signature="v1=0"), KEYS)


def test_while_a_key_is_changed_the_old_one_is_accepted_and_the_new_one_signs(
    make_job: MakeJob,
) -> None:
    both = {"default": [OTHER, KEY]}

    check_proof(signed(make_job(), KEYS), both)
    check_proof(signed(make_job(), both), {"default": [OTHER]})


def test_a_job_with_an_idempotency_key_is_signed_by_the_id_that_comes_of_it(
    make_job: MakeJob,
) -> None:
    job = signed(make_job(id=new_job_id("default", "k"), key="k"), KEYS)
    headers = job_headers(job) | {"ce_id": "any"}

    check_proof(read_job(job.topic, headers, job_value(job), 0.0), KEYS)
