"""What has to be true of a Kafka cluster so that it loses nothing. Pure but for `kafka_findings`, which asks it."""

from __future__ import annotations

from infra.checks import Finding, clock_finding
from infra.eventlog.kafka import cluster_at
from infra.eventlog.kafka_cluster import MAX_RECORD_BYTES
from infra.eventlog.kafka_facts import ClusterFacts, look
from infra.eventlog.tracker import METADATA_LIMIT
from infra.settings import KafkaSettings, Settings
from schemas.topics import JOB_TOPICS, RESULTS, RETRY, TOPICS

GROUP = "dispatcher"
WITH_JOBS = (*JOB_TOPICS, RETRY)
SAFE_REPLICAS = 3
APPLY = "`headrace topics apply` mends it."
NOT_TOLD = "not told: this user lacks DESCRIBE_CONFIGS"


def kafka_findings(settings: Settings) -> list[Finding]:
    """Raises Transient, PipelineError (log_forbidden, log_unsupported, settings_invalid)."""
    cluster = cluster_at(settings.log_address, settings.kafka)
    facts = look(cluster, GROUP, settings.dispatcher.slot)
    of_cluster = [reached(facts), access(facts), commit_metadata(facts), clock(facts)]
    if not facts.topics:
        return [*of_cluster, topics(facts)]
    return [
        *of_cluster,
        topics(facts),
        partitions(facts),
        retention(facts, settings.dispatcher.max_deadline_s),
        durability(facts, settings.kafka),
        record_size(facts),
    ]


def reached(facts: ClusterFacts) -> Finding:
    version = ".".join(map(str, facts.version))
    return Finding("kafka", "ok", f"version {version} or newer, {len(facts.brokers)} brokers")


def access(facts: ClusterFacts) -> Finding:
    """As the dispatcher needs it, so it is to be asked as the dispatcher's user."""
    lacking = [f"DESCRIBE on topic {name}" for name in facts.hidden]
    for topic in TOPICS:
        found = facts.topics.get(topic.name)
        if found is None or found.allowed is None:
            continue
        needed = {
            "READ": "dispatcher" in topic.readers or topic.name == RESULTS,
            "WRITE": "dispatcher" in topic.writers,
        }
        lacking += [
            f"{operation} on topic {topic.name}"
            for operation, is_needed in needed.items()
            if is_needed and operation not in found.allowed
        ]
    lacking += facts.refused
    if not lacking:
        return Finding("kafka access", "ok", "this user may do what the dispatcher does")
    return Finding(
        "kafka access",
        "fail",
        f"this user lacks {_listed(lacking)}",
        "Grant it: the dispatcher reads and writes these, in a group and in transactions of its own.",
    )


def topics(facts: ClusterFacts) -> Finding:
    missing = [
        topic.name
        for topic in TOPICS
        if topic.name not in facts.topics and topic.name not in facts.hidden
    ]
    if missing:
        return Finding(
            "kafka topics",
            "fail",
            f"{len(missing)} of {len(TOPICS)} are not there: {_listed(missing)}",
            "`headrace topics apply` makes them.",
        )
    if differing := [change for change in facts.changes if change.action == "configure"]:
        # How long records are kept is judged on its own.
        harmful = any(change.settings.keys() - {"retention.ms"} for change in differing)
        told = [f"{c.name} to {k}={v}" for c in differing for k, v in c.settings.items()]
        return Finding(
            "kafka topics",
            "fail" if harmful else "warn",
            f"not set as they are declared: {_listed(told)}",
            APPLY,
        )
    return Finding("kafka topics", "ok", f"all {len(TOPICS)} are there, as they are declared")


def partitions(facts: ClusterFacts) -> Finding:
    """One job's records must have one owner, whichever of the topics they are in."""
    counts = {name: facts.topics[name].partitions for name in WITH_JOBS if name in facts.topics}
    if len(set(counts.values())) > 1:
        told = [f"{name} has {count}" for name, count in counts.items()]
        return Finding(
            "kafka partitions",
            "fail",
            f"topics with jobs differ: {_listed(told)}",
            "Give all of them the largest number (kafka-topics.sh --alter --partitions) while no job is open.",
        )
    return Finding(
        "kafka partitions", "ok", f"{next(iter(counts.values()), 0)} of each topic with jobs"
    )


def retention(facts: ClusterFacts, deadline_s: float) -> Finding:
    kept_s = min((_kept_s(facts, name) for name in WITH_JOBS), default=float("inf"))
    by_size = [n for n in WITH_JOBS if _setting(facts, n, "retention.bytes", "-1") != "-1"]
    if by_size:
        return Finding(
            "kafka retention",
            "fail",
            f"retention.bytes lets open jobs be deleted from {_listed(by_size)}",
            "Set it to -1, and let retention.ms alone decide.",
        )
    found = f"jobs are kept {kept_s / 86400:g} days, deadlines reach {deadline_s / 86400:g} days"
    if kept_s < deadline_s:
        return Finding(
            "kafka retention",
            "fail",
            found,
            f"{APPLY} Or set HEADRACE_DISPATCHER__MAX_DEADLINE_S to {kept_s:.0f} at most.",
        )
    return Finding("kafka retention", "ok", found)


def durability(facts: ClusterFacts, declared: KafkaSettings) -> Finding:
    """What was accepted must outlive a broker, and work must go on without one, where there are enough."""
    check = "kafka durability"
    held = {**facts.topics, **facts.internal}
    replicas = min((topic.replicas for topic in held.values()), default=0)
    if replicas < declared.replicas:
        fewer = [name for name, topic in held.items() if topic.replicas < declared.replicas]
        return Finding(
            check,
            "fail",
            f"{declared.replicas} replicas are declared, but fewer hold {_listed(fewer)}",
            "Add replicas (kafka-reassign-partitions.sh), or lower HEADRACE_KAFKA__REPLICAS.",
        )
    unclean = [
        n for n in facts.topics if _setting(facts, n, "unclean.leader.election.enable") == "true"
    ]
    if unclean and replicas > 1:
        return Finding(
            check,
            "fail",
            f"unclean.leader.election.enable is true on {_listed(unclean)}: what was accepted may vanish",
            "Set it to false.",
        )
    insync = [int(_setting(facts, n, "min.insync.replicas", "0") or 0) for n in facts.topics]
    least, most = min(insync, default=0), max(insync, default=0)
    if not least:
        return Finding(check, "warn", f"{replicas} replicas; min.insync.replicas {NOT_TOLD}")
    found = f"{replicas} replicas, min.insync.replicas {least}"
    if replicas < SAFE_REPLICAS:
        return Finding(
            check,
            "warn",
            f"{found}: a broker that is lost takes accepted jobs with it, or stops all work",
            "Have 3 brokers or more, HEADRACE_KAFKA__REPLICAS=3 and HEADRACE_KAFKA__MIN_INSYNC_REPLICAS=2.",
        )
    if least < 2:
        return Finding(
            check,
            "fail",
            f"{found}: a job may be accepted by one broker alone, and be lost with it",
            f"Set HEADRACE_KAFKA__MIN_INSYNC_REPLICAS=2; then {APPLY}",
        )
    if most >= replicas:
        return Finding(
            check,
            "fail",
            f"{replicas} replicas, min.insync.replicas {most}: nothing is accepted while one broker is down",
            f"Set HEADRACE_KAFKA__MIN_INSYNC_REPLICAS={replicas - 1}; then {APPLY}",
        )
    return Finding(check, "ok", found)


def record_size(facts: ClusterFacts) -> Finding:
    smaller = [
        name
        for name in facts.topics
        if 0 < int(_setting(facts, name, "max.message.bytes", "0")) < MAX_RECORD_BYTES
    ]
    if smaller:
        return Finding(
            "kafka record size",
            "fail",
            f"max.message.bytes is below our largest record on {_listed(smaller)}",
            f"Set it to {MAX_RECORD_BYTES} or more, on these topics and (message.max.bytes) on the brokers.",
        )
    return Finding("kafka record size", "ok", f"records of {MAX_RECORD_BYTES} bytes are taken")


def commit_metadata(facts: ClusterFacts) -> Finding:
    name = "offset.metadata.max.bytes"
    told = {broker: int(s[name]) for broker, s in facts.brokers.items() if name in s}
    if not told:
        return Finding("kafka commit metadata", "ok", NOT_TOLD)
    if least := [broker for broker, limit in told.items() if limit < METADATA_LIMIT]:
        return Finding(
            "kafka commit metadata",
            "fail",
            f"{name} is {told[least[0]]} on broker {least[0]}: what is complete cannot be committed",
            f"Set it to {METADATA_LIMIT}, its default, on every broker.",
        )
    return Finding("kafka commit metadata", "ok", f"{name} is {min(told.values())}")


def clock(facts: ClusterFacts) -> Finding:
    if facts.skew_s is None:
        return Finding(
            "kafka clock", "ok", "not told: that takes KRaft, and DESCRIBE on the cluster"
        )
    return clock_finding("kafka clock", facts.skew_s, "the cluster's clock")


def _kept_s(facts: ClusterFacts, topic: str) -> float:
    kept_ms = int(_setting(facts, topic, "retention.ms", "-1"))
    return float("inf") if kept_ms < 0 else kept_ms / 1000


def _setting(facts: ClusterFacts, topic: str, name: str, unknown: str = "") -> str:
    found = facts.topics.get(topic)
    return found.settings.get(name, unknown) if found else unknown


def _listed(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
