"""`headrace lake`: see what is archived; erase a job or a tenant; delete what is past its retention."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from msgspec import Struct
from rich.table import Table

from headrace.cli.options import Data, Json, settings_for
from headrace.cli.output import console, handle_errors, output, print_json
from infra.lake import LakeFile, lake_files, need_pyarrow
from infra.objects import ObjectStore, connect_objects
from schemas.errors import InvalidJob

app = typer.Typer(help="See what is archived; erase and prune it.", no_args_is_help=True)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class Holding(Struct, frozen=True):
    """What the lake holds of one tenant, model and date. newest: when a file was last written."""

    tenant: str
    model: str
    date: str
    files: int
    size_bytes: int
    newest: float


class Erased(Struct, frozen=True):
    """files: of rows, deleted or written again. blobs: payloads and results. left: files with rows that came
    later than the erasure; not known in a dry run."""

    erased: str
    files: int
    blobs: int
    left: int | None
    dry_run: bool


class Pruned(Struct, frozen=True):
    retention_days: int
    files: int
    size_bytes: int
    dry_run: bool


@app.command()
@handle_errors
def show(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model's.")] = None,
    json: Json = False,
    data: Data = None,
) -> None:
    """Show what the lake holds, by tenant, model and date."""
    objects = connect_objects(settings_for(data))
    found = [one for one in _holdings(objects, tenant) if model is None or one.model == model]
    if json:
        print_json(found)
        return
    if not found:
        console.print("Nothing is archived; docs/lake.md says how to begin.")
        return
    table = Table(box=None, header_style="dim")
    for column in ("tenant", "model", "date", "files", "size", "last written"):
        table.add_column(column, justify="right" if column in ("files", "size") else "left")
    for one in found:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.newest))
        table.add_row(
            one.tenant, one.model, one.date, str(one.files), _size(one.size_bytes), written
        )
    output.print(table)


@app.command()
@handle_errors
def erase(
    job: Annotated[str | None, typer.Option(help="The job to erase.")] = None,
    tenant: Annotated[str | None, typer.Option(help="The tenant to erase, up to now.")] = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
    data: Data = None,
) -> None:
    """Erase a job, or all of a tenant up to now, from the lake; with payloads and large results.

    The event log keeps what it has until its retention is over: docs/lake.md.
    """
    if (job is None) == (tenant is None):
        raise InvalidJob("erase_what", "Expected either --job ID or --tenant NAME.")
    need_pyarrow()
    objects = connect_objects(settings_for(data))
    from workers.archiver import erase as erasing
    from workers.archiver.erasures import new_erasure

    now = time.time()
    wanted = new_erasure("job", job, now) if job else new_erasure("tenant", tenant or "", now)
    left: int | None = None
    if dry_run:
        found = erasing.find(objects, wanted)
    else:
        if not yes:
            typer.confirm(f"Erase {wanted.kind} {wanted.name} for good?", abort=True, err=True)
        with _progress("erasing") as report:
            found, later = erasing.erase(objects, wanted, report)
        left = len(later)
    done = Erased(wanted.name, len(found.whole) + len(found.mixed), len(found.blobs), left, dry_run)
    if json:
        print_json(done)
        return
    verb = "would erase" if dry_run else "erased"
    output.print(
        f"{verb} {wanted.kind} {done.erased}: files of rows {done.files}, payloads and results {done.blobs}"
    )
    if left:
        console.print(
            f"{left} files have rows that came later, by their clocks; erase again for them."
        )


@app.command()
@handle_errors
def prune(
    days: Annotated[
        int | None, typer.Option(min=1, help="Keep so many days, instead of the setting's.")
    ] = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
    data: Data = None,
) -> None:
    """Delete rows past the retention (HEADRACE_ARCHIVER__RETENTION_DAYS). The archiver does so by itself."""
    settings = settings_for(data)
    need_pyarrow()
    objects = connect_objects(settings)
    from workers.archiver import upkeep

    kept_days = settings.archiver.retention_days if days is None else days
    expired = upkeep.find_expired(objects, kept_days, time.time())
    if not dry_run:
        if expired.files and not yes:
            question = f"Delete {len(expired.files)} files older than {kept_days} days for good?"
            typer.confirm(question, abort=True, err=True)
        with _progress("deleting") as report:
            upkeep.prune(objects, expired, report)
    size_bytes = sum(file.size_bytes for file in expired.files)
    done = Pruned(kept_days, len(expired.files), size_bytes, dry_run)
    if json:
        print_json(done)
    elif not kept_days:
        output.print("no retention is set: the lake keeps its rows")
    else:
        verb = "would delete" if dry_run else "deleted"
        output.print(
            f"{verb} {done.files} files of rows ({_size(size_bytes)}) older than {kept_days} days"
        )


def _holdings(objects: ObjectStore, tenant: str | None) -> list[Holding]:
    groups: dict[tuple[str, str, str], list[LakeFile]] = defaultdict(list)
    for file in lake_files(objects, tenant):
        groups[file.tenant, file.model, file.date.isoformat()].append(file)
    return [
        Holding(
            *place, len(files), sum(f.size_bytes for f in files), max(f.modified for f in files)
        )
        for place, files in sorted(groups.items())
    ]


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    from headrace.cli.jobs import progress_bar

    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"
