"""The engine cache between processes and machines that share a real S3 server, and under kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.minio import patience
from tests.servers.s3 import S3Server

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("HEADRACE_FAULTS") == "long"
MACHINES = 8

MACHINE = """
import json, pathlib, sys
from infra.logs import configure_logs
from infra.objects import connect_objects
from infra.settings import load_settings
from pipelines.engines import open_engines

def say(word):
    print(word, flush=True)

def build(into):
    say("building")
    sys.stdin.readline()
    (into / "engine.bin").write_bytes(b"compiled" * 1_000_000)

configure_logs("machine")
settings = load_settings()
cache = open_engines(settings, connect_objects(settings)).cache
artefact = cache.get_or_build({"model": sys.argv[1]}, build, on_wait=lambda: say("waits"))
whole = (artefact.path / "engine.bin").read_bytes() == b"compiled" * 1_000_000
say(json.dumps([artefact.trace.origin, whole, artefact.trace.store_fault]))
"""

Machine = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def machine(s3: S3Server, tmp_path: Path) -> Iterator[Machine]:
    """`machine("a", "model")`: a process with a cache folder of its own, or that of an earlier one."""
    started: list[subprocess.Popen[str]] = []
    with s3.bucket() as bucket:

        def start(name: str, model: str, **settings: object) -> subprocess.Popen[str]:
            environment = {
                **os.environ,
                **s3.environment,
                "HEADRACE_OBJECTS_URL": s3.url(bucket),
                "HEADRACE_S3__CACHE_DIR": str(tmp_path / name / "objects"),
                "HEADRACE_ENGINES__CACHE_DIR": str(tmp_path / name / "engines"),
                "HEADRACE_ENGINES__KEYS": json.dumps({"k1": "s" * 32}),
                **{f"HEADRACE_{name}": str(value) for name, value in settings.items()},
            }
            process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(MACHINE), model],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            started.append(process)
            return process

        yield start
        for process in started:
            process.kill()
            process.communicate()


def word(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> Any:
    return json.loads(process.communicate(timeout=60)[0].splitlines()[-1])


@patience()
def test_of_machines_that_start_at_once_one_builds(machine: Machine) -> None:
    machines = [machine(str(number), "a") for number in range(MACHINES)]
    words = [word(process) for process in machines]
    assert sorted(words) == ["building", *["waits"] * (MACHINES - 1)]
    go_on(machines[words.index("building")])
    answers = sorted(answer(process) for process in machines)
    assert answers == [["built", True, None], *[["store", True, None]] * (MACHINES - 1)]


@patience()
def test_when_the_builder_is_killed_another_machine_builds(machine: Machine) -> None:
    first = machine("first", "a", ENGINES__LEASE_S=1)
    assert word(first) == "building"
    second = machine("second", "a")
    assert word(second) == "waits"
    first.kill()
    assert word(second) == "building"
    go_on(second)
    assert answer(second) == ["built", True, None]
    again = machine("first", "a")
    assert answer(again) == ["store", True, None]


@patience()
def test_a_builder_that_starts_anew_waits_for_no_lease_of_its_own(machine: Machine) -> None:
    first = machine("first", "a", ENGINES__LEASE_S=1000)
    assert word(first) == "building"
    first.kill()
    first.wait()
    again = machine("first", "a")
    assert word(again) == "building"
    go_on(again)
    assert answer(again) == ["built", True, None]


@patience()
def test_without_the_store_a_machine_serves_what_it_has_and_builds_the_rest(
    machine: Machine,
) -> None:
    process = machine("a", "a")
    go_on(process)
    assert answer(process)[0] == "built"
    gone = {"OBJECTS_URL": "s3://127.0.0.1:9/gone?secure=false", "S3__ATTEMPTS": 1}
    assert answer(machine("a", "a", **gone)) == ["local", True, None]
    process = machine("a", "b", **gone)
    go_on(process)
    origin, whole, fault = answer(process)
    assert (origin, whole) == ("built", True)
    assert "127.0.0.1:9" in fault


def test_races_and_kills_never_show_a_broken_engine() -> None:
    """1,000 races and 100 kills with HEADRACE_FAULTS=long."""
    races, kills, racers = (1000, 100, 8) if LONG else (6, 4, 8)
    options = ["--races", races, "--kills", kills, "--racers", racers]
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine_races", *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads(done.stdout)
    assert (tally["races"], tally["builds"]) == (races, races)
    assert tally["kills"] >= tally["interrupted"] == kills
    assert tally["served"] >= (races + kills) * racers
