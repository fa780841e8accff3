"""The README's own snippets and commands, run as a reader would: those marked `<!-- test -->`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Stack

pytestmark = pytest.mark.timeout(600)  # the first test brings the stack up and may download models

ROOT = Path(__file__).parents[2]
MARKED = re.compile(r"^<!-- test -->\n+```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: list[tuple[str, str]] = MARKED.findall((ROOT / "README.md").read_text())


def run(stack: Stack, command: list[str]) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**stack.environment, "HEADRACE_DATA_DIR": str(stack.data), "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_marked_block_is_found() -> None:
    marks = (ROOT / "README.md").read_text().count("<!-- test -->")
    assert len(BLOCKS) == marks
    assert {kind for kind, _ in BLOCKS} == {"python", "console"}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_readme_does_what_it_says(stack: Stack, number: int) -> None:
    kind, text = BLOCKS[number]
    if kind == "python":
        assert run(stack, [sys.executable, "-c", text]) != ""
        return
    commands = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
    assert commands
    for command in commands:
        assert run(stack, ["bash", "-euc", command]) != ""


def test_the_first_result_takes_five_lines() -> None:
    first = next(text for kind, text in BLOCKS if kind == "python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 5
