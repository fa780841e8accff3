"""`python -m bench`: measure all figures, or those named, and compare them with what was asked."""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

from bench.figures import Figure
from bench.machine import describe
from bench.report import show, write_docs, write_json

BENCHMARKS = ("saturation", "noop", "latency", "engine_load", "startup", "memory", "demo")


def main() -> int:
    options = _options()
    figures: list[Figure] = []
    for name in options.names or BENCHMARKS:
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        began = time.perf_counter()
        figures += import_module(f"bench.{name}").measure(options.quick)
        print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    machine = describe()
    show(figures, machine)
    if options.json:
        write_json(options.json, figures, machine)
    if options.write_docs:
        write_docs(figures, machine)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: rough")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--write-docs", action="store_true", help="renew docs/performance.md")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
