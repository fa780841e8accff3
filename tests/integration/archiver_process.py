"""The archiver process, which is killed before or after one of its writes: archiver_process.py MOMENT

Moments count from 0, two for each call that changes something in the lake or the log. -1: it lives on.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from workers.archiver import main as archiver

MOMENTS = itertools.count()


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
    if next(MOMENTS) == int(sys.argv[1]):
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
    raise SystemExit(archiver.main())
