"""What a payload looks like by its first bytes: for refusals that tell somebody what they sent."""

from __future__ import annotations

_PREFIXES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"fLaC", "FLAC audio"),
    (b"OggS", "an Ogg stream"),
    (b"ID3", "MP3 audio"),
    *((bytes([0xFF, second]), "MP3 audio") for second in (0xFB, 0xFA, 0xF3, 0xF2, 0xE3, 0xE2)),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive or office document"),
    (b"\x1f\x8b", "gzip data; unpack it first"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
_TAGGED: dict[bytes, str] = {  # what follows `RIFF` and a length
    b"WEBP": "a WebP image",
    b"WAVE": "WAV audio",
    b"AVI ": "a video",
}
_BRANDS: dict[bytes, str] = {  # what follows `ftyp` in a file of boxes
    b"heic": "a HEIC image",
    b"mif1": "a HEIF image",
    b"avif": "an AVIF image",
    b"M4A ": "AAC audio (M4A)",
    b"qt  ": "a video",
}


def looks_like(data: bytes) -> str:
    """A few words, as in "a PNG image", "text", "nothing known"."""
    if data[:4] in (b"RIFF", b"RIFX", b"RF64"):
        return _TAGGED.get(data[8:12], "a RIFF file")
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "a video")
    for prefix, words in _PREFIXES:
        if data.startswith(prefix):
            return words
    return _text(data[:512])


def _text(head: bytes) -> str:
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page; the address may have answered with an error page"
    if b"<svg" in start:
        return "an SVG drawing; render it first"
    if start.startswith((b"{", b"[")):
        return "JSON"
    control = sum(byte < 9 or 13 < byte < 32 for byte in head)
    return "nothing known" if control else "text"
