"""What is said of clusters that no test can have: of several brokers, badly set."""

from __future__ import annotations

from typing import Any

import pytest

from infra.eventlog import kafka_checks as checks
from infra.eventlog.kafka_facts import ClusterFacts, TopicFacts
from infra.eventlog.kafka_topics import TopicChange
from infra.settings import KafkaSettings
from schemas.topics import TOPICS

DAY_S = 86400.0
ALL = frozenset({"READ", "WRITE", "DESCRIBE"})
SOUND = {
    "retention.ms": str(int(7 * DAY_S * 1000)),
    "retention.bytes": "-1",
    "max.message.bytes": "1048588",
    "min.insync.replicas": "2",
    "unclean.leader.election.enable": "false",
}
A = "jobs.image.standard"


def cluster(topics: dict[str, TopicFacts] | None = None, **facts: Any) -> ClusterFacts:
    """A sound one of three brokers, but for these."""
    sound = {topic.name: topic_with() for topic in TOPICS}
    told: dict[str, Any] = {
        "version": (4, 1),
        "brokers": {number: {"offset.metadata.max.bytes": "4096"} for number in (1, 2, 3)},
        "topics": sound | (topics or {}),
        "internal": {"__consumer_offsets": topic_with()},
        "hidden": (),
        "changes": (),
        "refused": (),
        "skew_s": 0.0,
    }
    return ClusterFacts(**(told | facts))


def topic_with(
    partitions: int = 6,
    replicas: int = 3,
    allowed: frozenset[str] | None = ALL,
    **settings: str,
) -> TopicFacts:
    named = {name.replace("_", "."): value for name, value in settings.items()}
    return TopicFacts(partitions, replicas, SOUND | named, allowed)


def everywhere(**more: Any) -> dict[str, TopicFacts]:
    return {topic.name: topic_with(**more) for topic in TOPICS}


def test_a_sound_cluster_of_three_passes_everything() -> None:
    facts = cluster()

    findings = [
        checks.reached(facts),
        checks.access(facts),
        checks.topics(facts),
        checks.partitions(facts),
        checks.retention(facts, 3 * DAY_S),
        checks.durability(facts, KafkaSettings(replicas=3, min_insync_replicas=2)),
        checks.record_size(facts),
        checks.commit_metadata(facts),
        checks.clock(facts),
    ]

    assert {finding.level for finding in findings} == {"ok"}


@pytest.mark.parametrize(
    ("facts", "level", "word"),
    [
        (cluster(everywhere(min_insync_replicas="1")), "fail", "MIN_INSYNC_REPLICAS=2"),
        (cluster(everywhere(min_insync_replicas="3")), "fail", "MIN_INSYNC_REPLICAS=2"),
        (cluster({A: topic_with(unclean_leader_election_enable="true")}), "fail", "false"),
        (cluster(everywhere(replicas=2)), "warn", "3 brokers"),
        (cluster(everywhere(replicas=1, min_insync_replicas="1")), "warn", "3 brokers"),
        (cluster(internal={"__consumer_offsets": topic_with(replicas=1)}), "warn", "3 brokers"),
    ],
)
def test_what_was_accepted_must_outlive_a_broker(
    facts: ClusterFacts, level: str, word: str
) -> None:
    finding = checks.durability(facts, KafkaSettings())

    assert finding.level == level
    assert word in finding.remedy


def test_fewer_replicas_than_declared_fail() -> None:
    facts = cluster({A: topic_with(replicas=2)})

    finding = checks.durability(facts, KafkaSettings(replicas=3))

    assert finding.level == "fail"
    assert A in finding.detail


def test_settings_that_this_user_may_not_see_are_not_judged() -> None:
    unseen = {topic.name: TopicFacts(6, 3, {}, ALL) for topic in TOPICS}
    facts = cluster(unseen, brokers={1: {}}, skew_s=None)

    assert checks.durability(facts, KafkaSettings()).level == "warn"
    assert checks.retention(facts, 3 * DAY_S).level == "ok"
    assert checks.record_size(facts).level == "ok"
    assert checks.commit_metadata(facts).level == "ok"
    assert checks.clock(facts).level == "ok"


def test_jobs_must_be_kept_for_as_long_as_they_may_wait() -> None:
    short = cluster({A: topic_with(retention_ms="3600000")})
    by_size = cluster({A: topic_with(retention_bytes="1000000")})
    for_ever = cluster(everywhere(retention_ms="-1"))

    assert checks.retention(short, 2 * 3600).level == "fail"
    assert checks.retention(short, 3600).level == "ok"
    assert checks.retention(by_size, 3600).level == "fail"
    assert checks.retention(for_ever, 1000 * DAY_S).level == "ok"


def test_topics_with_jobs_have_as_many_partitions_each() -> None:
    finding = checks.partitions(cluster({A: topic_with(partitions=12)}))

    assert finding.level == "fail"
    assert "largest number" in finding.remedy
    assert checks.partitions(cluster({"results": topic_with(partitions=12)})).level == "ok"


def test_settings_other_than_declared_fail_where_they_lose_records() -> None:
    def differing(**settings: str) -> ClusterFacts:
        named = {name.replace("_", "."): value for name, value in settings.items()}
        return cluster(changes=(TopicChange(A, "configure", 6, named),))

    assert checks.topics(differing(retention_ms="1")).level == "warn"
    assert checks.topics(differing(cleanup_policy="delete")).level == "fail"
    assert checks.topics(cluster(changes=(TopicChange(A, "differs", 6, {}),))).level == "ok"


def test_what_the_dispatcher_may_not_do_is_named() -> None:
    facts = cluster(
        {
            "results": topic_with(allowed=frozenset({"READ"})),
            A: topic_with(allowed=frozenset({"WRITE"})),
        },
        refused=("READ on group dispatcher",),
    )

    finding = checks.access(facts)

    assert finding.level == "fail"
    assert f"READ on topic {A}" in finding.detail
    assert "WRITE on topic results" in finding.detail
    assert "READ on group dispatcher" in finding.detail


def test_a_cluster_without_an_authorizer_says_nothing_of_it() -> None:
    assert checks.access(cluster(everywhere(allowed=None))).level == "ok"


@pytest.mark.parametrize(
    ("skew_s", "level"), [(0.5, "ok"), (-30, "warn"), (600, "fail"), (-600, "fail")]
)
def test_clocks_apart_are_noted_then_not_borne(skew_s: float, level: str) -> None:
    finding = checks.clock(cluster(skew_s=skew_s))

    assert finding.level == level
    assert ("behind" in finding.detail) == (skew_s < 0)


def test_one_broker_that_keeps_too_little_of_a_commit_fails() -> None:
    facts = cluster(
        brokers={1: {"offset.metadata.max.bytes": "4096"}, 2: {"offset.metadata.max.bytes": "64"}}
    )

    finding = checks.commit_metadata(facts)

    assert finding.level == "fail"
    assert "broker 2" in finding.detail
    assert "4096" in finding.remedy
