from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from headrace.cli.deadletters import app
from infra.eventlog import EventLog, NewRecord, Record
from infra.eventlog.open import connect_log
from infra.objects.files import FileObjects
from infra.settings import load_settings
from schemas.jobs import REPLAY, Job, job_headers, job_value
from schemas.payloads import Payload
from schemas.topics import JOB_TOPICS, dead_letter_topic

Run = Callable[..., Result]
Bury = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run("list", ...)`, with data in a folder of its own."""
    (tmp_path / "data").mkdir()

    def run(*args: object, stdin: str | None = None) -> Result:
        env = {"HEADRACE_DATA_DIR": str(tmp_path / "data")}
        return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin, env=env)

    return run


@pytest.fixture
def log(tmp_path: Path, run: Run) -> Iterator[EventLog]:
    log = connect_log(load_settings(data_dir=tmp_path / "data"))
    yield log
    log.close()


@pytest.fixture
def bury(log: EventLog, make_job: Callable[..., Job]) -> Bury:
    """`bury("a", code="bad_output", given={})`: a dead letter of job `a`; given: headers on top of its own."""

    def write(
        job_id: str, *, code: str = "bad_output", given: dict[str, str] | None = None, **facts: Any
    ) -> None:
        job = make_job(id=job_id, **facts)
        reason = {
            "x-original-topic": job.topic,
            "x-attempt": "3",
            "x-error": code,
            "x-error-message": "y is [NaN]",
        }
        headers = job_headers(job) | (given or {}) | reason
        log.append([NewRecord(dead_letter_topic(job.topic), job.id, headers, job_value(job))])

    return write


def garbage(bury: Bury) -> None:
    bury("garbage", code="record_malformed", given={"ce_tenant": "[red]no tenant[/]"})


def submitted(log: EventLog) -> list[Record]:
    return list(log.read(JOB_TOPICS, 0.0))


def said(result: Result) -> str:
    """stderr without the line breaks of a narrow terminal."""
    return " ".join(result.stderr.split())


# ── list ─────────────────────────────────────────────────────────────────────────────────────────


def test_letters_are_listed_newest_first(run: Run, bury: Bury) -> None:
    bury("a", model="one", version=3)
    bury("b", code="worker_died", tenant="acme", lane="bulk")
    garbage(bury)

    listed = run("list")

    assert listed.exit_code == 0
    header, *rows = listed.stdout.splitlines()
    assert header.split() == ["letter", "job", "model", "tenant", "error", "age"]
    assert [row.split()[1] for row in rows] == ["garbage", "b", "a"]
    assert "[red]no tenant[/] record_malformed (cannot run)" in " ".join(rows[0].split())
    assert rows[1].split()[:5] == ["jobs.text.bulk.dlq/0/1", "b", "echo", "acme", "worker_died"]
    assert rows[2].split()[2] == "one/3"


def test_json_lists_what_is_known_of_each(run: Run, bury: Bury) -> None:
    bury("a", lane="bulk")
    bury("b")

    newest, older = json.loads(run("list", "--json").stdout)

    assert newest["job"] == "b"
    age = older.pop("at")
    assert age > 0
    assert older == {
        "id": "jobs.text.bulk.dlq/0/1",
        "job": "a",
        "topic": "jobs.text.bulk",
        "tenant": "default",
        "model": "echo",
        "version": None,
        "code": "bad_output",
        "message": "y is [NaN]",
        "attempts": 3,
        "size_bytes": 5,
        "object": None,
        "obstacle": None,
    }


@pytest.mark.parametrize(
    "options",
    [
        ["--topic", "jobs.text.bulk"],
        ["--model", "two"],
        ["--tenant", "acme"],
        ["--code", "worker_died"],
        ["--job", "b"],
        ["--limit", "1"],
    ],
    ids=lambda options: options[0],
)
@pytest.mark.parametrize("command", [["list"], ["redrive", "--dry-run"]], ids=lambda c: c[0])
def test_options_narrow_what_is_meant(
    run: Run, bury: Bury, command: list[str], options: list[str]
) -> None:
    other = ["a", "b"] if command == ["list"] else ["b", "a"]
    for job_id in other:
        if job_id == "a":
            bury("a", model="one")
        else:
            bury("b", code="worker_died", tenant="acme", model="two", lane="bulk")
    # A limit takes the newest to list, and the first of the first topic to redrive.
    expected = "a" if options[0] == "--limit" and command != ["list"] else "b"

    found = run(*command, *options, "--json").stdout

    documents = json.loads(found) if command == ["list"] else [json.loads(found)]
    assert [document["job"] for document in documents] == [expected]


def test_since_looks_back_by_hours(run: Run, bury: Bury) -> None:
    bury("a")

    assert len(json.loads(run("list", "--since", "1", "--json").stdout)) == 1
    assert json.loads(run("list", "--since", "0", "--json").stdout) == []


def test_a_summary_counts_by_code(run: Run, bury: Bury) -> None:
    for number in range(3):
        bury(f"a{number}")
    bury("b", code="worker_died")

    assert json.loads(run("list", "--summary", "--json").stdout) == {
        "bad_output": 3,
        "worker_died": 1,
    }
    rows = [row.split() for row in run("list", "--summary").stdout.splitlines()]
    assert rows == [["error", "letters"], ["bad_output", "3"], ["worker_died", "1"]]


def test_an_unknown_topic_is_the_users_mistake(run: Run) -> None:
    result = run("list", "--topic", "jobs.video.bulk")

    assert result.exit_code == 2
    assert "headrace topics list" in said(result)


# ── show ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_letter_is_shown_with_every_header(run: Run, bury: Bury) -> None:
    bury("a", foreign={"x-color": "[blue]"})

    for name in ("a", "jobs.text.standard.dlq/0/1"):
        shown = run("show", name)
        assert shown.exit_code == 0
        lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
        assert {"job a", "message y is [NaN]", "payload 5 bytes, in the letter"} <= set(lines)
        assert {"x-color [blue]", "x-attempt 3", "ce_type io.headrace.job.v1"} <= set(lines)

    document = json.loads(run("show", "a", "--json").stdout)
    assert (document["job"], document["headers"]["x-color"]) == ("a", "[blue]")


def test_it_says_why_a_letter_cannot_run(run: Run, bury: Bury) -> None:
    garbage(bury)

    shown = " ".join(run("show", "garbage").stdout.split())

    assert "obstacle Header ce_tenant: expected" in shown


def test_a_payload_is_written_to_a_file(run: Run, bury: Bury, tmp_path: Path) -> None:
    ref = FileObjects(tmp_path / "data" / "objects").put("tenants/default/payloads/b", b"\0many")
    bury("a", payload=Payload("text/plain", data=b"\0few"))
    bury("b", payload=Payload("text/plain", ref=ref))

    for job_id, content in {"a": b"\0few", "b": b"\0many"}.items():
        assert run("show", job_id, "--payload", tmp_path / job_id).exit_code == 0
        assert (tmp_path / job_id).read_bytes() == content


def test_a_payload_that_is_gone_is_named(run: Run, bury: Bury, tmp_path: Path) -> None:
    objects = FileObjects(tmp_path / "data" / "objects")
    ref = objects.put("tenants/default/payloads/b", b"many")
    objects.delete(ref.key)
    bury("b", payload=Payload("text/plain", ref=ref))

    result = run("show", "b", "--payload", tmp_path / "b")

    assert result.exit_code == 2
    assert ref.key in said(result)
    assert not (tmp_path / "b").exists()


def test_an_unknown_letter_is_the_users_mistake(run: Run) -> None:
    result = run("show", "nobody")

    assert (result.exit_code, result.stdout) == (2, "")
    assert "'nobody'" in said(result)


# ── redrive ──────────────────────────────────────────────────────────────────────────────────────


def test_jobs_are_submitted_again(run: Run, bury: Bury, log: EventLog) -> None:
    bury("a")
    bury("b", lane="bulk")

    result = run("redrive", "--yes")

    assert (result.exit_code, result.stdout) == (0, "")
    assert "jobs submitted again: 2" in said(result)
    assert {(record.key, record.position.topic) for record in submitted(log)} == {
        ("a", "jobs.text.standard"),
        ("b", "jobs.text.bulk"),
    }


def test_it_says_in_json_how_many_went(run: Run, bury: Bury) -> None:
    bury("a")
    garbage(bury)

    result = run("redrive", "--yes", "--json")

    assert json.loads(result.stdout) == {"redriven": 1, "left_out": 1}
    assert "left out, because they cannot run: 1;" in said(result)
    assert json.loads(run("redrive", "--yes", "--force", "--json").stdout)["redriven"] == 2


def test_a_dry_run_shows_what_would_go_and_sends_nothing(
    run: Run, bury: Bury, log: EventLog
) -> None:
    bury("a")
    bury("b", code="worker_died")

    result = run("redrive", "--dry-run", "--code", "bad_output")

    assert result.exit_code == 0
    assert result.stdout == "jobs.text.standard.dlq/0/1 job a to jobs.text.standard\n"
    assert "jobs that would be submitted again: 1" in said(result)
    assert submitted(log) == []


def test_without_a_terminal_it_takes_a_yes(run: Run, bury: Bury, log: EventLog) -> None:
    bury("a")

    result = run("redrive", stdin="y\n")

    assert result.exit_code == 2
    assert "--yes" in said(result)
    assert submitted(log) == []


@pytest.mark.parametrize(("answer", "count"), [("n\n", 0), ("", 0), ("y\n", 1)])
def test_at_a_terminal_it_asks(
    run: Run,
    bury: Bury,
    log: EventLog,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    count: int,
) -> None:
    monkeypatch.setattr("headrace.cli.deadletters.can_ask", lambda: True)
    bury("a")

    result = run("redrive", stdin=answer)

    assert "Jobs to be submitted again: 1 (1 bad_output). Go on?" in said(result)
    assert (result.exit_code == 0) == bool(count)
    assert len(submitted(log)) == count


def test_redriving_twice_gives_the_same_replay_id(run: Run, bury: Bury, log: EventLog) -> None:
    bury("a")
    for _ in range(2):
        assert run("redrive", "--yes").exit_code == 0

    assert [record.headers[REPLAY] for record in submitted(log)] == [
        "jobs.text.standard.dlq/0/1"
    ] * 2


@pytest.mark.parametrize("deadline", ["0", "-5", "1e9"])
def test_a_deadline_that_cannot_be_is_the_users_mistake(
    run: Run, bury: Bury, log: EventLog, deadline: str
) -> None:
    bury("a")

    result = run("redrive", "--yes", "--deadline", deadline)

    assert result.exit_code == 2
    assert "deadline" in said(result)
    assert submitted(log) == []


def test_looking_at_letters_loads_no_engine(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom headrace.cli.deadletters import app\n"
        f"app(['list', '--data', {str(tmp_path)!r}, '--json'], standalone_mode=False)\n"
        "print([name for name in ('numpy', 'onnx', 'onnxruntime', 'celery') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n[]\n", done.stderr
