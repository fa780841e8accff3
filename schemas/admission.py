"""What a job must keep to, whoever asks: a client before it submits, the dispatcher as it admits. Pure."""

from __future__ import annotations

from schemas.errors import InvalidJob
from schemas.jobs import Job
from schemas.models import ModelCard
from schemas.payloads import belongs_to


def check_deadline(deadline_at: float, max_deadline_s: float, now: float) -> None:
    """deadline_at, now: seconds since the epoch, now by the checker's clock. Raises InvalidJob (deadline_too_far)."""
    if (ahead_s := deadline_at - now) > max_deadline_s:
        raise InvalidJob(
            "deadline_too_far",
            f"Expected a deadline at most {max_deadline_s:.0f} s ahead, came {ahead_s:.0f} s.",
        )


def check_limits(job: Job, card: ModelCard) -> None:
    """Raises InvalidJob (payload_empty, payload_too_large, payload_foreign, wrong_modality)."""
    size = job.payload.size_bytes
    if size == 0:
        raise InvalidJob("payload_empty", f"Expected {card.modality} bytes, came none.")
    if size > card.limits.max_bytes:
        raise InvalidJob(
            "payload_too_large",
            f"Model {card.name} takes at most {card.limits.max_bytes} bytes, came {size}.",
        )
    if job.payload.ref and not belongs_to(job.tenant, job.payload.ref.key):
        raise InvalidJob(
            "payload_foreign",
            f"Expected a payload under the prefix of tenant {job.tenant}, came {job.payload.ref.key}.",
        )
    if job.topic.split(".")[1] != card.modality:
        raise InvalidJob(
            "wrong_modality",
            f"Model {card.name} takes {card.modality} jobs, this one came on {job.topic}.",
        )
