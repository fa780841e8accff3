from __future__ import annotations

import pytest

from pipelines.modalities.magic import looks_like


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "text"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"RIFF....WEBPVP8 ", "a WebP image"),
        (b"RIFF....ACON", "a RIFF file"),
        (b"\xff\xfb\x90", "MP3 audio"),
        (b"\xff\xe3\x48", "MP3 audio"),
        (b"\xff\xfeh\0", "UTF-16 text"),
        (b"....ftypavif", "an AVIF image"),
        (b"....ftypmp42", "a video"),
        (b"\x1f\x8b\x08", "gzip data; unpack it first"),
        (b"\x93NUMPY\x01\0", "a NumPy array"),
        (b'<?xml version="1.0"?><svg>', "an SVG drawing; render it first"),
        (b"  [1, 2]", "JSON"),
        ("Grüße".encode(), "text"),
        (b"\x00\x01", "nothing known"),
    ],
)
def test_a_few_words_for_the_first_bytes(data: bytes, words: str) -> None:
    assert looks_like(data).startswith(words)
