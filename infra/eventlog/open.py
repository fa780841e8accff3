"""From the address in the settings to an event log: the one place that knows the implementations."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from infra.eventlog import EventLog
from schemas.errors import PipelineError


def open_log(url: str, *, on_append: Callable[[], None] | None = None) -> EventLog:
    """Open the log at `sqlite:///absolute/path?synchronous=full&max_bytes=N`.

    on_append: called after each durable append, also of a consumer's outputs. Must be quick and not raise.
    Raises PipelineError for a wrong address, Transient if the log is not to be had now.
    """
    opener = OPENERS.get(urlsplit(url).scheme)
    if opener is None:
        known = ", ".join(f"{scheme}://" for scheme in OPENERS)
        raise PipelineError(
            "settings_invalid",
            f"The event log's address must begin with one of {known}; got {url!r}.",
        )
    return opener(url, on_append)


def _open_sqlite(url: str, on_append: Callable[[], None] | None) -> EventLog:
    from infra.eventlog.sqlite import open_sqlite

    return open_sqlite(url, on_append)


OPENERS: dict[str, Callable[[str, Callable[[], None] | None], EventLog]] = {"sqlite": _open_sqlite}
