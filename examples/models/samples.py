"""Demo inputs with known answers: photographs out of wheels, and sentences."""

from __future__ import annotations

from pathlib import Path

from examples.models.wheels import wheel_file


def photographs() -> list[Path]:
    """Photographs (PNG and JPEG, 0.1 to 0.5 MB) whose first label is right."""
    return [coffee()]


def coffee() -> Path:
    return scikit_image(
        "coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"
    )


def scikit_image(name: str, sha256: str) -> Path:
    return wheel_file("scikit-image", "0.26.0", f"skimage/data/{name}", sha256)
