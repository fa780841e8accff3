"""`headrace doctor`: are this machine, the settings and the servers they name fit, and what to do where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import typer
from rich.markup import escape
from rich.table import Table

from headrace import machine_checks as machine
from headrace.cli.options import Data, Json, settings_for
from headrace.cli.output import FAILED, handle_errors, output, print_json
from infra import preconditions, redis_checks
from infra.checks import Finding
from infra.settings import Settings
from schemas.errors import PipelineError, Transient

Check = Callable[[Settings], Finding | Sequence[Finding]]


@handle_errors
def doctor(data: Data = None, json: Json = False) -> None:
    """Check this machine, the settings, and the servers that they name.

    Says what to do where something is not well; what a server's user may do is judged by the dispatcher's
    needs. Exit code 1: something will not work, or would lose jobs.
    """
    findings = examine(settings_for(data))
    if json:
        print_json(findings)
    else:
        output.print(_table(findings))
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(FAILED)


def examine(settings: Settings) -> list[Finding]:
    """Carry out every check that concerns these settings; one that cannot be carried out has failed."""
    findings: list[Finding] = []
    for name, check in _checks(settings):
        found = _tried(name, check, settings)
        findings += [found] if isinstance(found, Finding) else found
    return findings


def _checks(settings: Settings) -> Iterator[tuple[str, Check]]:
    """name: what the finding is called if the check fails to be carried out."""
    yield "python", machine.python
    yield "data folder", machine.data_folder
    yield "clock", machine.clock
    yield "open files", machine.open_files
    if settings.log_address.startswith("kafka:"):
        yield "kafka", preconditions.log_findings
    else:
        yield "sqlite", machine.sqlite
        yield "retention", preconditions.log_findings
    yield "event log", machine.event_log
    if not settings.redis_url.get_secret_value():
        yield "redis server", machine.redis_server
        yield "redis socket", machine.redis_socket
    yield "redis", redis_checks.redis_findings
    if settings.objects_address.startswith("s3:"):
        yield "object store", preconditions.object_findings
    else:
        yield "object store", machine.object_folder
    yield "models", machine.models
    yield "engine cache", machine.engine_cache
    yield "engine keys", machine.engine_keys


def _tried(name: str, check: Check, settings: Settings) -> Finding | Sequence[Finding]:
    try:
        return check(settings)
    except Transient as error:
        return Finding(name, "fail", error.message, "Start it, or correct its address.")
    except PipelineError as error:
        return Finding(name, "fail", error.message)
    except OSError as error:
        return Finding(name, "fail", str(error), "Make the folder accessible, or choose another.")


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, header_style="dim")
    for name in ("check", "", "found"):
        table.add_column(name, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        found = f"{finding.detail}\n{finding.remedy}" if finding.remedy else finding.detail
        level = f"[{colours[finding.level]}]{finding.level}[/]"
        table.add_row(finding.check, level, escape(found))
    return table
