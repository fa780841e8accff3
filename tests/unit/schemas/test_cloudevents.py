"""Both modes of CloudEvents are one event; what is no event is refused in words."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.cloudevents import STRUCTURED, binary_mode, structured_mode
from schemas.errors import InvalidJob
from schemas.jobs import JOB_TYPE, read_job, retry_headers
from schemas.topics import JOB_TOPICS, RETRY

EVENT = {"specversion": "1.0", "id": "job-1", "type": JOB_TYPE, "tenant": "default", "model": "m"}
AS_HEADERS = {f"ce_{name}": text for name, text in EVENT.items()}
TEXT = "jobs.text.standard"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.from_regex(r"[a-z0-9]{1,12}", fullmatch=True).filter(
    lambda name: name not in ("data", "datacontenttype")
)


def structured(event: dict[str, Any], **headers: str) -> tuple[dict[str, str], bytes]:
    return binary_mode({"content-type": STRUCTURED, **headers}, json.dumps(event).encode())


# ── which mode ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content_type",
    [
        STRUCTURED,
        "application/cloudevents+json; charset=UTF-8",
        "Application/CloudEvents+JSON;charset=utf-8",
        " application/cloudevents+json ",
    ],
)
@pytest.mark.parametrize("name", ["content-type", "Content-Type"])
def test_a_structured_event_is_known_by_its_content_type(name: str, content_type: str) -> None:
    headers, value = binary_mode({name: content_type}, json.dumps(EVENT).encode())

    assert (headers, value) == (AS_HEADERS, b"")


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "application/cloud", "text/plain"]
)
def test_any_other_event_is_in_binary_mode(content_type: str) -> None:
    headers = AS_HEADERS | {"content-type": content_type}

    assert binary_mode(headers, b"{}") == (headers, b"{}")


@pytest.mark.parametrize(
    "content_type",
    [
        "application/cloudevents",
        "application/cloudevents+avro",
        "application/cloudevents-batch+json; charset=utf-8",
    ],
)
def test_other_formats_of_structured_events_are_refused(content_type: str) -> None:
    with pytest.raises(InvalidJob, match=r"content-type: expected \S+\+json") as caught:
        binary_mode({"content-type": content_type}, b"[]")

    assert caught.value.code == "record_malformed"


# ── attributes ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given_value", "text"), [("x", "x"), (7, "7"), (-1, "-1"), (True, "true"), (False, "false")]
)
def test_an_attribute_of_any_type_is_a_header(given_value: object, text: str) -> None:
    headers, _ = structured(EVENT | {"myattribute": given_value})

    assert headers == AS_HEADERS | {"ce_myattribute": text}


def test_an_attribute_that_is_null_is_not_set() -> None:
    assert structured(EVENT | {"subject": None}) == (AS_HEADERS, b"")


@pytest.mark.parametrize("value", [1.5, {}, [1], {"a": {"b": 1}}])
def test_an_attribute_of_a_type_that_there_is_not_is_refused(value: object) -> None:
    with pytest.raises(InvalidJob, match="Attribute params: expected a text, a whole number"):
        structured(EVENT | {"params": value})


def test_the_event_is_believed_and_not_the_headers_that_repeat_it() -> None:
    headers, _ = structured(EVENT, ce_id="other", CE_PRIORITY="9", app="1")

    assert headers == AS_HEADERS | {"app": "1"}


# ── data ─────────────────────────────────────────────────────────────────────────────────────────

PIXELS = bytes(range(256))


@pytest.mark.parametrize(
    ("data", "content_type", "value"),
    [
        ({"data": "h\u00e9llo"}, "text/plain; charset=utf-8", "h\u00e9llo".encode()),
        ({"data": "hi", "datacontenttype": "text/markdown"}, "text/markdown", b"hi"),
        ({"data": "hi", "datacontenttype": "application/json"}, "application/json", b'"hi"'),
        ({"data": {"a": [1, 2.50]}}, "application/json", b'{"a": [1, 2.5]}'),
        ({"data": [1], "datacontenttype": "a/b+json; x=y"}, "a/b+json; x=y", b"[1]"),
        ({"data": None}, "application/json", b"null"),
        ({"data_base64": base64.b64encode(PIXELS).decode()}, None, PIXELS),
        ({"data_base64": "AA==", "datacontenttype": "image/png"}, "image/png", b"\0"),
        ({"datacontenttype": "image/png"}, "image/png", b""),
        ({}, None, b""),
    ],
)
def test_the_payload_of_a_structured_event(
    data: dict[str, Any], content_type: str | None, value: bytes
) -> None:
    headers, read = structured(EVENT | data)

    assert (headers.get("content-type"), read) == (content_type, value)


def test_json_is_passed_on_byte_for_byte() -> None:
    raw = b'{"b" : 1.50,\t"a":"\\u00e9"}'
    event = json.dumps(EVENT).encode()[:-1] + b', "data": ' + raw + b"}"

    assert binary_mode({"content-type": STRUCTURED}, event)[1] == raw


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"", "Value: expected one CloudEvent"),
        (b"[]", "Value: expected one CloudEvent"),
        (b"\xff\xfe", "Value: expected one CloudEvent"),
        (b"[" * 100_000, "Value: expected one CloudEvent"),
        (b'{"a":' * 100_000, "Value: expected one CloudEvent"),
        (b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "Value: expected one CloudEvent"),
        (b'{"specversion": "1.0"', "Value: expected one CloudEvent"),
        (b'{"data": "a", "data_base64": "AA=="}', "data or data_base64, came both"),
        (b'{"data_base64": "not base64!"}', "data_base64: expected base64"),
        (b'{"data_base64": 5}', "data_base64: expected base64"),
        (b'{"data_base64": "AAA"}', "data_base64: expected base64"),
        (b'{"data": "\xff"}', "expected a text"),
        (b'{"id": "\xff"}', "Attribute id: expected a text"),
        (b'{"id": "\\ud800"}', "expected"),
        (b'{"priority": ' + b"9" * 5000 + b"}", "Attribute priority"),
    ],
)
def test_what_is_no_event_is_refused_in_few_words(value: bytes, words: str) -> None:
    with pytest.raises(InvalidJob, match=words) as caught:
        binary_mode({"content-type": STRUCTURED}, value)

    assert caught.value.code == "record_malformed"
    assert len(caught.value.message) < 400


# ── there and back ───────────────────────────────────────────────────────────────────────────────


@given(
    attributes=st.dictionaries(names, texts, max_size=4),
    content_type=st.none() | st.sampled_from(["text/plain", "application/json", "image/png", "x"]),
    value=st.binary(max_size=64) | texts.map(str.encode) | st.integers().map(lambda n: b"%d" % n),
)
def test_an_event_is_the_same_after_structured_mode(
    attributes: dict[str, str], content_type: str | None, value: bytes
) -> None:
    headers = {"app": "1"} | {f"ce_{name}": text for name, text in attributes.items()}
    if content_type is not None:
        headers["content-type"] = content_type

    assert binary_mode(*structured_mode(headers, value)) == (headers, value)


# ── whatever comes ───────────────────────────────────────────────────────────────────────────────

OWN_NAMES = [*AS_HEADERS, "content-type", "ce_params", "ce_deadline", "x-replay-id", "CE_ID"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
events = st.dictionaries(
    st.sampled_from([*EVENT, "data", "data_base64", "datacontenttype", "params"]) | texts,
    json_values,
    max_size=6,
).map(lambda event: json.dumps(EVENT | event).encode())


@settings(deadline=None, max_examples=500)
@given(
    topic=st.sampled_from([*JOB_TOPICS, RETRY]),
    headers=st.dictionaries(
        st.sampled_from(OWN_NAMES) | texts, texts | st.sampled_from([STRUCTURED, "1.0"])
    ),
    value=st.binary(max_size=200) | events,
    good=st.sampled_from([{}, AS_HEADERS, {"content-type": STRUCTURED}]),
)
def test_any_record_is_a_job_or_an_invalid_job(
    topic: str, headers: dict[str, str], value: bytes, good: dict[str, str]
) -> None:
    """And a job that was read can be written."""
    with suppress(InvalidJob):
        written = retry_headers(read_job(topic, headers | good, value, 0.0))
        assert all(isinstance(text, str) for text in written.values())
