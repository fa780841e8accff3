from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from infra.logs import configure_logs, get_logger


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (None, "headrace", "kafka")]
    levels = [logger.level for logger in loggers]
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def lines(level: str) -> list[dict[str, str]]:
    """What a process with this level writes of what we, Kafka's client and another library say."""
    stream = io.StringIO()
    configure_logs("worker-0", level, stream)
    get_logger("worker").info("ready", job="1")
    logging.getLogger("kafka.producer.sender").error("lost its way")
    logging.getLogger("celery").warning("something odd")
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_line_says_who_when_and_what() -> None:
    first = lines("info")[0]

    assert (first["process"], first["event"], first["job"]) == ("worker-0", "ready", "1")
    assert first["timestamp"].endswith("Z")


def test_kafkas_own_lines_come_only_to_who_debugs() -> None:
    assert [line["event"] for line in lines("info")] == ["ready", "something odd"]
    assert "lost its way" in [line["event"] for line in lines("debug")]
