"""CloudEvents 1.0 on the log: binary mode (attributes are headers, the payload is the value, untouched),
and structured mode (the value is the whole event as JSON). Knows nothing of jobs.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

import msgspec

from schemas.errors import InvalidJob

SPEC_VERSION = "1.0"
MEDIA_TYPE = "application/cloudevents"
STRUCTURED = f"{MEDIA_TYPE}+json"
ATTRIBUTE = "ce_"
CONTENT_TYPE = "content-type"

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_decode_event = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_attribute = msgspec.json.Decoder(str | bool | int | None).decode
_decode_text = msgspec.json.Decoder(str).decode


def binary_mode(headers: Mapping[str, str], value: bytes) -> tuple[dict[str, str], bytes]:
    """The event in binary mode, whichever mode it came in; names of attributes in lower case.

    Of a structured event, the JSON is believed and not what headers repeat of it; other headers stay.
    Raises InvalidJob (record_malformed) for a structured event that is none.
    """
    headers = _folded(headers)
    kind = _media_type(headers.get(CONTENT_TYPE))
    if not kind.startswith(MEDIA_TYPE):
        return headers, value
    if kind != STRUCTURED:
        raise _malformed(
            f"Header {CONTENT_TYPE}: expected {STRUCTURED}, or in binary mode the payload's own type, "
            f"came {kind[:80]!r}."
        )
    attributes, data = _read_event(value)
    return _beside(headers) | attributes, data


def structured_mode(headers: Mapping[str, str], value: bytes) -> tuple[dict[str, str], bytes]:
    """An event of binary mode as one of structured mode. Texts and JSON stay readable, all else is base64."""
    event: dict[str, object] = {
        name.removeprefix(ATTRIBUTE): text
        for name, text in headers.items()
        if name.startswith(ATTRIBUTE)
    }
    if (content_type := headers.get(CONTENT_TYPE)) is not None:
        event["datacontenttype"] = content_type
    if value:
        event |= _data(value, _media_type(content_type))
    return _beside(headers) | {CONTENT_TYPE: STRUCTURED}, msgspec.json.encode(event)


def _data(value: bytes, kind: str) -> dict[str, object]:
    try:
        if _is_json(kind):
            msgspec.json.decode(value)
            return {"data": msgspec.Raw(value)}
        if kind.startswith("text/"):
            return {"data": value.decode()}
    except (ValueError, RecursionError):
        pass  # not what its type says: bytes
    return {"data_base64": value}


def _beside(headers: Mapping[str, str]) -> dict[str, str]:
    """What is no part of the event."""
    return {
        name: text
        for name, text in headers.items()
        if name != CONTENT_TYPE and not name.startswith(ATTRIBUTE)
    }


def _folded(headers: Mapping[str, str]) -> dict[str, str]:
    """Attributes' names are lower case by the specification; some senders write them otherwise."""
    folded = {}
    for name, text in headers.items():
        lower = name.lower()
        if lower.startswith(ATTRIBUTE) or lower == CONTENT_TYPE:
            if lower != name and lower in headers:
                continue
            name = lower
        folded[name] = text
    return folded


def _read_event(value: bytes) -> tuple[dict[str, str], bytes]:
    """Attributes as headers, and the payload."""
    try:
        event = _decode_event(value)
    except (ValueError, RecursionError) as error:
        raise _malformed(
            f"Value: expected one CloudEvent as a JSON object in UTF-8, came {value[:40]!r}: {error}"
        ) from None
    data, encoded = event.pop("data", None), event.pop("data_base64", None)
    if data is not None and encoded is not None:
        raise _malformed("Event: expected data or data_base64, came both.")
    headers = {
        ATTRIBUTE + name: text
        for name, raw in event.items()
        if (text := _text(name, raw)) is not None
    }
    declared = headers.pop(f"{ATTRIBUTE}datacontenttype", None)
    if encoded is not None:
        implied, payload = None, _from_base64(encoded)
    elif data is not None:
        implied, payload = _from_json(data, declared)
    else:
        implied, payload = None, b""
    if content_type := declared or implied:
        headers[CONTENT_TYPE] = content_type
    return headers, payload


def _text(name: str, raw: msgspec.Raw) -> str | None:
    """An attribute as binary mode spells it. None for one that is unset."""
    try:
        found = _decode_attribute(raw)
    except (ValueError, RecursionError):
        raise _malformed(
            f"Attribute {name[:80]}: expected a text, a whole number, true or false, "
            f"came {bytes(raw)[:80]!r}."
        ) from None
    if found is None or isinstance(found, str):
        return found
    return str(found).lower() if isinstance(found, bool) else str(found)


def _from_base64(raw: msgspec.Raw) -> bytes:
    try:
        return base64.b64decode(_decode_text(raw), validate=True)
    except (ValueError, binascii.Error):
        raise _malformed(
            f"Attribute data_base64: expected base64 as a text, came {bytes(raw)[:80]!r}."
        ) from None


def _from_json(raw: msgspec.Raw, declared: str | None) -> tuple[str, bytes]:
    """The type implied where none is declared, and the payload: a text as its characters, all else as JSON.

    A text without a type would be JSON in quotes, says the specification; no model wants it so.
    """
    if not bytes(raw).startswith(b'"') or (
        declared is not None and _is_json(_media_type(declared))
    ):
        return _JSON, bytes(raw)
    try:
        return _TEXT, _decode_text(raw).encode()
    except ValueError as error:
        raise _malformed(f"Attribute data: expected a text, {error}.") from None


def _media_type(content_type: str | None) -> str:
    return (content_type or "").split(";", 1)[0].strip().lower()


def _is_json(kind: str) -> bool:
    return kind.endswith(("/json", "+json"))


def _malformed(message: str) -> InvalidJob:
    return InvalidJob("record_malformed", message)
