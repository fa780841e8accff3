"""How much longer a lone job takes than calling the model, at light load, and where it is meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median

import psutil
from msgspec import Struct
from msgspec.structs import astuple

from bench.bundles import NOOP, load, noop_payload
from bench.figures import Asked, Effort, Figure, p50_p99
from bench.machine import CpuMeter
from bench.publisher import alone
from bench.stack import Deployment, Kind, running
from producers.client import Client

ASKED = {"embedded": Asked("<=", 5), "servers": Asked("<=", 25)}
PAUSE_S = 0.01
WARM_UP = 200


class Way(Struct, frozen=True):
    """Milliseconds of a job's way. submit: until it is accepted. to_worker: until its worker begins with it.
    in_worker: loaded, decoded, run, stored. to_dispatcher: until its outcome is decided. told: committed, shown,
    and read by the client."""

    submit: float
    to_worker: float
    in_worker: float
    to_dispatcher: float
    told: float

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))


class Timed(Struct, frozen=True):
    """direct_ms: of calls of the model between the jobs. others_cpus: CPUs busy with what is not ours."""

    ways: list[Way]
    direct_ms: list[float]
    others_cpus: float


def measure(effort: Effort, kind: Kind) -> Iterator[Figure]:
    with running(kind, NOOP) as deployment:
        timed = alone(time_jobs, deployment, 150 if effort == "quick" else 600)
    p50, p99 = p50_p99([way.total for way in timed.ways])
    direct_p50, direct_p99 = p50_p99(timed.direct_ms)
    yield Figure(
        name="latency at light load: added, p50",
        measured=p50 - direct_p50,
        unit="ms",
        asked=ASKED[kind],
        note=f"submit to result {p50:.2f}: {_parts(timed.ways)}; the direct call {direct_p50:.3f}; "
        f"other work took {timed.others_cpus:.1f} CPUs",
        details={"timed": timed},
    )
    yield Figure(
        name="latency at light load: added, p99",
        measured=p99 - direct_p99,
        unit="ms",
        note=f"submit to result {p99:.2f}, the direct call {direct_p99:.3f}",
    )


def time_jobs(deployment: Deployment, times: int) -> Timed:
    """Jobs one at a time, and direct calls in between."""
    model = load(deployment.settings, NOOP)

    def call(payload: bytes) -> None:
        (row,) = model.infer([model.decode(payload, "", {})])
        model.encode(row)

    ways, direct = [], []
    with Client(settings=deployment.settings) as client:
        meter = CpuMeter(deployment.processes() | {"client": psutil.Process()})
        for number in range(WARM_UP + times):
            payload = noop_payload(number)
            ways.append(time_job(client, payload))
            direct.append(_ms(call, payload))
            time.sleep(PAUSE_S)
        return Timed(ways[WARM_UP:], direct[WARM_UP:], meter.others_cpus())


def time_job(client: Client, payload: bytes) -> Way:
    """By the wall clock, which all processes on this machine share."""
    began = time.time()
    handle = client.submit(NOOP, payload)
    accepted = time.time()
    outcome = handle.wait()
    client.result_of(outcome)
    told = time.time()
    assert outcome.times is not None
    assert outcome.finished_at is not None
    waited_ms, *in_worker_ms = astuple(outcome.times)
    begun = outcome.submitted_at + waited_ms / 1000
    stored = begun + sum(in_worker_ms) / 1000
    stations = [began, accepted, begun, stored, outcome.finished_at, told]
    return Way(*(1000 * (end - start) for start, end in pairwise(stations)))


def _parts(ways: list[Way]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {median(getattr(way, name) for way in ways):.2f}"
        for name in Way.__struct_fields__
    )


def _ms(step: Callable[[bytes], object], payload: bytes) -> float:
    began = time.perf_counter()
    step(payload)
    return 1000 * (time.perf_counter() - began)
