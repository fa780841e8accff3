"""The embedded stack's processes, and running them until somebody says stop."""

from __future__ import annotations

import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from pydantic import BaseModel, SecretStr

from infra.embedded import announced_ready, ready_file, redis_server
from infra.embedded.child import ChildSpec
from infra.embedded.processes import StopSignals, send_signal, start_of
from infra.embedded.record import ChildState, Record, held, recorded_stack, state_file
from infra.embedded.supervisor import Event, Supervisor
from infra.settings import Section, Settings
from schemas.errors import PipelineError

ORPHAN_TERM_S = 10.0
ORPHAN_KILL_S = 5.0
ORPHAN_POLL_S = 0.02

Report = Callable[[Event], None]


def run_stack(
    settings: Settings, report: Report, version: str, specs: Sequence[ChildSpec] | None = None
) -> None:
    """Run the stack until SIGTERM, SIGINT or SIGHUP (a second one ends it at once), or until its
    data folder is removed.

    In the main thread only, which must stay the only one: children are made by fork.
    report: called with each event; those of the whole stack have the child's name "stack".
    specs: the stack's own by default. Raises PipelineError (stack_running, redis_server_missing,
    socket_folder_unsafe, orphan_remains).
    """
    with held(settings) as in_place, StopSignals() as signals:
        end_orphans(settings, report)
        specs = child_specs(settings) if specs is None else specs
        for spec in specs:
            ready_file(settings, spec.name).unlink(missing_ok=True)
        supervisor = Supervisor(specs, settings.data_dir / "logs", report)
        record = Record(settings, version)
        try:
            while not signals.requests and in_place():
                supervisor.tick()
                ready_s = record.update(supervisor.describe())
                if ready_s is not None:
                    report(Event("ready", "stack", "ready", ready_s))
                signals.wait(supervisor.pause_s())
        finally:
            why = "" if in_place() else ": its data folder is gone"
            report(Event("stopping", "stack", f"stopping{why}"))

            def wait(timeout_s: float) -> None:
                record.update(supervisor.describe(), stopping=True)
                signals.wait(timeout_s)

            supervisor.stop(settings.stack.stop_s, wait, lambda: signals.requests > 1)
            record.remove()
            report(Event("stopped", "stack", "stopped"))


def child_specs(settings: Settings) -> list[ChildSpec]:
    """The processes of the embedded stack. Stopped from the last stage down: workers first, while
    the dispatcher still records what they complete; Redis last.

    Raises PipelineError (redis_server_missing, socket_folder_unsafe).
    """
    specs = [
        _python_child(settings, "dispatcher", "workers.dispatcher.main", stage=1),
        _python_child(settings, "builder", "workers.builder.main", stage=1),
    ]
    for number in range(settings.stack.workers):
        name = f"worker-{number}"
        own = {"HEADRACE_WORKER__NAME": name}
        specs.append(_python_child(settings, name, "workers.inference.main", stage=2, own=own))
    if settings.stack.archiver:
        specs.append(_python_child(settings, "archiver", "workers.archiver.main", stage=1))
    if not settings.redis_url.get_secret_value():
        specs.insert(0, _redis_child(settings))
    return specs


def environment(settings: Settings) -> dict[str, str]:
    """These settings as variables, from which `load_settings` makes them again. Holds secrets."""
    return dict(_variables(settings, "HEADRACE_"))


def _variables(section: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in section:
        if isinstance(value, Section):
            yield from _variables(value, f"{prefix}{name.upper()}__")
        elif value is not None:
            yield f"{prefix}{name.upper()}", _as_text(value)


def end_orphans(settings: Settings, report: Report) -> None:
    """End what a killed supervisor left behind: only what it wrote down, known by pid and start.

    Raises PipelineError (orphan_remains) if one cannot be ended.
    """
    recorded = recorded_stack(settings)
    orphans = [child for child in recorded.children if _lives(child)] if recorded else []
    for child in orphans:
        text = f"ending it: left behind by a killed stack (pid {child.pid})"
        report(Event("killed", child.name, text))
    for signum, patience_s in ((signal.SIGTERM, ORPHAN_TERM_S), (signal.SIGKILL, ORPHAN_KILL_S)):
        for child in filter(_lives, orphans):
            send_signal(child.pid, signum)
        deadline = time.monotonic() + patience_s
        while any(map(_lives, orphans)) and time.monotonic() < deadline:
            time.sleep(ORPHAN_POLL_S)
    if remaining := [str(child.pid) for child in filter(_lives, orphans)]:
        raise PipelineError(
            "orphan_remains",
            f"Expected to end what a killed stack left on {settings.data_dir}, but process "
            f"{', '.join(remaining)} stays. End it by hand, then try again.",
        )
    state_file(settings).unlink(missing_ok=True)


def _lives(child: ChildState) -> bool:
    return child.pid > 0 and start_of(child.pid) == child.start


def _redis_child(settings: Settings) -> ChildSpec:
    command = redis_server.prepare(settings, settings.data_dir / "run" / "redis.conf")
    # A locale that is not installed would end the server at its start.
    own = {"LC_ALL": "C"}

    def ready(_pid: int) -> bool:
        return redis_server.answers(settings.redis_socket)

    return ChildSpec("redis", command, ready, stage=0, environment=own)


def _python_child(
    settings: Settings, name: str, module: str, stage: int, own: dict[str, str] | None = None
) -> ChildSpec:
    ready = functools.partial(announced_ready, settings, name)
    variables = {**python_environment(settings), **(own or {})}
    return ChildSpec(name, python_command(module), ready, stage, variables)


def python_command(module: str) -> tuple[str, ...]:
    # -P: a folder of the user's that is called `workers` must not be taken for ours.
    return (sys.executable, "-P", "-m", module)


def python_environment(settings: Settings) -> dict[str, str]:
    """What a Python process of the stack needs in its environment. Holds secrets."""
    # Unbuffered: the last words of a process that is killed are in its log. No health port: one cannot serve them
    # all, and the supervisor knows how they are.
    return {**environment(settings), "PYTHONUNBUFFERED": "1", "HEADRACE_HEALTH_PORT": "0"}


def _as_text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return json.dumps(value, default=_as_text) if isinstance(value, list | dict) else str(value)
