"""What the log takes to answer a group of jobs: their outcomes and their positions, in one transaction.

This process stands in for the dispatcher; what that does beside is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import msgspec
import psutil
from msgspec import Struct

from bench.figures import Effort, Figure, p50_p99
from bench.machine import CpuMeter
from bench.publisher import alone
from bench.stack import Deployment, Kind, deployed
from infra.eventlog import Consumer, EventLog, NewRecord, Record
from infra.eventlog.open import connect_log
from schemas.jobs import new_job_id
from schemas.results import Outcome, StageTimes, encode_outcome, result_headers
from schemas.topics import RESULTS, jobs_topic

JOBS = jobs_topic("tensor", "standard")
WINDOW = 16_384
TRANSACTIONS = {1: 400, 8: 400, 32: 200, 128: 100, 500: 32}
"""How many of each size: all records of one size fit the window."""

WARM_UP, WARM_UP_SIZE = 200, 32


class Committed(Struct, frozen=True):
    """Transactions of one size. cpu_us_per_job: by process."""

    size: int
    ms: list[float]
    cpu_us_per_job: dict[str, float]


def measure(effort: Effort, kind: Kind) -> Iterator[Figure]:
    with deployed(kind) as deployment:
        measured = alone(commit_all, deployment, 4 if effort == "quick" else 1)
    for committed in measured:
        p50, p99 = p50_p99(committed.ms)
        cpu = ", ".join(f"{name} {us:.0f}" for name, us in committed.cpu_us_per_job.items())
        yield Figure(
            name=f"jobs answered in one transaction, {committed.size}: time, p50",
            measured=p50,
            unit="ms",
            note=f"{1000 * p50 / committed.size:.0f} us a job, p99 {p99:.2f} ms; CPU us a job: {cpu}",
            details={"committed": committed},
        )


def commit_all(deployment: Deployment, times_fewer: int) -> list[Committed]:
    with closing(connect_log(deployment.settings)) as log:
        consumer = log.consumer("bench", [JOBS], window=WINDOW)
        try:
            commit(deployment, log, consumer, WARM_UP_SIZE, WARM_UP)
            return [
                commit(deployment, log, consumer, size, times // times_fewer)
                for size, times in TRANSACTIONS.items()
            ]
        finally:
            consumer.close()


def commit(
    deployment: Deployment, log: EventLog, consumer: Consumer, size: int, times: int
) -> Committed:
    running = deployment.processes().items()
    kafka = {name: process for name, process in running if name == "kafka"}
    jobs = received(log, consumer, size * times)
    groups = [jobs[first : first + size] for first in range(0, len(jobs), size)]
    outputs = [[result(job) for job in group] for group in groups]
    meter = CpuMeter({"this process": psutil.Process()} | kafka)
    ms = []
    for group, records in zip(groups, outputs, strict=True):
        began = time.perf_counter()
        consumer.complete([job.position for job in group], records)
        ms.append(1000 * (time.perf_counter() - began))
    return Committed(
        size, ms, {name: 1e6 * seconds / len(jobs) for name, seconds in meter.read().items()}
    )


def received(log: EventLog, consumer: Consumer, count: int) -> list[Record]:
    """So many fresh records that wait to be completed."""
    log.append([NewRecord(JOBS, new_job_id("default"), {}, b"") for _ in range(count)])
    records: list[Record] = []
    while len(records) < count:
        records += consumer.receive(count - len(records), 2**30, timeout_s=1)
    return records


def result(job: Record) -> NewRecord:
    outcome = Outcome(
        job_id=job.key,
        status="succeeded",
        tenant="default",
        model="noop",
        version=1,
        answer=msgspec.Raw(b'{"type":"tensor","outputs":{"first":[1.0]}}'),
        attempts=1,
        submitted_at=job.time,
        finished_at=job.time,
        times=StageTimes(1.5, 0.25, 0.25, 0.25, 0.25),
        worker="worker-0",
    )
    return NewRecord(RESULTS, job.key, result_headers(outcome), encode_outcome(outcome))
