"""Cold start by case: how long a process takes from its start to its first result, by where the engine comes from.

    python -m bench.coldstart [--quick] [--json FILE] [--write-docs]

no cache    nobody has built the engine: this process does
remote hit  the engine is in the object store, not on this machine
local hit   it is on this machine's disk
prewarmed   a worker holds it, each bucket run once: the time of a run alone

Each measurement is a process of its own, in shuffled order. Engines for GPUs that are not here are built and found, not
loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

from msgspec import Struct, structs
from rich.progress import track

from bench import engine_fetch, engine_races
from bench.chart import bars
from bench.engine_load import (
    CACHE,
    CACHE_BYTES,
    SETTLE_S,
    Model,
    Request,
    all_models,
    built,
    keyring,
    measure,
    on,
    request,
    sample,
    shuffled,
)
from bench.figures import Effort, Figure, rounded, spread
from bench.machine import describe
from bench.report import BEGIN, END, show, write_json
from bench.stack import ServersMissing
from infra.objects import open_objects
from infra.settings import S3Settings
from pipelines.engines import EngineCache
from pipelines.engines.store import EngineStore

Case = Literal["no cache", "remote hit", "local hit", "prewarmed"]
CASES: tuple[Case, ...] = get_args(Case)
ON_CPU = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
"""Backends, and the package that each needs."""

RTX, RTX_PACKAGE, TARGET = "tensorrt-rtx", "tensorrt_rtx", "sm89"
BUILDS = 3
"""Rounds of what takes long and differs little."""

DOCS = Path(__file__).resolve().parents[1] / "docs"


class Store(NamedTuple):
    """about: what it is, for the reader."""

    url: str
    s3: dict[str, Any]
    about: str


class Subject(Struct, frozen=True):
    """A model by one backend. target: a GPU that is not here, "" for this machine."""

    model: Model
    backend: str
    target: str = ""

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.backend}"

    @property
    def cases(self) -> tuple[Case, ...]:
        return ("no cache", "local hit") if self.target else CASES


Times = dict[tuple[str, Case], list[float]]
"""Milliseconds, by subject and case."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: rough")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument(
        "--write-docs", action="store_true", help="renew docs/coldstart.md and .svg"
    )
    options = parser.parse_args()
    began = time.monotonic()
    effort: Effort = "quick" if options.quick else "usual"
    figures = list(measure(effort, "embedded"))
    figures += engine_races.measure(effort, "embedded")
    try:
        figures += engine_fetch.measure(effort, "embedded")
    except ServersMissing as missing:
        print(f"fetch from an object store: not measured: {missing}", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory(prefix="hr-cold-") as folder,
        object_store(Path(folder)) as store,
    ):
        subjects, times = measure_cases(Path(folder), store, rounds=2 if options.quick else 5)
    figures += [figure for one in subjects for figure in case_figures(one, times)]
    machine = describe() | {"object store": store.about}
    taken_s = time.monotonic() - began
    machine |= {
        "measured": f"{datetime.now(UTC).date().isoformat()}, in {taken_s / 60:.0f} minutes"
    }
    show(figures, machine)
    if options.json:
        write_json(options.json, figures, machine)
    if options.write_docs:
        write_docs(figures, subjects, times, machine)
    return 0


def measure_cases(folder: Path, store: Store, rounds: int) -> tuple[list[Subject], Times]:
    key = secrets.token_hex(32)
    shared = EngineStore(open_objects(store.url, S3Settings.model_validate(store.s3)), keyring(key))
    cache = EngineCache(folder / "cache", CACHE_BYTES, keyring=keyring(key), store=shared)
    subjects = list(
        track(prepared(all_models(folder / "models"), cache), "compiling", transient=True)
    )
    time.sleep(SETTLE_S)
    requests = {
        one.name: request(one.model, cache.root, key, target=one.target) for one in subjects
    }
    for one in requests.values():
        sample(
            CACHE, one
        )  # notes that the files are as they were built, and compiles what is imported
    times: Times = {(one.name, case): [] for one in subjects for case in one.cases}
    plan = shuffled(list(times), rounds)
    for name, case in track(plan, "measuring", transient=True):
        if case == "no cache" and len(times[name, case]) == BUILDS:
            continue
        times[name, case].append(taken(requests[name], case, store, folder))
    return subjects, times


def prepared(models: list[Model], cache: EngineCache) -> Iterator[Subject]:
    """With every engine in the cache and, as it is published, in the store."""
    for backend, package in ON_CPU.items():
        if importlib.util.find_spec(package):
            for model in models:
                yield Subject(built(on(backend, model), cache), backend)
    if importlib.util.find_spec(RTX_PACKAGE):
        for model in models:
            yield Subject(built(on(RTX, model), cache, TARGET), f"{RTX} for {TARGET}", TARGET)


def taken(local: Request, case: Case, store: Store, folder: Path) -> float:
    """Milliseconds of one process."""
    if case == "prewarmed":
        return sample(CACHE, structs.replace(local, held=True)).held
    if case == "local hit":
        return time_of(sample(CACHE, local), local)
    elsewhere = folder / "elsewhere"
    new = structs.replace(local, cache=str(elsewhere))
    if case == "remote hit":
        new = structs.replace(new, store=store.url, s3=store.s3)
    try:
        return time_of(sample(CACHE, new), new)
    finally:
        shutil.rmtree(elsewhere)


def time_of(sample: Any, request: Request) -> float:
    return float(sample.load if request.target else sample.first_result)


@contextmanager
def object_store(folder: Path) -> Iterator[Store]:
    """MinIO; where it cannot be had, a folder, which is named."""
    import pytest

    from tests.servers.minio import PACKAGE, minio_server

    try:
        with minio_server() as server, server.s3.bucket() as bucket:
            s3 = server.s3.settings(folder / "copies", secret_key=server.s3.secret_key)
            told = s3.model_dump(mode="json") | {
                "access_key": server.s3.access_key,
                "secret_key": server.s3.secret_key,
            }
            about = f"MinIO {PACKAGE.rpartition('@')[2]}, a process on the same machine"
            yield Store(server.s3.url(bucket), told, about)
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        print(f"MinIO: {missing}", file=sys.stderr)
        yield Store(
            (folder / "objects").as_uri(), {}, "a folder on the same disk, for want of MinIO"
        )


def case_figures(one: Subject, times: Times) -> Iterator[Figure]:
    for case in one.cases:
        came = times[one.name, case]
        yield Figure(
            name=f"{case}: {one.name}",
            measured=median(came),
            unit="ms",
            note=spread(sorted(came)),
        )
    if one.target:
        compiled, found = (median(times[one.name, case]) for case in one.cases)
        yield Figure(
            name=f"compile to cached: {one.name}",
            measured=compiled / found,
            note="without a GPU: the artefact at hand, not loaded",
        )


def write_docs(
    figures: list[Figure], subjects: list[Subject], times: Times, machine: dict[str, str]
) -> None:
    """Renew the chart, and what stands between the markers of the page."""
    groups = {
        one.name: [(case, median(times[one.name, case])) for case in one.cases] for one in subjects
    }
    (DOCS / "coldstart.svg").write_text(bars(groups, CASES), "utf-8")
    page = DOCS / "coldstart.md"
    before, rest = page.read_text("utf-8").split(BEGIN)
    facts = [f"- {what}: {text}" for what, text in machine.items()]
    table = [
        "| model, backend | " + " | ".join(CASES) + " | compile to cached |",
        "|" + " --- |" * 6,
    ]
    table += [row(one, times) for one in subjects]
    ratios = ["| figure | asked | measured |  | how |", "|" + " --- |" * 5]
    for figure in figures:
        if figure.asked:
            name, _, *cells = figure.row()
            ratios.append(f"| {' | '.join([name, *cells])} |")
    lines = [BEGIN, *facts, "", *table, "", *ratios, END]
    page.write_text(before + "\n".join(lines) + rest.split(END)[1], "utf-8")


def row(one: Subject, times: Times) -> str:
    """Medians, with the least and the most in brackets."""
    cells = []
    for case in CASES:
        came = times.get((one.name, case))
        cells.append(
            f"{rounded(median(came))} ({rounded(min(came))} to {rounded(max(came))})"
            if came
            else ""
        )
    compiled = ""
    if one.target:
        compiled = rounded(
            median(times[one.name, "no cache"]) / median(times[one.name, "local hit"])
        )
    return f"| {one.name} | {' | '.join(cells)} | {compiled} |"


if __name__ == "__main__":
    raise SystemExit(main())
