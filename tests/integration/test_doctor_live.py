"""`headrace doctor` and the preconditions of a process, against servers that run."""

from __future__ import annotations

import json
import uuid

import pytest
from typer.testing import CliRunner

from headrace.cli import app
from infra.settings import Settings
from schemas.topics import JOB_TOPICS
from tests.servers.minio import patience

pytestmark = patience()

A = JOB_TOPICS[0]
WORTH_KNOWING = {"models", "kafka durability"}
"""No model is installed, and there is but one broker."""

Findings = dict[str, dict[str, str]]


def doctor(*, code: int) -> Findings:
    """What it says, by check."""
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == code, done.output
    return {finding["check"]: finding for finding in json.loads(done.stdout)}


def run(*command: str) -> None:
    done = CliRunner().invoke(app, list(command))
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def prepared() -> dict[str, str]:
    """Prefix of topics and bucket that the tests of this module share: to make 38 topics takes its time."""
    return {"prefix": f"doctor-{uuid.uuid4().hex[:8]}."}


@pytest.fixture
def sound(
    deployment: Settings, prepared: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """A deployment on which all is as it should be."""
    host = deployment.log_url.partition("?")[0]
    bucket = f"test-{prepared['prefix'][:-1]}"
    objects = deployment.objects_url.partition("/test-")
    url = f"{objects[0]}/{bucket}?{objects[2].partition('?')[2]}"
    monkeypatch.setenv("HEADRACE_LOG_URL", f"{host}?prefix={prepared['prefix']}")
    monkeypatch.setenv("HEADRACE_OBJECTS_URL", url)
    if "done" not in prepared:
        run("topics", "apply")
        run("objects", "apply")
        prepared["done"] = "yes"
    from infra.settings import load_settings

    return load_settings()
