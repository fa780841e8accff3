"""Real inputs: the demo's photographs as JPEG files, and its sentences."""

from __future__ import annotations

import io

from PIL import Image

from examples.models.samples import photographs, sentences

JPEG_QUALITY = 90

__all__ = ["jpegs", "sentences"]


def jpegs(side: int | None = None) -> list[bytes]:
    """A JPEG file of each photograph. side: scaled to this many pixels square; None: as it is."""
    files = []
    for path in photographs():
        image = Image.open(path).convert("RGB")
        if side is not None:
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=JPEG_QUALITY)
        files.append(file.getvalue())
    return files
