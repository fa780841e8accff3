"""`headrace models`: add, list, show and remove models."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from headrace.cli.options import Data, Json, settings_for
from headrace.cli.output import console, handle_errors, output, print_json

if TYPE_CHECKING:
    from infra.objects import ObjectStore
    from infra.settings import Settings
    from pipelines.registry import Added
    from schemas.models import ModelCard

app = typer.Typer(help="Add, list, show and remove models.", no_args_is_help=True)

STAGES = {
    "validate": "read model.yaml",
    "build": "build the engine",
    "check": "answer the sample",
    "install": "install",
}

Name = Annotated[str, typer.Argument(help="As `headrace models list` shows it.")]


@app.command()
@handle_errors
def add(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders with a model.yaml each.")
    ],
    json: Json = False,
    data: Data = None,
) -> None:
    """Check each model, compile it for this machine, let it answer a sample, install it.

    Prints one line a model. Exit code 0: all are installed. 2: one is refused; those before it stay.
    """
    settings = settings_for(data)
    objects = _objects(settings)
    for folder in folders:
        added = _add(folder, objects, settings)
        card = added.card
        if json:
            print_json({**_facts(card), "new": added.new}, line=True)
        elif added.new:
            console.print(f"{card.name} version {card.version} added, {decimal(card.size_bytes)}")
        else:
            console.print(f"{card.name} version {card.version} is installed already, unchanged")


@app.command("list")
@handle_errors
def list_(json: Json = False, data: Data = None) -> None:
    """List the installed models."""
    from infra.catalogue import Catalogue

    cards = Catalogue(_objects(settings_for(data))).cards()
    if json:
        print_json(cards)
    elif cards:
        output.print(_table(cards))
    else:
        console.print("No model is installed; `headrace models add DIR` installs one.")


@app.command()
@handle_errors
def show(
    name: Name,
    version: Annotated[int | None, typer.Option(help="The newest by default.")] = None,
    json: Json = False,
    data: Data = None,
) -> None:
    """Show all that is known of a model."""
    from infra.catalogue import Catalogue

    card = Catalogue(_objects(settings_for(data))).resolve(name, version)
    if json:
        print_json(card)
        return
    table = Table(show_header=False, box=None)
    for fact, value in _facts(card).items():
        table.add_row(f"[dim]{fact}[/]", escape(_shown(fact, value)))
    output.print(table)


@app.command()
@handle_errors
def remove(
    name: Name,
    version: Annotated[int | None, typer.Option(help="Needed if there are several.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Even the model's last version.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    data: Data = None,
) -> None:
    """Uninstall a version of a model. Jobs that still wait for it will fail."""
    from pipelines import registry

    objects = _objects(settings_for(data))
    card = registry.removable(name, version, objects, force=force)
    if not yes:
        typer.confirm(
            f"Remove {card.name} version {card.version}? Jobs that wait for it will fail.",
            abort=True,
            err=True,
        )
    registry.remove(card, objects)
    console.print(f"{card.name} version {card.version} removed")


def _objects(settings: Settings) -> ObjectStore:
    from infra.objects import connect_objects

    return connect_objects(settings)


def _add(folder: Path, objects: ObjectStore, settings: Settings) -> Added:
    from headrace.cli.jobs import progress_bar
    from pipelines import registry
    from pipelines.engines import open_engines

    engines = open_engines(settings, objects)
    with progress_bar() as bar:
        task = bar.add_task("", total=len(STAGES))

        def show_stage(stage: registry.Stage) -> None:
            done = list(STAGES).index(stage)
            bar.update(task, completed=done, description=f"{folder}: {STAGES[stage]}")

        return registry.add(
            folder,
            objects,
            engines,
            budget_bytes=settings.worker.memory_bytes,
            on_stage=show_stage,
        )


def _facts(card: ModelCard) -> dict[str, object]:
    import msgspec

    facts: dict[str, object] = msgspec.to_builtins(card)
    return facts


def _shown(fact: str, value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items() if inner is not None)
    if fact in ("size_bytes", "memory_bytes") and isinstance(value, int):
        return decimal(value)
    return _when(value) if isinstance(value, float) else str(value)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _table(cards: list[ModelCard]) -> Table:
    table = Table(box=None, header_style="dim")
    for column in ("name", "version", "modality", "tier", "size", "added", "description"):
        table.add_column(column, justify="right" if column in ("version", "size") else "left")
    for card in cards:
        table.add_row(
            card.name,
            str(card.version),
            card.modality,
            card.tier,
            decimal(card.size_bytes),
            _when(card.added_at),
            escape(card.description),
        )
    return table
