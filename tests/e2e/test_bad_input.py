"""What people send by mistake or in malice: a clear error each, nothing else harmed, the stack lives on."""

from __future__ import annotations

import io
import json
import struct
import time
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import soundfile
from PIL import Image

from examples.models import samples, whisper
from headrace import Client
from infra.eventlog import NewRecord
from schemas.errors import InvalidJob, PipelineError
from schemas.jobs import JOB_TYPE, new_job_id, rfc3339
from schemas.payloads import Ref
from schemas.results import decode_outcome

if TYPE_CHECKING:
    from tests.conftest import Stack

pytestmark = [
    pytest.mark.timeout(600),  # the first test brings the stack up and may download models
    pytest.mark.usefixtures("the_stack_lives_on"),
]

ONE = np.zeros(1, np.float32)


# ── images ───────────────────────────────────────────────────────────────────────────────────────


def coffee() -> Image.Image:
    return Image.open(samples.photograph("coffee.png")).convert("RGB")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes with a size of its own choice in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    )


def damaged_jpeg() -> bytes:
    data = saved(coffee(), "JPEG")
    return data[: len(data) // 2]


def damaged_png() -> bytes:
    data = bytearray(saved(coffee(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


BAD_IMAGES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "truncated JPEG": (damaged_jpeg, "image_truncated", "ends too early"),
    "damaged PNG": (damaged_png, "image_damaged", "damaged"),
    "50,000 by 50,000 PNG": (lambda: png_that_says(50_000, 50_000), "image_too_large", "pixels"),
    "random bytes": (lambda: np.random.default_rng(1).bytes(900), "image_unreadable", "whole JPEG"),
    "an HTML page": (lambda: b"<!doctype html><p>404", "image_unreadable", "an HTML page"),
    "a PDF": (lambda: b"%PDF-1.7 \n", "image_unreadable", "a PDF document"),
    "a drawing": (lambda: b"<svg xmlns='x'></svg>", "image_unreadable", "render it first"),
    "sound": (lambda: whisper.speech()[2][0].read_bytes(), "image_unreadable", "WAV audio"),
    "a JPEG's first bytes": (lambda: b"\xff\xd8\xff\xe0", "image_unreadable", "JPEG"),
}


def refused_by_the_model(
    stack: Stack, client: Client, model: str, payload: Any, code: str, words: str, **options: Any
) -> None:
    """The job ends as failed with this code, once, with a dead letter that holds it as it was sent."""
    job = client.submit(model, payload, **options)
    outcome = job.wait()
    assert (outcome.status, outcome.code) == ("failed", code)
    assert words in (outcome.message or "")
    assert outcome.attempts == 1
    assert len(stack.results(job.id)) == 1
    (letter,) = stack.dead_letters(job.id)
    assert letter.headers["x-error"] == code
    assert letter.headers["x-error-message"] == outcome.message
    assert letter.position.topic == f"{letter.headers['x-original-topic']}.dlq"
    if isinstance(payload, bytes) and "ce_dataref" not in letter.headers:
        assert letter.value == payload


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_refused_with_its_reason(stack: Stack, client: Client, name: str) -> None:
    make, code, words = BAD_IMAGES[name]
    refused_by_the_model(stack, client, "efficientnet-lite0", make(), code, words)


def test_a_text_that_is_called_an_image_is_refused(
    stack: Stack, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_text("no photograph")
    refused_by_the_model(
        stack, client, "efficientnet-lite0", path, "image_unreadable", "Sent as image/jpeg"
    )


def test_an_image_by_another_name_is_seen_for_what_it_is(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(saved(coffee(), "PNG"))
    assert client.submit("efficientnet-lite0", path).result().label == "espresso"


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    return saved(coffee().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)


def sixteen_bit() -> bytes:
    grey = np.asarray(Image.open(samples.photograph("camera.png")).convert("L"), np.uint16)
    return saved(Image.fromarray(grey * 257), "PNG")


def animated() -> bytes:
    other = Image.new("RGB", coffee().size, "green")
    return saved(coffee(), "GIF", save_all=True, append_images=[other] * 3)


ODD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "animated": (animated, "espresso"),
    "CMYK": (lambda: saved(coffee().convert("CMYK"), "JPEG"), "espresso"),
    "16 bits": (sixteen_bit, "tripod"),
    "turned by EXIF": (turned, "espresso"),
    "transparent": (lambda: saved(coffee().convert("RGBA"), "PNG"), "espresso"),
    "WebP": (lambda: saved(coffee(), "WEBP"), "espresso"),
}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_an_odd_image_is_handled(client: Client, name: str) -> None:
    make, label = ODD_IMAGES[name]
    assert client.submit("efficientnet-lite0", make()).result().label == label


def test_one_corrupt_image_among_32_is_one_failure(stack: Stack, client: Client) -> None:
    good = saved(coffee().resize((320, 240)), "JPEG", quality=80)
    with stack.held(client):
        jobs = client.submit_many("efficientnet-lite0", [*[good] * 20, good[:4000], *[good] * 11])
        stack.until(lambda: waiting(client) >= 32)
    ends = {outcome.job_id: outcome for outcome in client.outcomes(jobs)}
    assert len(ends) == 32
    bad = ends.pop(jobs[20].id)
    assert (bad.status, bad.code) == ("failed", "image_truncated")
    assert {client.result_of(outcome).label for outcome in ends.values()} == {"espresso"}
    assert len(stack.dead_letters(bad.job_id)) == 1
    log = (stack.data / "logs" / "worker-0.log").read_text().splitlines()
    runs = [json.loads(line) for line in log if '"batch_run"' in line]
    assert (32, {"image_truncated": 1}) in [
        (run["jobs"], run["failed"]) for run in runs
    ]  # they shared it


def waiting(client: Client) -> int:
    dispatcher = next(iter(client.fleet.dispatchers()), None)
    return sum(lane.waiting for lane in dispatcher.waiting.values()) if dispatcher else 0


# ── text ─────────────────────────────────────────────────────────────────────────────────────────

BAD_TEXTS: dict[str, tuple[bytes, str, str]] = {
    "white space": (b" \n\t ", "text_empty", "white space alone"),
    "10 MB": (b"many words " * 1_000_000, "text_too_long", "11000000"),
    "lone surrogate": (b"half \xed\xa0\x80 pair", "text_not_utf8", "at byte 5"),
    "NUL": (b"one\0two", "text_has_nul", "at character 3"),
    "UTF-16": ("words".encode("utf-16"), "text_not_utf8", "0xff at byte 0"),
    "heaps of accents": (("e" + "́" * 500).encode(), "text_marks", "combining marks"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_text_is_refused_with_its_reason(stack: Stack, client: Client, name: str) -> None:
    payload, code, words = BAD_TEXTS[name]
    refused_by_the_model(stack, client, "minilm-topics", payload, code, words)


def test_text_in_any_script_is_handled(client: Client) -> None:
    texts = ["中央银行降息。", "😀" * 200, "ﷺ", "a", "é" * 5000, "﻿The match ended two to one."]
    for job in client.submit_many("minilm-topics", texts):
        assert 0 < job.result().probability <= 1


# ── sound ────────────────────────────────────────────────────────────────────────────────────────


def wav(samples: bytes, rate: int = 16_000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples)
    return file.getvalue()


def wav_that_says(seconds: int) -> bytes:
    """One second of silence whose header promises more."""
    data = bytearray(wav(bytes(32_000)))
    struct.pack_into("<I", data, 4, 36 + 32_000 * seconds)
    struct.pack_into("<I", data, 40, 32_000 * seconds)
    return bytes(data)


BAD_SOUNDS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "no samples": (lambda: wav(b""), "audio_empty", "no samples"),
    "3 hours by its header": (lambda: wav_that_says(3 * 3600), "audio_too_long", "by its header"),
    "31 seconds": (lambda: wav(bytes(31 * 32_000)), "audio_too_long", "at most 30 s"),
    "cut off": (lambda: wav_that_says(20), "audio_truncated", "ends after 1.0 s"),
    "a photograph": (lambda: saved(coffee(), "PNG"), "audio_unreadable", "a PNG image"),
    "text": (lambda: b"RIFF or not", "audio_unreadable", "a RIFF file"),
    "damaged": (lambda: wav(bytes(3200))[:30], "audio_damaged", "damaged"),
}


@pytest.mark.parametrize("name", BAD_SOUNDS)
def test_bad_sound_is_refused_with_its_reason(stack: Stack, client: Client, name: str) -> None:
    make, code, words = BAD_SOUNDS[name]
    refused_by_the_model(stack, client, "whisper-tiny-en", make(), code, words)


def test_sound_at_another_rate_and_in_stereo_is_understood(client: Client) -> None:
    (path,) = [path for path, _ in whisper.speech() if path.name == "quick_brown_fox.wav"]
    mono, rate = soundfile.read(path)
    assert (rate, mono.ndim) == (16_000, 1)
    at = np.arange(int(len(mono) * 44_100 / 16_000)) * 16_000 / 44_100
    left = np.interp(at, np.arange(len(mono)), mono * 32_767)
    stereo = np.stack([left, left * 0.5], axis=1).astype(np.int16)
    text = client.submit("whisper-tiny-en", wav(stereo.tobytes(), 44_100, 2)).result().text
    assert "quick brown fox jumps over the lazy dog" in text.lower()


def test_silence_is_no_speech(client: Client) -> None:
    assert client.submit("whisper-tiny-en", wav(bytes(2 * 32_000))).result().text == ""


# ── tensors and custom steps ─────────────────────────────────────────────────────────────────────


def npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


BAD_TENSORS: dict[str, tuple[bytes, str]] = {
    "wrong shape": (npy(np.zeros((2, 2), np.float32)), "array_shape"),
    "no elements": (npy(np.zeros(0, np.float32)), "array_shape"),
    "complex numbers": (npy(np.zeros(2, np.complex64)), "array_dtype"),
    "pickled objects": (npy(np.array([{}], object), allow_pickle=True), "array_dtype"),
    "cut off": (npy(np.zeros(100, np.float32))[:-8], "array_size"),
    "no array": (b"1, 2, 3", "array_unreadable"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_bad_tensor_is_refused_with_its_reason(stack: Stack, client: Client, name: str) -> None:
    payload, code = BAD_TENSORS[name]
    refused_by_the_model(stack, client, "noop", payload, code, "Expected")


def test_a_step_that_raises_fails_its_job_alone(stack: Stack, client: Client) -> None:
    payload = json.dumps({"fail": "out of cheese"}).encode()
    words = "RuntimeError: out of cheese"
    refused_by_the_model(stack, client, "obey", payload, "step_failed", words)


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_an_answer_that_is_no_number_is_a_failure(
    stack: Stack, client: Client, number: str
) -> None:
    payload = f'{{"number": {number}}}'.encode()
    refused_by_the_model(stack, client, "obey", payload, "bad_output", "NaN or infinity")


def test_params_that_no_step_takes_are_refused(stack: Stack, client: Client) -> None:
    payload, params = npy(ONE), {"temperature": 1}
    refused_by_the_model(
        stack, client, "noop", payload, "params_unknown", "temperature", params=params
    )


def test_a_reference_to_nothing_is_a_failure(stack: Stack, client: Client) -> None:
    ref = Ref("tenants/default/none", 10, "0" * 64)
    refused_by_the_model(stack, client, "noop", ref, "object_missing", "put it first")


# ── refused at submit ────────────────────────────────────────────────────────────────────────────

Refused = tuple[str, tuple[Any, ...], dict[str, Any]]
SENTENCE = "Fine."

REFUSED: dict[str, Refused] = {
    "empty image": ("payload_empty", ("efficientnet-lite0", b""), {}),
    "empty text": ("payload_empty", ("minilm-topics", ""), {}),
    "lone surrogate": ("text_invalid", ("minilm-topics", "half \ud800 pair"), {}),
    "above the limit": ("payload_too_large", ("small", np.zeros(50_000, np.float32)), {}),
    "unknown model": ("model_unknown", ("minilm-topic", SENTENCE), {}),
    "model with a surrogate": ("model_unknown", ("\ud800", SENTENCE), {}),
    "unknown version": ("version_unknown", ("minilm-topics", SENTENCE), {"version": 99}),
    "unknown tier": ("tier_unknown", ("minilm-topics", SENTENCE), {"tier": "gold"}),
    "priority of 10": ("priority_invalid", ("minilm-topics", SENTENCE), {"priority": 10}),
    "deadline in the past": ("deadline_past", ("minilm-topics", SENTENCE), {"deadline_s": -1}),
    "deadline of now": ("deadline_past", ("minilm-topics", SENTENCE), {"deadline_s": 0}),
    "deadline NaN": ("deadline_past", ("minilm-topics", SENTENCE), {"deadline_s": float("nan")}),
    "deadline in a year": ("deadline_too_far", ("minilm-topics", SENTENCE), {"deadline_s": 3e7}),
    "no deadline ever": (
        "deadline_too_far",
        ("minilm-topics", SENTENCE),
        {"deadline_s": float("inf")},
    ),
    "empty key": ("key_invalid", ("minilm-topics", SENTENCE), {"key": ""}),
    "long key": ("key_invalid", ("minilm-topics", SENTENCE), {"key": "k" * 257}),
    "key with a surrogate": ("key_invalid", ("minilm-topics", SENTENCE), {"key": "\ud800"}),
    "params too large": (
        "params_too_large",
        ("minilm-topics", SENTENCE),
        {"params": {"p": "x" * 20_000}},
    ),
    "another tenant's object": (
        "payload_foreign",
        ("noop", Ref("tenants/acme/a.npy", 10, "0" * 64)),
        {},
    ),
    "params that are no JSON": (
        "params_invalid",
        ("minilm-topics", SENTENCE),
        {"params": {"p": object()}},
    ),
    "params beyond 64 bits": (
        "params_invalid",
        ("minilm-topics", SENTENCE),
        {"params": {"n": 2**64}},
    ),
    "list": ("payload_type", ("noop", [1, 2]), {}),
    "array of objects": ("payload_type", ("noop", np.array([{}], object)), {}),
    "missing file": ("payload_unreadable", ("noop", Path("/nowhere/x.npy")), {}),
    "folder": ("payload_unreadable", ("noop", Path("/tmp")), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_job_is_refused_at_submit(stack: Stack, client: Client, name: str) -> None:
    code, args, options = REFUSED[name]
    before = len(stack.records("jobs.tensor.standard", "jobs.text.standard"))
    with pytest.raises(InvalidJob) as refused:
        client.submit(*args, **options)
    assert refused.value.code == code
    assert len(stack.records("jobs.tensor.standard", "jobs.text.standard")) == before


@pytest.mark.parametrize("option", ["content_type", "params"])
def test_half_a_character_in_an_option_is_refused_at_submit(client: Client, option: str) -> None:
    bad: Any = "text/\ud800" if option == "content_type" else {"p": "\ud800"}
    with pytest.raises(InvalidJob):
        client.submit("minilm-topics", SENTENCE, **{option: bad})


def test_a_refusal_names_what_there_is(client: Client) -> None:
    with pytest.raises(InvalidJob, match="Did you mean minilm-topics"):
        client.submit("minilm-topic", SENTENCE)
    with pytest.raises(InvalidJob, match=r"no version 99 .* there are 2"):
        client.submit("minilm-topics", SENTENCE, version=99)


def test_a_tenant_must_be_a_plain_name(stack: Stack) -> None:
    for tenant in ("", "../acme", "Ac me", "a" * 100):
        with pytest.raises(PipelineError) as refused:
            Client(data_dir=stack.data, tenant=tenant)
        assert refused.value.code == "tenant_invalid"


def test_of_many_payloads_the_bad_one_is_named(client: Client) -> None:
    with pytest.raises(InvalidJob) as refused:
        client.submit_many("minilm-topics", ["fine", "half \ud800 pair", "fine"])
    assert refused.value.code == "text_invalid"


# ── straight into the log, past the client's checks ──────────────────────────────────────────────


def headers(**changes: str | None) -> dict[str, str]:
    """A good job's headers with some changed, or left out."""
    good: dict[str, str | None] = {
        "ce_specversion": "1.0",
        "ce_type": JOB_TYPE,
        "ce_id": new_job_id("default"),
        "ce_tenant": "default",
        "ce_model": "noop",
        "content-type": "application/x-npy",
    }
    good |= {name if name == "content-type" else f"ce_{name}": v for name, v in changes.items()}
    return {name: value for name, value in good.items() if value is not None}


def appended(
    stack: Stack, client: Client, given: dict[str, str], value: bytes | None = None
) -> str:
    """Put a record into the log; returns its key once the dispatcher has dealt with it."""
    key = given.get("ce_id", new_job_id("default"))
    record = NewRecord("jobs.tensor.standard", key, given, npy(ONE) if value is None else value)
    client.log.append([record])
    stack.until(lambda: not stack.lag())
    return key


FAR = "9999-12-31T23:59:59Z"
FIRST = "0001-01-01T00:00:00+23:59"

MALFORMED: dict[str, dict[str, str | None]] = {
    "no headers": dict.fromkeys(("specversion", "type", "id", "tenant", "model")),
    "other type": {"type": "com.example.order"},
    "no id": {"id": None},
    "id with spaces": {"id": "not an id"},
    "tenant that climbs": {"tenant": "../acme"},
    "no model": {"model": None},
    "version in words": {"modelversion": "newest"},
    "version of many digits": {"modelversion": "9" * 400},
    "priority in words": {"priority": "high"},
    "deadline in words": {"deadline": "tomorrow"},
    "time in words": {"time": "noon"},
    "params no object": {"params": "[1]"},
    "params endless": {"params": "[" * 15_000},
    "reference without digest": {"dataref": "tenants/default/a"},
    "sent in the year 9999": {"time": FAR},
    "deadline in the year 9999": {"deadline": FAR},
    "sent in the year 1": {"time": FIRST},
    "params nested 900 deep": {"params": '{"n":' + "[" * 900 + "]" * 900 + "}"},
    "number beyond 64 bits": {"params": '{"n": 1000000000000000000000000}'},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_record_that_is_no_job_is_a_dead_letter(stack: Stack, client: Client, name: str) -> None:
    given = headers(**MALFORMED[name])
    key = appended(stack, client, given)
    (letter,) = stack.dead_letters(key)
    assert letter.headers["x-error"] == "record_malformed"
    assert letter.headers["x-error-message"].startswith("Header ")
    assert letter.value == npy(ONE)
    assert given.items() <= letter.headers.items()
    assert stack.results(key) == []


ANSWERED: dict[str, tuple[dict[str, str], str, str | None]] = {
    "unknown model": ({"model": "nope"}, "failed", "model_unknown"),
    "model of a million letters": ({"model": "x" * 1_000_000}, "failed", "model_unknown"),
    "unknown version": ({"modelversion": "99"}, "failed", "version_unknown"),
    "deadline in the past": ({"deadline": "2020-01-01T00:00:00Z"}, "expired", None),
    "deadline in a hundred years": (
        {"deadline": "2126-01-01T00:00:00Z"},
        "failed",
        "deadline_too_far",
    ),
    "sent long ago, without a deadline": ({"time": "1970-01-01T00:00:00Z"}, "expired", None),
    "trace that is none": ({"traceparent": "garbage"}, "succeeded", None),
    "says that it failed before": (
        {"attempt": "999", "suspect": "1", "notbefore": "2126-01-01T00:00:00Z"},
        "succeeded",
        None,
    ),
    "of another modality": ({"model": "minilm-topics"}, "failed", "wrong_modality"),
    "another tenant's object": (
        {"dataref": "tenants/acme/a", "datasize": "3", "datasha256": "0" * 64},
        "failed",
        "payload_foreign",
    ),
    "object outside the store": (
        {"dataref": "tenants/default/../../etc", "datasize": "3", "datasha256": "0" * 64},
        "failed",
        "object_key_invalid",
    ),
    "header that nobody knows": ({"color": "blue"}, "succeeded", None),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_a_record_that_is_an_odd_job_gets_its_one_outcome(
    stack: Stack, client: Client, name: str
) -> None:
    changes, status, code = ANSWERED[name]
    key = appended(stack, client, headers(**changes))
    (record,) = stack.results(key)
    outcome = decode_outcome(record.value)
    assert (outcome.status, outcome.code) == (status, code)
    assert [letter.headers["x-error"] for letter in stack.dead_letters(key)] == (
        [code] if code else []
    )


def test_a_payload_above_the_limit_is_refused_in_the_log_too(stack: Stack, client: Client) -> None:
    given = headers(model="small")
    key = appended(stack, client, given, bytes(200_000))
    (record,) = stack.results(key)
    assert decode_outcome(record.value).code == "payload_too_large"


def retried(**changes: str) -> NewRecord:
    given = headers() | {"ce_jobtopic": "jobs.tensor.standard", "ce_attempt": "1", **changes}
    return NewRecord("jobs.retry", given["ce_id"], given, npy(ONE))


@pytest.mark.parametrize(
    "changes",
    [{"ce_attempt": "first"}, {"ce_jobtopic": "results"}, {"ce_notbefore": "later"}],
    ids=["attempt in words", "topic that is none", "time in words"],
)
def test_a_retry_that_is_no_job_is_a_dead_letter(
    stack: Stack, client: Client, changes: dict[str, str]
) -> None:
    record = retried(**changes)
    client.log.append([record])
    stack.until(lambda: not stack.lag())
    (letter,) = stack.dead_letters(record.key)
    assert letter.headers["x-error"] == "record_malformed"
    assert letter.position.topic == "jobs.retry.dlq"


def test_a_retry_that_waits_for_its_time_keeps_its_deadline(stack: Stack, client: Client) -> None:
    deadline = rfc3339(time.time() + 0.5)
    record = retried(ce_notbefore="2126-01-01T00:00:00Z", ce_deadline=deadline)
    client.log.append([record])
    stack.until(lambda: not stack.lag())
    (result,) = stack.results(record.key)
    assert decode_outcome(result.value).status == "expired"


def test_a_retry_that_was_cancelled_does_not_run(stack: Stack, client: Client) -> None:
    record = retried(ce_notbefore=rfc3339(time.time() + 2))
    client.log.append([record])
    client.cancel(record.key)
    stack.until(lambda: not stack.lag())
    (result,) = stack.results(record.key)
    assert decode_outcome(result.value).status == "cancelled"


def test_garbage_in_the_other_topics_harms_nobody(stack: Stack, client: Client) -> None:
    client.log.append(
        [
            NewRecord("jobs.retry", "garbage", {"what": "is this"}, b"\0"),
            NewRecord("control", "no job", {}, b"\xff"),
            NewRecord("control", "", {"ce_type": "unheard.of"}, b""),
        ]
    )
    stack.until(lambda: not stack.lag())
    (letter,) = stack.dead_letters("garbage")
    assert letter.position.topic == "jobs.retry.dlq"


# ── models ───────────────────────────────────────────────────────────────────────────────────────

MakeBundle = Callable[..., Path]


def refused_bundle(stack: Stack, client: Client, folder: Path, *words: str) -> None:
    done = stack.headrace("models", "add", folder, code=2)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert "bad" not in {card.name for card in client.models()}


def test_a_bundle_without_its_graph_is_refused(
    stack: Stack, client: Client, make_tensor_bundle: MakeBundle
) -> None:
    folder = make_tensor_bundle("bad")
    (folder / "model.onnx").unlink()
    refused_bundle(stack, client, folder, "model.yaml:5", "model.onnx", "no such file")


def test_a_mistake_in_model_yaml_is_named_with_its_line(
    stack: Stack, client: Client, make_tensor_bundle: MakeBundle
) -> None:
    folder = make_tensor_bundle("bad")
    text = (folder / "model.yaml").read_text()
    (folder / "model.yaml").write_text(text.replace("modality: tensor", "modality: [tensor"))
    refused_bundle(stack, client, folder, "model.yaml:")
    (folder / "model.yaml").write_text(text + "modle: x\n")
    refused_bundle(stack, client, folder, f"model.yaml:{len(text.splitlines()) + 1}", "modle")


def test_a_step_that_nobody_knows_is_named_with_its_line(
    stack: Stack, client: Client, make_tensor_bundle: MakeBundle
) -> None:
    folder = make_tensor_bundle("bad", preprocess="[dream]")
    refused_bundle(stack, client, folder, "model.yaml:6", "dream", "obey")


def test_a_bundle_of_another_shape_than_it_says_is_refused(
    stack: Stack, client: Client, make_tensor_bundle: MakeBundle
) -> None:
    decode = "[{decode_array: {input: x, dtype: float32, shape: [2, 2]}}]"
    folder = make_tensor_bundle("bad", preprocess=decode)
    (folder / "sample.npy").write_bytes(npy(np.zeros((2, 2), np.float32)))
    text = (folder / "model.yaml").read_text()
    (folder / "model.yaml").write_text(text + "sample: sample.npy\n")
    refused_bundle(stack, client, folder, "fails on the sample")


def test_a_graph_whose_weights_lie_outside_the_bundle_is_refused(
    stack: Stack, client: Client, make_tensor_bundle: MakeBundle, tmp_path: Path
) -> None:
    folder = make_tensor_bundle("bad")
    graph = onnx.load(folder / "model.onnx")
    (tensor,) = graph.graph.initializer
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    (folder.parent / "secret.bin").write_bytes(bytes(4))
    onnx.save(graph, folder / "model.onnx")
    refused_bundle(stack, client, folder, "outside the bundle")


def test_a_file_that_is_no_graph_is_refused(
    stack: Stack, client: Client, make_tensor_bundle: MakeBundle
) -> None:
    folder = make_tensor_bundle("bad")
    (folder / "model.onnx").write_bytes(b"<html>404</html>")
    refused_bundle(stack, client, folder, "not an ONNX file")
