"""Whatever bytes come, a decode step answers or refuses. Anything else would be a crash."""

from __future__ import annotations

import io
import struct
import warnings
from contextlib import suppress
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


@st.composite
def spoiled(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A good file with a few bytes changed, most often near its header, or cut off."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.sampled_from([64, 512, len(data)]))
        at = draw(st.integers(0, min(near, len(data))))
        size = draw(st.sampled_from([0, 1, 4]))
        number = draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1))
        data[at : at + size] = struct.pack(draw(st.sampled_from("<>")) + "I", number)
    return bytes(data[: draw(st.sampled_from([len(data), draw(st.integers(0, len(data)))]))])


def magic_and_noise(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    magic = st.sampled_from([original[:12] for original in originals])
    return st.builds(bytes.__add__, magic, st.binary(max_size=300))


STEPS = {
    "image": (decode_image(None, max_pixels=2_000_000), IMAGES),  # type: ignore[arg-type]
    "audio": (decode_audio(None, max_s=5), SOUNDS),  # type: ignore[arg-type]
    "array": (decode_array(None, "x", "float32", [None] * 3), ARRAYS),  # type: ignore[arg-type]
    "text": (decode_text(None, max_chars=20), TEXTS),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", STEPS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_bytes_are_read_or_refused(kind: str, data: st.DataObject) -> None:
    step, originals = STEPS[kind]
    payload = data.draw(
        st.one_of(spoiled(originals), magic_and_noise(originals), st.binary(max_size=400))
    )
    with suppress(InvalidJob), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about damaged metadata
        step(payload)


@pytest.mark.parametrize("kind", STEPS)
def test_the_good_files_are_read(kind: str) -> None:
    step, originals = STEPS[kind]
    for original in originals:
        step(original)
