"""Words that the tests of several packages share: a job, and the card of a model that takes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from schemas.jobs import Job
from schemas.models import BatchConfig, Limits, ModelCard
from schemas.payloads import Payload
from schemas.topics import jobs_topic

NOON = 1_800_000_000.0


@pytest.fixture
def noon() -> float:
    """The wall clock's time when a test begins, seconds since the epoch."""
    return NOON


@pytest.fixture
def make_job() -> Callable[..., Job]:
    """`make_job(id="a", lane="bulk", priority=3)`: a job for model `echo`, due an hour after noon."""
    numbers = itertools.count(1)

    def make(*, lane: Any = "standard", modality: Any = "text", **facts: Any) -> Job:
        facts.setdefault("id", f"job-{next(numbers)}")
        facts.setdefault("topic", jobs_topic(modality, lane))
        facts.setdefault("payload", Payload("text/plain", data=b"hello"))
        submitted_at = facts.setdefault("submitted_at", NOON)
        facts.setdefault("deadline_at", submitted_at + 3600)
        facts.setdefault("tenant", "default")
        facts.setdefault("model", "echo")
        return Job(**facts)

    return make


@pytest.fixture
def make_card() -> Callable[..., ModelCard]:
    """`make_card(max_attempts=2, max_jobs=4)`: the card of `echo`, version 1, that takes text."""

    def make(**facts: Any) -> ModelCard:
        limits = {k: facts.pop(k) for k in Limits.__struct_fields__ if k in facts}
        batch = {k: facts.pop(k) for k in BatchConfig.__struct_fields__ if k in facts}
        card: dict[str, Any] = {
            "name": "echo",
            "version": 1,
            "modality": "text",
            "tier": "standard",
            "description": "",
            "batch": BatchConfig(**batch),
            "limits": Limits(**limits),
            "digest": "0" * 64,
            "size_bytes": 1,
            "added_at": 0.0,
        }
        return ModelCard(**(card | facts))

    return make
