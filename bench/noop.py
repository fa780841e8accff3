"""What a job costs in CPU time beside the model: a no-op with 1 KB in, over all processes."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from bench.bundles import NOOP, noop_payload
from bench.figures import Asked, Figure, spread
from bench.publisher import Streamed, alone, stream
from bench.stack import running

ASKED = Asked("<=", 400, aim=190)


def measure(quick: bool) -> Iterator[Figure]:
    jobs, rounds = (12_000, 2) if quick else (20_000, 3)
    payloads = [noop_payload(number) for number in range(500)]
    with running(NOOP) as settings:
        streams = [alone(stream, settings, NOOP, payloads, jobs) for _ in range(rounds)]
    totals = [sum(streamed.cpu_us_per_job.values()) for streamed in streams]
    yield Figure(
        name="no-op job of 1 KB: CPU time in all processes",
        measured=median(totals),
        unit="us",
        asked=ASKED,
        note=f"{_by_process(streams)}; rounds {spread(totals)}; "
        f"{median(streamed.jobs_per_s for streamed in streams):.0f} jobs/s",
        details={"streams": streams},
    )


def _by_process(streams: list[Streamed]) -> str:
    names = streams[0].cpu_s
    return ", ".join(
        f"{name} {median(streamed.cpu_us_per_job[name] for streamed in streams):.0f}"
        for name in names
    )
