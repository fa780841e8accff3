"""`headrace jobs show` of a job whose result is an object: there, gone, harmed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from headrace.cli.jobs import app
from infra.eventlog import NewRecord
from infra.eventlog.open import open_log
from infra.objects.files import FileObjects
from schemas.payloads import Ref, result_key
from schemas.results import Outcome, encode_outcome, result_headers
from schemas.topics import RESULTS

KEY = result_key("default", "a", "1")


@pytest.fixture
def objects(tmp_path: Path) -> FileObjects:
    return FileObjects(tmp_path / "objects")


@pytest.fixture
def ref(objects: FileObjects) -> Ref:
    return objects.put(KEY, b'{"type":"vector","dimensions":2}')


@pytest.fixture
def show(tmp_path: Path, ref: Ref) -> Callable[..., Result]:
    outcome = Outcome(job_id="a", status="succeeded", tenant="default", model="m", ref=ref)
    record = NewRecord(RESULTS, "a", result_headers(outcome), encode_outcome(outcome))
    with closing(open_log(f"sqlite://{tmp_path}/log.db")) as log:
        log.append([record])
    env = {"HEADRACE_DATA_DIR": str(tmp_path)}
    return lambda *args: CliRunner().invoke(app, ["show", "a", *args], env=env)


def test_its_answer_is_in_place(show: Callable[..., Result]) -> None:
    assert json.loads(show("--json").stdout)["answer"]["dimensions"] == 2


def test_once_it_is_gone_the_rest_is_shown(
    show: Callable[..., Result], objects: FileObjects
) -> None:
    objects.delete(KEY)
    shown = json.loads(show("--json").stdout)
    assert (shown["status"], shown["answer"], shown["object"]) == ("succeeded", None, KEY)
    assert KEY in show().stdout


def test_what_is_not_what_was_stored_is_no_answer(
    show: Callable[..., Result], objects: FileObjects
) -> None:
    objects.put(KEY, b"harmed")
    assert show("--json").exit_code == 2
