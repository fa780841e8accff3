"""From the address in the settings to an event log: the one place that knows the implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from infra.eventlog import EventLog
from schemas.errors import PipelineError

if TYPE_CHECKING:
    from infra.settings import KafkaSettings, Settings


class Options(NamedTuple):
    """on_append: called after each durable append, also of a consumer's outputs. Must be quick and not raise.
    kafka: security of kafka://. slot: which member of its groups this process is, on a log that has several.
    """

    on_append: Callable[[], None] | None = None
    kafka: KafkaSettings | None = None
    slot: int = 0


def open_log(
    url: str,
    *,
    on_append: Callable[[], None] | None = None,
    kafka: KafkaSettings | None = None,
    slot: int = 0,
) -> EventLog:
    """Open the log at `sqlite:///absolute/path?synchronous=full&max_bytes=N` or
    `kafka://host:port,host:port?prefix=P`. The rest: see Options.

    Raises PipelineError for a wrong address, Transient if the log is not to be had now (a cluster is asked
    when the log is first used).
    """
    opener = OPENERS.get(urlsplit(url).scheme)
    if opener is None:
        known = ", ".join(f"{scheme}://" for scheme in OPENERS)
        raise PipelineError(
            "settings_invalid",
            f"The event log's address must begin with one of {known}; got {url!r}.",
        )
    return opener(url, Options(on_append, kafka, slot))


def connect_log(settings: Settings, on_append: Callable[[], None] | None = None) -> EventLog:
    """The log of the settings, as this process's slot. Raises what `open_log` raises."""
    return open_log(
        settings.log_address,
        on_append=on_append,
        kafka=settings.kafka,
        slot=settings.dispatcher.slot,
    )


def _open_sqlite(url: str, options: Options) -> EventLog:
    from infra.eventlog.sqlite import open_sqlite

    return open_sqlite(url, options.on_append)


def _open_kafka(url: str, options: Options) -> EventLog:
    try:
        from infra.eventlog.kafka import KafkaLog, cluster_at
    except ImportError as error:
        raise PipelineError(
            "settings_invalid",
            f"An event log at kafka:// needs `pip install 'headrace[kafka]'` ({error}).",
        ) from error
    return KafkaLog(cluster_at(url, options.kafka), options.slot, options.on_append)


OPENERS: dict[str, Callable[[str, Options], EventLog]] = {
    "sqlite": _open_sqlite,
    "kafka": _open_kafka,
}
