"""The tenants' keys, as they stand in the environment or in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.settings import load_settings
from schemas.errors import PipelineError

OLD, NEW = "an-older-secret-of-acme", "a-newer-secret-of-acme"
KEYS = "HEADRACE_TENANTS__KEYS"
FILE = "HEADRACE_TENANTS__KEYS_FILE"


def test_without_keys_nobody_has_one_and_no_proof_is_asked_for() -> None:
    tenants = load_settings().tenants

    assert (tenants.require_proof, tenants.secrets()) == (False, {})


def test_a_tenant_has_one_key_or_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS, json.dumps({"acme": [NEW, OLD], "other": OLD}))

    assert load_settings().tenants.secrets() == {
        "acme": (NEW.encode(), OLD.encode()),
        "other": (OLD.encode(),),
    }


def test_keys_in_a_file_count_over_those_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"acme": NEW}))
    monkeypatch.setenv(KEYS, json.dumps({"acme": OLD, "other": OLD}))
    monkeypatch.setenv(FILE, str(file))

    assert load_settings().tenants.secrets() == {"acme": (NEW.encode(),), "other": (OLD.encode(),)}


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS, json.dumps({"acme": OLD}))

    assert OLD not in repr(load_settings()) + str(load_settings().model_dump_json())


WRONG = [
    "{",
    "[]",
    json.dumps({"acme": "short-secret"}),
    json.dumps({"Acme!": OLD}),
    json.dumps({"acme": {"key": OLD}}),
    json.dumps({"acme": 12345678901234567890}),
]


@pytest.mark.parametrize("text", WRONG)
def test_wrong_keys_in_the_environment_are_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(KEYS, text)

    with pytest.raises(PipelineError, match=r"(?i)tenants") as caught:
        load_settings()

    assert caught.value.code == "settings_invalid"
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("text", [*WRONG, None])
def test_wrong_keys_in_a_file_are_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "keys.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv(FILE, str(file))

    with pytest.raises(PipelineError, match=r"KEYS_FILE: \S+keys.json must hold") as caught:
        load_settings().tenants.secrets()

    assert caught.value.code == "settings_invalid"
    assert "secret" not in caught.value.message
