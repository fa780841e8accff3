"""The engine cache under races and kills: how often it builds, and whether it ever serves anything broken.

python -m bench.engine_races [--races 1000] [--kills 100] [--racers 8] [--seed 1]

In each race several processes ask for the same new engine at once, in turn as processes of one machine
and as machines with an object store in common. A kill ends the one that builds by SIGKILL at some moment
before, while or after it puts the engine in its place; the others must get it all the same. Builds are
never the same twice, so two of them that are mixed show. Exit code 1: something was broken, or built
more often than it should.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from msgspec import Struct, to_builtins
from rich.progress import Progress

from bench.engine_load import BUCKETS, CONFIG, write_light
from bench.figures import Asked, Effort, Figure, spread
from infra.logs import configure_logs
from infra.objects.files import FileObjects
from pipelines.engines import EngineCache, Engines
from pipelines.engines.onnxruntime import OnnxRuntime
from pipelines.engines.signing import Keyring
from pipelines.engines.store import EngineStore

FILES = ("weights.bin", "plans/bucket-1", "plans/bucket-8")
STEPS, STEP_BYTES, STEP_S = 5, 20_000, 0.002
LEASE_S, SHORT_LEASE_S = 30.0, 0.4
"""In a race nobody dies, and no lease may be lost because the machine is busy."""
KEYRING = Keyring({"bench": secrets.token_bytes(32)})

RACERS = 8
EXTENT: dict[Effort, tuple[int, int, int]] = {
    "quick": (20, 5, 3),
    "usual": (100, 20, 7),
    "long": (1000, 100, 15),
}
"""Races, kills, and starts at once with a real model."""

BEGIN_S = 30.0
TRIES = 20
"""Kills for each that is to hit a builder at work."""

WHOLE, BROKEN, OTHER = 0, 10, 11
"""Exit codes of a racer."""


class Tally(Struct):
    """races: without a kill, each with one build if all is well. kills: some of them too late to harm
    the build; interrupted: those after which somebody else built. broken: artefacts that are not
    whole. failed: racers that were neither killed nor served."""

    races: int = 0
    builds: int = 0
    kills: int = 0
    interrupted: int = 0
    served: int = 0
    broken: int = 0
    failed: int = 0

    @property
    def is_well(self) -> bool:
        return self.builds == self.races and not (self.broken or self.failed)


class Start(NamedTuple):
    """Of several processes at once: seconds until the builder, and until the last of all, has the engine."""

    builds: int
    builder_s: float
    last_s: float


class Track(NamedTuple):
    """Where one race is run. caches: of its racers."""

    caches: list[EngineCache]
    parts: dict[str, object]
    builds: Path


def measure(effort: Effort, _kind: str) -> Iterator[Figure]:
    races, kills, starts = EXTENT[effort]
    yield from measure_races(run_all(races, kills, RACERS, seed=1))
    yield from measure_waits(starts)


def measure_races(tally: Tally) -> Iterator[Figure]:
    note = (
        f"{tally.races} races of {RACERS} processes, {tally.kills} builders killed,"
        f" {tally.interrupted} of them in the middle of a build; {tally.served} engines served"
    )
    yield Figure(
        name="engine cache: broken engines served, or processes left without one",
        measured=tally.broken + tally.failed,
        asked=Asked("<=", 0),
        note=note,
        details=to_builtins(tally),
    )
    yield Figure(
        name=f"engine cache: builds in a race of {RACERS} processes",
        measured=tally.builds / tally.races,
        asked=Asked("<=", 1),
        note="every second race is between machines that share an object store",
    )


def measure_waits(rounds: int) -> Iterator[Figure]:
    """Processes that start at once with a real model: the last one's time over the builder's."""
    with tempfile.TemporaryDirectory(prefix="hr-races-") as folder:
        model = write_light("light_resnet50", Path(folder) / "model")
        starts = [at_once(model, Path(folder) / str(number)) for number in range(rounds)]
    ratios = [start.last_s / start.builder_s for start in starts]
    yield Figure(
        name=f"engine cache: the longest wait of {RACERS} processes that start at once, over the build",
        measured=median(ratios),
        asked=Asked("<=", 1.1),
        note=f"resnet50, builds {' '.join(str(start.builds) for start in starts)}; the builder takes"
        f" {median(start.builder_s for start in starts):.2f} s; ratios {spread(sorted(ratios))}",
        details={"starts": starts},
    )


def at_once(model: Path, root: Path) -> Start:
    command = [sys.executable, "-m", "bench.engine_races", "--ask", str(model), str(root)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(RACERS)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [json.loads(process.communicate()[0]) for process in processes]
    built = [seconds for origin, seconds in answers if origin == "built"]
    return Start(len(built), min(built), max(seconds for _, seconds in answers))


def ask(model: Path, root: Path) -> None:
    """In a process of its own, that has begun as a worker does: with its logs and the vendor's library."""
    configure_logs("racer", "critical")
    OnnxRuntime()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    artefact = Engines(EngineCache(root, 1 << 30)).obtain(model, CONFIG, BUCKETS).artefact
    print(json.dumps([artefact.trace.origin, time.perf_counter() - began]))


def run_all(races: int, kills: int, racers: int, seed: int) -> Tally:
    """Kills are spread over the races."""
    logging.getLogger("headrace").setLevel(logging.CRITICAL)
    chance, tally = random.Random(seed), Tally()
    with (
        tempfile.TemporaryDirectory(prefix="hr-races-") as folder,
        Progress(transient=True, auto_refresh=False) as bar,  # no thread, for the racers are forked
    ):
        racing, killing = bar.add_task("races", total=races), bar.add_task("kills", total=kills)
        for number in range(races):
            race(prepare(Path(folder), number, racers, LEASE_S), tally)
            bar.update(racing, completed=tally.races, refresh=True)
        for number in range(races, races + TRIES * kills):
            if tally.interrupted >= kills:
                break
            kill(prepare(Path(folder), number, racers, SHORT_LEASE_S), tally, chance)
            bar.update(killing, completed=tally.interrupted, refresh=True)
    return tally


def prepare(folder: Path, number: int, racers: int, lease_s: float) -> Track:
    """Every second race is between machines."""
    (folder / "builds").mkdir(exist_ok=True)
    store = EngineStore(FileObjects(folder / "store"), KEYRING, lease_s=lease_s)
    if number % 2:
        roots, shared = [folder / f"machine-{n}" for n in range(racers)], store
    else:
        roots, shared = [folder / "host"] * racers, None
    caches = [EngineCache(root, 1 << 30, keyring=KEYRING, store=shared) for root in roots]
    return Track(caches, {"race": number}, folder / "builds" / str(number))


def race(track: Track, tally: Tally) -> None:
    tally.races += 1
    finish([fork(track, cache) for cache in track.caches], tally)
    tally.builds += builds(track)


def kill(track: Track, tally: Tally, chance: random.Random) -> None:
    """Ends the first that begins to build; it says so by writing its pid."""
    racers = [fork(track, cache) for cache in track.caches]
    limit_at = time.monotonic() + BEGIN_S
    while not (started := read(track.builds)).endswith("\n"):
        if time.monotonic() > limit_at:
            raise TimeoutError(f"Expected a build to begin within {BEGIN_S:.0f} s, none did.")
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 1.5 * STEPS * len(FILES) * STEP_S))
    os.kill(int(started.split()[0]), signal.SIGKILL)
    finish(racers, tally)
    # Who comes later on the victim's machine is served as well.
    finish([fork(track, track.caches[0])], tally)
    tally.interrupted += builds(track) > 1


def fork(track: Track, cache: EngineCache) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = OTHER
    try:
        artefact = cache.get_or_build(track.parts, builder(track.builds))
        code = WHOLE if is_whole(artefact.path) else BROKEN
    finally:
        os._exit(code)


def finish(racers: list[int], tally: Tally) -> None:
    for pid in racers:
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        tally.served += code == WHOLE
        tally.broken += code == BROKEN
        tally.kills += code == -signal.SIGKILL
        tally.failed += code not in (WHOLE, BROKEN, -signal.SIGKILL)


def builder(began: Path) -> Callable[[Path], None]:
    def build(into: Path) -> None:
        with began.open("a") as file:
            file.write(f"{os.getpid()}\n")
        nonce = secrets.token_bytes(32)
        (into / "plans").mkdir()
        for name in FILES:
            with (into / name).open("wb") as file:
                for step in range(STEPS):
                    file.write(expected(nonce, name, step))
                    file.flush()
                    time.sleep(STEP_S)
        (into / "nonce").write_bytes(nonce)

    return build


def expected(nonce: bytes, name: str, step: int) -> bytes:
    return hashlib.shake_128(nonce + f"{name} {step}".encode()).digest(STEP_BYTES)


def is_whole(artefact: Path) -> bool:
    nonce = (artefact / "nonce").read_bytes()
    return len(nonce) == 32 and all(
        (artefact / name).read_bytes()
        == b"".join(expected(nonce, name, step) for step in range(STEPS))
        for name in FILES
    )


def builds(track: Track) -> int:
    return len(read(track.builds).split())


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine_races", description=__doc__)
    parser.add_argument("--races", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--racers", type=int, default=RACERS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ask", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(*options.ask)
        return 0
    del options.ask
    tally = run_all(**vars(options))
    print(json.dumps(to_builtins(tally)))
    return 0 if tally.is_well else 1


if __name__ == "__main__":
    raise SystemExit(main())
