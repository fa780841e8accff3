from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from msgspec import Struct
from typer.testing import CliRunner

import headrace
from headrace.cli import COMMANDS, app, load_command
from headrace.cli.output import exit_code, handle_errors, print_json
from schemas.errors import (
    Backpressure,
    InferenceFailed,
    InvalidJob,
    InvalidModel,
    JobFailed,
    PipelineError,
    Transient,
)

HEAVY = ("numpy", "celery", "onnxruntime", "redis", "pydantic", "PIL", "soundfile")


def raising(error: BaseException) -> typer.Typer:
    """A command line of one command, which raises."""
    single = typer.Typer(pretty_exceptions_enable=False)

    @single.command()
    @handle_errors
    def fail() -> None:
        raise error

    return single


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_front_door_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom headrace.cli import app\n"
        f"try: app({arguments!r})\n"
        f"except SystemExit: print([name for name in {HEAVY!r} if name in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])

    assert result.exit_code == 0
    assert all(re.search(rf"^ +{name} +\w", result.stdout, re.M) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_of_itself_what_the_list_says_of_it(name: str) -> None:
    command = load_command(COMMANDS[name])

    assert COMMANDS[name].help.lower() in command.get_short_help_str(limit=200).lower()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])

    assert result.exit_code == 0
    assert f" {name} [OPTIONS]" in result.stdout


def test_a_mistyped_command_is_a_user_error_with_a_suggestion() -> None:
    result = CliRunner().invoke(app, ["statsu"])

    assert result.exit_code == 2
    assert "status" in result.stderr


def test_the_version_is_the_packages(pytestconfig: pytest.Config) -> None:
    project = tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())["project"]

    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == f"headrace {project['version']}"


def test_every_public_name_is_there_and_no_other() -> None:
    for name in headrace.__all__:
        assert getattr(headrace, name) is not None
    assert set(headrace.__all__) <= set(dir(headrace))
    with pytest.raises(AttributeError, match="no attribute 'Clinet'"):
        headrace.Clinet  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidJob("model_unknown", "no such model"), 2),
        (InvalidModel("yaml", "line 3"), 2),
        (PipelineError("settings_invalid", "HEADRACE_X"), 2),
        (PipelineError("stack_running", "one is running"), 2),
        (Transient("redis_unavailable", "no answer"), 3),
        (Backpressure("full"), 3),
        (TimeoutError("3 jobs left"), 4),
        (InferenceFailed("bad_output", "NaN"), 1),
        (JobFailed("expired", "too late"), 1),
        (PipelineError("stack_failed", "no"), 1),
        (PermissionError(13, "Permission denied", "/root"), 1),
        (ZeroDivisionError("a bug"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_a_line_and_an_exit_code_and_no_traceback(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HEADRACE_DEBUG", raising=False)
    printed: list[str] = []
    monkeypatch.setattr("headrace.cli.output.console.print", lambda *a, **_: printed.extend(a))

    result = CliRunner().invoke(raising(error), [])

    assert result.exit_code == exit_code(error) == code
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert any((str(error) or "interrupted") in line for line in printed)


def test_messages_are_not_taken_for_markup(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "from headrace.cli.output import handle_errors\n"
        "from schemas.errors import InvalidJob\n"
        "import typer\n"
        "@handle_errors\n"
        "def fail(): raise InvalidJob('x', 'shape [red] came, [/data] expected')\n"
        "try: fail()\n"
        "except typer.Exit: pass"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

    assert capfd.readouterr().err == "error: shape [red] came, [/data] expected\n"


def test_debugging_lets_the_traceback_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_DEBUG", "1")

    result = CliRunner().invoke(raising(ZeroDivisionError("a bug")), [])

    assert isinstance(result.exception, ZeroDivisionError)


def test_typers_own_exits_pass() -> None:
    assert CliRunner().invoke(raising(typer.Exit(7)), []).exit_code == 7
    assert CliRunner().invoke(raising(typer.BadParameter("no")), []).exit_code == 2


def test_a_reader_that_went_away_is_met_with_silence() -> None:
    program = (
        "import os, sys, typer\n"
        "from headrace.cli.output import handle_errors, print_json\n"
        "@handle_errors\n"
        "def talk():\n"
        "    while True: print_json({'job': 'x' * 1000}, line=True)\n"
        "try: talk()\n"
        "except typer.Exit as done: sys.exit(done.exit_code)"
    )
    talker = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert talker.stdout is not None
    assert talker.stderr is not None
    with talker.stdout, talker.stderr:
        talker.stdout.readline()
        talker.stdout.close()
        assert talker.stderr.read() == b""
    assert talker.wait() == 1


class Answer(Struct):
    label: str
    folder: Path


@pytest.mark.parametrize("line", [True, False])
def test_json_is_one_document_of_whatever_is_known(
    line: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    print_json([Answer("espresso", Path("/data"))], line=line)

    text = capsys.readouterr().out
    assert json.loads(text) == [{"label": "espresso", "folder": "/data"}]
    assert (text.count("\n") == 1) == line


@pytest.mark.parametrize("command", ["up", "down", "status", "doctor"])
def test_wrong_settings_are_named_by_their_variable(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HEADRACE_STACK__STOP_S", "soon")
    said: list[str] = []
    monkeypatch.setattr("headrace.cli.output.print_error", lambda m, *_: said.append(m))

    result = CliRunner().invoke(app, [command, "--data", str(tmp_path / "new")])

    assert result.exit_code == 2
    assert "HEADRACE_STACK__STOP_S" in said[0]
    assert not (tmp_path / "new").exists()


def test_completion_knows_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headrace"],
        env={"_HEADRACE_COMPLETE": "complete_bash", "COMP_WORDS": "headrace do", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout.split() == ["down", "doctor"]
