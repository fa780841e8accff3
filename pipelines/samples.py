"""The plainest payload of each modality: what a model without a sample of its own is warmed up
and checked with when it is added."""

from __future__ import annotations

import io
import wave
from base64 import b64decode

from schemas.topics import Modality

_GREY_PIXEL_PNG = b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGOor68HAAL+AX66JXAlAAAAAElFTkSuQmCC"
)


def sample_payload(modality: Modality) -> bytes | None:
    """None for tensors: their shapes are the model's own."""
    if modality == "image":
        return _GREY_PIXEL_PNG
    if modality == "text":
        return b"The quick brown fox jumps over the lazy dog."
    if modality == "audio":
        return _silence(seconds=1)
    return None


def _silence(seconds: int, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(bytes(2 * rate * seconds))
    return file.getvalue()
