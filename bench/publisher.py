"""A program that uses the public client: it keeps jobs coming, a few groups ahead of their results.

It runs in a process of its own, so that its CPU time is the client's and nothing else's.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import ParamSpec, TypeVar

import psutil
from msgspec import Struct

from bench.machine import CpuMeter
from bench.stack import Deployment
from producers.client import Client, JobHandle
from schemas.results import Outcome

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT_S = 300
RAMP_S = 1.0
GROUP_LEAST, GROUP_MOST = 64, 500
AHEAD = 4

Payloads = Sequence[bytes] | Sequence[str]


class Streamed(Struct, frozen=True):
    """What became of a stream of jobs. wall_s: from the first submit to the last result seen.

    jobs_per_s: between RAMP_S after the first outcome and the last submit, so with everything at
    work at once. cpu_s: by process. others_cpus: CPUs busy with what is not ours.
    """

    jobs: int
    wall_s: float
    jobs_per_s: float
    cpu_s: dict[str, float]
    others_cpus: float

    @property
    def cpu_us_per_job(self) -> dict[str, float]:
        return {name: 1e6 * seconds / self.jobs for name, seconds in self.cpu_s.items()}


def alone(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *args, **kwargs).result()


def stream(deployment: Deployment, model: str, payloads: Payloads, jobs: int) -> Streamed:
    """Submit so many jobs, the payloads over and over, at most AHEAD groups without their results."""
    group = min(GROUP_MOST, max(GROUP_LEAST, jobs // 24))
    with Client(settings=deployment.settings) as client:
        _finish(client, client.submit_many(model, payloads[:1]))  # connections are open now
        meter = CpuMeter(deployment.processes() | {"client": psutil.Process()})
        began = time.perf_counter()
        waiting: deque[list[JobHandle]] = deque()
        outcomes: list[Outcome] = []
        for first in range(0, jobs, group):
            if len(waiting) == AHEAD:
                outcomes += _finish(client, waiting.popleft())
            members = range(first, min(first + group, jobs))
            waiting.append(
                client.submit_many(model, [payloads[i % len(payloads)] for i in members])
            )
        last_submit = time.time()
        for handles in waiting:
            outcomes += _finish(client, handles)
        wall_s = time.perf_counter() - began
        rate = _rate(outcomes, last_submit)
        return Streamed(jobs, wall_s, rate, meter.read(), meter.others_cpus())


def others(streams: Sequence[Streamed]) -> str:
    """In words, how much of the machine was not ours."""
    return f"other work took {median(streamed.others_cpus for streamed in streams):.1f} CPUs"


def _finish(client: Client, handles: list[JobHandle]) -> list[Outcome]:
    """Every outcome, with its answer read as a program would. Raises if a job failed."""
    outcomes = []
    for outcome in client.outcomes(handles, TIMEOUT_S):
        client.result_of(outcome)
        outcomes.append(outcome)
    return outcomes


def _rate(outcomes: list[Outcome], last_submit: float) -> float:
    """Jobs a second while the stream was in full flow; times are seconds since the epoch."""
    finished = sorted(outcome.finished_at or 0.0 for outcome in outcomes)
    start = finished[0] + RAMP_S
    flowing = [at for at in finished if start < at <= last_submit]
    if len(flowing) < len(finished) / 4:
        raise RuntimeError(
            f"expected a quarter of {len(finished)} jobs or more in full flow, came {len(flowing)}: stream more"
        )
    return len(flowing) / (flowing[-1] - start)
