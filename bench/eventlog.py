"""What one record costs in the embedded log, and how long a writer waits beside another in a tight loop.

python bench/eventlog.py [--seconds 3] [--synchronous full] [--folder DIR]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from infra.eventlog import EventLog, NewRecord
from infra.eventlog.open import open_log
from infra.eventlog.tracker import Tracker

JOBS = "jobs.image.standard"
RESULTS = "results"
CONTROL = "control"
HEADERS = {
    "ce_id": "0190b3c4-7d2e-7abc-8def-0123456789ab",
    "ce_type": "headrace.job.submitted.v1",
    "tenant": "default",
    "model": "efficientnet-lite0",
}
PAYLOAD = bytes(range(256)) * 4


def records(topic: str, count: int) -> list[NewRecord]:
    return [NewRecord(topic, f"key-{i:08}", HEADERS, PAYLOAD) for i in range(count)]


def show(name: str, seconds: list[float], each: int = 1) -> None:
    """Microseconds for each record; the slowest call in milliseconds."""
    per_record = [1e6 * s / each for s in seconds]
    print(
        f"{name:<46} p50 {statistics.median(per_record):8.1f} us   "
        f"mean {statistics.mean(per_record):8.1f} us   slowest call {1e3 * max(seconds):7.1f} ms"
    )


def timed(step: Callable[[], object], times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_tracker() -> None:
    tracker, count = Tracker(0), 200_000
    start = time.perf_counter()
    for offset in range(count):
        tracker.received(offset)
        if offset >= 4096:
            tracker.complete((offset - 4096) ^ 63)
    show("tracker: received + complete, 4,096 open", [(time.perf_counter() - start)], count)
    straggler = Tracker(0)
    for offset in range(16_384):
        straggler.received(offset)
    start = time.perf_counter()
    for offset in range(16_383, 0, -1):
        straggler.complete(offset)
    show("tracker: complete above a straggler, 16,384", [time.perf_counter() - start], 16_383)
    show("tracker: encode that", timed(straggler.encode, 200))


def measure_log(log: EventLog) -> None:
    batch = records(JOBS, 500)
    show("append 500 records of 1 KB, each", timed(lambda: log.append(batch), 100), 500)
    one = records(JOBS, 1)
    show("append 1 record of 1 KB", timed(lambda: log.append(one), 2000))
    consumer = log.consumer("bench", [JOBS, RESULTS], window=16_384)
    consumer.pause(RESULTS)
    held = []
    seconds = timed(lambda: held.extend(consumer.receive(500, 2**30)), 30)
    show("receive 500 of 1 KB, each", seconds, 500)
    outputs = records(RESULTS, 32)
    positions = iter([record.position for record in held])
    seconds = timed(
        lambda: consumer.complete([next(positions) for _ in range(32)], outputs), len(held) // 32
    )
    show("complete 32 with 32 outputs of 1 KB", seconds)
    consumer.pause(JOBS)
    show("receive when nothing changed", timed(lambda: consumer.receive(500, 2**30), 5000))
    show("lag of two topics", timed(consumer.lag, 1000))
    show("read 52,000, each", timed(lambda: sum(1 for _ in log.read([JOBS], 0)), 1), 52_000)
    consumer.close()
    for _ in range(20):
        log.append(records(CONTROL, 500))
    show("trim 10,000, each", timed(lambda: log.trim({CONTROL: 0}), 1), 10_000)


def write_in_a_loop(url: str, topic: str, count: int, seconds: float) -> list[float]:
    """How long each append took, in a process of its own."""
    log, batch, calls = open_log(url), records(topic, count), []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        calls += timed(lambda: log.append(batch), 1)
    log.close()
    return calls


def measure_contention(url: str, seconds: float) -> None:
    for sizes in [(500, 32), (1, 32), (500, 500, 32)]:
        with multiprocessing.get_context("spawn").Pool(len(sizes)) as pool:
            loops = [
                pool.apply_async(write_in_a_loop, (url, topic, size, seconds))
                for topic, size in zip((JOBS, RESULTS, JOBS), sizes, strict=False)
            ]
            for size, loop in zip(sizes, loops, strict=True):
                beside = " and ".join(str(other) for other in sizes)
                show(f"loops of {beside}: append {size}", loop.get())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--synchronous", default="normal")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    measure_tracker()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        url = f"sqlite://{folder}/log.db?synchronous={options.synchronous}"
        log = open_log(url)
        measure_log(log)
        log.close()
        measure_contention(url, options.seconds)
        wal = max((f.stat().st_size for f in Path(folder).glob("*-wal")), default=0)
        print(f"write-ahead log left behind: {wal / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
