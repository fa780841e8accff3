"""How much longer a lone job takes than calling the model: submit to result, at light load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import quantiles

import psutil

from bench.bundles import NOOP, load, noop_payload
from bench.figures import Asked, Figure
from bench.machine import CpuMeter, stack_processes
from bench.publisher import alone
from bench.stack import running
from infra.settings import Settings
from producers.client import Client

PAUSE_S = 0.01
WARM_UP = 20


def measure(quick: bool) -> Iterator[Figure]:
    with running(NOOP) as settings:
        through, direct, others_cpus = alone(time_jobs, settings, 150 if quick else 600)
    (p50, p99), (direct_p50, direct_p99) = _p50_p99(through), _p50_p99(direct)
    yield Figure(
        name="latency at light load: added, p50",
        measured=p50 - direct_p50,
        unit="ms",
        asked=Asked("<=", 5),
        note=f"submit to result {p50:.2f}, the direct call {direct_p50:.3f}; "
        f"other work took {others_cpus:.1f} CPUs",
        details={"through_ms": through, "direct_ms": direct},
    )
    yield Figure(
        name="latency at light load: added, p99",
        measured=p99 - direct_p99,
        unit="ms",
        note=f"submit to result {p99:.2f}, the direct call {direct_p99:.3f}",
    )


def time_jobs(settings: Settings, times: int) -> tuple[list[float], list[float], float]:
    """Milliseconds of jobs one at a time, and of direct calls in between; CPUs of other work."""
    model = load(settings, NOOP)

    def call(payload: bytes) -> None:
        (row,) = model.infer([model.decode(payload, "", {})])
        model.encode(row)

    through, direct = [], []
    meter = CpuMeter(stack_processes(settings) | {"client": psutil.Process()})
    with Client(settings=settings) as client:
        for number in range(WARM_UP + times):
            payload = noop_payload(number)
            through.append(_ms(lambda data: client.submit(NOOP, data).result(), payload))
            direct.append(_ms(call, payload))
            time.sleep(PAUSE_S)
    return through[WARM_UP:], direct[WARM_UP:], meter.others_cpus()


def _ms(step: Callable[[bytes], object], payload: bytes) -> float:
    began = time.perf_counter()
    step(payload)
    return 1000 * (time.perf_counter() - began)


def _p50_p99(values: list[float]) -> tuple[float, float]:
    cuts = quantiles(values, n=100)
    return cuts[49], cuts[98]
