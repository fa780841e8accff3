"""The embedded stack with real processes: its own, or `sleep` in their place where only the
supervision matters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli import app
from infra.embedded.processes import send_signal, start_of
from infra.embedded.record import StackState, recorded_stack, running_stack
from infra.settings import load_settings

SUPERVISOR = """
import sys
from infra.embedded import child_log, stack
from infra.embedded.child import ChildSpec
from infra.settings import load_settings

stack.ORPHAN_TERM_S = 0.2
settings = load_settings()

def report(event):
    print(event.kind, event.child, event.text, flush=True)

def spec(stage, name, script):
    log = child_log(settings, name)
    return ChildSpec(name, ("sh", "-c", script), lambda pid: "ready" in log.read_text(), stage)

specs = [spec(i, *arg.split("=", 1)) for i, arg in enumerate(sys.argv[1:])]
stack.run_stack(settings, report, "test", specs or None)
"""

STAYS = "echo ready; exec sleep 600"
STUBBORN = "trap '' TERM; echo ready; while :; do sleep 600; done"
THREE = ("redis=" + STAYS, "dispatcher=" + STAYS, "worker-0=" + STAYS)


class Supervisor:
    """A stack in a process of its own, on a folder of its own, with stand-ins as children."""

    def __init__(self, data: Path, children: tuple[str, ...], stop_s: float) -> None:
        self.settings = load_settings(data_dir=data)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, *children],
            env={**environment(data), "HEADRACE_STACK__STOP_S": str(stop_s)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def until(self, *words: str) -> list[str]:
        """Read what it reports up to the line that begins with these words."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line.rstrip())
            if line.startswith(" ".join(words)):
                return lines
        raise AssertionError(f"{words} was never said, but {lines}")

    def rest(self) -> list[str]:
        """What it says until it ends."""
        output, _ = self.process.communicate(timeout=60)
        return output.splitlines()

    @property
    def state(self) -> StackState:
        state = running_stack(self.settings)
        assert state is not None
        return state

    def pid(self, name: str) -> int:
        return next(child.pid for child in self.state.children if child.name == name)

    def kill_everything(self) -> None:
        state = running_stack(self.settings)
        self.process.kill()
        self.process.communicate()
        for child in state.children if state else []:
            if child.pid:
                send_signal(child.pid, signal.SIGKILL)


@pytest.fixture
def data() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hr-") as folder:
        yield Path(folder).resolve()


@pytest.fixture
def start(data: Path) -> Iterator[Callable[..., Supervisor]]:
    """`start(*children)`: each is `name=shell script`; none is the stack's own."""
    started: list[Supervisor] = []

    def make(*children: str, stop_s: float = 40) -> Supervisor:
        started.append(Supervisor(data, children, stop_s))
        return started[-1]

    yield make
    for supervisor in started:
        supervisor.kill_everything()


def until(condition: Callable[[], object]) -> None:
    """Other processes cannot be waited for but by looking. Bounded by the test's time limit."""
    while not condition():
        time.sleep(0.01)


def environment(data: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    return {**own, "HEADRACE_DATA_DIR": str(data)}


def headrace(data: Path, *args: str, code: int = 0) -> tuple[str, str]:
    """Run a command and see that it ends with this exit code. Returns stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *args],
        env=environment(data),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == code, f"{args}: {done}"
    return done.stdout, done.stderr


def test_sigterm_stops_workers_then_dispatcher_then_redis_and_leaves_nobody(
    start: Callable[..., Supervisor],
) -> None:
    supervisor = start(*THREE)
    supervisor.until("ready stack")
    pids = [child.pid for child in supervisor.state.children]

    supervisor.process.terminate()

    assert supervisor.rest() == [
        "stopping stack stopping",
        "stopped worker-0 stopped: killed by SIGTERM",
        "stopped dispatcher stopped: killed by SIGTERM",
        "stopped redis stopped: killed by SIGTERM",
        "stopped stack stopped",
    ]
    assert supervisor.process.returncode == 0
    assert [start_of(pid) for pid in pids] == [None] * 3
    assert running_stack(supervisor.settings) is None


def test_ctrl_c_reaches_the_children_by_the_supervisor_only(
    start: Callable[..., Supervisor],
) -> None:
    supervisor = start(*THREE)
    supervisor.until("ready stack")
    sessions = {os.getsid(child.pid) for child in supervisor.state.children}
    assert len(sessions | {os.getsid(0)}) == 4

    supervisor.process.send_signal(signal.SIGINT)

    assert "stopped worker-0 stopped: killed by SIGTERM" in supervisor.rest()
    assert supervisor.process.returncode == 0


def test_a_second_stack_on_the_folder_is_refused_and_the_first_lives_on(
    start: Callable[..., Supervisor], data: Path
) -> None:
    supervisor = start(*THREE)
    supervisor.until("ready stack")

    for way in ([], ["--detach"]):
        _, refusal = headrace(data, "up", *way, code=2)
        assert f"one is running (pid {supervisor.process.pid})" in refusal
        assert "Traceback" not in refusal

    assert supervisor.state.healthy


def test_a_killed_child_is_restarted_and_that_is_said(start: Callable[..., Supervisor]) -> None:
    supervisor = start(*THREE)
    supervisor.until("ready stack")
    killed = supervisor.pid("worker-0")

    os.kill(killed, signal.SIGKILL)

    assert supervisor.until("ready worker-0") == [
        "died worker-0 died: killed by SIGKILL; restart 1",
        "started worker-0 started",
        "ready worker-0 ready",
    ]
    assert supervisor.pid("worker-0") != killed
    assert start_of(supervisor.pid("worker-0")) is not None


def test_after_a_kill_of_the_supervisor_its_orphans_are_ended_and_a_new_stack_starts(
    start: Callable[..., Supervisor], data: Path
) -> None:
    first = start("redis=" + STUBBORN, "dispatcher=" + STAYS)
    first.until("ready stack")
    orphans = [child.pid for child in first.state.children]
    first.process.kill()
    first.process.wait()
    assert start_of(orphans[0]) is not None, "it ignores SIGTERM"

    second = start(*THREE)

    said = second.until("ready stack")
    assert f"killed redis ending it: left behind by a killed stack (pid {orphans[0]})" in said
    assert [start_of(pid) for pid in orphans] == [None, None]
    assert set(orphans).isdisjoint(child.pid for child in second.state.children)


def test_down_ends_what_a_killed_supervisor_left(
    start: Callable[..., Supervisor], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = start("redis=" + STUBBORN)
    supervisor.until("ready stack")
    orphan = supervisor.pid("redis")
    supervisor.process.kill()
    supervisor.process.wait()
    monkeypatch.setattr("infra.embedded.stack.ORPHAN_TERM_S", 0.2)

    assert CliRunner().invoke(app, ["down", "--data", str(data)]).exit_code == 0

    assert start_of(orphan) is None
    assert recorded_stack(supervisor.settings) is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs the parent-death signal")
def test_children_end_with_a_killed_supervisor(start: Callable[..., Supervisor]) -> None:
    supervisor = start(*THREE)
    supervisor.until("ready stack")
    pids = [child.pid for child in supervisor.state.children]

    supervisor.process.kill()

    until(lambda: not any(start_of(pid) for pid in pids))


def test_a_child_that_does_not_stop_is_killed_and_that_is_said(
    start: Callable[..., Supervisor],
) -> None:
    supervisor = start("redis=" + STAYS, "dispatcher=" + STUBBORN, stop_s=0.3)
    supervisor.until("ready stack")

    supervisor.process.terminate()

    assert supervisor.rest()[1:4] == [
        "killed dispatcher killed: it did not stop in time",
        "stopped dispatcher stopped: killed by SIGKILL",
        "stopped redis stopped: killed by SIGTERM",
    ]


def test_a_second_signal_ends_everything_at_once(start: Callable[..., Supervisor]) -> None:
    supervisor = start("redis=" + STUBBORN, "dispatcher=" + STUBBORN, stop_s=3600)
    supervisor.until("ready stack")

    supervisor.process.terminate()
    supervisor.until("stopping stack")
    supervisor.process.terminate()

    assert [line.split()[:2] for line in supervisor.rest()][:4] == [
        ["killed", "dispatcher"],
        ["stopped", "dispatcher"],
        ["killed", "redis"],
        ["stopped", "redis"],
    ]


def test_status_says_what_fails_with_its_last_words(
    start: Callable[..., Supervisor], data: Path
) -> None:
    supervisor = start("redis=" + STAYS, "luckless=echo no model here; exit 7")
    supervisor.until("failing luckless")

    out, _ = headrace(data, "status", "--json", code=3)

    found = json.loads(out)
    redis, failing = found["children"]
    assert redis["state"]["state"] == "ready"
    assert redis["memory_bytes"] > 0
    assert failing["state"]["state"] == "failing"
    assert failing["state"]["last_exit"] == "exit code 7"
    assert failing["last_lines"].endswith("no model here")
    assert not found["healthy"]
    table, said = headrace(data, "status", code=3)
    assert "luckless" in table
    assert "no model here" in said


def test_without_a_stack_down_is_done_and_status_says_so(data: Path) -> None:
    _, said = headrace(data, "down")
    assert f"No stack is running on {data}" in said

    out, said = headrace(data, "status", "--json", code=3)
    assert json.loads(out)["stack"] is None
    assert "headrace up" in said


def test_up_that_cannot_get_ready_says_why_and_leaves_nothing(data: Path) -> None:
    (data / "redis.sock").mkdir()

    _, said = headrace(data, "up", "--detach", code=1)

    assert "Failed opening Unix socket" in said
    assert said.splitlines()[-1].startswith("error: The stack did not get ready")
    assert running_stack(load_settings(data_dir=data)) is None


def test_a_stack_whose_data_folder_was_removed_stops(
    start: Callable[..., Supervisor], data: Path
) -> None:
    supervisor = start(*THREE)
    supervisor.until("ready stack")
    pids = [child.pid for child in supervisor.state.children]

    shutil.rmtree(data)

    assert supervisor.rest()[0] == "stopping stack stopping: its data folder is gone"
    assert [start_of(pid) for pid in pids] == [None] * 3
    data.mkdir()


def test_the_whole_stack_up_looked_at_and_down_by_the_command_line(data: Path) -> None:
    _, said = headrace(data, "up", "--detach")
    assert "ready in" in said
    try:
        found = json.loads(headrace(data, "status", "--json")[0])
        assert found["healthy"]
        names = [child["state"]["name"] for child in found["children"]]
        assert names == ["redis", "dispatcher", "builder", "worker-0"]
        assert found["topics"]["jobs.image.standard"] == {"open": 0, "oldest_age_s": 0}
        assert found["dispatchers"][0]["running_jobs"] == 0
        assert "worker-0" in headrace(data, "status")[0]
        checks = {
            check["check"]: check for check in json.loads(headrace(data, "doctor", "--json")[0])
        }
        assert checks["redis eviction"]["detail"] == "maxmemory-policy is noeviction"
        pids = [child["state"]["pid"] for child in found["children"]]
    finally:
        headrace(data, "down")
    assert [start_of(pid) for pid in pids] == [None] * 4
    headrace(data, "status", code=3)


def test_redis_is_restarted_behind_the_same_socket_even_in_a_deep_folder(
    data: Path, start: Callable[..., Supervisor]
) -> None:
    deep = data.joinpath(*["deep"] * 30)
    settings = load_settings(data_dir=deep)
    assert deep not in settings.redis_socket.parents
    headrace(deep, "up", "--detach")
    try:
        state = running_stack(settings)
        assert state is not None
        os.kill(state.children[0].pid, signal.SIGKILL)
        until(lambda: (state := running_stack(settings)) and state.children[0].restarts == 1)
        until(lambda: (state := running_stack(settings)) and state.healthy)
        headrace(deep, "status")
    finally:
        headrace(deep, "down")
        settings.redis_socket.unlink(missing_ok=True)
        settings.redis_socket.parent.rmdir()
