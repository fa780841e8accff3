"""Image steps: from a file's bytes to the tensor an image model takes.

The payload may be anything at all, so nothing is allocated before its size is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.bundle import Bundle
from pipelines.modalities import preprocess_step
from pipelines.modalities.magic import looks_like
from schemas.errors import InvalidJob, InvalidModel

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may try. Its other readers are seldom used: the likeliest to have holes."""

PILLOW_MAX_PIXELS = 89_478_485
"""Above it Pillow itself warns of a decompression bomb."""

MAX_SCANS = 100
"""Of a JPEG with as many pixels as allowed; of a smaller one accordingly more."""

Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Side = Annotated[int, Meta(ge=1, le=16384)]
Sides = Annotated[list[Side], Meta(min_length=2, max_length=2)]
"""Width and height. No tuple: msgspec 0.22 crashes on `Side | tuple[Side, Side]`."""
Edit = Callable[[Image.Image], Image.Image]

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CUT_SHORT = re.compile(r"truncated|broken data stream|not enough image data|unexpected end", re.I)


@preprocess_step("decode_image")
def decode_image(
    bundle: Bundle,
    mode: Literal["RGB", "L"] = "RGB",
    max_pixels: Annotated[int, Meta(ge=1, le=PILLOW_MAX_PIXELS)] = 25_000_000,
) -> Callable[[bytes], Image.Image]:
    """Bytes to an upright 8-bit image. Of an animation the first frame; transparency on white;
    16 bits and floats scaled to 8; colour profiles are not applied."""

    def decode(data: bytes) -> Image.Image:
        image = _open(data)
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise _too_large(f"{image.width} x {image.height}", max_pixels)
        if image.format in ("JPEG", "MPO"):
            _check_scans(data, pixels, max_pixels)
        return _read(image, mode)

    def _open(data: bytes) -> Image.Image:
        if not data:
            raise InvalidJob("payload_empty", "Expected an image file, came 0 bytes.")
        try:
            return Image.open(BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            found = re.search(r"\d+", str(error))
            raise _too_large(found[0] if found else "more", max_pixels) from error
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise whatever a damaged file makes them
            raise _unreadable(data, error) from error

    return decode


def _check_scans(data: bytes, pixels: int, max_pixels: int) -> None:
    """A progressive JPEG goes over all its pixels in each of about ten scans. Nothing but this
    stops a file of 100 KB from asking for thousands. Other bytes may look like the marker, such
    as a video after the picture, so it is the work that has a limit."""
    scans = data.count(b"\xff\xda")
    if scans * pixels > MAX_SCANS * max_pixels:
        raise InvalidJob(
            "image_too_many_scans",
            f"Expected a JPEG of at most {MAX_SCANS} scans, came {scans}; save it again.",
        )


def _too_large(came: str, max_pixels: int) -> InvalidJob:
    return InvalidJob(
        "image_too_large",
        f"Expected at most {max_pixels} pixels, came {came}; send it smaller,"
        " or raise max_pixels of decode_image.",
    )


def _unreadable(data: bytes, error: Exception) -> InvalidJob:
    came = looks_like(data)
    if came.endswith("image") and not isinstance(error, UnidentifiedImageError):
        return _damaged(error)
    return InvalidJob(
        "image_unreadable",
        f"Expected a whole {', '.join(FORMATS)} file, came {len(data)} bytes"
        f" that look like {came}.",
    )


def _read(image: Image.Image, mode: str) -> Image.Image:
    try:
        image.load()
        return _eight_bit(_upright(image), mode)
    except (InvalidJob, MemoryError):
        raise
    except Exception as error:  # as above
        raise _damaged(error) from error


def _damaged(error: Exception) -> InvalidJob:
    if _CUT_SHORT.search(str(error)):
        return InvalidJob(
            "image_truncated", f"Expected a whole image file, it ends too early ({error})."
        )
    return InvalidJob(
        "image_damaged", f"Expected a sound image file, came a damaged one ({error})."
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged metadata harms no pixel
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(rgba)
    return image if image.mode == mode else image.convert(mode)


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits to 8. Only 16-bit files say what white is; for the others it is the
    least of 1 (floats), 255, 65535 and 2**32 - 1 that no pixel exceeds."""
    values = np.asarray(image, np.float32)
    if not np.isfinite(values).all():
        raise InvalidJob("image_not_finite", "Expected finite pixels, came NaN or infinity.")
    scales = [255.0, 65535.0, float(2**32 - 1)]
    if image.mode.startswith("I;16"):
        scales = scales[1:]
    elif image.mode == "F":
        scales.insert(0, 1.0)
    white = next((scale for scale in scales if values.max() <= scale), values.max())
    return Image.fromarray((values.clip(0) * (255 / white) + 0.5).astype(np.uint8))


@preprocess_step("center_crop")
def center_crop(bundle: Bundle, fraction: Annotated[float, Meta(gt=0, le=1)] = 1.0) -> Edit:
    """The centred square whose side is this fraction of the image's shorter side."""

    def crop(image: Image.Image) -> Image.Image:
        side = max(1, round(min(image.size) * fraction))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    return crop


@preprocess_step("resize")
def resize(bundle: Bundle, size: Side | Sides, filter: Filter = "bicubic") -> Edit:
    """size: of both sides, or [width, height] in pixels; the image is stretched to it."""
    wanted = (size, size) if isinstance(size, int) else (size[0], size[1])
    resample = Image.Resampling[filter.upper()]
    return lambda image: image if image.size == wanted else image.resize(wanted, resample)


@preprocess_step("to_tensor")
def to_tensor(
    bundle: Bundle,
    input: str,
    mean: float | list[float] = 0.0,
    scale: float | list[float] = 255.0,
    layout: Literal["NCHW", "NHWC"] = "NCHW",
    channels: Literal["RGB", "BGR"] = "RGB",
) -> Callable[[Image.Image], dict[str, NDArray[np.float32]]]:
    """`(pixel - mean) / scale` of pixels in 0..255, as float32 without the batch axis.

    mean, scale: one for all channels, or one each, in the order of `channels`.
    """
    means, scales = (np.atleast_1d(np.asarray(values, np.float32)) for values in (mean, scale))
    if not scales.all():
        raise InvalidModel("model_step_invalid", "to_tensor: scale must not be 0")

    def tensor(image: Image.Image) -> dict[str, NDArray[Any]]:
        pixels = np.asarray(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if channels == "BGR":
            pixels = pixels[..., ::-1]
        if {means.size, scales.size} - {1, pixels.shape[-1]}:
            raise InvalidModel(
                "model_step_invalid",
                f"to_tensor: expected mean and scale of 1 or {pixels.shape[-1]} numbers,"
                f" came {means.size} and {scales.size}",
            )
        if layout == "NHWC":
            return {input: np.divide(pixels - means, scales, dtype=np.float32)}
        planes = np.empty((pixels.shape[-1], *pixels.shape[:2]), np.float32)
        np.subtract(pixels.transpose(2, 0, 1), means[:, None, None], out=planes)
        return {input: np.divide(planes, scales[:, None, None], out=planes)}

    return tensor
