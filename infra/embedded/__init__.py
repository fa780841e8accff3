"""The embedded stack of `headrace up`: all processes of one machine, on one data folder.

    run/lock            held by the supervisor while it lives
    run/stack.json      what runs (`record.py`)
    run/<child>.ready   that a child is ready for work
    logs/<child>.log    what it printed; "stack" is the supervisor itself

The supervisor starts the children, in `stack.py`, with the settings in their environment.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from infra.settings import Settings


def announce_ready(settings: Settings, name: str, **facts: object) -> None:
    """Say that this process is ready for work. name: the child's name. facts: for the reader."""
    ready_file(settings, name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(ready_file(settings, name), {"pid": os.getpid(), **facts})


def announced_ready(settings: Settings, name: str, pid: int) -> bool:
    """Whether this process, and not one that had the name earlier, has announced itself."""
    try:
        facts = msgspec.json.decode(ready_file(settings, name).read_bytes())
    except (OSError, msgspec.DecodeError):
        return False
    return isinstance(facts, dict) and facts.get("pid") == pid


def ready_file(settings: Settings, name: str) -> Path:
    return settings.data_dir / "run" / f"{name}.ready"


def child_log(settings: Settings, name: str) -> Path:
    return settings.data_dir / "logs" / f"{name}.log"


def write_whole(path: Path, content: object) -> None:
    """Write JSON so that a reader sees the old or the new content, never half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(msgspec.json.encode(content))
    os.replace(unfinished, path)
