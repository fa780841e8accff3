"""How the command line speaks: data on stdout, all else on stderr, errors as a line and a code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console

from schemas.errors import Backpressure, InvalidJob, InvalidModel, PipelineError, Transient

P = ParamSpec("P")
R = TypeVar("R")

console = Console(stderr=True, highlight=False)
"""Messages, progress, questions, errors."""

output = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
"""Data: tables and values that may be piped on. JSON goes through `print_json`."""

FAILED, USER_ERROR, UNAVAILABLE, TIMEOUT, INTERRUPTED = 1, 2, 3, 4, 130

USER_ERROR_CODES = frozenset({"settings_invalid", "stack_running"})


def print_json(value: object, *, line: bool = False) -> None:
    """Write one JSON document to stdout, indented; or on one line, for a stream of them.

    value: anything msgspec encodes (Structs included); other types by `str`.
    """
    import msgspec

    encoded = msgspec.json.encode(value, enc_hook=str)
    sys.stdout.write((encoded if line else msgspec.json.format(encoded, indent=2)).decode() + "\n")
    sys.stdout.flush()


def print_yaml(value: object) -> None:
    """Write one YAML document to stdout. value: of plain values; one that occurs twice is written twice."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

        def text(self, text: str) -> yaml.Node:
            style = "|" if "\n" in text else None
            return self.represent_scalar("tag:yaml.org,2002:str", text, style)

    Dumper.add_representer(str, Dumper.text)
    yaml.dump(value, sys.stdout, Dumper, sort_keys=False, allow_unicode=True, width=100)
    sys.stdout.flush()


def print_error(message: str, hint: str = "") -> None:
    """Print `error: message`, and what to do about it on a second line."""
    console.print("[bold red]error:[/]", end=" ")
    console.print(message, markup=False, soft_wrap=True)
    if hint:
        console.print(hint, style="dim", markup=False, soft_wrap=True)


def exit_code(error: BaseException) -> int:
    """What a script sees: 2 a user's mistake, 3 unavailable, 4 timeout, 130 Ctrl-C, 1 all else."""
    code = error.code if isinstance(error, PipelineError) else ""
    if isinstance(error, InvalidJob | InvalidModel) or code in USER_ERROR_CODES:
        return USER_ERROR
    if isinstance(error, TimeoutError):
        return TIMEOUT
    if isinstance(error, Transient | Backpressure):
        return UNAVAILABLE
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED


def handle_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command: its exceptions become one line on stderr and an exit code.

    `HEADRACE_DEBUG=1` lets them through, with their traceback.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            # The reader of our output went away (`| head`); nothing more can be said to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if _debugging():
                raise
            _explain(error)
            raise typer.Exit(exit_code(error)) from None

    return run


def _explain(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt):
        console.print("interrupted")
    elif isinstance(error, Transient | Backpressure):
        print_error(str(error), "See `headrace status`; `headrace up` starts the embedded stack.")
    elif isinstance(error, PipelineError | TimeoutError | OSError):
        print_error(str(error) or type(error).__name__)
    else:
        print_error(
            f"unexpected {type(error).__name__}: {error}",
            "This is a bug. HEADRACE_DEBUG=1 shows where it happened.",
        )


def _debugging() -> bool:
    return os.environ.get("HEADRACE_DEBUG", "") not in ("", "0")
