"""What `headrace status` says of the lake, and of workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
from msgspec.structs import replace
from typer.testing import CliRunner

from headrace.cli.status import Status, _show_jobs, status
from infra.eventlog import NewRecord
from infra.eventlog.open import open_log
from infra.fleet import WorkerBeat
from infra.lake import GROUP, SEGMENTS
from infra.objects.files import FileObjects
from schemas.topics import RESULTS

app = typer.Typer()
app.command()(status)


@pytest.fixture
def show(tmp_path: Path) -> Callable[..., str]:
    """On a log of one's own and a Redis that is not there."""
    env = {
        "HEADRACE_DATA_DIR": str(tmp_path),
        "HEADRACE_LOG_URL": f"sqlite://{tmp_path}/log.db",
        "HEADRACE_REDIS_URL": f"unix://{tmp_path}/nobody.sock",
    }

    def show(*args: str) -> str:
        shown = CliRunner().invoke(app, list(args), env=env)
        assert shown.exit_code == 3
        return shown.stdout

    with closing(open_log(env["HEADRACE_LOG_URL"])) as log:
        log.append([NewRecord(RESULTS, str(n), {}, b"") for n in range(3)])
    return show


def test_without_a_lake_nothing_is_said_of_it(show: Callable[..., str]) -> None:
    assert json.loads(show("--json"))["lake"] is None
    assert "lake" not in show()


def test_with_a_lake_it_says_what_is_not_archived(show: Callable[..., str], tmp_path: Path) -> None:
    FileObjects(tmp_path / "objects").put(f"{SEGMENTS}/0-1-abcd", b"")
    lake: dict[str, Any] = json.loads(show("--json"))["lake"]
    assert lake["open"] == 3
    assert lake["oldest_age_s"] >= 0
    assert "lake: 3 outcomes to be archived, the oldest for" in show()

    with closing(open_log(f"sqlite://{tmp_path}/log.db")) as log:
        consumer = log.consumer(GROUP, [RESULTS])
        consumer.complete([record.position for record in consumer.receive(9, 2**20)])
        consumer.close()
    assert json.loads(show("--json"))["lake"]["open"] == 0
    assert "lake" not in show()


def test_a_worker_that_is_ready_says_how_long_its_start_took(capsys: Any) -> None:
    beat = WorkerBeat(
        worker="w", life="1", pid=1, started_at=0.0, ready=True, draining=False, slots=2, batches=[],
        engines=["tiny/1"], memory_bytes=1, jobs_done=3, start={"imports": 1.2}, cold_start_s=1.25,
    )  # fmt: skip
    found = Status(
        data_dir="", healthy=True, stack=None, children=[], topics=None, lake=None, dispatchers=[],
        workers=[beat, replace(beat, worker="young", ready=False, start={}, cold_start_s=0.0)],
        models=None, trouble=[],
    )  # fmt: skip

    _show_jobs(found)

    first, second = capsys.readouterr().out.splitlines()
    assert first == "w: 3 jobs done, holds tiny/1, ready 1.2 s after its start"
    assert second == "young: 3 jobs done, holds tiny/1"
