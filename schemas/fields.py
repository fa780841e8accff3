"""Headers of a record, as typed fields: what is missing or wrong is named, with what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

from schemas.cloudevents import SPEC_VERSION
from schemas.errors import InvalidJob

END_OF_TIME = datetime(9999, 1, 1, tzinfo=UTC).timestamp()
"""Later times could not be written again."""


class Fields:
    """Typed reading of an event's headers, in binary mode. Raises InvalidJob (record_malformed)."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.headers = headers

    def event(self, kind: str) -> None:
        """It is a CloudEvent of this type."""
        for name, expected in (("ce_specversion", SPEC_VERSION), ("ce_type", kind)):
            if (came := self.headers.get(name)) != expected:
                raise malformed(name, expected, came)

    def text(self, name: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.headers.get(name)
        if not value or (pattern and not pattern.fullmatch(value)):
            expected = f"text matching {pattern.pattern}" if pattern else "a text"
            raise malformed(name, expected, value)
        return value

    def number(self, name: str, default: int | None) -> int | None:
        value = self.headers.get(name)
        if value is None:
            return default
        if not value.isascii() or not value.isdigit() or len(value) > 15:
            raise malformed(name, "a whole number", value)
        return int(value)

    def when(self, name: str, default: float) -> float:
        value = self.headers.get(name)
        if value is None:
            return default
        try:
            moment = datetime.fromisoformat(value)
            when = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            raise malformed(name, "an RFC 3339 time", value) from None
        if not 0 <= when < END_OF_TIME:
            raise malformed(name, "a time between 1970 and 9999", value)
        return when


def rfc3339(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="microseconds")


def malformed(name: str, expected: str, came: str | None) -> InvalidJob:
    shown = "nothing" if came is None else repr(came[:80])
    return InvalidJob("record_malformed", f"Header {name}: expected {expected}, came {shown}.")
