from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from pipelines.bundle import Bundle
from pipelines.modalities.audio import decode_audio, pad_audio
from schemas.errors import InvalidJob

Decode = Callable[[bytes], NDArray[np.float32]]


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle()


@pytest.fixture
def decode(bundle: Bundle) -> Decode:
    return decode_audio(bundle)


def tone(rate: int = 16_000, seconds: float = 1.0, hertz: float = 440.0) -> NDArray[Any]:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def encoded(sound: NDArray[Any], rate: int = 16_000, format: str = "WAV", **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format=format, **options)
    return file.getvalue()


def loudest_hertz(sound: NDArray[np.float32], rate: int = 16_000) -> float:
    return float(np.abs(np.fft.rfft(sound)).argmax() * rate / len(sound))


def refusal(decode: Decode, data: bytes) -> InvalidJob:
    with pytest.raises(InvalidJob) as caught:
        decode(data)
    return caught.value


@pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_rate_and_number_of_channels_sounds_the_same(
    decode: Decode, format: str, rate: int, channels: int
) -> None:
    sound = np.column_stack([tone(rate)] * channels)
    heard = decode(encoded(sound, rate, format))
    assert heard.dtype == np.float32
    assert heard.ndim == 1
    assert abs(len(heard) - 16_000) <= 16_000 // 8
    assert loudest_hertz(heard) == pytest.approx(440, abs=3)
    assert np.abs(heard).max() == pytest.approx(0.5, abs=0.06)


def test_channels_are_averaged(decode: Decode) -> None:
    left, right = np.full(1600, 0.5), np.full(1600, -0.1)
    heard = decode(encoded(np.column_stack([left, right]), subtype="FLOAT"))
    assert np.allclose(heard, 0.2)


def test_floats_beyond_full_scale_are_clipped(decode: Decode) -> None:
    heard = decode(encoded(np.array([3.0, -3.0] * 800), subtype="FLOAT"))
    assert (heard.min(), heard.max()) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", "payload_empty", "0 bytes"),
        (b"hello", "audio_unreadable", "text"),
        (b"\x89PNG\r\n\x1a\n...", "audio_unreadable", "a PNG image"),
        (b"\0\0\0\x18ftypM4A ....", "audio_unreadable", "AAC audio"),
        (b"fLaC....", "audio_damaged", "damaged"),
        (b"RIFF\x24\0\0\0WAVE", "audio_damaged", "damaged"),
        (encoded(np.empty(0)), "audio_empty", "no samples"),
        (encoded(tone(), 900), "audio_layout", "900 Hz"),
        (encoded(np.zeros((64, 40))), "audio_layout", "40"),
        (encoded(tone(seconds=31)), "audio_too_long", "31 s by its header"),
    ],
)
def test_sound_that_is_refused(decode: Decode, data: bytes, code: str, words: str) -> None:
    error = refusal(decode, data)
    assert error.code == code
    assert words in error.message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(decode: Decode, value: float) -> None:
    sound = np.column_stack([tone(), tone()])
    sound[100] = value, -value
    assert refusal(decode, encoded(sound, subtype="FLOAT")).code == "audio_not_finite"


def wav_of_3_hours() -> bytes:
    data = bytearray(encoded(tone(seconds=0.1)))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 3 * 3600 * 16_000 * 2)
    return bytes(data)


def flac_of_3_hours() -> bytes:
    data = bytearray(encoded(tone(seconds=0.1), format="FLAC"))
    packed = int.from_bytes(data[18:26], "big") >> 36 << 36
    data[18:26] = (packed | 3 * 3600 * 16_000).to_bytes(8, "big")
    return bytes(data)


@pytest.mark.parametrize("make", [wav_of_3_hours, flac_of_3_hours])
def test_3_hours_by_the_header_of_a_small_file_cost_nothing(
    decode: Decode, make: Callable[[], bytes]
) -> None:
    data = make()
    error = refusal(decode, data)
    assert error.code == "audio_too_long"
    assert "10800 s" in error.message
    tracemalloc.start()
    with suppress(InvalidJob):
        decode(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize(("format", "code"), [("WAV", "truncated"), ("FLAC", "damaged")])
def test_a_truncated_file_is_refused(decode: Decode, format: str, code: str) -> None:
    data = encoded(tone(seconds=3), format=format)
    assert refusal(decode, data[: len(data) // 2]).code == f"audio_{code}"


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_whose_writer_could_not_know_its_length_is_read(decode: Decode, size: int) -> None:
    data = bytearray(encoded(tone()))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    assert len(decode(bytes(data))) == 16_000


def test_sound_shorter_than_the_model_needs_is_refused(bundle: Bundle) -> None:
    decode = decode_audio(bundle, min_s=2.0)
    error = refusal(decode, encoded(tone()))
    assert error.code == "audio_too_short"
    assert "at least 2 s, came 1.00 s" in error.message


def test_exactly_the_longest_sound_is_read(bundle: Bundle) -> None:
    assert len(decode_audio(bundle, max_s=1.0)(encoded(tone(44_100), 44_100))) == 16_000


def test_pad_audio_fills_up_with_silence(bundle: Bundle) -> None:
    pad = pad_audio(bundle, input="waveform", samples=6)
    row = pad(np.ones(4, np.float32))
    assert row["waveform"].tolist() == [1, 1, 1, 1, 0, 0]
    assert row["waveform"].dtype == np.float32
    with pytest.raises(InvalidJob, match="at most 6 samples, came 7"):
        pad(np.ones(7, np.float32))
