"""Memory of every process with few jobs queued, and with many. The worker is frozen meanwhile.

The dispatcher holds no more jobs than its window: the second level is above that of each kind of deployment.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import psutil

from bench.bundles import NOOP, noop_payload
from bench.figures import Asked, Effort, Figure
from bench.machine import rss_bytes
from bench.publisher import alone
from bench.stack import Deployment, Kind, running
from producers.client import Client

ASKED = Asked("<=", 10)
GROUP, TOPIC = "dispatcher", "jobs.tensor.standard"
LEVELS = {
    "quick": (1_000, 30_000),
    "usual": (1_000, 30_000, 100_000),
    "long": (1_000, 30_000, 100_000, 1_000_000),
}
STEADY_S = 1.0
MIB = 2**20


def measure(effort: Effort, kind: Kind) -> Iterator[Figure]:
    levels = LEVELS[effort]
    with running(kind, NOOP) as deployment:
        taken = alone(queue, deployment, levels)
    ours = taken[0].keys() - deployment.servers
    sizes = ", ".join(
        f"{name} {' '.join(f'{one[name] / MIB:.0f}' for one in taken)}" for name in taken[0]
    )
    for level, before in zip(levels[:-1], taken, strict=False):
        growth = {name: 100 * (taken[-1][name] / before[name] - 1) for name in ours}
        worst = max(ours, key=lambda name: growth[name])
        yield Figure(
            name=f"memory with {levels[-1]:,} queued jobs over {level:,}, largest growth",
            measured=growth[worst],
            unit="%",
            asked=ASKED if level == levels[0] else None,
            note=f"{worst}; MiB with {', '.join(f'{n:,}' for n in levels)} jobs: {sizes}",
            details={"levels": levels, "bytes": taken},
        )


def queue(deployment: Deployment, levels: Sequence[int]) -> list[dict[str, int]]:
    """Resident bytes by process, with so many jobs queued each time."""
    processes = deployment.processes() | {"client": psutil.Process()}
    payloads = map(noop_payload, itertools.count())
    taken = []
    with Client(settings=deployment.settings) as client:
        client.submit(NOOP, next(payloads)).result()
        processes["worker-0"].suspend()
        try:
            for few, many in pairwise((0, *levels)):
                submit(client, payloads, many - few)
                taken.append(rss_bytes(processes))
            queued = client.log.lag(GROUP, [TOPIC])[TOPIC].open
            assert queued >= many, f"expected {many} jobs in the queue, there are {queued}"
            return taken
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
