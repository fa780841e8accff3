"""What was found, as a table on the terminal, as JSON, and as the table of docs/faults.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.machine import describe
from tests.faults.real.suite import Finding

Facts = dict[str, Any]
"""A finding as `Finding.as_dict` has it, and the day of it."""

DOCS = Path(__file__).parents[3] / "docs"
PAGE, DATA = DOCS / "faults.md", DOCS / "faults.json"
BEGIN, END = "<!-- found: begin -->", "<!-- found: end -->"
COLUMNS = (
    "",
    "fault",
    "times",
    "jobs",
    "lost",
    "twice",
    "run again",
    "back after: p50 / most",
    "within",
    "",
)
LEFT = ("", "fault")


def table_of(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in LEFT else "right")
    for row in _rows([finding.as_dict() for finding in findings]):
        table.add_row(*row)
    return table


def renew_json(path: Path, findings: Sequence[Finding]) -> list[Facts]:
    """Put them in place of what the file has of the same faults. Returns all that it has then."""
    known: list[Facts] = json.loads(path.read_text())["faults"] if path.exists() else []
    today = datetime.now(UTC).date().isoformat()
    by_number = {one["number"]: one for one in known}
    by_number |= {one.number: {"day": today, **one.as_dict()} for one in findings}
    faults = [by_number[number] for number in sorted(by_number)]
    path.write_text(json.dumps({"machine": describe(), "faults": faults}, indent=1) + "\n")
    return faults


def renew_docs(findings: Sequence[Finding]) -> None:
    """Renew the table on the page; the rest of it is written by people."""
    faults = renew_json(DATA, findings)
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    days = sorted({one["day"] for one in faults})
    lines = [f"Found on {' and '.join(days)}:", ""]
    lines += [f"- {what}: {text}" for what, text in describe().items()]
    lines += ["", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(faults)]
    PAGE.write_text("\n".join([before + BEGIN, *lines, END]) + rest.split(END)[1], "utf-8")


def _rows(faults: Iterable[Facts]) -> list[tuple[str, ...]]:
    faults = list(faults)
    jobs, lost, twice = (sum(one[name] for one in faults) for name in ("jobs", "lost", "twice"))
    rows = [_row(one) for one in faults]
    return [*rows, ("", "all", "", f"{jobs:,}", f"{lost}", f"{twice}", "", "", "", "")]


def _row(one: Facts) -> tuple[str, ...]:
    p50, most = one["recovery_p50_s"], one["recovery_max_s"]
    return (
        f"{one['number']:g}",
        one["name"],
        f"{one['repeats']}",
        f"{one['jobs']:,}",
        f"{one['lost']}",
        f"{one['twice']}",
        f"{one['recomputed']}",
        f"{p50:.1f} / {most:.1f} s" if most is not None else "",
        f"{one['limit_s']:g} s" if one["limit_s"] else "",
        _verdict(one),
    )


def _verdict(one: Facts) -> str:
    if one["not_run"]:
        return "not run"
    if one["breaches"]:
        return "BROKEN"
    return "slow" if one["slow"] else "kept"
