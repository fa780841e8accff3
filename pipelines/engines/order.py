"""What is asked of the engine cache, and what is told of how it was obtained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from msgspec import Struct

Build = Callable[[Path], None]


class Order(Struct, frozen=True, kw_only=True):
    """What is wanted. key_parts: what the key is the hash of. build: fills the empty folder it is given,
    and has the folder around it to itself meanwhile. label: which model it is for, for people. force: try
    again what failed a moment ago. rebuild: take nothing that is there, and replace it here and in the
    store. may_build: if not, it is an error that nobody has built it yet. on_wait: called when somebody
    else is at it."""

    key: str
    key_parts: dict[str, object]
    build: Build
    label: str
    force: bool
    rebuild: bool
    may_build: bool
    on_wait: Callable[[], None] | None


class Policy(Struct, frozen=True):
    """wait_s: for somebody else's work on the same key. failure_memory_s: how long a failed build is not
    tried again. clock: seconds since the epoch."""

    wait_s: float
    failure_memory_s: float
    clock: Callable[[], float]


class Trace(Struct, frozen=True, kw_only=True):
    """Where an artefact came from, and the seconds spent on waiting for others, on fetching, building
    and publishing. store_fault: why the object store could not be used when it was needed."""

    key: str
    origin: Literal["local", "store", "built"] = "local"
    wait_s: float = 0.0
    fetch_s: float = 0.0
    build_s: float = 0.0
    publish_s: float = 0.0
    store_fault: str | None = None
