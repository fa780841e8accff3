"""Whatever bytes come, a decode step answers or refuses. Anything else would be a crash."""

from __future__ import annotations

import io
import struct
import warnings
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.modalities.audio import decode_audio
from pipelines.modalities.image import decode_image
from pipelines.modalities.tensor import decode_array
from pipelines.modalities.text import decode_text
from schemas.errors import InvalidJob

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
SOUND = np.random.default_rng(0).normal(0, 0.1, 2000)


def image(format: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, format, **options)
    return file.getvalue()


def sound(format: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, SOUND, 8000, format=format, subtype=subtype)
    return file.getvalue()


def array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


IMAGES = [
    *(image(format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")),
    image("JPEG", progressive=True),
    image("JPEG", "CMYK"),
    image("PNG", "P", transparency=3),
    image("TIFF", "F"),
    image("TIFF", compression="tiff_lzw"),
    image("WEBP", lossless=True),
]
SOUNDS = [
    *(sound(format) for format in ("WAV", "WAVEX", "FLAC", "OGG", "MP3")),
    sound("WAV", "FLOAT"),
    sound("WAV", "IMA_ADPCM"),
]
ARRAYS = [array(PIXELS), array(PIXELS.astype(np.float32)), array(np.asfortranarray(PIXELS))]
TEXTS = ["déjà vu, 한국어, 👩‍👩‍👧".encode(), b"plain"]


def spoiled(original: bytes, random: Random) -> bytes:
    """A good file with a few bytes changed, most often near its header, or cut off, or only its
    first bytes followed by noise."""
    if random.random() < 0.1:
        return original[: random.randrange(16)] + random.randbytes(random.randrange(300))
    data = bytearray(original)
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        at = random.randrange(random.choice([64, 512, len(data)]))
        number = random.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, random.getrandbits(32)])
        data[at : at + random.choice([0, 1, 4])] = struct.pack(random.choice("<>") + "I", number)
    return bytes(data[: random.choice([len(data), random.randrange(len(data))])])


STEPS = {
    "image": (decode_image(None, max_pixels=2_000_000), IMAGES),  # type: ignore[arg-type]
    "audio": (decode_audio(None, max_s=5), SOUNDS),  # type: ignore[arg-type]
    "array": (decode_array(None, "x", "float32", [None] * 3), ARRAYS),  # type: ignore[arg-type]
    "text": (decode_text(None, max_chars=20), TEXTS),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", STEPS)
@settings(max_examples=500, deadline=None)
@given(random=st.randoms(use_true_random=True))
def test_spoiled_files_are_read_or_refused(kind: str, random: Random) -> None:
    step, originals = STEPS[kind]
    with suppress(InvalidJob), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about damaged metadata
        step(spoiled(random.choice(originals), random))


@pytest.mark.parametrize("kind", STEPS)
@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(kind: str, payload: bytes) -> None:
    with suppress(InvalidJob):
        STEPS[kind][0](payload)


@pytest.mark.parametrize("kind", STEPS)
def test_the_good_files_are_read(kind: str) -> None:
    step, originals = STEPS[kind]
    for original in originals:
        step(original)
