"""The command line, one file per noun. A command's module is imported when the command is used."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from headrace import __version__


class Entry(NamedTuple):
    """Where a command or a group of them is, and its line in the list of commands."""

    module: str
    name: str
    help: str


COMMANDS = {
    "up": Entry("headrace.cli.stack", "up", "Start the embedded stack."),
    "down": Entry("headrace.cli.stack", "down", "Stop the embedded stack."),
    "status": Entry("headrace.cli.status", "status", "Show what runs and what waits."),
    "doctor": Entry(
        "headrace.cli.doctor",
        "doctor",
        "Check this machine, the settings, and the servers that they name.",
    ),
    "demo": Entry("headrace.cli.demo", "demo", "Run photographs, sentences and speech through it."),
    "jobs": Entry("headrace.cli.jobs", "app", "Submit jobs and see what became of them."),
    "deadletters": Entry(
        "headrace.cli.deadletters", "app", "Look at jobs that failed, and submit them again."
    ),
    "models": Entry("headrace.cli.models", "app", "Add, list, show and remove models."),
    "engines": Entry(
        "headrace.cli.engines", "app", "Compile engines, and look after the cache of them."
    ),
    "topics": Entry(
        "headrace.cli.topics",
        "app",
        "List the event log's topics; create them on Kafka; document them.",
    ),
    "lake": Entry("headrace.cli.lake", "app", "See what is archived; erase and prune it."),
    "objects": Entry("headrace.cli.objects", "app", "Create the object store's bucket on S3."),
}


class LazyCommands(TyperGroup):
    """Lists commands without importing them; imports the one that is called or completed."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, load_command(COMMANDS[name]) if name else listed, rest


def load_command(entry: Entry) -> Any:
    """The command itself, as typer runs it."""
    target = getattr(import_module(entry.module), entry.name)
    if isinstance(target, typer.Typer):
        target.rich_markup_mode = None
        return typer.main.get_group(target)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command()(target)
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=LazyCommands,
    no_args_is_help=True,
    # Plain help: what typer needs to draw boxes takes longer to import than all the rest.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show it.")
    ] = False,
) -> None:
    """Event-driven asynchronous inference: jobs in by an event log, results back exactly once."""
    from infra.logs import configure_logs

    configure_logs("headrace", "warning")


for _name, _entry in COMMANDS.items():
    app.command(_name, help=_entry.help)(lambda: None)


def main() -> None:
    app(prog_name="headrace")
