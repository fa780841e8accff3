"""How soon a worker works after its process began: ready, and with its first result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import psutil

from bench.bundles import IMAGE, NOOP, TEXT, noop_payload
from bench.figures import Effort, Figure, spread
from bench.stack import Deployment, Kind, running
from infra.embedded import ready_file
from infra.embedded.processes import age_s
from infra.embedded.record import running_stack
from infra.fleet import Fleet
from infra.redis_client import connect_redis
from producers.client import Client

WORKER = "worker-0"
BETWEEN_S = 3.0
"""Longer than the supervisor takes to believe that a worker is well, or it waits before the next start."""


class Start(NamedTuple):
    """Seconds since the process began. steps: what the worker itself says of them, until it was ready."""

    ready_s: float
    first_result_s: float
    steps: dict[str, float]


def measure(effort: Effort, kind: Kind) -> Iterator[Figure]:
    with (
        running(kind, NOOP, IMAGE, TEXT) as deployment,
        Client(settings=deployment.settings) as client,
    ):
        state = running_stack(deployment.settings)
        assert state is not None
        starts = []
        for _ in range(2 if effort == "quick" else 5):
            time.sleep(BETWEEN_S)
            starts.append(restart(deployment, client))
    models = f"{IMAGE}, {TEXT} and a no-op, from the engine cache"
    yield Figure(
        name="worker start: process to ready",
        measured=median(start.ready_s for start in starts),
        unit="s",
        note=f"{models}; {spread(start.ready_s for start in starts)}",
        details={"steps": [start.steps for start in starts]},
    )
    yield Figure(
        name="worker start: process to first result",
        measured=median(start.first_result_s for start in starts),
        unit="s",
        note=f"of a job that waited for it; {spread(start.first_result_s for start in starts)}",
    )
    yield Figure(
        name="stack start: `headrace up` to ready",
        measured=state.ready_s or 0.0,
        unit="s",
        note=f"Redis, dispatcher, worker with {models}",
    )


def restart(deployment: Deployment, client: Client) -> Start:
    """Kill the worker with a job coming in; the supervisor starts another."""
    killed = deployment.processes()[WORKER]
    killed.kill()
    psutil.wait_procs([killed])
    client.submit(NOOP, noop_payload(1)).result()
    answered = time.time()
    began = time.time() - age_s(deployment.processes()[WORKER].pid)
    ready_at = ready_file(deployment.settings, WORKER).stat().st_mtime
    (beat,) = Fleet(connect_redis(deployment.settings)).workers()
    return Start(ready_at - began, answered - began, beat.start)
