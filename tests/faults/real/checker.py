"""An independent look at what a run left behind: plain clients of Kafka and Redis, nothing of the product.

checker.py --servers HOST:PORT --prefix P --accepted FILE [--seen FILE] [--redis] [--live]

Reads the topics `read_committed` and prints as JSON what became of the accepted jobs. --live: while jobs
are still under way, so only what must hold at any time is looked at. --redis: look at the job view too, in the
server at $REDIS_URL.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import redis
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

GROUP = "dispatcher"
ENDED = {"succeeded", "failed", "expired", "cancelled"}
AGAIN_S = 1.0


class Stand(NamedTuple):
    """Where a group stands on a partition: all below `next` is complete, and what has its bit set above it."""

    next: int
    bits: int

    def complete(self, offset: int) -> bool:
        return offset < self.next or bool(self.bits >> (offset - self.next) & 1)


class Log:
    """The records of some topics, by partition, up to the end that was found when they were read."""

    def __init__(self, servers: str, prefix: str) -> None:
        self._servers = servers
        self._prefix = prefix
        self._admin = KafkaAdminClient(bootstrap_servers=servers)
        every = [t for t in self._admin.list_topics() if t.startswith(prefix)]
        self.dead_letters = [t for t in every if t.endswith(".dlq")]
        self.jobs = [
            t for t in every if t.startswith(f"{prefix}jobs.") and t not in self.dead_letters
        ]
        self.control = [t for t in every if t == f"{prefix}control"]
        self.results = [f"{prefix}results"]

    def stands(self) -> dict[TopicPartition, Stand]:
        group = self._prefix + GROUP
        offsets = self._admin.list_group_offsets([group])[group]
        return {p: _stand(at.offset, at.metadata or "") for p, at in offsets.items()}

    def read(self, topics: Iterable[str]) -> dict[TopicPartition, list[Any]]:
        consumer = KafkaConsumer(
            bootstrap_servers=self._servers,
            isolation_level="read_committed",
            enable_auto_commit=False,
            metrics_enabled=False,
        )
        try:
            wanted = [
                TopicPartition(topic, number)
                for topic in topics
                for number in consumer.partitions_for_topic(topic) or ()
            ]
            ends = consumer.end_offsets(wanted)
            found: dict[TopicPartition, list[Any]] = {p: [] for p in wanted}
            left = {p for p in wanted if ends[p] > 0}
            if left:
                consumer.assign(sorted(left))
                consumer.seek_to_beginning()
            while left:
                for partition, batch in consumer.poll(timeout_ms=200).items():
                    found[partition] += [r for r in batch if r.offset < ends[partition]]
                left -= {p for p in left if (consumer.position(p) or 0) >= ends[p]}
            return found
        finally:
            consumer.close(timeout_ms=1000)


def check(options: argparse.Namespace) -> dict[str, Any]:
    log = Log(options.servers, options.prefix)
    accepted = [line.split()[0] for line in options.accepted.read_text().splitlines()]
    deadline = time.monotonic() + options.patience_s
    while True:
        # In this order: what is committed now has its outcomes in what is read next.
        stands = log.stands()
        jobs = log.read([*log.jobs, *log.control])
        outcomes: dict[str, list[bytes]] = defaultdict(list)
        for batch in log.read(log.results).values():
            for record in batch:
                outcomes[record.key.decode()].append(record.value)
        found = _positions(jobs, stands, outcomes, set(accepted))
        # The end of a transaction reaches its partitions one by one.
        settled = not found["ahead"] and (options.live or not found["open"])
        if settled or time.monotonic() > deadline:
            break
        time.sleep(AGAIN_S)
    found |= {"accepted": len(accepted), "duplicate_ids": len(accepted) - len(set(accepted))}
    found |= _outcomes(accepted, outcomes, options)
    if not options.live:
        letters = Counter(
            r.key.decode() for b in log.read(log.dead_letters).values() for r in b if r.key
        )
        found |= _dead_letters(accepted, outcomes, letters, options.outcomes)
    if options.seen:
        found["changed"] = _changed(options.seen, outcomes)
    if options.redis:
        found["view"] = _view(accepted, outcomes, deadline)
    return found


def _stand(next_: int, metadata: str) -> Stand:
    padded = metadata + "=" * (-len(metadata) % 4)
    return Stand(next_, int.from_bytes(base64.b64decode(padded, validate=True), "little"))


def _positions(
    records: dict[TopicPartition, list[Any]],
    stands: dict[TopicPartition, Stand],
    outcomes: dict[str, list[bytes]],
    accepted: set[str],
) -> dict[str, Any]:
    """ahead: jobs without an outcome for which no position stands open any more. open: positions."""
    open_, held, known = 0, set(), set()
    for partition, batch in records.items():
        stand = stands.get(partition, Stand(0, 0))
        for record in batch:
            job_id = record.key.decode()
            known.add(job_id)
            if not stand.complete(record.offset):
                open_ += 1
                held.add(job_id)
    unended = accepted - outcomes.keys()
    return {
        "open": open_,
        "ahead": sorted((unended & known) - held),
        "not_in_log": sorted(accepted - known),
        "unasked": sorted(outcomes.keys() - known),
    }


def _outcomes(
    accepted: list[str], outcomes: dict[str, list[bytes]], options: argparse.Namespace
) -> dict[str, Any]:
    """The last outcome counts. twice: more of them than is right, also of jobs that were not accepted and ran
    all the same. lost: too few."""
    told = {job_id: json.loads(values[-1]) for job_id, values in outcomes.items()}
    mine = [told[job_id] for job_id in accepted if job_id in told]
    short = [j for j in accepted if len(outcomes.get(j, ())) < options.outcomes]
    return {
        "lost": [] if options.live else short,
        "twice": sorted(j for j, values in outcomes.items() if len(values) > options.outcomes),
        "malformed": [
            job_id
            for job_id, outcome in told.items()
            if outcome["job_id"] != job_id or outcome["status"] not in ENDED
        ],
        "statuses": Counter(outcome["status"] for outcome in mine),
        "codes": Counter(outcome["code"] for outcome in mine if outcome.get("code")),
        "attempts": Counter(outcome.get("attempts", 0) for outcome in mine),
    }


def _dead_letters(
    accepted: list[str], outcomes: dict[str, list[bytes]], letters: Counter[str], each: int
) -> dict[str, Any]:
    """wrong_letters: jobs that failed without a letter for each time, or that have one and did not fail."""
    failed = {
        job_id
        for job_id in accepted
        if job_id in outcomes and json.loads(outcomes[job_id][0])["status"] == "failed"
    }
    return {
        "dead_letters": sum(letters[job_id] for job_id in accepted),
        "wrong_letters": [j for j in accepted if letters[j] != each * (j in failed)],
    }


def _changed(seen: Path, outcomes: dict[str, list[bytes]]) -> list[str]:
    """Jobs whose outcome is not what an onlooker saw as it became visible."""
    lines = (line.split() for line in seen.read_text().splitlines())
    return [
        job_id
        for job_id, digest in lines
        if not outcomes.get(job_id) or zlib.crc32(outcomes[job_id][0]) != int(digest)
    ]


def _view(accepted: list[str], outcomes: dict[str, list[bytes]], deadline: float) -> dict[str, Any]:
    """How many jobs the view shows otherwise than the log has them, or not at all. It may have to catch up."""
    client = redis.Redis.from_url(os.environ["REDIS_URL"])
    while True:
        missing, other = 0, 0
        for start in range(0, len(accepted), 1000):
            ids = accepted[start : start + 1000]
            for job_id, shown in zip(
                ids, client.mget([f"headrace:job:{i}" for i in ids]), strict=True
            ):
                missing += shown is None
                other += shown is not None and shown not in outcomes.get(job_id, ())
        if not missing + other or time.monotonic() > deadline:
            return {"missing": missing, "other": other}
        time.sleep(AGAIN_S)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--servers", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--accepted", type=Path, required=True)
    parser.add_argument("--seen", type=Path)
    parser.add_argument("--redis", action="store_true")
    parser.add_argument("--patience-s", type=float, default=30)
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--outcomes", type=int, default=1, help="how many each job has")
    print(json.dumps(check(parser.parse_args())))


if __name__ == "__main__":
    main()
