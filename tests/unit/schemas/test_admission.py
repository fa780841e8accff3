"""What a job must keep to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from schemas.admission import check_deadline, check_limits
from schemas.errors import InvalidJob
from schemas.jobs import Job
from schemas.models import ModelCard
from schemas.payloads import Payload, Ref, payload_key, result_key

Make = Callable[..., Job]
MakeCard = Callable[..., ModelCard]


def ref(key: str, size: int = 1) -> Payload:
    return Payload("text/plain", ref=Ref(key, size, "0" * 64))


def test_a_job_within_its_limits_passes(make_job: Make, make_card: MakeCard) -> None:
    job = make_job(payload=Payload("text/plain", data=b"12345"))

    check_limits(job, make_card(max_bytes=5))
    check_deadline(job.deadline_at, 3600, job.submitted_at)


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (Payload("text/plain", data=b""), "payload_empty"),
        (Payload("text/plain"), "payload_empty"),
        (ref("tenants/default/x", 0), "payload_empty"),
        (Payload("text/plain", data=b"123456"), "payload_too_large"),
        (ref("tenants/default/x", 6), "payload_too_large"),
        (ref("tenants/other/x"), "payload_foreign"),
        (ref("tenants/default-2/x"), "payload_foreign"),
        (ref("models/echo/1/card.json"), "payload_foreign"),
    ],
)
def test_a_payload_beyond_the_limits_is_refused(
    make_job: Make, make_card: MakeCard, payload: Payload, code: str
) -> None:
    with pytest.raises(InvalidJob) as caught:
        check_limits(make_job(payload=payload), make_card(max_bytes=5))

    assert caught.value.code == code


def test_a_model_of_another_modality_is_refused(make_job: Make, make_card: MakeCard) -> None:
    with pytest.raises(InvalidJob, match="takes image jobs") as caught:
        check_limits(make_job(modality="text"), make_card(modality="image"))

    assert caught.value.code == "wrong_modality"


def test_a_deadline_further_ahead_than_the_log_keeps_is_refused(make_job: Make) -> None:
    job = make_job()

    with pytest.raises(InvalidJob, match="at most 3599 s") as caught:
        check_deadline(job.deadline_at, 3599, job.submitted_at)

    assert caught.value.code == "deadline_too_far"


@pytest.mark.parametrize(
    "key", [payload_key("default", "job", "u"), result_key("default", "j", "u")]
)
def test_our_own_keys_lie_under_the_tenants_prefix(
    make_job: Make, make_card: MakeCard, key: str
) -> None:
    check_limits(make_job(payload=ref(key)), make_card())
