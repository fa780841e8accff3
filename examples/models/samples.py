"""Inputs for the demo, each with the answer that is right: photographs out of wheels, sentences."""

from __future__ import annotations

from pathlib import Path

from examples.models.wheels import wheel_file

PHOTOGRAPHS = {
    "coffee.png": "espresso",
    "camera.png": "tripod",
    "chelsea.png": "tiger cat",
    "rocket.jpg": "missile",  # the nearest that ImageNet has, and so is the daisy below: a dahlia
    "china.jpg": "palace",
    "flower.jpg": "daisy",
}

SENTENCES = {
    "The striker scored twice in the last ten minutes of the match.": "sports",
    "The new processor runs twice as fast on half the power.": "technology",
    "Simmer the onions in butter until they are golden, then add the garlic.": "cooking",
    "We took the night train to Lisbon and stayed by the old harbour.": "travel",
    "The central bank cut interest rates by a quarter of a point.": "finance",
    "I have had a headache and a fever since Monday.": "health",
}


def photographs() -> list[Path]:
    """The files, named as in PHOTOGRAPHS: PNG and JPEG, colour and grey, 0.1 to 0.5 MB each."""
    return [photograph(name) for name in PHOTOGRAPHS]


def sentences() -> list[str]:
    return list(SENTENCES)


def photograph(name: str) -> Path:
    package, version, folder, sha256 = _SOURCES[name]
    return wheel_file(package, version, f"{folder}/{name}", sha256)


_SKIMAGE = ("scikit-image", "0.26.0", "skimage/data")
_SKLEARN = ("scikit-learn", "1.9.1", "sklearn/datasets/images")

_SOURCES = {
    "coffee.png": (*_SKIMAGE, "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
    "camera.png": (*_SKIMAGE, "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a"),
    "chelsea.png": (*_SKIMAGE, "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
    "rocket.jpg": (*_SKIMAGE, "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"),
    "china.jpg": (*_SKLEARN, "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29"),
    "flower.jpg": (*_SKLEARN, "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638"),
}
