"""Audio steps: from a sound file's bytes to a mono waveform at the model's rate.

The payload may be anything at all; memory is bounded by `max_s`, whatever the header says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from io import BytesIO
from typing import Annotated, Any

import numpy as np
import soundfile
import soxr
from msgspec import Meta
from numpy.typing import NDArray

from pipelines.bundle import Bundle
from pipelines.modalities import preprocess_step
from pipelines.modalities.magic import looks_like
from schemas.errors import InvalidJob

Waveform = NDArray[np.float32]
Rate = Annotated[int, Meta(ge=1000, le=384_000)]

MAX_CHANNELS = 32
_READABLE = ("WAV audio", "FLAC audio", "an Ogg stream", "MP3 audio")
_BLOCK_FRAMES = 65_536
_MISSING_S = 0.25
"""What a header may promise too much: encoders round up to whole frames."""
_STREAMED = (0, 0x7FFFFFFF, 0xFFFFFFFF)
"""Sizes that a program writes which cannot go back to the header when it is done."""


@preprocess_step("decode_audio")
def decode_audio(
    bundle: Bundle,
    rate: Rate = 16_000,
    max_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0,
    min_s: Annotated[float, Meta(ge=0)] = 0.0,
) -> Callable[[bytes], Waveform]:
    """A WAV, FLAC, Ogg or MP3 file to float32[samples] in -1..1 at `rate`, channels averaged."""

    def decode(data: bytes) -> Waveform:
        if not data:
            raise InvalidJob("payload_empty", "Expected a sound file, came 0 bytes.")
        if (came := looks_like(data)) not in _READABLE:
            raise InvalidJob(
                "audio_unreadable",
                f"Expected a WAV, FLAC, Ogg or MP3 file, came {len(data)} bytes"
                f" that look like {came}.",
            )
        try:
            with soundfile.SoundFile(BytesIO(data)) as file:
                said_s = max(file.frames / file.samplerate, _wav_header_s(data))
                _check_header(file, said_s, max_s)
                sound, file_rate = _read_mono(file, max_s), file.samplerate
        except soundfile.SoundFileError as error:
            raise InvalidJob(
                "audio_damaged", f"Expected a sound file, came a damaged one ({error})."
            ) from error
        _check_sound(sound, len(sound) / file_rate, said_s, min_s)
        if file_rate != rate:
            sound = soxr.resample(sound, file_rate, rate)
        return np.clip(sound, -1.0, 1.0)

    return decode


def _check_header(file: Any, length_s: float, max_s: float) -> None:
    """Before anything is read: a header costs its sender nothing."""
    if length_s > max_s:
        raise _too_long(f"{length_s:.0f} s by its header", max_s)
    if not (1000 <= file.samplerate <= 384_000 and file.channels <= MAX_CHANNELS):
        raise InvalidJob(
            "audio_layout",
            f"Expected 1000 to 384000 Hz and at most {MAX_CHANNELS} channels, came"
            f" {file.samplerate} Hz and {file.channels}; convert it.",
        )


def _check_sound(sound: Waveform, came_s: float, said_s: float, min_s: float) -> None:
    if not len(sound):
        raise InvalidJob("audio_empty", "Expected some sound, came a file with no samples.")
    if came_s < said_s - _MISSING_S:
        raise InvalidJob(
            "audio_truncated",
            f"Expected {said_s:.1f} s by the file's header, it ends after {came_s:.1f} s.",
        )
    if came_s < min_s:
        raise InvalidJob("audio_too_short", f"Expected at least {min_s:g} s, came {came_s:.2f} s.")
    if not np.isfinite(sound).all():
        raise InvalidJob("audio_not_finite", "Expected finite samples, came NaN or infinity.")


def _wav_header_s(data: bytes) -> float:
    """Seconds that the header of a WAV file cut short promised; libsndfile does not tell. 0 of a
    whole file."""
    if data[:4] != b"RIFF":
        return 0.0
    bytes_per_s, at = 0, 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"fmt " and at + 20 <= len(data):
            (bytes_per_s,) = struct.unpack_from("<I", data, at + 16)
        if kind == b"data":
            whole = size in _STREAMED or at + 8 + size <= len(data)
            return 0.0 if whole or not bytes_per_s else size / bytes_per_s
        at += 8 + size + size % 2
    return 0.0


def _read_mono(file: Any, max_s: float) -> Waveform:
    """Read by blocks, so that neither a false length nor many channels take memory."""
    blocks: list[Waveform] = []
    left = int(max_s * file.samplerate)
    with np.errstate(all="ignore"):  # NaN and infinity in a file of floats are refused later
        while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
            left -= len(block)
            if left < 0:
                raise _too_long("more", max_s)
            blocks.append(block[:, 0] if file.channels == 1 else block.mean(axis=1))
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)


def _too_long(came: str, max_s: float) -> InvalidJob:
    return InvalidJob(
        "audio_too_long", f"Expected at most {max_s:g} s, came {came}; send it in parts."
    )


@preprocess_step("pad_audio")
def pad_audio(
    bundle: Bundle, input: str, samples: Annotated[int, Meta(ge=1)]
) -> Callable[[Waveform], dict[str, Waveform]]:
    """Fill up with silence to float32[samples]."""

    def pad(sound: Waveform) -> dict[str, Waveform]:
        if len(sound) > samples:
            raise InvalidJob(
                "audio_too_long",
                f"Expected at most {samples} samples, came {len(sound)}; send it in parts.",
            )
        return {input: np.pad(sound, (0, samples - len(sound)))}

    return pad
