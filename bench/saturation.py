"""Jobs a second, end to end through the public client, over a plain loop in a process per core.

The loop runs the batch size that is fastest for it, and nothing is stored or sent.

Plain and headrace take turns, so that what else runs on the machine hits both. Beside other work
the rates may still mislead, because headrace has more processes to compete with; so what a job
costs in CPU time is compared too, and the lower of the two ratios counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, median

from bench.bundles import IMAGE, TEXT
from bench.figures import Asked, Effort, Figure, spread
from bench.inputs import jpegs, sentences
from bench.plain import Looped, plain_loops
from bench.publisher import Payloads, Streamed, alone, others, stream
from bench.stack import Deployment, Kind, running

ASKED = Asked(">=", 0.85, aim=0.95)


def measure(effort: Effort, kind: Kind) -> Iterator[Figure]:
    with running(kind, IMAGE, TEXT) as stack:
        yield compare(stack, "EfficientNet-Lite0, JPEG 512 px", IMAGE, jpegs(512), effort)
        if effort != "quick":
            yield compare(stack, "EfficientNet-Lite0, JPEG as is", IMAGE, jpegs(), effort)
        yield compare(stack, "MiniLM sentences", TEXT, sentences(), effort)


def compare(stack: Deployment, name: str, model: str, payloads: Payloads, effort: Effort) -> Figure:
    seconds, rounds = (4.0, 1) if effort == "quick" else (6.0, 3)
    with plain_loops(stack.settings, model, payloads) as plain:
        plain.tune((1, 2, 8), seconds=2.0)
        loops = [plain.run(seconds)]
        streams: list[Streamed] = []
        for _ in range(rounds):
            jobs = int(loops[-1].jobs_per_s * (seconds + 2))
            streams.append(alone(stream, stack, model, payloads, jobs))
            loops.append(plain.run(seconds))
    return _figure(name, plain.batch, loops, streams)


def _figure(name: str, batch: int, loops: list[Looped], streams: list[Streamed]) -> Figure:
    """loops: one more than streams, before, between and after them."""
    around = list(zip(streams, loops, loops[1:], strict=False))
    by_rate = [s.jobs_per_s / mean((a.jobs_per_s, b.jobs_per_s)) for s, a, b in around]
    by_cpu = [mean((_cpu_us(a), _cpu_us(b))) / sum(s.cpu_us_per_job.values()) for s, a, b in around]
    plain, headrace = (median(x.jobs_per_s for x in many) for many in (loops, streams))
    costs = ", ".join(f"{who} {us:.0f}" for who, us in streams[-1].cpu_us_per_job.items())
    return Figure(
        name=f"saturation: {name}",
        measured=min(median(by_rate), median(by_cpu)),
        asked=ASKED,
        note=f"{headrace:.0f} of {plain:.0f} jobs/s (loops of {batch} at a time): {spread(by_rate)}; "
        f"by CPU time {spread(by_cpu)}: {costs} of {median(map(_cpu_us, loops)):.0f} us a job; "
        f"{others(streams)}",
        details={"plain": loops, "headrace": streams, "by_rate": by_rate, "by_cpu": by_cpu},
    )


def _cpu_us(loop: Looped) -> float:
    return 1e6 * loop.cpu_s / loop.jobs
