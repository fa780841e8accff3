"""`headrace topics`: the topics of the event log, as declared and as a Kafka cluster has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from headrace.cli.options import Data, Json, settings_for
from headrace.cli.output import console, handle_errors, output, print_json, print_yaml

if TYPE_CHECKING:
    from infra.eventlog.kafka_topics import TopicChange
    from infra.settings import Settings

app = typer.Typer(
    help="List the event log's topics; create them on Kafka; document them.", no_args_is_help=True
)

DONE = {"create": "created", "configure": "configured"}
PLANNED = {"create": "to be created", "configure": "to be configured"}
AS_FOUND = {"differs": "left with another number of partitions", "none": "unchanged"}


@app.command("list")
@handle_errors
def list_(json: Json = False) -> None:
    """List the declared topics: what is in them, who writes and reads them, how long they keep it."""
    from schemas.topics import TOPICS

    if json:
        print_json(TOPICS)
        return
    table = Table(box=None, header_style="dim")
    for column in ("name", "kept", "written by", "read by", "holds"):
        table.add_column(column, justify="right" if column == "kept" else "left")
    for topic in TOPICS:
        kept = f"{topic.retention_s / 86400:g} d"
        table.add_row(topic.name, kept, topic.writers, topic.readers, topic.about)
    output.print(table)


@app.command()
@handle_errors
def apply(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be done.")
    ] = False,
    json: Json = False,
    data: Data = None,
) -> None:
    """Create the topics that a Kafka cluster has not got, and set what differs. Deletes nothing."""
    settings = settings_for(data)
    if not settings.log_address.startswith("kafka:"):
        console.print("The embedded event log makes its topics itself: there is nothing to do.")
        if json:
            print_json([])
        return
    changes = _apply(settings, dry_run)
    if json:
        print_json(changes)
    else:
        output.print(_table(changes, dry_run))


@app.command()
@handle_errors
def asyncapi(json: Json = False) -> None:
    """Print the AsyncAPI document of the topics, as YAML: what others need who write or read them."""
    from headrace import __version__
    from schemas.asyncapi import document

    if json:
        print_json(document(__version__))
    else:
        print_yaml(document(__version__))


def _apply(settings: Settings, dry_run: bool) -> list[TopicChange]:
    from infra.eventlog.kafka import cluster_at
    from infra.eventlog.kafka_topics import ensure_topics

    return ensure_topics(cluster_at(settings.log_address, settings.kafka), dry_run=dry_run)


def _table(changes: list[TopicChange], dry_run: bool) -> Table:
    words = AS_FOUND | (PLANNED if dry_run else DONE)
    table = Table(box=None, header_style="dim")
    for column in ("name", "partitions", "", "settings"):
        table.add_column(column, justify="right" if column == "partitions" else "left")
    for change in changes:
        settings = ", ".join(f"{key}={value}" for key, value in change.settings.items())
        table.add_row(change.name, str(change.partitions), words[change.action], escape(settings))
    return table
