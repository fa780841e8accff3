"""`headrace up` and `headrace down`: the embedded stack, in the foreground or detached."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from headrace import __version__
from headrace.cli.options import Data, settings_for
from headrace.cli.output import console, handle_errors
from infra.embedded import child_log
from infra.embedded.processes import start_of
from infra.embedded.record import held, recorded_stack, running_stack, stack_running
from infra.embedded.stack import end_orphans, python_command, python_environment, run_stack
from infra.embedded.supervisor import Event
from infra.logs import configure_logs, get_logger
from infra.settings import Settings
from schemas.errors import PipelineError, Transient

POLL_S = 0.05
STOP_PATIENCES = 4
"""Three stages of children may use up their time to stop, and some for the rest."""
TAIL_LINES = 15


@handle_errors
def up(
    data: Data = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Inference worker processes.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when it is ready; it goes on running.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, help="With --detach: seconds to get ready in.")
    ] = 300,
) -> None:
    """Start the embedded stack. Redis, a dispatcher, a builder and workers, with their data in one folder."""
    chosen = {"stack": {"workers": workers}} if workers else {}
    settings = settings_for(data, **chosen)
    if detach:
        _start_detached(settings, timeout_s)
    else:
        run_stack(settings, _reporter(settings), __version__)


@handle_errors
def down(data: Data = None) -> None:
    """Stop the embedded stack. What runs is finished, what waits stays in the log."""
    settings = settings_for(data)
    state = running_stack(settings)
    if state is None:
        if recorded_stack(settings):
            with held(settings):
                end_orphans(settings, _print_event)
        console.print(f"No stack is running on {settings.data_dir}.", markup=False)
        return
    with suppress(ProcessLookupError):
        os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_PATIENCES * settings.stack.stop_s
    with console.status("stopping"):
        while start_of(state.pid) == state.start:
            if time.monotonic() > deadline:
                raise Transient(
                    "stack_stopping", f"The stack (pid {state.pid}) is still stopping; look again."
                )
            time.sleep(POLL_S)
    console.print(f"Stopped the stack on {settings.data_dir}.", markup=False)


def _reporter(settings: Settings) -> Callable[[Event], None]:
    """On a terminal: lines for people, and the log in its file. Elsewhere stderr is the log."""
    log = get_logger("stack")
    if console.is_terminal:
        file = child_log(settings, "stack")
        file.parent.mkdir(parents=True, exist_ok=True)
        configure_logs("stack", settings.log_level, file.open("a", buffering=1))
        console.print(f"Starting the stack on {settings.data_dir}", markup=False)
    else:
        configure_logs("stack", settings.log_level)

    def report(event: Event) -> None:
        bad = event.kind in ("died", "failing", "killed")
        write = log.warning if bad else log.info
        write(event.kind, child=event.child, detail=event.text, seconds=round(event.seconds, 3))
        if console.is_terminal:
            _print_event(event)

    return report


def _print_event(event: Event) -> None:
    if event.child == "stack":
        if event.kind == "ready":
            console.print(f"ready in {event.seconds:.1f} s")
            console.print(
                "In another terminal: headrace models list, headrace jobs submit MODEL FILE, "
                "headrace status. Ctrl-C stops.",
                style="dim",
            )
        elif event.kind == "stopping":
            console.print(f"{event.text}; Ctrl-C again ends it at once", markup=False)
    elif event.kind != "started":
        after = f" {event.seconds:.1f} s" if event.kind == "ready" else ""
        style = {"ready": "green", "stopped": "dim"}.get(event.kind, "yellow")
        console.print(f"  {event.child:<12}{event.text}{after}", style=style, markup=False)


def _start_detached(settings: Settings, patience_s: float) -> None:
    if state := running_stack(settings):
        raise stack_running(settings, state.pid)
    log = child_log(settings, "stack")
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*python_command("headrace"), "up"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **python_environment(settings)},
            start_new_session=True,
        )
    try:
        ready_s = _wait_ready(settings, process, patience_s)
    except BaseException:
        process.terminate()
        with console.status("stopping"):
            process.wait()
        raise
    console.print(f"ready in {ready_s:.1f} s (pid {process.pid}); `headrace down` stops it")


def _wait_ready(settings: Settings, process: subprocess.Popen[bytes], patience_s: float) -> float:
    """Returns how long the stack took. Raises PipelineError (stack_failed), its log printed."""
    deadline = time.monotonic() + patience_s
    with console.status("starting") as spinner:
        while True:
            ended = process.poll() is not None
            state = running_stack(settings)
            children = state.children if state and state.pid == process.pid else []
            pending = [child for child in children if child.state != "ready"]
            failing = [child.name for child in pending if child.state == "failing"]
            if ended or failing or time.monotonic() > deadline:
                names = failing or [child.name for child in pending if not ended]
                raise _not_ready(settings, names or ["stack"])
            if state and children and state.ready_s is not None:
                return state.ready_s
            spinner.update(f"starting {', '.join(child.name for child in pending)}")
            time.sleep(POLL_S)


def _not_ready(settings: Settings, names: list[str]) -> PipelineError:
    """The error, after the end of the logs that say why."""
    for name in names:
        log = child_log(settings, name)
        console.print(f"The last lines of {log}:", style="dim", markup=False)
        console.print(last_lines(log, TAIL_LINES), style="dim", markup=False, soft_wrap=True)
    return PipelineError(
        "stack_failed",
        f"The stack did not get ready and was stopped: {', '.join(names)} did not start. "
        "`headrace doctor` may tell why.",
    )


def last_lines(log: Path, count: int) -> str:
    """The end of a log, at most 64 KB of it; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
    except OSError:
        return ""
