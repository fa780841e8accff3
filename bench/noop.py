"""What a job costs in CPU time beside the model: a no-op with 1 KB in, over all processes."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from bench.bundles import NOOP, NOOP_MAX_JOBS, WIDE_NOOP, noop_payload
from bench.figures import Asked, Figure, spread
from bench.publisher import Streamed, alone, others, stream
from bench.stack import running
from infra.settings import Settings

ASKED = Asked("<=", 400, aim=190)


def measure(quick: bool) -> Iterator[Figure]:
    with running(NOOP, WIDE_NOOP) as settings:
        yield cpu_time(settings, NOOP, quick)
        yield cpu_time(settings, WIDE_NOOP, quick)


def cpu_time(settings: Settings, model: str, quick: bool) -> Figure:
    jobs, rounds = (12_000, 2) if quick else (20_000, 3)
    payloads = [noop_payload(number) for number in range(500)]
    streams = [alone(stream, settings, model, payloads, jobs) for _ in range(rounds)]
    totals = [sum(streamed.cpu_us_per_job.values()) for streamed in streams]
    return Figure(
        name=f"no-op job of 1 KB, up to {NOOP_MAX_JOBS[model]} in a batch: CPU in all processes",
        measured=median(totals),
        unit="us",
        asked=ASKED,
        note=f"{_by_process(streams)}; rounds {spread(totals)}; "
        f"{median(streamed.jobs_per_s for streamed in streams):.0f} jobs/s; {others(streams)}",
        details={"streams": streams},
    )


def _by_process(streams: list[Streamed]) -> str:
    names = streams[0].cpu_s
    return ", ".join(
        f"{name} {median(streamed.cpu_us_per_job[name] for streamed in streams):.0f}"
        for name in names
    )
