"""`headrace jobs`: submit, show, wait for, list, cancel and explain jobs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from headrace.cli.output import FAILED, console, handle_errors, output, print_json
from schemas.errors import InvalidJob, JobFailed

if TYPE_CHECKING:
    from producers.client import Client, JobHandle, JobOptions
    from schemas.results import Outcome

app = typer.Typer(help="Submit jobs and see what became of them.", no_args_is_help=True)

Data = Annotated[
    Path | None, typer.Option("--data", envvar="HEADRACE_DATA_DIR", help="The stack's folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one document a line for streams.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0, help="Most seconds to wait.")]
Ids = Annotated[list[str], typer.Argument(metavar="JOB...", show_default=False)]


def open_client(data: Path | None, tenant: str | None = None) -> Client:
    from producers.client import Client

    return Client(data_dir=data, tenant=tenant)


@app.command()
@handle_errors
def submit(
    model: Annotated[str, typer.Argument(help="A model's name; see `headrace models list`.")],
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE...", help="One job each; - reads stdin.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; one job each.")] = None,
    version: Annotated[int | None, typer.Option(help="The newest by default.")] = None,
    tenant: Annotated[str | None, typer.Option(help="On whose behalf.")] = None,
    tier: Annotated[str | None, typer.Option(help="premium, standard, basic or bulk.")] = None,
    priority: Annotated[int, typer.Option(help="0 to 9, higher first, within the tier.")] = 0,
    deadline: Annotated[float | None, typer.Option(help="Seconds from now.")] = None,
    key: Annotated[str | None, typer.Option(help="Idempotency key, for a single job.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the results.")] = False,
    timeout: Timeout = 300,
    json: Json = False,
    data: Data = None,
) -> None:
    """Submit a job for each FILE or --text. Prints job ids, or with --wait the results.

    Exit code 0: accepted (with --wait: all succeeded). 1: a job failed. 2: refused. 4: still running.
    """
    payloads: list[Any] = [
        sys.stdin.buffer.read() if str(file) == "-" else file for file in files or []
    ] + list(text or [])
    if not payloads:
        raise InvalidJob("payload_missing", "Expected at least one FILE or --text, came none.")
    if key is not None and len(payloads) > 1:
        raise InvalidJob(
            "key_shared", f"One --key stands for one job, came {len(payloads)} inputs."
        )
    with open_client(data, tenant) as client:
        options: JobOptions = {
            "version": version,
            "tier": tier,
            "priority": priority,
            "deadline_s": deadline,
        }
        if key is not None:
            handles = [client.submit(model, payloads[0], key=key, **options)]
        else:
            handles = client.submit_many(model, payloads, **options)
        if wait:
            _wait_for(client, handles, timeout, json=json)
        else:
            for handle in handles:
                print_json({"job": handle.id}, line=True) if json else output.print(handle.id)


@app.command()
@handle_errors
def wait(ids: Ids, timeout: Timeout = 300, json: Json = False, data: Data = None) -> None:
    """Wait until the jobs have ended. Exit code 0: all succeeded. 1: one failed. 4: still running."""
    from producers.client import JobHandle

    with open_client(data) as client:
        _wait_for(client, [JobHandle(job_id, client) for job_id in ids], timeout, json=json)


@app.command()
@handle_errors
def show(
    job: Annotated[str, typer.Argument(metavar="JOB")], json: Json = False, data: Data = None
) -> None:
    """Show one job: its state and, once it ended, its result."""
    with open_client(data) as client:
        outcome = client.status(job)
        if json:
            print_json(_document(client, outcome))
        else:
            output.print(_facts(client, outcome))


@app.command("list")
@handle_errors
def list_jobs(
    since: Annotated[float, typer.Option(help="Hours to look back.", min=0)] = 1,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    status: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    json: Json = False,
    data: Data = None,
) -> None:
    """List the newest jobs, newest first."""
    from producers.job_search import recent_jobs

    def wanted(outcome: Outcome) -> bool:
        return status in (None, outcome.status) and model in (None, outcome.model)

    with open_client(data) as client:
        found = recent_jobs(client.log, time.time() - since * 3600, limit, wanted)
        if json:
            print_json([_document(client, outcome, fetch=False) for outcome in found])
            return
        table = Table("job", "model", "state", "age", "answer")
        for outcome in found:
            age = f"{time.time() - outcome.submitted_at:.0f} s"
            table.add_row(outcome.job_id, _version(outcome), _state(outcome), age, _brief(outcome))
        output.print(table)


@app.command()
@handle_errors
def cancel(ids: Ids, json: Json = False, data: Data = None) -> None:
    """Ask to cancel jobs. Those that have not ended by then end as cancelled."""
    with open_client(data) as client:
        for job_id in ids:
            client.cancel(job_id)
            if json:
                print_json({"job": job_id, "cancel": "requested"}, line=True)
            else:
                output.print(f"{job_id} cancel requested")


@app.command()
@handle_errors
def explain(
    job: Annotated[str, typer.Argument(metavar="JOB")], json: Json = False, data: Data = None
) -> None:
    """Say why a job waits, and behind what."""
    from producers.explain import explain_job

    with open_client(data) as client:
        reasons = explain_job(client, job)
    if json:
        print_json({"job": job, "reasons": reasons})
    else:
        for reason in reasons:
            output.print(f"- {reason}")


def _wait_for(client: Client, handles: list[JobHandle], timeout: float, *, json: bool) -> None:
    """Print each outcome as it arrives, under a progress bar. Exits with 1 if any job failed."""
    failed = 0
    with progress_bar() as bar:
        task = bar.add_task("waiting", total=len(handles))
        for outcome in client.outcomes(handles, timeout):
            failed += outcome.status != "succeeded"
            if json:
                print_json(_document(client, outcome), line=True)
            else:
                output.print(f"{outcome.job_id} {_state(outcome)} {_answer(client, outcome)}")
            bar.advance(task)
    if failed:
        raise typer.Exit(FAILED)


def progress_bar() -> Progress:
    """A bar on stderr for people; nothing where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def brief_answer(answer: dict[str, Any]) -> str:
    """An answer in a few words, whatever its type."""
    if "label" in answer:
        return f"{answer['label']} ({answer['probability']:.2f})"
    if "text" in answer:
        return f"“{answer['text']}”"
    if "dimensions" in answer:
        return f"vector of {answer['dimensions']}"
    return str(answer.get("type", answer))


def _answer(client: Client, outcome: Outcome) -> str:
    try:
        return brief_answer(client.result_of(outcome).answer)
    except JobFailed:
        return outcome.message or ""


def _brief(outcome: Outcome) -> str:
    if outcome.status == "succeeded":
        return "object" if outcome.ref else brief_answer(outcome.json())
    return outcome.code or ""


def _version(outcome: Outcome) -> str:
    return f"{outcome.model}/{outcome.version}" if outcome.version else outcome.model


def _state(outcome: Outcome) -> str:
    colour = {"succeeded": "green", "failed": "red", "running": "yellow", "queued": "cyan"}
    return f"[{colour.get(outcome.status, 'magenta')}]{outcome.status}[/]"


def _document(client: Client, outcome: Outcome, *, fetch: bool = True) -> dict[str, Any]:
    """One job as JSON: everything known, with its answer in place, if that is still there."""
    answer: Any = None
    if outcome.status == "succeeded" and (fetch or not outcome.ref):
        try:
            answer = client.result_of(outcome).answer
        except InvalidJob as error:
            if error.code != "object_missing":
                raise
    times = outcome.times
    return {
        "job": outcome.job_id,
        "status": outcome.status,
        "tenant": outcome.tenant,
        "model": outcome.model,
        "version": outcome.version,
        "answer": answer,
        "object": outcome.ref.key if outcome.ref else None,
        "code": outcome.code,
        "message": outcome.message,
        "attempts": outcome.attempts,
        "submitted_at": outcome.submitted_at,
        "finished_at": outcome.finished_at,
        "times_ms": None
        if times is None
        else {
            "waited": times.waited_ms,
            "load": times.load_ms,
            "decode": times.decode_ms,
            "run": times.run_ms,
            "store": times.store_ms,
        },
        "worker": outcome.worker,
        "trace": outcome.trace_id,
    }


def _facts(client: Client, outcome: Outcome) -> Table:
    table = Table(show_header=False, box=None)
    facts = _document(client, outcome)
    for name, value in facts.items():
        if name == "times_ms" and value:
            value = ", ".join(f"{stage} {ms:.1f}" for stage, ms in value.items())
        elif name.endswith("_at") and value:
            value = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
        elif name == "answer" and value:
            value = brief_answer(value)
        if value not in (None, ""):
            table.add_row(f"[dim]{name}[/]", str(value))
    return table
