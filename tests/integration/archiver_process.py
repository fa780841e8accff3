"""Archiver processes without the time that a start takes: forked from this one, which has imported all they need.

A line of JSON on stdin starts one: its environment, and at which moment it is killed. Moments count from 0,
two for each call that changes something in the lake or the log. On stdout stands its pid, and once it has
ended, its pid and its exit code. When stdin ends, all of them are killed.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from workers.archiver import main as archiver

for late in ("infra.eventlog.kafka", "infra.objects.s3_checks", "workers.archiver.archive"):
    import_module(late)  # once, and not in each child

LOOK_S = 0.02

moments = itertools.count()
last_moment = -1


class Mortal:
    """An object of which some calls are moments."""

    def __init__(self, inner: Any, *calls: str) -> None:
        self._inner = inner
        for name in calls:
            setattr(self, name, mortal(getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        pass_by()
        answer = call(*args, **options)
        pass_by()
        return answer

    return run


def pass_by() -> None:
    if next(moments) == last_moment:
        os.kill(os.getpid(), signal.SIGKILL)


def with_mortal_consumers(log: Any) -> Any:
    join = log.consumer
    log.consumer = lambda *args, **options: Mortal(join(*args, **options), "complete")
    return log


def live(environment: dict[str, str], moment: int) -> int:
    global last_moment
    last_moment = moment
    os.environ.update(environment)
    open_log, connect_objects = archiver.open_log, archiver.connect_objects
    replaced: Any = archiver
    replaced.open_log = lambda *args, **options: with_mortal_consumers(open_log(*args, **options))
    replaced.connect_objects = lambda settings: Mortal(connect_objects(settings), "put", "delete")
    return archiver.main()


def serve() -> None:
    alive: set[int] = set()
    while True:
        if select.select([sys.stdin], [], [], LOOK_S)[0]:
            if not (line := sys.stdin.readline()):
                break
            if not (pid := os.fork()):
                os._exit(live(**json.loads(line)))
            alive.add(pid)
            print(pid, flush=True)
        if alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                alive.remove(pid)
                print(pid, os.waitstatus_to_exitcode(status), flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    serve()
