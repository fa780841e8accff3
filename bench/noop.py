"""What a job costs beside the model: a no-op with 1 KB in, over all processes, and how many a second."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from bench.bundles import NOOP, NOOP_MAX_JOBS, WIDE_NOOP, noop_payload
from bench.figures import Asked, Effort, Figure, spread
from bench.publisher import Streamed, alone, others, stream
from bench.stack import Deployment, Kind, running

ASKED = {"embedded": Asked("<=", 400, aim=190)}


def measure(effort: Effort, kind: Kind) -> Iterator[Figure]:
    with running(kind, NOOP, WIDE_NOOP) as deployment:
        for model in (NOOP, WIDE_NOOP):
            yield from cost_and_rate(deployment, model, effort)


def cost_and_rate(deployment: Deployment, model: str, effort: Effort) -> Iterator[Figure]:
    jobs, rounds = (12_000, 2) if effort == "quick" else (20_000, 3)
    payloads = [noop_payload(number) for number in range(500)]
    streams = [alone(stream, deployment, model, payloads, jobs) for _ in range(rounds)]
    totals = [sum(streamed.cpu_us_per_job.values()) for streamed in streams]
    rates = [streamed.jobs_per_s for streamed in streams]
    name = f"no-op job of 1 KB, up to {NOOP_MAX_JOBS[model]} in a batch"
    yield Figure(
        name=f"{name}: CPU in all processes",
        measured=median(totals),
        unit="us",
        asked=ASKED.get(deployment.kind),
        note=f"{_by_process(streams)}; rounds {spread(totals)}; {others(streams)}",
        details={"streams": streams},
    )
    yield Figure(
        name=f"{name}: throughput",
        measured=median(rates),
        unit="jobs/s",
        note=f"one worker, one client; rounds {spread(rates)}",
    )


def _by_process(streams: list[Streamed]) -> str:
    names = streams[0].cpu_s
    return ", ".join(
        f"{name} {median(streamed.cpu_us_per_job[name] for streamed in streams):.0f}"
        for name in names
    )
