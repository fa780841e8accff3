"""One of several members that answer jobs on Kafka until it is killed, or put out.

kafka_member.py URL SLOT        prints how many it has answered after each transaction
"""

from __future__ import annotations

import random
import sys

from infra.eventlog import Consumer, Fenced, Moved, NewRecord, Record
from infra.eventlog.open import open_log
from schemas.errors import Transient

JOBS = ("jobs.image.standard", "jobs.text.standard")
EXIT_FENCED = 3


def answer(consumer: Consumer) -> None:
    """Out of order, and always with some jobs left open for the next round."""
    chance, held, done = random.Random(), list[Record](), list[Record]()
    while True:
        held += consumer.receive(64, 2**20, timeout_s=0 if held or done else 0.1)
        moved = set(consumer.lost())
        held = [record for record in held if record.position not in moved]
        done = [record for record in done if record.position not in moved]
        chance.shuffle(held)
        done, held = done + held[:32], held[32:]
        if not done:
            continue
        try:
            consumer.complete(
                [record.position for record in done],
                [NewRecord("results", record.key, {}, record.value) for record in done],
            )
        except (Moved, Transient):
            continue
        print(len(done), flush=True)
        done = []


def main(url: str, slot: str) -> int:
    try:
        answer(open_log(url, slot=int(slot)).consumer("g", JOBS, window=256))
    except Fenced:
        return EXIT_FENCED
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
