"""The floor that headrace is compared with: decode, infer, encode in a loop, a process per core."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import psutil
from msgspec import Struct

from bench.bundles import load
from bench.machine import cores, cpu_s
from bench.publisher import Payloads
from infra.settings import Settings


class Looped(Struct, frozen=True):
    """jobs_per_s: of all processes together. cpu_s: of all of them, for `jobs` jobs."""

    jobs: int
    jobs_per_s: float
    cpu_s: float


class PlainLoops:
    """Processes with the model loaded, idle until `run`. batch: jobs in one run of the engine."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes
        self.batch = 1

    def tune(self, batches: Iterable[int], seconds: float) -> None:
        """Take the batch size with which the loops are fastest."""

        def rate(batch: int) -> float:
            self.batch = batch
            return self.run(seconds).jobs_per_s

        self.batch = max(batches, key=rate)

    def run(self, seconds: float) -> Looped:
        for pipe in self._pipes:
            pipe.send((seconds, self.batch))
        parts: list[Looped] = [pipe.recv() for pipe in self._pipes]
        return Looped(
            sum(part.jobs for part in parts),
            sum(part.jobs_per_s for part in parts),
            sum(part.cpu_s for part in parts),
        )


@contextmanager
def plain_loops(settings: Settings, model: str, payloads: Payloads) -> Iterator[PlainLoops]:
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(cores()):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, settings, model, payloads))
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            pipe.recv()
        yield PlainLoops(pipes)
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()


def _serve(pipe: Connection, settings: Settings, name: str, payloads: Payloads) -> None:
    model = load(settings, name)
    data = [text.encode() if isinstance(text, str) else text for text in payloads]
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        seconds, batch = asked
        turns = itertools.cycle(data)
        jobs = 0
        cpu_before, began = cpu_s(psutil.Process()), time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            rows = [model.decode(next(turns), "", {}) for _ in range(batch)]
            for row in model.infer(rows):
                model.encode(row)
            jobs += batch
        pipe.send(Looped(jobs, jobs / elapsed, cpu_s(psutil.Process()) - cpu_before))
