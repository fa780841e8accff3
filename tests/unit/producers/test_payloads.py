"""Whatever a caller has in hand becomes a payload, or a clear refusal."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.objects.files import FileObjects
from producers.payloads import make_payload
from schemas.errors import InvalidJob
from schemas.models import ModelCard
from schemas.payloads import INLINE_LIMIT_BYTES, Payload, Ref

Make = Callable[..., Payload]


@pytest.fixture
def make(objects: FileObjects, make_card: Callable[..., ModelCard]) -> Make:
    def payload(given: Any, **options: Any) -> Payload:
        card = make_card(max_bytes=100_000)
        return make_payload(given, card, objects, tenant="acme", job_id="job-1", **options)

    return payload


@pytest.mark.parametrize("given", [b"hello", bytearray(b"hello"), memoryview(b"xhello")[1:]])
def test_bytes_are_taken_as_they_are(make: Make, given: Any) -> None:
    assert make(given) == Payload("application/octet-stream", data=b"hello")


def test_text_is_utf_8_and_never_a_path(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("other")

    assert make("h\u00e9llo").data == "h\u00e9llo".encode()
    assert make(str(path)).data == str(path).encode()
    assert make("x").content_type == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpg", "image/jpeg"),
        ("a.PNG", "image/png"),
        ("a.txt", "text/plain"),
        ("a", "application/octet-stream"),
    ],
)
def test_a_file_is_read_and_its_name_hints_at_its_kind(
    make: Make, tmp_path: Path, name: str, kind: str
) -> None:
    (tmp_path / name).write_bytes(b"\x00\x01")

    assert make(tmp_path / name) == Payload(kind, data=b"\x00\x01")


def test_the_callers_word_on_the_kind_counts(make: Make) -> None:
    assert make(b"x", content_type="image/webp").content_type == "image/webp"


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "uint8"])
def test_an_array_is_sent_as_npy(make: Make, dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)

    payload = make(array)

    assert payload.content_type == "application/x-npy"
    assert payload.data is not None
    read = np.load(io.BytesIO(payload.data), allow_pickle=False)
    assert read.dtype == array.dtype
    assert np.array_equal(read, array)


def test_a_reference_is_passed_on(make: Make) -> None:
    ref = Ref("tenants/acme/x", 5, "0" * 64)

    assert make(ref, content_type="image/png") == Payload("image/png", ref=ref)


@pytest.mark.parametrize(("size", "inline"), [(INLINE_LIMIT_BYTES, True), (INLINE_LIMIT_BYTES + 1, False)])  # fmt: skip
def test_what_is_too_large_for_a_record_becomes_an_object(
    make: Make, objects: FileObjects, size: int, inline: bool
) -> None:
    data = b"x" * size

    payload = make(data)

    assert payload.size_bytes == size
    assert (payload.ref is None) == inline
    if payload.ref:
        assert payload.data is None
        assert payload.ref.key.startswith("tenants/acme/payloads/job-1")
        assert objects.fetch(payload.ref) == data


def test_a_second_large_payload_under_one_id_does_not_overwrite_the_first(
    make: Make, objects: FileObjects
) -> None:
    first, second = make(b"a" * 50_000), make(b"b" * 50_000)

    assert first.ref is not None
    assert second.ref is not None
    assert objects.fetch(first.ref) == b"a" * 50_000
    assert objects.fetch(second.ref) == b"b" * 50_000


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_what_is_too_large_for_the_model_is_refused_before_it_is_stored(
    make: Make, objects: FileObjects, tmp_path: Path, kind: str
) -> None:
    data = b"x" * 100_001
    path = tmp_path / "large"
    path.write_bytes(data)

    with pytest.raises(InvalidJob, match="at most 100000 bytes, came 100001") as caught:
        make(data if kind == "bytes" else path)

    assert caught.value.code == "payload_too_large"
    assert list(objects.list("tenants")) == []


@pytest.mark.parametrize("name", ["missing", "folder", "nul\0"])
def test_a_file_that_cannot_be_read_is_refused(make: Make, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()

    with pytest.raises(InvalidJob, match="Expected a readable file") as caught:
        make(tmp_path / name)

    assert caught.value.code == "payload_unreadable"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_text_with_lone_surrogates_is_refused(make: Make, text: str) -> None:
    with pytest.raises(InvalidJob, match="lone surrogate at character") as caught:
        make(text)

    assert caught.value.code == "text_invalid"


@pytest.mark.parametrize("given", [None, 5, 1.5, ["a"], {"a": 1}, object(), np.array([object()])])
def test_anything_else_is_refused_saying_what_is_taken(make: Make, given: Any) -> None:
    with pytest.raises(InvalidJob, match="Expected bytes, str") as caught:
        make(given)

    assert caught.value.code == "payload_type"
