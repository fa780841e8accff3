from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from infra.embedded import announce_ready, announced_ready, ready_file
from infra.embedded.processes import age_s, describe_exit, start_of
from infra.embedded.record import (
    ChildState,
    Record,
    StackState,
    held,
    recorded_stack,
    running_stack,
    state_file,
)
from infra.settings import Settings
from schemas.errors import PipelineError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


@pytest.fixture
def run_folder(settings: Settings) -> Path:
    with held(settings):
        return settings.data_dir / "run"


def child(state: str = "ready") -> ChildState:
    return ChildState("worker-0", state, 7, 70.0, 0.5, 0, "")  # type: ignore[arg-type]


def test_a_process_that_announced_itself_is_ready_and_its_predecessor_was_not(
    settings: Settings,
) -> None:
    assert not announced_ready(settings, "worker-0", os.getpid())

    announce_ready(settings, "worker-0", engines=2)

    assert announced_ready(settings, "worker-0", os.getpid())
    assert not announced_ready(settings, "worker-0", os.getpid() + 1)
    facts = msgspec.json.decode(ready_file(settings, "worker-0").read_bytes())
    assert facts == {"pid": os.getpid(), "engines": 2}


@pytest.mark.parametrize("content", [b"", b"half{", b"[]"])
def test_a_damaged_announcement_counts_for_nothing(
    settings: Settings, run_folder: Path, content: bytes
) -> None:
    (run_folder / "worker-0.ready").write_bytes(content)

    assert not announced_ready(settings, "worker-0", os.getpid())


def test_a_folder_is_held_once(settings: Settings) -> None:
    with held(settings):
        with pytest.raises(PipelineError, match=f"pid {os.getpid()}") as refusal, held(settings):
            pass
        assert refusal.value.code == "stack_running"
    with held(settings):
        pass  # free again


def test_the_record_says_what_runs(settings: Settings, run_folder: Path) -> None:
    record = Record(settings, version="1.2.3")

    assert record.update([child("starting")]) is None
    assert record.update([child()]) is not None, "ready for the first time"
    assert record.update([child("restarting")]) is None
    assert record.update([child()]) is None, "ready again"

    state = running_stack(settings)
    assert state is not None
    assert (state.pid, state.version, state.redis) == (os.getpid(), "1.2.3", "embedded")
    assert state.children == [child()]
    assert state.healthy
    record.update([child()], stopping=True)
    assert not running_stack(settings).healthy  # type: ignore[union-attr]


def test_a_full_disk_does_not_stop_the_record(
    settings: Settings, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(settings, version="1")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        record.update([child("starting")])
    assert recorded_stack(settings) is None

    record.update([child()])
    assert recorded_stack(settings) is not None


def test_the_record_of_a_killed_stack_is_no_running_stack(
    settings: Settings, run_folder: Path
) -> None:
    Record(settings, version="1").update([child()])
    mine = recorded_stack(settings)
    assert mine is not None
    reused = msgspec.structs.replace(mine, start=mine.start - 1)
    state_file(settings).write_bytes(msgspec.json.encode(reused))

    assert running_stack(settings) is None
    assert isinstance(recorded_stack(settings), StackState)


@pytest.mark.parametrize("content", [b"", b'{"pid": "many"}'])
def test_an_unreadable_record_is_none(settings: Settings, run_folder: Path, content: bytes) -> None:
    state_file(settings).write_bytes(content)

    assert recorded_stack(settings) is None


def test_a_process_is_known_by_its_start_until_it_is_dead() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        start = start_of(process.pid)
        assert start is not None
        assert start == start_of(process.pid)
        assert start != start_of(os.getpid())
    finally:
        process.kill()
    while start_of(process.pid) is not None:
        pass  # dead counts, though its parent has not asked yet
    process.wait()


def test_a_process_has_the_age_that_passed_since_its_start() -> None:
    tick_s = 2 / os.sysconf("SC_CLK_TCK")
    before = time.monotonic()
    process = subprocess.Popen(["sleep", "60"])
    try:
        after = time.monotonic()
        asked = time.monotonic()
        age = age_s(process.pid)
        assert asked - after - tick_s <= age <= time.monotonic() - before + tick_s
    finally:
        process.kill()
        process.wait()
    with pytest.raises(ProcessLookupError):
        age_s(process.pid)


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "killed by SIGKILL"), (-77, "by signal 77")],
)
def test_an_exit_in_words(status: int, words: str) -> None:
    assert words in describe_exit(status)
