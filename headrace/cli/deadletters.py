"""`headrace deadletters`: look at jobs that failed for good, and submit them again."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from headrace.cli.jobs import open_client, progress_bar
from headrace.cli.options import Data, Json
from headrace.cli.output import console, handle_errors, output, print_json

if TYPE_CHECKING:
    from producers.deadletters import DeadLetters, LetterFilter, Selection
    from producers.letters import DeadLetter

app = typer.Typer(help="Look at jobs that failed, and submit them again.", no_args_is_help=True)

Topic = Annotated[str | None, typer.Option(help="Only of this topic.")]
Model = Annotated[str | None, typer.Option(help="Only of this model.")]
Tenant = Annotated[str | None, typer.Option(help="Only of this tenant.")]
Code = Annotated[str | None, typer.Option(help="Only with this error code.")]
Job = Annotated[str | None, typer.Option(help="Only of this job.")]
Since = Annotated[float | None, typer.Option(min=0, help="Hours to look back; all by default.")]


@app.command("list")
@handle_errors
def list_letters(
    topic: Topic = None,
    model: Model = None,
    tenant: Tenant = None,
    code: Code = None,
    job: Job = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    summary: Annotated[bool, typer.Option("--summary", help="Count them by error code.")] = False,
    json: Json = False,
    data: Data = None,
) -> None:
    """List dead letters, newest first."""
    wanted = _filter(topic, model, tenant, code, job, since)
    if summary:
        with open_client(data) as client, reading():
            counts = dict(client.dead_letters.codes(wanted).most_common())
        print_json(counts) if json else output.print(_counts(counts))
    else:
        with open_client(data) as client, reading():
            letters = client.dead_letters.newest(wanted, limit)
        print_json(letters) if json else output.print(_letters(letters))


@app.command()
@handle_errors
def show(
    letter: Annotated[str, typer.Argument(metavar="LETTER", help="Its id, or its job's.")],
    payload: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the payload's bytes to this file.")
    ] = None,
    json: Json = False,
    data: Data = None,
) -> None:
    """Show one dead letter: why it failed, every header, and where its payload is."""
    with open_client(data) as client:
        with reading():
            found = client.dead_letters.get(letter)
        if payload is not None:
            from infra.objects import connect_objects
            from producers.letters import read_payload

            payload.write_bytes(read_payload(found, connect_objects(client.settings)))
            console.print(f"payload written to {payload}", markup=False, soft_wrap=True)
    if json:
        print_json({**_document(found.letter), "headers": found.record.headers})
    else:
        output.print(_facts(found.letter, found.record.headers))


@app.command()
@handle_errors
def redrive(
    topic: Topic = None,
    model: Model = None,
    tenant: Tenant = None,
    code: Code = None,
    job: Job = None,
    since: Since = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many, the oldest of each topic first.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.01, max=1e6, help="Most jobs a second.")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds from now; as for new jobs by default.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also what cannot run, as far as can be seen.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
    data: Data = None,
) -> None:
    """Submit the jobs of dead letters again, under the same job ids.

    Each goes back to its topic with a new deadline. Redriving a letter twice runs its job once.
    """
    wanted = _filter(topic, model, tenant, code, job, since)
    if not (yes or dry_run or can_ask()):
        raise typer.BadParameter("Expected --yes, as there is no terminal to ask on.")
    with open_client(data) as client:
        letters = client.dead_letters
        with reading():
            selection = letters.select(wanted, limit=limit, force=force)
        if selection.left_out:
            console.print(
                f"left out, because they cannot run: {selection.left_out}; `headrace deadletters show` "
                "says why, --force takes them too",
                style="yellow",
            )
        if dry_run:
            _show_selected(letters, selection, json=json)
            return
        if selection.letters and not yes:
            typer.confirm(_question(selection), abort=True, err=True)
        options = {} if deadline is None else {"deadline_s": deadline}
        with progress_bar() as bar:
            task = bar.add_task("redriving", total=selection.letters)
            redriven = letters.redrive(
                selection, rate=rate, progress=lambda count: bar.advance(task, count), **options
            )
    if json:
        print_json({"redriven": redriven, "left_out": selection.left_out})
    else:
        console.print(f"jobs submitted again: {redriven}")


def can_ask() -> bool:
    return sys.stdin.isatty()


def reading() -> Status:
    """What a person sees while a long log is read."""
    return console.status("reading dead letters")


def _filter(
    topic: str | None,
    model: str | None,
    tenant: str | None,
    code: str | None,
    job: str | None,
    since: float | None,
) -> LetterFilter:
    from producers.deadletters import LetterFilter

    since_s = 0.0 if since is None else time.time() - since * 3600
    return LetterFilter(topic=topic, model=model, tenant=tenant, code=code, job=job, since=since_s)


def _question(selection: Selection) -> str:
    counts = ", ".join(f"{count} {code}" for code, count in selection.codes.most_common(5))
    return f"Jobs to be submitted again: {selection.letters} ({counts}). Go on?"


def _show_selected(letters: DeadLetters, selection: Selection, *, json: bool) -> None:
    for letter, _ in letters.each(selection):
        if json:
            print_json(_document(letter), line=True)
        else:
            output.print(
                f"{letter.id} job {letter.job} to {letter.topic}", markup=False, soft_wrap=True
            )
    console.print(f"jobs that would be submitted again: {selection.letters}")


def _counts(counts: dict[str, int]) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column("error")
    table.add_column("letters", justify="right")
    for code, count in counts.items():
        table.add_row(escape(code), str(count))
    return table


def _letters(letters: list[DeadLetter]) -> Table:
    table = Table(box=None, header_style="dim")
    for column in ("letter", "job", "model", "tenant", "error", "age"):
        table.add_column(column, justify="right" if column == "age" else "left")
    for letter in letters:
        error = f"{escape(letter.code)}{' [red](cannot run)[/]' if letter.obstacle else ''}"
        age = f"{max(0.0, time.time() - letter.at):.0f} s"
        own = map(escape, (letter.id, letter.job, _model(letter), letter.tenant))
        table.add_row(*own, error, age)
    return table


def _model(letter: DeadLetter) -> str:
    return f"{letter.model}/{letter.version}" if letter.version else letter.model


def _facts(letter: DeadLetter, headers: dict[str, str]) -> Table:
    table = Table(show_header=False, box=None)
    facts = _document(letter)
    facts["at"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.at))
    where = f"object {letter.object}" if letter.object else "in the letter"
    facts["payload"] = f"{facts.pop('size_bytes')} bytes, {where}"
    del facts["object"]
    for name, value in [*facts.items(), *sorted(headers.items())]:
        if value not in (None, ""):
            table.add_row(f"[dim]{escape(name)}[/]", escape(str(value)))
    return table


def _document(letter: DeadLetter) -> dict[str, Any]:
    import msgspec

    return msgspec.structs.asdict(letter)
