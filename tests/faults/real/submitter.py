"""A service that submits jobs until it is told to stop, in bursts, and writes down those that were accepted.

submitter.py ACCEPTED MARKS --rate 100 ...     a line per accepted job: its id, and its number in MARKS
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from headrace import Client
from schemas.errors import PipelineError

BURST_S = 0.25
LANES = ("premium", "standard", "bulk")
LARGE_VALUES = 10_000
"""Of float32: both the payload and the answer go to the object store."""


def main() -> int:
    options = _options()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    chance = random.Random(options.seed)
    numbers = itertools.count(options.first)
    refused = 0
    burst = max(1, round(options.rate * BURST_S))
    with Client() as client, options.accepted.open("a") as accepted:
        client.models()
        begin = time.monotonic()
        for round_ in itertools.count(1):
            large = sum(chance.random() < options.large for _ in range(burst))
            lane = LANES[round_ % len(LANES)]
            orders = [_order(options, next(numbers)) for _ in range(burst - large)]
            arrays = [np.full(LARGE_VALUES, round_, np.float32)] * large
            try:
                for order, handle in zip(
                    orders,
                    client.submit_many("obey", map(_payload, orders), tier=lane),
                    strict=True,
                ):
                    accepted.write(f"{handle.id} {order['name']}\n")
                for handle in client.submit_many("noop", arrays, tier=lane):
                    accepted.write(f"{handle.id} -\n")
            except PipelineError:
                # What was refused is given up. Some of it may have been taken all the same.
                refused += 1
            accepted.flush()
            if stop.wait(max(0.0, begin + round_ * BURST_S - time.monotonic())):
                break
    print(json.dumps({"bursts_refused": refused}), flush=True)
    return 0


def _order(options: argparse.Namespace, number: int) -> dict[str, Any]:
    return {"mark": str(options.marks), "name": str(number), "sleep_s": options.sleep_s}


def _payload(order: dict[str, Any]) -> bytes:
    return json.dumps(order).encode()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("accepted", type=Path)
    parser.add_argument("marks", type=Path)
    parser.add_argument("--rate", type=float, required=True, help="jobs a second")
    parser.add_argument("--sleep-s", type=float, default=0.003, help="how long each runs")
    parser.add_argument("--large", type=float, default=0.02, help="share that goes by reference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first job")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
