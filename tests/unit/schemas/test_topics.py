"""The topics and what their names say."""

from __future__ import annotations

import pytest

from schemas.topics import (
    CONTROL,
    JOB_TOPICS,
    KEYS,
    LANES,
    LIVE_LANES,
    MODALITIES,
    RESULTS,
    RETRY,
    TOPIC_BY_NAME,
    TOPICS,
    dead_letter_topic,
    lane_of,
)


def test_each_topic_is_declared_once() -> None:
    assert len(TOPIC_BY_NAME) == len(TOPICS)


def test_there_is_a_jobs_topic_for_each_modality_and_lane() -> None:
    assert set(JOB_TOPICS) == {f"jobs.{m}.{lane}" for m in MODALITIES for lane in LANES}


@pytest.mark.parametrize("topic", [*JOB_TOPICS, RETRY, CONTROL])
def test_whatever_the_dispatcher_reads_has_its_dead_letters(topic: str) -> None:
    assert dead_letter_topic(topic) in TOPIC_BY_NAME


def test_dead_letters_outlive_the_jobs_they_tell_of() -> None:
    for topic in JOB_TOPICS:
        letters = TOPIC_BY_NAME[dead_letter_topic(topic)]
        assert letters.retention_s > TOPIC_BY_NAME[topic].retention_s


def test_the_lane_is_in_the_name_of_a_jobs_topic_and_of_no_other() -> None:
    assert {lane_of(topic) for topic in JOB_TOPICS} == set(LANES)
    assert [lane_of(t) for t in (RETRY, CONTROL, RESULTS, KEYS, "x.bulk", "bulk", "")] == [None] * 7


def test_bulk_is_the_lane_nobody_waits_on() -> None:
    assert set(LANES) - set(LIVE_LANES) == {"bulk"}
