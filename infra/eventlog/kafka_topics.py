"""The topics that schemas/topics.py declares, as Kafka should have them: made, and brought into line."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import Any, Literal

from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType
from msgspec import Struct

from infra.eventlog.kafka_cluster import Cluster, kafka_trouble, translated
from schemas.topics import TOPICS, Topic


class TopicChange(Struct, frozen=True):
    """What a topic needs. `differs`: it has another number of partitions, which is left alone, because with
    another number the records of one key no longer lie in one partition."""

    name: str
    action: Literal["create", "configure", "differs", "none"]
    partitions: int
    settings: dict[str, str]


def ensure_topics(
    cluster: Cluster, topics: Iterable[Topic] = TOPICS, *, dry_run: bool = False
) -> list[TopicChange]:
    """Create what is missing, set what differs; with dry_run only say so. Raises PipelineError, Transient."""
    with kafka_trouble(), closing(cluster.admin()) as admin:
        changes = _plan(cluster, admin, list(topics))
        if not dry_run:
            _create(cluster, admin, [change for change in changes if change.action == "create"])
            for change in changes:
                if change.action == "configure":
                    admin.alter_configs([_resource(change.name, change.settings)])
    return changes


def _plan(cluster: Cluster, admin: Any, topics: list[Topic]) -> list[TopicChange]:
    found = {
        entry["name"]: len(entry["partitions"])
        for entry in admin.describe_topics([cluster.name(topic.name) for topic in topics])
        if not entry["error_code"]
    }
    settings = _settings_of(admin, list(found))
    wanted_partitions = cluster.settings.partitions
    changes = []
    for topic in topics:
        name, wanted = cluster.name(topic.name), _settings(cluster, topic)
        if name not in found:
            changes.append(TopicChange(name, "create", wanted_partitions, wanted))
            continue
        differing = {k: v for k, v in wanted.items() if settings[name].get(k) != v}
        action: Literal["configure", "differs", "none"] = "none"
        if differing:
            action = "configure"
        elif found[name] != wanted_partitions:
            action = "differs"
        changes.append(TopicChange(name, action, found[name], differing))
    return changes


def _settings(cluster: Cluster, topic: Topic) -> dict[str, str]:
    """The time of a record is the cluster's: producers' clocks may be wrong."""
    wanted = {
        "retention.ms": str(int(topic.retention_s * 1000)),
        "cleanup.policy": "delete",
        "message.timestamp.type": "LogAppendTime",
    }
    if least := cluster.settings.min_insync_replicas:
        wanted["min.insync.replicas"] = str(least)
    return wanted


def _settings_of(admin: Any, names: list[str]) -> dict[str, dict[str, str]]:
    if not names:
        return {}
    found = admin.describe_configs([_resource(name) for name in names], config_filter="all")
    return {
        name: {key: entry["value"] for key, entry in found["topic"][name].items()} for name in names
    }


def _create(cluster: Cluster, admin: Any, changes: list[TopicChange]) -> None:
    if not changes:
        return
    specs = {
        change.name: {
            "num_partitions": change.partitions,
            "replication_factor": cluster.settings.replicas or -1,
            "configs": change.settings,
        }
        for change in changes
    }
    answer = admin.create_topics(specs, raise_errors=False)
    for topic in answer["topics"]:
        error = kafka_errors.for_code(topic["error_code"])
        # Somebody else may have made it since we looked.
        if error not in (kafka_errors.NoError, kafka_errors.TopicAlreadyExistsError):
            raise translated(error(f"{topic['name']}: {topic['error_message']}"))
    admin.wait_for_topics(list(specs))


def _resource(name: str, settings: dict[str, str] | None = None) -> Any:
    return ConfigResource(ConfigResourceType.TOPIC, name, settings)
