"""Structured logs: readable on a terminal, one JSON object a line otherwise. Bind `job`, `batch` and `trace` ids.

Loggers go through the standard library, under `headrace`, and leave an application's own structlog
settings alone. A process of ours says in its `main()` where its logs go; in a library user's process
they go where the application sends them, by default warnings to stderr.

structlog and logging are imported with the first line: structlog draws in rich, which takes longer than an engine's
load, and most processes that load one have nothing to say on the way.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    import structlog


def configure_logs(process: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Say where this process's logs go (stderr), once, in its `main()`. Other libraries' come out alike."""
    import logging

    import structlog

    out = stream or sys.stderr
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer()
        if out.isatty()
        else structlog.processors.JSONRenderer(sort_keys=True)
    )

    def name_process(
        _: Any, __: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        event.setdefault("process", process)
        return event

    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared(),
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                name_process,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    own = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    root.setLevel(max(own, logging.WARNING) if level != "debug" else logging.DEBUG)
    logging.getLogger("headrace").setLevel(own)
    # What matters of its many lines comes to us as an error, and is logged or raised by us.
    logging.getLogger("kafka").setLevel(logging.DEBUG if level == "debug" else logging.CRITICAL)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    return cast("structlog.stdlib.BoundLogger", _Logger(name))


class _Logger:
    """structlog's, made when it is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_open(self._name), attribute)


@functools.cache
def _open(name: str) -> structlog.stdlib.BoundLogger:
    import logging

    import structlog

    logger = structlog.wrap_logger(
        logging.getLogger(f"headrace.{name}"),
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return cast("structlog.stdlib.BoundLogger", logger)


def _shared() -> list[structlog.typing.Processor]:
    import structlog

    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
