"""The command line against a running stack: what it prints, and how it ends for a script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from examples.models import samples
from headrace import Client

if TYPE_CHECKING:
    from tests.conftest import Stack

pytestmark = pytest.mark.timeout(600)  # the first test brings the stack up and may download models


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def order(tmp_path: Path, **words: Any) -> Path:
    path = tmp_path / f"order-{len(list(tmp_path.iterdir()))}.json"
    path.write_text(json.dumps(words))
    return path


def test_submit_and_wait_prints_a_document_a_job(stack: Stack) -> None:
    texts = samples.sentences()[:2]
    options = [word for text in texts for word in ("--text", text)]
    done = stack.headrace("jobs", "submit", "minilm-topics", *options, "--wait", "--json")
    found = lines(done.stdout)
    assert {job["answer"]["label"] for job in found} == {"sports", "technology"}
    assert {job["status"] for job in found} == {"succeeded"}
    assert all(job["times_ms"]["run"] > 0 for job in found)


def test_submit_takes_files_and_stdin(stack: Stack, tmp_path: Path) -> None:
    photograph = samples.photograph("coffee.png")
    done = stack.headrace(
        "jobs", "submit", "efficientnet-lite0", photograph, "-", "--wait", "--json",
        stdin=samples.photograph("camera.png").read_bytes(),
    )  # fmt: skip
    assert {job["answer"]["label"] for job in lines(done.stdout)} == {"espresso", "tripod"}


def test_a_job_is_submitted_waited_for_shown_listed_and_explained(stack: Stack) -> None:
    submitted = stack.headrace("jobs", "submit", "minilm-topics", "--text", "A match.", "--json")
    job = json.loads(submitted.stdout)["job"]
    assert lines(stack.headrace("jobs", "wait", job, "--json").stdout)[0]["job"] == job
    shown = stack.json("jobs", "show", job)
    assert (shown["job"], shown["status"], shown["attempts"]) == (job, "succeeded", 1)
    assert job in stack.headrace("jobs", "show", job).stdout
    assert job in {listed["job"] for listed in stack.json("jobs", "list", "--limit", 5)}
    assert "ended as succeeded" in stack.json("jobs", "explain", job)["reasons"][0]


def test_a_waiting_job_is_explained_and_cancelled(
    stack: Stack, client: Client, tmp_path: Path
) -> None:
    with stack.held(client):
        job = client.submit("obey", order(tmp_path)).id
        reasons = " ".join(stack.json("jobs", "explain", job)["reasons"])
        assert "waits since" in reasons
        assert "1 workers are ready" in reasons
        assert "jobs.tensor.standard" in reasons
        assert stack.json("jobs", "show", job)["status"] == "queued"
        stack.headrace("jobs", "wait", job, "--timeout", 0.2, code=4)
        stack.headrace("jobs", "cancel", job)
        assert client.outcomes([job]).__next__().status == "cancelled"
    stack.headrace("jobs", "wait", job, code=1)


def test_a_failed_job_makes_the_command_fail(stack: Stack, tmp_path: Path) -> None:
    bad = order(tmp_path, fail="no luck")
    done = stack.headrace("jobs", "submit", "obey", bad, order(tmp_path), "--wait", code=1)
    assert "no luck" in done.stdout
    assert "Traceback" not in done.stderr
    (failed,) = stack.json("jobs", "list", "--limit", 1, "--status", "failed")
    assert failed["code"] == "step_failed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["jobs", "submit", "minilm-topic", "--text", "x"], "Did you mean minilm-topics"),
        (["jobs", "submit", "minilm-topics", "--text", "x", "--tier", "gold"], "gold"),
        (["jobs", "submit", "minilm-topics", "nowhere.txt"], "nowhere.txt"),
        (["jobs", "submit", "minilm-topics"], "at least one FILE"),
        (["jobs", "show", "01a00000-0000-7000-8000-000000000000"], "No job"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    stack: Stack, arguments: list[str], words: str
) -> None:
    done = stack.headrace(*arguments, code=2)
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_status_tells_what_runs(stack: Stack, client: Client) -> None:
    client.submit("noop", np.zeros(1, np.float32)).result()
    stack.until(lambda: stack.healthy)
    found = stack.json("status")
    assert found["healthy"] is True
    assert {child["state"]["name"] for child in found["children"]} == {
        "redis", "dispatcher", "builder", "worker-0",
    }  # fmt: skip
    assert found["workers"][0]["jobs_done"] > 0
    assert found["dispatchers"][0]["ended"]["succeeded"] > 0
    assert found["models"] >= 8
    assert "worker-0" in stack.headrace("status").stdout


def test_doctor_finds_nothing_wrong(stack: Stack) -> None:
    found = {check["check"]: check["level"] for check in stack.json("doctor")}
    assert "fail" not in found.values(), found
    assert {"redis eviction", "object store", "models", "event log"} <= found.keys()


def test_a_second_stack_on_the_same_folder_is_refused(stack: Stack) -> None:
    assert "one is running" in stack.headrace("up", code=2).stderr
    assert stack.healthy


def test_jobs_are_accepted_before_the_stack_is_up(
    make_stack: Callable[..., Stack], small_bundles: list[Path], tmp_path: Path
) -> None:
    """And a stack in the foreground ends cleanly on Ctrl-C."""
    stack = make_stack()
    assert "headrace up" in stack.headrace("status", code=3).stderr
    stack.headrace("models", "add", small_bundles[1])
    job = stack.headrace("jobs", "submit", "obey", order(tmp_path, number=3)).stdout.strip()
    assert "not running" in " ".join(stack.json("jobs", "explain", job)["reasons"])
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "up"],
        env={**stack.environment, "HEADRACE_DATA_DIR": str(stack.data)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        assert stack.client().outcomes([job]).__next__().status == "succeeded"
        children = [child.pid for child in stack.state.children] if stack.state else []
        os.kill(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert b"Traceback" not in said
    assert len(children) == 4
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
