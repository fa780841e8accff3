"""The fault suite: `python -m tests.faults.real [--long] [--only 2,3] [--json FILE] [--write-docs]`.

Exit code 0: every promise was kept. 1: one was not. 2: there are no servers to do it on.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console
from rich.markup import escape

from headrace.cli.jobs import progress_bar
from tests.faults.real import (
    FAULTS,
    Fault,
    Finding,
    Servers,
    execute,
    keep_evidence,
    real_stack,
    running_servers,
)
from tests.faults.real.report import renew_docs, renew_json, table_of

console = Console()


def main() -> int:
    options = _options()
    chosen = _chosen(options.only)
    if options.list:
        for one in chosen:
            console.print(f"{one.number:>5g}  {one.name}")
        return 0
    # A stop in the middle must leave no server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    findings: list[Finding] = []
    try:
        with running_servers() as servers, progress_bar() as progress:
            task = progress.add_task("", total=len(chosen))
            for one in chosen:
                progress.update(task, description=f"{one.number:g} {one.name}")
                findings.append(_one(one, servers, options))
                progress.console.print(_line(findings[-1]))
                progress.advance(task)
                if options.json:
                    renew_json(options.json, findings)
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        console.print(str(missing))
        return 2
    console.print(table_of(findings))
    if options.write_docs:
        renew_docs(findings)
    return int(any(finding.breaches for finding in findings))


def _one(one: Fault, servers: Servers, options: argparse.Namespace) -> Finding:
    scale = one.long if options.long else one.short or one.long
    if why := one.unable(servers):
        return Finding(one.number, one.name, 0, not_run=why)
    with real_stack(servers, proxied=one.proxied, lease_s=one.lease_s) as stack:
        finding = execute(one, scale, stack)
        if finding.breaches or options.keep_all:
            keep_evidence(stack, finding, options.evidence)
    return finding


def _line(finding: Finding) -> str:
    if finding.not_run:
        return f"[yellow]{finding.number:g} {finding.name}: not run, {finding.not_run}[/]"
    if finding.breaches:
        reasons = escape("; ".join(finding.breaches))
        return f"[red]{finding.number:g} {finding.name}[/] ({finding.took_s:g} s): {reasons}"
    return f"[green]{finding.number:g} {finding.name}[/] ({finding.took_s:g} s)"


def _chosen(only: str) -> list[Fault]:
    """`only`: numbers; a whole number stands for all its parts."""
    wanted = [float(word) for word in only.split(",") if word]
    return [
        one for one in FAULTS if not wanted or {one.number, float(int(one.number))} & set(wanted)
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.real", description=__doc__)
    parser.add_argument("--long", action="store_true", help="at full length: an hour")
    parser.add_argument("--only", default="", help="numbers of faults, as in 2,3,8.1")
    parser.add_argument("--json", type=Path, help="renew what was found in this file")
    parser.add_argument("--write-docs", action="store_true", help="renew docs/faults.{md,json}")
    parser.add_argument("--list", action="store_true", help="show the faults and stop")
    parser.add_argument("--keep-all", action="store_true", help="keep what processes wrote, always")
    parser.add_argument(
        "--evidence",
        type=Path,
        default=Path(tempfile.gettempdir()) / "headrace-faults",
        help="where the output of processes goes when a promise was not kept",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
