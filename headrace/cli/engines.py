"""`headrace engines`: compiled engines, on this machine and in the object store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TypeVar

import typer
from msgspec import Struct
from msgspec.structs import replace
from rich.filesize import decimal

from headrace.cli.options import Data, Json, settings_for
from headrace.cli.output import FAILED, USER_ERROR, console, handle_errors, output, print_json
from schemas.errors import InvalidJob

if TYPE_CHECKING:
    from headrace.cli.engine_builds import Built, Warmed
    from infra.catalogue import Catalogue
    from pipelines.engines import EngineCache, Engines
    from pipelines.engines.inventory import EngineInfo
    from pipelines.engines.manifest import Manifest
    from pipelines.engines.store import EngineStore

T = TypeVar("T")
R = TypeVar("R", "Built", "Warmed")

app = typer.Typer(help="Compile engines, and look after the cache of them.", no_args_is_help=True)

DAY_S = 86400.0
BUSY_S = 30.0
"""How long `verify` waits for somebody who is at work on the same engine."""

Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY...", help="Or the beginning of it; all by default."),
]
InStore = Annotated[
    bool, typer.Option("--store", help="In the object store, instead of on this machine.")
]


class Checked(Struct, frozen=True):
    """fault: what is wrong with the engine, None if nothing is."""

    key: str
    where: str
    fault: str | None


class Removed(Struct, frozen=True):
    key: str
    where: str
    size_bytes: int
    used_at: float
    dry_run: bool


class Moved(Struct, frozen=True):
    """new: False if it was here already."""

    key: str
    engine: str
    size_bytes: int
    new: bool


@app.command("list")
@handle_errors
def list_(json: Json = False, data: Data = None) -> None:
    """List the engines, those that failed to build, and those that are not to be believed."""
    found = _inventory(_cache(data))
    if json:
        print_json([replace(info, manifest=None, log="") for info in found])
    elif found:
        from headrace.cli.engine_tables import listing

        output.print(listing(found))
    else:
        console.print("There are no engines; `headrace engines build MODEL` makes some.")


@app.command()
@handle_errors
def show(
    key: Annotated[str, typer.Argument(help="Or the beginning of it.")],
    json: Json = False,
    data: Data = None,
) -> None:
    """Show all that is known of an engine: what it depends on, its files, its builder's log."""
    [info] = _picked(_inventory(_cache(data)), [key])
    if json:
        print_json(info)
        return
    from headrace.cli.engine_tables import facts

    output.print(facts(info))
    if info.log:
        output.print(info.log, markup=False, style="dim", soft_wrap=True)


@app.command()
@handle_errors
def build(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="NAME, NAME/VERSION, or a folder.")
    ],
    backend: Annotated[
        str | None, typer.Option(help="Instead of the one that model.yaml names.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="A device other than this machine's, in the backend's words.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Anew, whatever is there, here and in the store.")
    ] = False,
    json: Json = False,
    data: Data = None,
) -> None:
    """Compile the engines of models, unless the cache has them. Prints one line an engine.

    With keys to sign them, they are copied to the object store. Exit code 2: one cannot be built.
    """
    from headrace.cli.engine_builds import build_all, wanted
    from headrace.cli.engine_tables import outcome

    named = wanted(models, _catalogue(data), backend)
    built = build_all(named, _engines(data), target=target, force=force)
    if _tell(built, outcome, json):
        raise typer.Exit(USER_ERROR)


@app.command()
@handle_errors
def prewarm(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="NAME or NAME/VERSION; all by default."),
    ] = None,
    json: Json = False,
    data: Data = None,
) -> None:
    """Have this machine ready for the installed models: fetch their engines, or compile them, and run each once.

    Run with a new version of a backend before its rollout, it has the fleet's engines ready too. What is
    compiled for a driver is compiled by the first runs, so run it with a new driver on each machine.
    """
    from headrace.cli.engine_builds import build_all, wanted, warm_all
    from headrace.cli.engine_tables import outcome, warmth

    named = wanted(models or _installed(data), _catalogue(data), None)
    engines = _engines(data)
    warmed = warm_all(named, engines, settings_for(data).worker.memory_bytes)
    failed = _tell(build_all(named, engines), outcome, json)
    if _tell(warmed, warmth, json) or failed:
        raise typer.Exit(USER_ERROR)


@app.command()
@handle_errors
def verify(
    keys: Keys = None, store: InStore = False, json: Json = False, data: Data = None
) -> None:
    """Compare every byte of engines with what was signed. Exit code 1: something is wrong.

    A damaged engine is removed; in the store, a builder that has it shares it again.
    """
    cache = _cache(data)
    where = "store" if store else "disk"
    fault_of = _store(cache).verify if store else partial(cache.disk.verify, wait_s=BUSY_S)
    found = [info for info in _inventory(cache) if where in info.where and info.state != "failed"]
    checked = [
        Checked(info.key, where, fault_of(info.key))
        for info in _counted("verify", _picked(found, keys), len(found))
    ]
    if json:
        print_json(checked)
    else:
        for one in checked:
            output.print(f"{one.key}  {one.fault or 'good'}", markup=False, soft_wrap=True)
    if any(one.fault for one in checked):
        raise typer.Exit(FAILED)


@app.command()
@handle_errors
def prune(
    max_bytes: Annotated[
        int | None, typer.Option("--bytes", min=0, help="Keep no more; as the setting by default.")
    ] = None,
    unused_days: Annotated[
        float | None,
        typer.Option(min=0, help="With --store: remove what nobody has fetched for so long."),
    ] = None,
    store: InStore = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    json: Json = False,
    data: Data = None,
) -> None:
    """Remove the engines that were not used for longest. Never one in use, or just being built."""
    limits = [max_bytes, unused_days]
    if (store and limits == [None, None]) or (unused_days is not None and not store):
        came = "--store alone" if store else "--unused-days without --store"
        raise InvalidJob(
            "prune_what",
            f"Expected --store with --bytes, --unused-days or both, came {came}; on this machine the"
            " setting says how much is kept, or --bytes.",
        )
    cache = _cache(data)
    if store:
        unused_s = None if unused_days is None else unused_days * DAY_S
        entries = _store(cache).prune(max_bytes=max_bytes, unused_s=unused_s, dry_run=dry_run)
        gone = [Removed(e.key, "store", e.size_bytes, e.used_at, dry_run) for e in entries]
    else:
        evicted = cache.prune(max_bytes, dry_run=dry_run)
        gone = [Removed(e.key, "disk", e.size_bytes, e.used_at, dry_run) for e in evicted]
    if json:
        print_json(gone)
    else:
        verb = "would remove" if dry_run else "removed"
        output.print(f"{verb} {len(gone)}, {decimal(sum(one.size_bytes for one in gone))}")


@app.command("export")
@handle_errors
def export(
    file: Annotated[Path, typer.Argument(help="The tar file to write.")],
    keys: Keys = None,
    json: Json = False,
    data: Data = None,
) -> None:
    """Write signed engines of this machine to a file, for one that shares no object store."""
    from pipelines.engines.archive import export_engines

    cache = _cache(data)
    found = [i for i in _inventory(cache) if i.state == "ready" and "disk" in i.where]
    picked = [info.key for info in _picked(found, keys)]
    with _whole(file) as target:
        written = export_engines(cache, picked, target)
        moved = [_moved(manifest) for manifest in _counted("export", written, len(picked))]
    _report_moved(moved, f"written to {file}", json)


@app.command("import")
@handle_errors
def import_(
    file: Annotated[Path, typer.Argument(help="As `export` wrote it.")],
    json: Json = False,
    data: Data = None,
) -> None:
    """Take signed engines from a file. Exit code 1: it holds something else; engines before it stay."""
    from pipelines.engines.archive import import_engines

    cache = _cache(data)
    with file.open("rb") as source:
        taken = import_engines(cache, source)
        moved = [_moved(manifest, new) for manifest, new in _counted("import", taken)]
    _report_moved(moved, "taken in", json)


def _engines(data: Path | None) -> Engines:
    from infra.objects import connect_objects
    from pipelines.engines import open_engines

    settings = settings_for(data)
    return open_engines(settings, connect_objects(settings))


def _cache(data: Path | None) -> EngineCache:
    return _engines(data).cache


def _catalogue(data: Path | None) -> Catalogue:
    from infra.catalogue import Catalogue
    from infra.objects import connect_objects

    return Catalogue(connect_objects(settings_for(data)))


def _store(cache: EngineCache) -> EngineStore:
    if cache.store is None:
        raise InvalidJob(
            "engines_not_shared",
            "Expected engines in the object store, they are kept on this machine alone; set"
            " HEADRACE_ENGINES__KEYS or HEADRACE_ENGINES__KEYS_FILE to share them.",
        )
    return cache.store


def _inventory(cache: EngineCache) -> list[EngineInfo]:
    from pipelines.engines.inventory import inventory

    found = inventory(cache)
    if found.store_fault:
        console.print("the object store is left out, it does not answer: ", style="yellow", end="")
        console.print(found.store_fault, style="yellow", markup=False, soft_wrap=True)
    return found.engines


def _picked(found: Sequence[EngineInfo], keys: Sequence[str] | None) -> list[EngineInfo]:
    """All, or those whose keys begin so. Raises InvalidJob unless each beginning is of exactly one."""
    if not keys:
        return list(found)
    picked = []
    for key in keys:
        matches = [info for info in found if info.key.startswith(key)]
        if len(matches) != 1:
            raise InvalidJob(
                "engine_unknown",
                f"Expected one engine whose key begins with {key!r}, there are {len(matches)}; see"
                " `headrace engines list`.",
            )
        picked += matches
    return picked


def _installed(data: Path | None) -> list[str]:
    cards = _catalogue(data).cards()
    if not cards:
        console.print("No model is installed; `headrace models add DIR` installs one.")
    return [f"{card.name}/{card.version}" for card in cards]


def _tell(results: Iterable[R], line: Callable[[R], str], json: bool) -> bool:
    """Print each as it comes. Whether any of them is an error."""
    failed = False
    for result in results:
        failed |= result.error is not None
        if json:
            print_json(result, line=True)
        else:
            output.print(line(result), markup=False, soft_wrap=True)
    return failed


def _counted(what: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """The items, under a progress bar."""
    from headrace.cli.jobs import progress_bar

    with progress_bar() as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)


@contextmanager
def _whole(file: Path) -> Iterator[BinaryIO]:
    """A file that is there when all of it was written, or not at all."""
    unfinished = file.with_name(f"{file.name}.partial")
    try:
        with unfinished.open("wb") as target:
            yield target
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _moved(manifest: Manifest, new: bool = True) -> Moved:
    return Moved(manifest.key, manifest.label, manifest.size_bytes, new)


def _report_moved(moved: list[Moved], what: str, json: bool) -> None:
    if json:
        print_json(moved)
        return
    for one in moved:
        done = what if one.new else "was here already"
        output.print(f"{one.engine}: {one.key[:16]} {done}", markup=False, soft_wrap=True)
