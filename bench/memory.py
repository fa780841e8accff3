"""Memory of every process with 1,000 jobs queued, and with 100,000. The worker is frozen meanwhile."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import psutil

from bench.bundles import NOOP, noop_payload
from bench.figures import Asked, Figure
from bench.machine import rss_bytes, stack_processes
from bench.publisher import alone
from bench.stack import running
from infra.settings import Settings
from producers.client import Client

GROUP, TOPIC = "dispatcher", "jobs.tensor.standard"
FEW = 1_000
STEADY_S = 1.0
MIB = 2**20


def measure(quick: bool) -> Iterator[Figure]:
    many = 20_000 if quick else 100_000
    with running(NOOP) as settings:
        few_bytes, many_bytes = alone(queue, settings, many)
    growth = {name: 100 * (many_bytes[name] / few_bytes[name] - 1) for name in few_bytes}
    worst = max(growth, key=lambda name: growth[name])
    each = ", ".join(
        f"{name} {few_bytes[name] / MIB:.0f} to {many_bytes[name] / MIB:.0f}" for name in growth
    )
    yield Figure(
        name=f"memory with {many:,} queued jobs over {FEW:,}, largest growth",
        measured=growth[worst],
        unit="%",
        asked=Asked("<=", 10),
        note=f"{worst}; MiB: {each}",
        details={"few_bytes": few_bytes, "many_bytes": many_bytes},
    )


def queue(settings: Settings, many: int) -> tuple[dict[str, int], dict[str, int]]:
    """Resident bytes by process with few and with many jobs queued."""
    processes = stack_processes(settings) | {"client": psutil.Process()}
    payloads = map(noop_payload, itertools.count())
    with Client(settings=settings) as client:
        client.submit(NOOP, next(payloads)).result()
        processes["worker-0"].suspend()
        try:
            submit(client, payloads, FEW)
            few_bytes = rss_bytes(processes)
            submit(client, payloads, many - FEW)
            many_bytes = rss_bytes(processes)
            queued = client.log.lag(GROUP, [TOPIC])[TOPIC].open
            assert queued >= many, f"expected {many} jobs in the queue, there are {queued}"
            return few_bytes, many_bytes
        finally:
            processes["worker-0"].resume()


def submit(client: Client, payloads: Iterator[bytes], jobs: int) -> None:
    """Submit so many, keeping nothing, and wait until the dispatcher holds what it will hold."""
    for _ in client.submit_each(NOOP, itertools.islice(payloads, jobs)):
        pass
    held = -1
    while held != (held := _held(client)):
        time.sleep(STEADY_S + 1.0)  # the dispatcher says every second what it holds


def _held(client: Client) -> int:
    beat = next(iter(client.fleet.dispatchers()), None)
    return sum(lane.waiting for lane in beat.waiting.values()) if beat else 0
