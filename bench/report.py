"""Figures as a table on the terminal, as JSON, and as a table in docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench.figures import Figure

DOCS = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COLUMNS = ("figure", "on", "asked", "measured", "", "how")


def show(figures: Sequence[Figure], machine: dict[str, str]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    table = Table(*COLUMNS)
    for figure in _side_by_side(figures):
        name, on, asked, measured, verdict, note = figure.row()
        colour = {"ok": "green", "short": "red"}.get(verdict, "default")
        table.add_row(name, on, asked, measured, f"[{colour}]{verdict}[/]", note)
    console.print(table)
    for what, text in machine.items():
        console.print(f"{what}: {text}", style="dim", markup=False)


def write_json(path: Path, figures: Sequence[Figure], machine: dict[str, str]) -> None:
    document = {"at": _today(), "machine": machine, "figures": figures}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def write_docs(figures: Sequence[Figure], machine: dict[str, str]) -> None:
    """Replace what stands between the markers; the rest of the page is written by people."""
    before, rest = DOCS.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    table = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    table += [f"| {' | '.join(figure.row())} |" for figure in _side_by_side(figures)]
    facts = [f"- {what}: {text}" for what, text in machine.items()]
    measured = "\n".join([BEGIN, f"Measured on {_today()}:", "", *facts, "", *table, END])
    DOCS.write_text(before + measured + after, "utf-8")


def _side_by_side(figures: Sequence[Figure]) -> list[Figure]:
    """The same figure on one kind of deployment and on the other, one below the other."""
    names = [figure.name for figure in figures]
    return sorted(figures, key=lambda figure: names.index(figure.name))


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
