"""What a Kafka cluster says of itself and of our topics, asked once. Nothing is changed by asking."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from typing import Any, NamedTuple

from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType

from infra.eventlog.kafka_cluster import ANSWER_S, Cluster, kafka_trouble
from infra.eventlog.kafka_topics import TopicChange, ensure_topics
from schemas.topics import TOPIC_BY_NAME, Topic

INTERNAL = ("__consumer_offsets", "__transaction_state")
"""The cluster's own topics, made when they are first needed: positions and completions are in them."""

AGAIN_S = 0.1


class TopicFacts(NamedTuple):
    """replicas: of the partition that has fewest. allowed: what this user may do with it, in Kafka's words;
    None where the cluster does not say."""

    partitions: int
    replicas: int
    settings: Mapping[str, str]
    allowed: frozenset[str] | None


class ClusterFacts(NamedTuple):
    """brokers: their settings, by id; empty where this user may not ask. topics: by their declared names, those
    that are there and may be seen. internal: those that are there. hidden: declared, and not to be seen by this
    user. changes: what `headrace topics apply` would do. refused: what this user lacks besides topics.
    skew_s: the cluster's clock less ours, None where it is not told."""

    version: tuple[int, ...]
    brokers: Mapping[int, Mapping[str, str]]
    topics: Mapping[str, TopicFacts]
    internal: Mapping[str, TopicFacts]
    hidden: tuple[str, ...]
    changes: tuple[TopicChange, ...]
    refused: tuple[str, ...]
    skew_s: float | None


def look(cluster: Cluster, group: str, slot: int) -> ClusterFacts:
    """group, slot: as the dispatcher joins. Raises Transient, PipelineError (log_forbidden, log_unsupported)."""
    with kafka_trouble(), closing(cluster.admin()) as admin:
        ids = [broker["broker_id"] for broker in admin.describe_cluster()["brokers"]]
        declared = {cluster.name(name): name for name in TOPIC_BY_NAME}
        entries = admin.describe_topics([*declared, *INTERNAL])
        found = {entry["name"]: entry for entry in entries if not entry["error_code"]}
        settings = _settings(admin, ConfigResourceType.TOPIC, found)
        facts = {name: _topic(entry, settings.get(name, {})) for name, entry in found.items()}
        names = [declared[name] for name in found if name in declared]
        return ClusterFacts(
            version=tuple(admin._manager.broker_version),
            brokers={
                broker: _settings(admin, ConfigResourceType.BROKER, [str(broker)])[str(broker)]
                for broker in ids
            },
            topics={declared[name]: facts[name] for name in facts if name in declared},
            internal={name: facts[name] for name in INTERNAL if name in facts},
            hidden=tuple(
                declared[entry["name"]]
                for entry in entries
                if entry["name"] in declared
                and entry["error_code"] == kafka_errors.TopicAuthorizationFailedError.errno
            ),
            changes=_changes(cluster, map(TOPIC_BY_NAME.__getitem__, names), settings),
            refused=_refused(admin, cluster.name(group), slot),
            skew_s=_skew_s(admin),
        )


def _changes(
    cluster: Cluster, topics: Iterable[Topic], settings: Mapping[str, Mapping[str, str]]
) -> tuple[TopicChange, ...]:
    """Only of topics whose settings we may see."""
    seen = [topic for topic in topics if settings.get(cluster.name(topic.name))]
    return tuple(ensure_topics(cluster, seen, dry_run=True)) if seen else ()


def _topic(entry: dict[str, Any], settings: Mapping[str, str]) -> TopicFacts:
    allowed = entry["authorized_operations"]
    return TopicFacts(
        partitions=len(entry["partitions"]),
        replicas=min(len(partition["replica_nodes"]) for partition in entry["partitions"]),
        settings=settings,
        allowed=None if allowed is None else frozenset(allowed),
    )


def _settings(admin: Any, kind: Any, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """By name; empty for what this user may not ask about."""
    resources = [ConfigResource(kind, name) for name in names]
    if not resources:
        return {}
    answer = admin.describe_configs(resources, config_filter="all").get(kind.name.lower(), {})
    return {
        resource.name: {
            key: str(entry["value"]) for key, entry in answer.get(resource.name, {}).items()
        }
        for resource in resources
    }


def _refused(admin: Any, group: str, slot: int) -> tuple[str, ...]:
    transactional_id = f"{group}.{slot}"
    refused = []
    try:
        said = _once_ready(lambda: admin.describe_groups([group]))[group]["authorized_operations"]
        if said is not None and "READ" not in said:
            refused.append(f"READ on group {group}")
    except kafka_errors.AuthorizationError:
        refused.append(f"READ on group {group}")
    try:
        with suppress(
            kafka_errors.TransactionalIdNotFoundError, kafka_errors.UnsupportedVersionError
        ):
            _once_ready(lambda: admin.describe_transactions([transactional_id]))
    except kafka_errors.AuthorizationError:
        refused.append(f"WRITE on transactional id {transactional_id}")
    return tuple(refused)


def _once_ready(ask: Callable[[], Any]) -> Any:
    """A new cluster makes its internal topics when it is first asked."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            return ask()
        except kafka_errors.RetriableError:
            if time.monotonic() > deadline:
                raise
        time.sleep(AGAIN_S)


def _skew_s(admin: Any) -> float | None:
    """Of the leader of the cluster's own quorum, who stamps its answer. Clusters before KRaft do not tell."""
    before = time.time()
    try:
        quorum = admin.describe_metadata_quorum()
    except kafka_errors.KafkaError:
        return None
    ours = (before + time.time()) / 2
    (partition,) = quorum["topics"][0]["partitions"]
    stamps = {
        voter["replica_id"]: voter["last_caught_up_timestamp"]
        for voter in partition["current_voters"]
    }
    stamp: int = stamps.get(partition["leader_id"], -1)
    return stamp / 1000 - ours if stamp > 0 else None
