"""`headrace status`: what runs, what waits, who works."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import typer
from msgspec import Struct
from rich.markup import escape
from rich.table import Table

from headrace.cli.options import Data, Json, settings_for
from headrace.cli.output import UNAVAILABLE, console, handle_errors, output, print_json
from headrace.cli.stack import last_lines
from infra.catalogue import Catalogue
from infra.embedded import child_log
from infra.embedded.record import ChildState, StackState, running_stack
from infra.eventlog.open import connect_log
from infra.fleet import DispatcherBeat, Fleet, WorkerBeat
from infra.lake import GROUP as ARCHIVERS
from infra.lake import SEGMENTS
from infra.objects import ObjectStore, connect_objects
from infra.redis_client import connect_redis
from infra.settings import Settings
from schemas.errors import PipelineError
from schemas.topics import JOB_TOPICS, RESULTS, RETRY

T = TypeVar("T")

GROUP = "dispatcher"
CPU_SAMPLE_S = 0.1
TAIL_LINES = 5


class ChildStatus(Struct, frozen=True):
    """cpu_percent: of one core, over the last tenth of a second."""

    state: ChildState
    uptime_s: float | None
    memory_bytes: int | None
    cpu_percent: float | None
    last_lines: str = ""


class TopicStatus(Struct, frozen=True):
    """open: what the group that reads it has not ended yet."""

    open: int
    oldest_age_s: float


class Status(Struct, frozen=True):
    """All that `--json` prints. stack: the embedded one of this data folder, None where the settings name
    servers of their own. lake: outcomes that are not archived yet, None where there is no lake.
    trouble: what could not be asked, and why."""

    data_dir: str
    healthy: bool
    stack: StackState | None
    children: list[ChildStatus]
    topics: dict[str, TopicStatus] | None
    lake: TopicStatus | None
    dispatchers: list[DispatcherBeat]
    workers: list[WorkerBeat]
    models: int | None
    trouble: list[str]


@handle_errors
def status(data: Data = None, json: Json = False) -> None:
    """Show what runs and what waits.

    Of the embedded stack, or of the servers that the settings name.

    Exit code 0: all is well. 3: it is not running, or not all of it.
    """
    settings = settings_for(data)
    stack = running_stack(settings)
    if stack is None and not settings.has_servers:
        if json:
            print_json({"data_dir": settings.data_dir, "healthy": False, "stack": None})
        console.print(
            f"No stack is running on {settings.data_dir}; `headrace up` starts it.", markup=False
        )
        raise typer.Exit(UNAVAILABLE)
    found = look(settings, stack)
    if json:
        print_json(found)
    else:
        _show(found)
    if not found.healthy:
        raise typer.Exit(UNAVAILABLE)


def look(settings: Settings, stack: StackState | None) -> Status:
    """Ask everybody once. Whoever does not answer is named in `trouble`."""
    trouble: list[str] = []

    def asked(question: Callable[[], T]) -> T | None:
        try:
            return question()
        except PipelineError as error:
            trouble.append(error.message)
            return None

    fleet = Fleet(connect_redis(settings))
    objects = connect_objects(settings)
    topics = asked(lambda: _lags(settings, GROUP, [*JOB_TOPICS, RETRY]))
    lake = asked(lambda: _lake(settings, objects))
    dispatchers = asked(fleet.dispatchers) or []
    workers = asked(fleet.workers) or []
    models = asked(lambda: len(Catalogue(objects).cards()))
    running = stack.healthy if stack else bool(dispatchers and workers)
    return Status(
        data_dir=str(settings.data_dir),
        healthy=running and not trouble,
        stack=stack,
        children=_children(settings, stack) if stack else [],
        topics=topics,
        lake=lake,
        dispatchers=dispatchers,
        workers=workers,
        models=models,
        trouble=trouble,
    )


def _lake(settings: Settings, objects: ObjectStore) -> TopicStatus | None:
    if next(objects.list(SEGMENTS), None) is None:
        return None
    return _lags(settings, ARCHIVERS, [RESULTS])[RESULTS]


def _lags(settings: Settings, group: str, topics: list[str]) -> dict[str, TopicStatus]:
    log = connect_log(settings)
    try:
        lags = log.lag(group, topics)
    finally:
        log.close()
    return {name: TopicStatus(lag.open, lag.oldest_age_s) for name, lag in lags.items()}


def _children(settings: Settings, stack: StackState) -> list[ChildStatus]:
    processes = {child.name: _process(child.pid) for child in stack.children if child.pid}
    for process in processes.values():
        _measured(process, lambda p: p.cpu_percent())
    time.sleep(CPU_SAMPLE_S)
    return [_child(settings, child, processes.get(child.name)) for child in stack.children]


def _child(settings: Settings, child: ChildState, process: psutil.Process | None) -> ChildStatus:
    tail = last_lines(child_log(settings, child.name), TAIL_LINES)
    return ChildStatus(
        state=child,
        uptime_s=_measured(process, lambda p: time.time() - p.create_time()),
        memory_bytes=_measured(process, lambda p: p.memory_info().rss),
        cpu_percent=_measured(process, lambda p: p.cpu_percent()),
        last_lines=tail if child.state == "failing" else "",
    )


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _measured(process: psutil.Process | None, measure: Callable[[psutil.Process], T]) -> T | None:
    """None when the process has just gone."""
    try:
        return measure(process) if process else None
    except psutil.Error:
        return None


def _show(found: Status) -> None:
    if stack := found.stack:
        age = _duration(time.time() - stack.started_at)
        line = f"stack {stack.version} on {found.data_dir}, pid {stack.pid}, up {age}"
        output.print(line, markup=False, soft_wrap=True)
        output.print(_process_table(found))
    else:
        count = f"{len(found.dispatchers)} dispatchers and {len(found.workers)} workers"
        output.print(f"{count} give a sign of life")
    for child in found.children:
        if child.last_lines:
            console.print(f"The last lines of {child.state.name}'s log:", style="red")
            console.print(child.last_lines, markup=False, soft_wrap=True)
    _show_jobs(found)
    for line in found.trouble:
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def _process_table(found: Status) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column("process")
    table.add_column("state")
    for name in ("pid", "up", "restarts", "memory", "cpu"):
        table.add_column(name, justify="right")
    table.add_column("last exit")
    for child in found.children:
        state = child.state
        colour = {"ready": "green", "starting": "cyan", "waiting": "cyan"}.get(state.state, "red")
        table.add_row(
            state.name,
            f"[{colour}]{state.state}[/]",
            str(state.pid or ""),
            "" if child.uptime_s is None else _duration(child.uptime_s),
            str(state.restarts),
            "" if child.memory_bytes is None else f"{child.memory_bytes / 1e6:.0f} MB",
            "" if child.cpu_percent is None else f"{child.cpu_percent:.0f} %",
            escape(state.last_exit),
        )
    return table


def _show_jobs(found: Status) -> None:
    for name, topic in (found.topics or {}).items():
        if topic.open:
            age = _duration(topic.oldest_age_s)
            output.print(f"{name}: {topic.open} open, the oldest for {age}")
    if found.lake and found.lake.open:
        age = _duration(found.lake.oldest_age_s)
        output.print(f"lake: {found.lake.open} outcomes to be archived, the oldest for {age}")
    for beat in found.dispatchers:
        waiting = sum(lane.waiting for lane in beat.waiting.values())
        ended = ", ".join(f"{count} {outcome}" for outcome, count in beat.ended.items())
        output.print(
            f"dispatcher {beat.slot}: {waiting} jobs waiting, {beat.delayed} delayed, {beat.running_jobs} running in "
            f"{beat.running} batches; ended since its start: {ended or 'none'}"
        )
        for model, until in beat.held_back.items():
            wait = _duration(max(0.0, until - time.time()))
            console.print(
                f"{model} only makes dead letters: held back, the next one is tried in {wait}",
                style="yellow",
                markup=False,
            )
        if beat.trouble:
            console.print(f"Dispatcher {beat.slot} is in trouble: {beat.trouble}", style="yellow")
    for worker in found.workers:
        engines = ", ".join(worker.engines) or "no engine"
        start = (
            f", ready {worker.cold_start_s:.1f} s after its start" if worker.cold_start_s else ""
        )
        output.print(f"{worker.worker}: {worker.jobs_done} jobs done, holds {engines}{start}")
    if found.models is not None:
        output.print(f"models installed: {found.models}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest_s} s"
