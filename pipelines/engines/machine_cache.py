"""What one machine learns of its GPU: times of kernels, when TensorRT builds, and compiled kernels, when
TensorRT-RTX loads. It makes later builds and loads quicker and changes no answer, so unlike engines
it is not shared, and losing it costs time alone."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from infra.logs import get_logger
from pipelines.engines.signing import Keyring, Signature

_PURPOSE = b"machine cache\0"
"""What is signed here is no manifest of an engine."""

_MOST_BYTES = 1 << 30
"""Of the folder. Beyond it the files that were not used for longest go: those of models that are gone."""

_log = get_logger("engines.machine_cache")


class MachineCache:
    """A private folder, its files signed as engines are: compiled kernels are run, and damaged ones
    answer wrongly."""

    def __init__(self, folder: Path, keyring: Keyring | None = None) -> None:
        self.folder = folder
        self.keyring = keyring or Keyring()

    def entry(self, kind: str, *parts: object) -> Entry:
        """parts: all that makes it useless elsewhere, such as library, GPU and driver."""
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        return Entry(self.folder / f"{digest}.{kind}", self.keyring)


class Entry:
    """One file: its signature in the first line, then its content."""

    def __init__(self, path: Path, keyring: Keyring) -> None:
        self._path = path
        self._keyring = keyring

    def read(self) -> bytes:
        """Empty if there is none, or it is not to be believed."""
        try:
            stored = self._path.read_bytes()
            os.utime(self._path)
        except OSError:
            return b""
        line, _, content = stored.partition(b"\n")
        key_id, _, mac = line.decode(errors="replace").partition(" ")
        if fault := self._keyring.fault(_PURPOSE + content, Signature(key_id, mac)):
            _log.warning("machine_cache_rejected", path=str(self._path), reason=fault)
            return b""
        return content

    def write(self, content: bytes) -> None:
        """As a whole or not at all; that it cannot be written is no reason to fail."""
        import tempfile  # not at the top: see cache.py

        signature = self._keyring.sign(_PURPOSE + content)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                file.write(f"{signature.key_id} {signature.mac}\n".encode() + content)
            os.replace(file.name, self._path)
            _tidy(self._path.parent)
        except OSError as error:
            with suppress(OSError, NameError):
                os.unlink(file.name)
            _log.warning("machine_cache_not_written", path=str(self._path), reason=str(error))


def _tidy(folder: Path) -> None:
    left = _MOST_BYTES
    files = [(path, path.stat()) for path in folder.iterdir()]
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime, reverse=True):
        left -= stat.st_size
        if left < 0:
            path.unlink(missing_ok=True)
