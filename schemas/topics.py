"""Every topic of the event log, declared once: name, what is in it, who writes it, who reads it."""

from __future__ import annotations

from typing import Literal, get_args

from msgspec import Struct

Modality = Literal["image", "text", "audio", "tensor"]
Lane = Literal["premium", "standard", "basic", "bulk"]

MODALITIES: tuple[Modality, ...] = get_args(Modality)
LANES: tuple[Lane, ...] = get_args(Lane)
LIVE_LANES: tuple[Lane, ...] = ("premium", "standard", "basic")
"""Lanes somebody waits on. Bulk never takes the slots reserved for them."""

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


class Topic(Struct, frozen=True):
    """One topic. retention_s: how long a record outlives its writing; never shorter than the longest deadline."""

    name: str
    about: str
    writers: str
    readers: str
    retention_s: float


RETRY = "jobs.retry"
RESULTS = "results"
CONTROL = "control"
KEYS = "keys"


def jobs_topic(modality: Modality, lane: Lane) -> str:
    return f"jobs.{modality}.{lane}"


def dead_letter_topic(topic: str) -> str:
    return f"{topic}.dlq"


def is_dead_letter_topic(topic: str) -> bool:
    return topic.endswith(".dlq")


JOB_TOPICS: tuple[str, ...] = tuple(jobs_topic(m, lane) for m in MODALITIES for lane in LANES)

TOPICS: tuple[Topic, ...] = (
    *(
        Topic(name, "submitted jobs, keyed by job id", "producers", "dispatcher", 7 * DAY_S)
        for name in JOB_TOPICS
    ),
    Topic(RETRY, "jobs to run again, not before a time", "dispatcher", "dispatcher", 7 * DAY_S),
    Topic(RESULTS, "the one outcome of each job", "dispatcher", "clients, archiver", 7 * DAY_S),
    Topic(KEYS, "idempotency keys that were answered", "dispatcher", "dispatcher", 7 * DAY_S),
    Topic(CONTROL, "cancel requests", "clients", "dispatcher", DAY_S),
    *(
        Topic(
            dead_letter_topic(name),
            "jobs that ended in failure",
            "dispatcher",
            "people",
            14 * DAY_S,
        )
        for name in (*JOB_TOPICS, RETRY, CONTROL)
    ),
)

TOPIC_BY_NAME: dict[str, Topic] = {topic.name: topic for topic in TOPICS}


def lane_of(topic: str) -> Lane | None:
    """The lane of a jobs topic; None for any other topic."""
    lane = topic.rsplit(".", 1)[-1]
    return lane if topic in JOB_TOPICS and lane in LANES else None
