"""A dispatcher or worker as it is, but for one method: at its k-th call the process ends, or stalls.

bent_process.py dispatcher|worker STEP before|after K STALL_S POLL_S

STEP is a path from the assembled process to the method. STALL_S 0: the process ends. POLL_S: the longest time
between two polls that the group allows, 0 for the usual.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import time
from typing import Any, NamedTuple

EXIT_BENT = 42
BENT_LINE = "BENT"


class Bend(NamedTuple):
    path: str
    when: str
    turn: int
    stall_s: float

    def apply(self, root: Any) -> None:
        *owners, name = self.path.split(".")
        owner = functools.reduce(getattr, owners, root)
        method, turns = getattr(owner, name), itertools.count(1)

        def bent(*args: Any, **kwargs: Any) -> Any:
            mine = next(turns) == self.turn
            if mine and self.when == "before":
                self.act()
            answer = method(*args, **kwargs)
            if mine and self.when == "after":
                self.act()
            return answer

        setattr(owner, name, bent)

    def act(self) -> None:
        print(f"{BENT_LINE} {self.when} {self.path} {self.turn}", flush=True)
        if not self.stall_s:
            os._exit(EXIT_BENT)
        time.sleep(self.stall_s)


def main(role: str, path: str, when: str, turn: str, stall_s: str, poll_s: str) -> int:
    bend = Bend(path, when, int(turn), float(stall_s))
    if role == "dispatcher":
        return _dispatcher(bend, float(poll_s))
    return _worker(bend)


def _dispatcher(bend: Bend, poll_s: float) -> int:
    from infra.eventlog import kafka_consumer
    from workers.dispatcher import main as real

    class BentProcess(real.Process):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bend.apply(self)

    if poll_s:
        kafka_consumer.STALLED_S = poll_s
    real.Process = BentProcess  # type: ignore[misc]
    return real.main()


def _worker(bend: Bend) -> int:
    from workers.inference import main as real

    class BentWorker(real.Worker):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bend.apply(self)

    real.Worker = BentWorker  # type: ignore[misc]
    return real.main()


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
