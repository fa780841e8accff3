"""`python -m bench`: measure all figures, or those named, and compare them with what was asked."""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

from msgspec.structs import replace

from bench.figures import Effort, Figure
from bench.machine import describe
from bench.report import show, write_docs, write_json
from bench.stack import KINDS, Kind, ServersMissing

BENCHMARKS: dict[str, tuple[Kind, ...]] = {
    "saturation": ("embedded",),
    "noop": KINDS,
    "latency": KINDS,
    "transaction": KINDS,
    "memory": KINDS,
    "engine_load": ("embedded",),
    "engine_races": ("embedded",),
    "engine_fetch": ("servers",),
    "startup": ("embedded",),
    "demo": ("embedded",),
}
"""On which kinds of deployment each is measured."""

EFFORTS = {
    "quick": "fewer and shorter rounds: rough",
    "long": "memory with 1,000,000 jobs queued as well",
}


def main() -> int:
    options = _options()
    figures: list[Figure] = []
    machine = describe()
    try:
        for name in options.names or BENCHMARKS:
            for kind in BENCHMARKS[name]:
                if options.on in (None, kind):
                    figures += _measure(name, kind, options.effort)
    finally:  # what was measured is not lost with what failed
        if any(figure.on == "servers" for figure in figures):
            from bench.servers import ABOUT

            machine["servers"] = ABOUT
        show(figures, machine)
        if options.json:
            write_json(options.json, figures, machine)
    if options.write_docs:
        write_docs(figures, machine)
    return 0


def _measure(name: str, kind: Kind, effort: Effort) -> list[Figure]:
    print(f"{name} on {kind} ...", end=" ", file=sys.stderr, flush=True)
    began = time.perf_counter()
    try:
        found = [replace(f, on=kind) for f in import_module(f"bench.{name}").measure(effort, kind)]
    except ServersMissing as missing:
        print(f"not measured: {missing}", file=sys.stderr)
        return []
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--on", choices=KINDS, help="only on this kind of deployment")
    effort = parser.add_mutually_exclusive_group()
    for name, help_text in EFFORTS.items():
        effort.add_argument(
            f"--{name}",
            dest="effort",
            action="store_const",
            const=name,
            default="usual",
            help=help_text,
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--write-docs", action="store_true", help="renew docs/performance.md")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
