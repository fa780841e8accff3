"""docker-compose.yml as Compose reads it: checked, merged, its variables replaced. By Compose's own loader, in Go."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.servers.process import free_port, unavailable

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("compose_config")
REMEDY = "install Go (https://go.dev/dl)"

CACHE = "/var/cache/headrace"
"""What the image has its caches in."""

DURATION = re.compile(r"(?:(\d+)m)?(\d+)s")


class Service(NamedTuple):
    """One of ours in docker-compose.yml. check: none for what runs once, before the others. stage: those of
    later stages are stopped first."""

    name: str
    command: list[str]
    check: list[str] | None
    environment: dict[str, str]
    stage: int
    stop_s: int


class ComposeError(Exception):
    """What Compose says of the file."""


def compose_config(environment: Mapping[str, str]) -> dict[str, Any]:
    """All services, those of profiles too. environment: what `.env` would hold. Skips where there is no Go."""
    if not shutil.which("go"):
        unavailable("Compose", "there is no `go` on the PATH", REMEDY)
    done = subprocess.run(
        ["go", "-C", str(PROGRAM), "run", ".", str(ROOT / "docker-compose.yml")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ComposeError(done.stderr)
    model: dict[str, Any] = json.loads(done.stdout)
    return model


def seconds(duration: str) -> int:
    """Of a duration as Compose prints it: 45s or 1m30s."""
    found = DURATION.fullmatch(duration)
    assert found, f"expected 45s or 1m30s, came {duration!r}"
    return 60 * int(found[1] or 0) + int(found[2])


def services_of(config: dict[str, Any], addresses: dict[str, str], folder: Path) -> list[Service]:
    """Those of ours that run without a profile, each with a home in the folder."""
    ours = {
        name: described
        for name, described in config["services"].items()
        if "HEADRACE_LOG_URL" in described["environment"] and not described.get("profiles")
    }
    return [
        Service(
            name,
            described["command"],
            _check(described),
            _environment(described, addresses, folder / name, folder / _cache(name, described)),
            _stage(name, ours),
            seconds(described.get("stop_grace_period", "10s")),
        )
        for name, described in sorted(ours.items())
    ]


def _check(described: dict[str, Any]) -> list[str] | None:
    kind, *command = described["healthcheck"].get("test", ["NONE"])
    return command if kind == "CMD" else None


def _environment(
    described: dict[str, Any], addresses: dict[str, str], home: Path, cache: Path
) -> dict[str, str]:
    environment = dict(described["environment"])
    for name, value in environment.items():
        for server, address in addresses.items():
            value = value.replace(server, address)
        environment[name] = value
    return {
        **environment,
        # What the image sets, and what each container has for itself.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(cache),
        "HEADRACE_DATA_DIR": str(home / "data"),
        "HEADRACE_HEALTH_PORT": str(free_port()),
    }


def _cache(name: str, described: dict[str, Any]) -> str:
    """Services that have a volume for it in common share it."""
    volumes = {volume["target"]: volume["source"] for volume in described.get("volumes", [])}
    return f"cache-{volumes.get(CACHE, name)}"


def _stage(name: str, services: dict[str, Any]) -> int:
    needed = [other for other in services[name]["depends_on"] if other in services]
    return 1 + max((_stage(other, services) for other in needed), default=-1)
