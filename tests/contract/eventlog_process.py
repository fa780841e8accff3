"""What the processes of `test_eventlog_kills.py` do until they are killed. Each line printed is a promise.

eventlog_process.py write URL PREFIX COUNT    append COUNT jobs; prints how many are accepted
eventlog_process.py answer URL                answer jobs for ever; prints after each transaction
eventlog_process.py drain URL                 answer jobs until none is open
eventlog_process.py results URL               print the key of every result
"""

from __future__ import annotations

import random
import sys

from infra.eventlog import Fenced, NewRecord, Record
from infra.eventlog.open import open_log

JOBS = ("jobs.image.standard", "jobs.text.standard")
RESULTS = "results"
GROUP = "dispatcher"
EXIT_FENCED = 3


def write(url: str, prefix: str, count: str) -> None:
    log, chance, accepted = open_log(url), random.Random(prefix), 0
    while accepted < int(count):
        batch = range(accepted, min(int(count), accepted + chance.randint(1, 20)))
        log.append(
            [NewRecord(chance.choice(JOBS), f"{prefix}.{i}", {"i": str(i)}, b"job") for i in batch]
        )
        accepted = batch.stop
        print(accepted, flush=True)


def answer(url: str, *, until_empty: bool = False) -> None:
    """Out of order, and always with some jobs left open for the next round."""
    log, chance = open_log(url), random.Random()
    consumer = log.consumer(GROUP, JOBS, window=256)
    held: list[Record] = []
    while True:
        held += consumer.receive(64, 2**20, timeout_s=0 if held else 0.1)
        chance.shuffle(held)
        done, held = held[:32], held[32:]
        if done:
            consumer.complete(
                [record.position for record in done],
                [NewRecord(RESULTS, record.key, {}, record.value) for record in done],
            )
            print(len(done), flush=True)
        elif until_empty and not any(lag.open for lag in consumer.lag().values()):
            return


def results(url: str) -> None:
    for record in open_log(url).read([RESULTS], 0):
        print(record.key)


def main(role: str, *arguments: str) -> int:
    try:
        match role:
            case "write":
                write(*arguments)
            case "answer":
                answer(*arguments)
            case "drain":
                answer(*arguments, until_empty=True)
            case "results":
                results(*arguments)
    except Fenced:
        return EXIT_FENCED
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
