"""The example producers of examples/producers, ready to run: built or installed once into the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.servers.process import cache_folder, only_one, unavailable

EXAMPLES = Path(__file__).parents[2] / "examples" / "producers"
LANGUAGES = ("python", "go", "node")
NEEDS = {"python": (), "go": ("go",), "node": ("node", "npm")}
REMEDY = {
    "go": "install Go 1.23 or newer (on Debian: `apt-get install golang`)",
    "node": "install Node.js 18 or newer with npm (on Debian: `apt-get install nodejs npm`)",
}


def produce_with(language: str, *options: str, **environment: str) -> list[str]:
    """Run the producer of a language. Returns the ids of the jobs that were accepted."""
    done = subprocess.run(
        [*command(language), *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def command(language: str) -> list[str]:
    """How it is run. Skips, or fails with CI=true, where its language is not there or cannot fetch its parts."""
    for program in NEEDS[language]:
        if not shutil.which(program):
            unavailable(f"the {language} producer", f"no `{program}` on the PATH", REMEDY[language])
    if language == "python":
        return [sys.executable, str(EXAMPLES / "python" / "produce.py")]
    folder = _built(language)
    return [str(folder / "produce")] if language == "go" else ["node", str(folder / "produce.js")]


def _built(language: str) -> Path:
    """Its folder in the cache, another one for each change of the sources."""
    sources = sorted(file for file in (EXAMPLES / language).iterdir() if file.is_file())
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    folder = cache_folder(f"producer-{language}-{digest}")
    with only_one(folder):
        if not (folder / "built").exists():
            for file in sources:
                shutil.copy(file, folder)
            build = {
                "go": ["go", "build", "-o", "produce", "."],
                "node": ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
            }[language]
            done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
            if done.returncode != 0:
                why = f"`{' '.join(build)}` failed: {done.stderr[-500:]}"
                unavailable(f"the {language} producer", why, REMEDY[language])
            (folder / "built").touch()
    return folder
