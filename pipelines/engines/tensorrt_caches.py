"""What one machine learns of its GPU: times of kernels, when TensorRT builds, and compiled kernels, when
TensorRT-RTX loads. It makes later builds and loads quicker and changes no answer, so unlike engines
it is not shared, and losing it costs time alone."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from infra.logs import get_logger

_DIGEST_BYTES = 32

_log = get_logger("engines.tensorrt")


class MachineCache:
    """One file in a private folder, its SHA-256 before its content, because a damaged kernel answers
    wrongly. parts: all that makes it useless elsewhere, such as library, GPU and driver."""

    def __init__(self, folder: Path, kind: str, *parts: object) -> None:
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        self._path = folder / f"{digest}.{kind}"

    def read(self) -> bytes:
        """Empty if there is none, or it is damaged."""
        try:
            stored = self._path.read_bytes()
        except OSError:
            return b""
        digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == digest else b""

    def write(self, content: bytes) -> None:
        """As a whole or not at all; that it cannot be written is no reason to fail."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(file.name, self._path)
        except OSError as error:
            with suppress(OSError, NameError):
                os.unlink(file.name)
            _log.warning("machine_cache_not_written", path=str(self._path), reason=str(error))
