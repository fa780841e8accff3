"""`headrace lake` on a lake of files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from headrace.cli.lake import app
from infra.eventlog import Position
from infra.objects.files import FileObjects
from schemas.payloads import payload_key
from schemas.results import Outcome, encode_outcome
from workers.archiver.archive import Archive
from workers.archiver.segments import Entry, Segment

Run = Callable[..., Result]
NOON = 1_767_268_800.0
DAY_S = 86_400.0


@pytest.fixture
def objects(tmp_path: Path) -> FileObjects:
    return FileObjects(tmp_path / "objects")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run("show", ...)`, with data in a folder of its own."""

    def run(*args: object, stdin: str | None = None) -> Result:
        env = {"HEADRACE_DATA_DIR": str(tmp_path)}
        return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin, env=env)

    return run


@pytest.fixture
def lake(objects: FileObjects) -> None:
    """Two jobs of acme on two days, one of other's."""
    given: dict[str, Any] = {"status": "succeeded", "model": "speech", "submitted_at": NOON}
    outcomes = [
        Outcome(job_id="a", tenant="acme", finished_at=NOON, **given),
        Outcome(job_id="b", tenant="acme", finished_at=NOON + DAY_S, **given),
        Outcome(job_id="c", tenant="other", finished_at=NOON, **given),
    ]
    entries = [Entry(Position("results", 0, n), encode_outcome(o)) for n, o in enumerate(outcomes)]
    archive = Archive(objects)
    archive.store(Segment(entries, 0.0), lambda: None)
    archive.close()
    objects.put(payload_key("acme", "a", "1"), b"payload")


def held(run: Run, *args: str) -> list[tuple[str, str]]:
    shown = json.loads(run("show", "--json", *args).stdout)
    return [(one["tenant"], one["date"]) for one in shown]


@pytest.mark.usefixtures("lake")
def test_show_says_what_is_there(run: Run) -> None:
    acme, other = ("acme", "2026-01-01"), ("other", "2026-01-01")
    assert held(run) == [acme, ("acme", "2026-01-02"), other]
    assert held(run, "--tenant", "other") == [other]
    assert held(run, "--model", "nothing") == []
    shown = run("show")
    assert shown.exit_code == 0
    assert [line.split()[:4] for line in shown.stdout.splitlines()[1:]] == [
        ["acme", "speech", "2026-01-01", "1"],
        ["acme", "speech", "2026-01-02", "1"],
        ["other", "speech", "2026-01-01", "1"],
    ]


def test_an_empty_lake_says_so(run: Run) -> None:
    assert held(run) == []
    shown = run("show")
    assert shown.exit_code == 0
    assert "Nothing is archived" in shown.stderr


@pytest.mark.usefixtures("lake")
def test_erase_asks_first(run: Run) -> None:
    assert run("erase", "--tenant", "acme", stdin="n\n").exit_code != 0
    assert len(held(run)) == 3
    erased = run("erase", "--tenant", "acme", stdin="y\n")
    assert erased.exit_code == 0
    assert "erased tenant acme: files of rows 2, payloads and results 1" in erased.stdout
    assert held(run) == [("other", "2026-01-01")]


@pytest.mark.usefixtures("lake")
def test_a_dry_run_erases_nothing(run: Run) -> None:
    planned = run("erase", "--job", "a", "--dry-run")
    assert "would erase job a: files of rows 1, payloads and results 1" in planned.stdout
    assert len(held(run)) == 3
    document = json.loads(run("erase", "--job", "a", "--yes", "--json").stdout)
    assert document == {"erased": "a", "files": 1, "blobs": 1, "left": 0, "dry_run": False}
    assert held(run) == [("acme", "2026-01-02"), ("other", "2026-01-01")]


@pytest.mark.parametrize(
    "args",
    [[], ["--job", "a", "--tenant", "b"], ["--job", "a/b"], ["--tenant", "A"], ["--job", ""]],
)
def test_what_to_erase_must_be_clear(run: Run, objects: FileObjects, args: list[str]) -> None:
    refused = run("erase", "--yes", *args)
    assert refused.exit_code == 2
    assert "Expected" in refused.stderr
    assert list(objects.list()) == []


@pytest.mark.usefixtures("lake")
def test_prune_keeps_what_the_setting_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOON + 2 * DAY_S)
    assert "no retention is set" in run("prune").stdout
    assert "would delete 2 files" in run("prune", "--days", 1, "--dry-run").stdout
    assert len(held(run)) == 3
    monkeypatch.setenv("HEADRACE_ARCHIVER__RETENTION_DAYS", "1")
    assert run("prune", stdin="n\n").exit_code != 0
    assert len(held(run)) == 3
    assert json.loads(run("prune", "--yes", "--json").stdout)["files"] == 2
    assert held(run) == [("acme", "2026-01-02")]
    assert "deleted 0 files" in run("prune").stdout


@pytest.mark.usefixtures("lake")
def test_erase_says_what_came_later(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOON - 1)
    erased = run("erase", "--tenant", "acme", "--yes")
    assert erased.exit_code == 0
    assert "2 files have rows that came later" in erased.stderr
    assert len(held(run)) == 3


def test_without_pyarrow_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused = run("erase", "--job", "a", "--yes")
    assert refused.exit_code == 1
    assert "headrace[lake]" in refused.stderr
