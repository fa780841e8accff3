"""Archiver processes that are killed before or after one of their writes.

A moment read from stdin starts one: its pid is printed, and when it has ended its exit code. Moments count
from 0, two for each call that changes something in the lake or the log. They are forked from this one,
which has imported all they need.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from workers.archiver import main as archiver

for late in ("infra.eventlog.kafka", "infra.objects.s3_checks", "workers.archiver.archive"):
    import_module(late)  # once, and not in each child

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


if __name__ == "__main__":
    open_log, connect_objects = archiver.open_log, archiver.connect_objects
    replaced: Any = archiver
    replaced.open_log = lambda *args, **options: with_mortal_consumers(open_log(*args, **options))
    replaced.connect_objects = lambda settings: Mortal(connect_objects(settings), "put", "delete")
    for line in sys.stdin:
        last_moment = int(line)
        if not (pid := os.fork()):
            os._exit(archiver.main())
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
