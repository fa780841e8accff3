from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.bundle import Bundle
from pipelines.modalities.image import center_crop, decode_image, resize, to_tensor
from schemas.errors import InvalidJob, InvalidModel

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle()


@pytest.fixture
def decode(bundle: Bundle) -> Callable[[bytes], Image.Image]:
    return decode_image(bundle)


@pytest.fixture
def noise() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, pixels: bytes, bits: int = 8, colours: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(pixels, 9))
        + chunk(b"IEND", b"")
    )


def refusal(decode: Callable[[bytes], Image.Image], data: bytes) -> InvalidJob:
    with pytest.raises(InvalidJob) as caught:
        decode(data)
    return caught.value


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_on_the_list_is_read(
    decode: Callable[[bytes], Image.Image], noise: Image.Image, format: str
) -> None:
    image = decode(encoded(noise, format))
    assert (image.mode, image.size) == ("RGB", (60, 40))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_pixels_of_a_lossless_file_are_kept(
    decode: Callable[[bytes], Image.Image], noise: Image.Image, format: str
) -> None:
    assert np.array_equal(decode(encoded(noise, format)), noise)


def test_an_empty_payload(decode: Callable[[bytes], Image.Image]) -> None:
    assert refusal(decode, b"").code == "payload_empty"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello there, this is no picture", "text"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"PK\x03\x04rest", "a ZIP archive"),
        (b'{"error": "not found"}', "JSON"),
        (b"\0\0\0\x18ftypheic....", "a HEIC image"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "WAV audio"),
        (b"\x01\x02\x03\x04", "nothing known"),
        (b"P6 1 1 255\n\xff\xff\xff", "text"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text"),
    ],
)
def test_what_is_no_image_is_refused_with_what_it_looks_like(
    decode: Callable[[bytes], Image.Image], data: bytes, words: str
) -> None:
    error = refusal(decode, data)
    assert error.code == "image_unreadable"
    assert words in error.message


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_file_of_every_format_is_refused(
    decode: Callable[[bytes], Image.Image], noise: Image.Image, format: str, part: float
) -> None:
    data = encoded(noise, format)
    error = refusal(decode, data[: int(len(data) * part)])
    assert error.code in ("image_truncated", "image_damaged", "image_unreadable")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
def test_a_file_cut_in_its_pixels_is_called_truncated(
    decode: Callable[[bytes], Image.Image], noise: Image.Image, format: str
) -> None:
    data = encoded(noise, format)
    assert refusal(decode, data[: len(data) * 9 // 10]).code == "image_truncated"


def test_a_damaged_file_is_refused(
    decode: Callable[[bytes], Image.Image], noise: Image.Image
) -> None:
    data = bytearray(encoded(noise, "PNG"))
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(8)
    assert refusal(decode, bytes(data)).code in ("image_damaged", "image_truncated")


def test_a_png_of_50000_by_50000_costs_no_memory(
    decode: Callable[[bytes], Image.Image],
) -> None:
    line = bytes(1 + 50_000 // 8)
    packer = zlib.compressobj(9)
    packed = b"".join([*(packer.compress(line * 100) for _ in range(500)), packer.flush()])
    bomb = png(50_000, 50_000, b"", bits=1).replace(zlib.compress(b"", 9), packed)
    assert len(bomb) < 400_000
    error = refusal(decode, bomb)
    assert error.code == "image_too_large"
    assert "2500000000" in error.message
    tracemalloc.start()
    with suppress(InvalidJob):
        decode(bomb)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_pixels_above_the_models_limit_are_refused_before_they_are_read(bundle: Bundle) -> None:
    decode = decode_image(bundle, max_pixels=99)
    assert refusal(decode, png(10, 10, b"no pixels at all")).code == "image_too_large"


def test_a_canvas_larger_than_the_frame_counts(
    decode: Callable[[bytes], Image.Image], noise: Image.Image
) -> None:
    data = bytearray(encoded(noise, "GIF"))
    data[6:10] = b"\xff\xff\xff\xff"
    assert refusal(decode, bytes(data)).code == "image_too_large"


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_bomb_in_the_metadata_is_refused(
    decode: Callable[[bytes], Image.Image], kind: bytes
) -> None:
    body = b"a\0\0" + zlib.compress(bytes(50_000_000), 9)
    crc = struct.pack(">I", zlib.crc32(kind + body))
    chunk = struct.pack(">I", len(body)) + kind + body + crc
    good = png(2, 2, bytes(6))
    assert refusal(decode, good[:33] + chunk + good[33:]).code == "image_damaged"


def test_a_jpeg_of_thousands_of_scans_is_refused(decode: Callable[[bytes], Image.Image]) -> None:
    jpeg = encoded(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
    last_scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    assert decode(jpeg[:-2] + last_scan * 20 + jpeg[-2:]).size == (1000, 1000)
    bomb = jpeg[:-2] + last_scan * 3000 + jpeg[-2:]
    assert refusal(decode, bomb).code == "image_too_many_scans"


def test_of_an_animation_the_first_frame_is_taken(
    decode: Callable[[bytes], Image.Image],
) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert decode(data).getpixel((4, 4)) == (255, 0, 0), format


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(
    decode: Callable[[bytes], Image.Image], format: str, orientation: int
) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 16, 8))
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(stored, format, exif=exif))
    assert image.size == (32, 16)
    corners = {"top left": (2, 2), "top right": (29, 2), "bottom left": (2, 13)}
    red = {name: image.getpixel(at)[1] < 128 for name, at in corners.items()}
    assert red == {"top left": True, "top right": False, "bottom left": False}


def test_damaged_exif_harms_no_pixel(
    decode: Callable[[bytes], Image.Image], noise: Image.Image
) -> None:
    data = encoded(noise, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(decode(data), noise)


def test_cmyk_becomes_rgb(decode: Callable[[bytes], Image.Image]) -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = decode(data).getpixel((4, 4))
    assert red > 200 > 80 > max(green, blue)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_8(decode: Callable[[bytes], Image.Image], format: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    image = decode(encoded(Image.fromarray(values), format))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_a_dark_16_bit_image_stays_dark(decode: Callable[[bytes], Image.Image]) -> None:
    image = decode(encoded(Image.fromarray(np.full((2, 2), 200, np.uint16)), "PNG"))
    assert image.getpixel((0, 0)) == (1, 1, 1)


def test_16_bit_colours_are_scaled_to_8(decode: Callable[[bytes], Image.Image]) -> None:
    pixels = b"\0" + struct.pack(">3H", 65535, 32768, 0)
    assert decode(png(1, 1, pixels, bits=16, colours=2)).getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([-3.0, 100.4, 255.0], np.float32, [0, 100, 255]),
        ([0.0, 32767.5, 65535.0], np.float32, [0, 128, 255]),
        ([0, 100, 255], np.int32, [0, 100, 255]),
        ([0, 257, 65535], np.int32, [0, 1, 255]),
        ([0, 0, 0], np.float32, [0, 0, 0]),
    ],
)
def test_floats_and_32_bits_are_scaled_to_8(
    decode: Callable[[bytes], Image.Image], values: list[float], dtype: Any, expected: list[int]
) -> None:
    image = decode(encoded(Image.fromarray(np.array([values], dtype)), "TIFF"))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_refused(
    decode: Callable[[bytes], Image.Image], value: float
) -> None:
    data = encoded(Image.fromarray(np.full((2, 2), value, np.float32)), "TIFF")
    assert refusal(decode, data).code == "image_not_finite"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(decode: Callable[[bytes], Image.Image], mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (9, 9, 9, 0)).convert(mode)
    options = {"transparency": image.getpixel((0, 0))} if mode == "P" else {}
    assert decode(encoded(image, "PNG", **options)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_grey_where_the_model_wants_it(
    bundle: Bundle, noise: Image.Image, mode: str
) -> None:
    format = "TIFF" if mode == "CMYK" else "PNG"
    assert decode_image(bundle, mode="L")(encoded(noise.convert(mode), format)).mode == "L"


def test_center_crop_takes_the_middle_square(bundle: Bundle) -> None:
    image = Image.new("RGB", (100, 60), "white")
    image.paste("red", (35, 15, 65, 45))
    cropped = center_crop(bundle, fraction=0.5)(image)
    assert cropped.size == (30, 30)
    assert cropped.getcolors() == [(900, (255, 0, 0))]


def test_the_smallest_image_can_be_cropped_and_resized(bundle: Bundle) -> None:
    image = center_crop(bundle, fraction=0.1)(Image.new("RGB", (1, 3)))
    assert resize(bundle, size=224)(image).size == (224, 224)


def test_resize_takes_width_and_height(bundle: Bundle) -> None:
    assert resize(bundle, size=[20, 10], filter="bilinear")(Image.new("L", (7, 7))).size == (20, 10)


def test_to_tensor_by_hand(bundle: Bundle) -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (0, 127, 255))
    image.putpixel((1, 0), (10, 20, 30))
    row = to_tensor(bundle, input="x", mean=[0, 127, 255], scale=[1, 2, 5])(image)
    assert row["x"].dtype == np.float32
    assert row["x"].flags.c_contiguous
    assert row["x"].tolist() == [[[0, 10]], [[0, -53.5]], [[0, -45]]]


def test_layout_and_channels(bundle: Bundle, noise: Image.Image) -> None:
    pixels = np.asarray(noise, np.float32) / 255
    nhwc = to_tensor(bundle, input="x", layout="NHWC")(noise)["x"]
    bgr = to_tensor(bundle, input="x", channels="BGR")(noise)["x"]
    grey = to_tensor(bundle, input="x")(noise.convert("L"))["x"]
    assert np.allclose(nhwc, pixels)
    assert np.allclose(bgr, pixels[..., ::-1].transpose(2, 0, 1))
    assert nhwc.dtype == bgr.dtype == np.float32
    assert grey.shape == (1, 40, 60)


def test_as_many_means_as_channels(bundle: Bundle) -> None:
    step = to_tensor(bundle, input="x", mean=[1, 2], scale=1)
    with pytest.raises(InvalidModel, match="1 or 3 numbers, came 2 and 1"):
        step(Image.new("RGB", (4, 4)))
