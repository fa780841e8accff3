"""docs/asyncapi.yaml is what the code says today, and the AsyncAPI project's own parser finds nothing wrong with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers.process import cache_folder, only_one, unavailable

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs" / "asyncapi.yaml"
PARSER = "3.6.3"
REMEDY = "install Node.js 18 or newer with npm (on Debian: `apt-get install nodejs npm`)"
SCRIPT = """\
const { Parser } = require("@asyncapi/parser");
const text = require("node:fs").readFileSync(0, "utf8");
new Parser().parse(text).then(({ document, diagnostics }) => {
  console.log(JSON.stringify({ valid: document !== undefined, diagnostics }));
});
"""
WARNING = 1
"""Severity, and worse ones are lower. Above are hints, such as that AsyncAPI 3.1 is out."""


@pytest.fixture(scope="module")
def parser() -> Path:
    """A folder in which Node finds the parser, installed on first use."""
    folder = cache_folder(f"asyncapi-parser-{PARSER}")
    for program in ("node", "npm"):
        if not shutil.which(program):
            unavailable("@asyncapi/parser", f"there is no `{program}` on the PATH", REMEDY)
    with only_one(folder):
        if not (folder / "installed").exists():
            install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
            fetched = subprocess.run(
                [*install, "--prefix", str(folder), f"@asyncapi/parser@{PARSER}"],
                capture_output=True,
                text=True,
            )
            if fetched.returncode != 0:
                why = f"npm could not install it ({fetched.stderr[-300:]})"
                unavailable("@asyncapi/parser", why, REMEDY)
            (folder / "installed").touch()
    return folder


def problems(parser: Path, text: str) -> list[str]:
    """What the parser finds wrong; `invalid` among it where it could make nothing of the document."""
    done = subprocess.run(
        ["node", "-e", SCRIPT], cwd=parser, input=text, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    diagnostics = [one for one in found["diagnostics"] if one["severity"] <= WARNING]
    return [one["message"] for one in diagnostics] + ([] if found["valid"] else ["invalid"])


def test_the_published_document_is_up_to_date() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "headrace", "topics", "asyncapi"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert PUBLISHED.read_text() == made.stdout, (
        "run: headrace topics asyncapi > docs/asyncapi.yaml"
    )


def test_the_parser_finds_nothing_wrong_with_it(parser: Path) -> None:
    assert problems(parser, PUBLISHED.read_text()) == []


def test_the_parser_would_find_a_mistake(parser: Path) -> None:
    document = yaml.safe_load(PUBLISHED.read_text())
    document["operations"]["send.results"]["action"] = "publish"

    assert problems(parser, json.dumps(document)) != []
