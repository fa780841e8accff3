"""What a builder says while it builds, kept with the artefact or with the failure."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from infra.logs import get_logger

LINES = 500
"""The last of them: a failed build says why at its end."""

LINE_CHARS = 2000
"""A parser may print a whole graph in one line; the log is part of a manifest, which has a limit."""

LOGGER = "headrace.engines"
"""Backends log under it, as `get_logger("engines.tensorrt")`."""

_log = get_logger("engines.build")


def tell(event: str, **facts: object) -> None:
    """A line for whoever looks at the build that is under way. Where else logs go it is one of debug."""
    _log.debug(event, **facts)
    for handler in logging.getLogger(LOGGER).handlers:
        if isinstance(handler, _Listener):
            handler.tell(event, facts)


@contextmanager
def compiling(into: Path, **facts: object) -> Iterator[dict[str, object]]:
    """Tells in the end what was written into the folder, in how many seconds, and the facts, to which the
    block may add."""
    began = time.monotonic()
    yield facts
    seconds = round(time.monotonic() - began, 3)
    size_bytes = sum(path.stat().st_size for path in into.iterdir())
    tell("engine_compiled", **facts, bytes=size_bytes, seconds=seconds)


@contextmanager
def recorded() -> Iterator[Callable[[], str]]:
    """Gives what has been told since the block began, and logged under LOGGER at the level that is set.

    Whatever thread logs: vendors build in threads of their own. Of several builds in one process
    each has the lines of all.
    """
    lines: deque[str] = deque(maxlen=LINES)
    with _listening(lambda line: lines.append(line[:LINE_CHARS])):
        yield lambda: "\n".join(lines)


@contextmanager
def shown(print_line: Callable[[str], None]) -> Iterator[None]:
    """Prints what is told, and logged under LOGGER down to info, instead of where else logs go."""
    logger = logging.getLogger(LOGGER)
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with _listening(print_line):
            yield
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextmanager
def _listening(take: Callable[[str], object]) -> Iterator[None]:
    listener = _Listener(take)
    logger = logging.getLogger(LOGGER)
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)


class _Listener(logging.Handler):
    def __init__(self, take: Callable[[str], object]) -> None:
        import structlog  # not at the top: see infra/logs.py

        super().__init__(logging.INFO)  # debug: what is told, once more
        self._take = take
        self._render = structlog.processors.KeyValueRenderer(key_order=["timestamp", "event"])
        self.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    self._render,
                ]
            )
        )

    def tell(self, event: str, facts: dict[str, object]) -> None:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self._take(self._render(None, "info", {"timestamp": now, "event": event, **facts}))

    def emit(self, record: logging.LogRecord) -> None:
        self._take(self.format(record))
