"""What a builder says while it builds, kept with the artefact or with the failure."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINES = 500
"""The last of them: a failed build says why at its end."""

LINE_CHARS = 2000
"""A parser may print a whole graph in one line; the log is part of a manifest, which has a limit."""

LOGGER = "headrace.engines"
"""Backends log under it, as `get_logger("engines.tensorrt")`."""


@contextmanager
def recorded() -> Iterator[Callable[[], str]]:
    """Gives what has been logged under LOGGER since the block began, at the level that is set.

    Whatever thread logs: vendors build in threads of their own. Of several builds in one process
    each has the lines of all.
    """
    lines: deque[str] = deque(maxlen=LINES)
    with _listening(lambda line: lines.append(line[:LINE_CHARS])):
        yield lambda: "\n".join(lines)


@contextmanager
def shown(print_line: Callable[[str], None]) -> Iterator[None]:
    """Prints what is logged under LOGGER, down to info, instead of where else logs go."""
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

        super().__init__()
        self._take = take
        self.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    structlog.processors.KeyValueRenderer(key_order=["timestamp", "event"]),
                ]
            )
        )

    def emit(self, record: logging.LogRecord) -> None:
        self._take(self.format(record))
