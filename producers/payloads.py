"""From what a caller has in hand (bytes, a path, text, an array, a reference) to a job's payload."""

from __future__ import annotations

import io
import mimetypes
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from infra.objects import ObjectStore
from schemas.errors import InvalidJob
from schemas.models import ModelCard
from schemas.payloads import INLINE_LIMIT_BYTES, Payload, Ref, payload_key

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Submittable: TypeAlias = bytes | bytearray | memoryview | str | Path | Ref | NDArray[np.generic]
"""str is text, never a path: a file is given as a `pathlib.Path`."""


def make_payload(
    given: Submittable,
    card: ModelCard,
    objects: ObjectStore,
    *,
    tenant: str,
    job_id: str,
    content_type: str | None = None,
) -> Payload:
    """The payload of one job; what is too large for its record is in the object store when this returns.

    Raises InvalidJob (payload_unreadable, payload_too_large, payload_type, text_invalid) and Transient.
    """
    if isinstance(given, Ref):
        return Payload(content_type or "application/octet-stream", ref=given)
    data, guessed = _bytes_of(given, card)
    kind = content_type or guessed
    if len(data) <= INLINE_LIMIT_BYTES:
        return Payload(kind, data=data)
    _check_size(len(data), card)
    return Payload(kind, ref=objects.put(payload_key(tenant, job_id, secrets.token_hex(4)), data))


def _bytes_of(given: Submittable, card: ModelCard) -> tuple[bytes, str]:
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given), "application/octet-stream"
    if isinstance(given, str):
        try:
            return given.encode(), "text/plain; charset=utf-8"
        except UnicodeEncodeError as error:
            raise InvalidJob(
                "text_invalid",
                f"Expected Unicode text, came a lone surrogate at character {error.start}.",
            ) from None
    if isinstance(given, Path):
        return _file(given, card)
    return _array(given)


def _file(path: Path, card: ModelCard) -> tuple[bytes, str]:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    try:
        _check_size(path.stat().st_size, card)
        return path.read_bytes(), kind
    except (OSError, ValueError) as error:
        raise InvalidJob(
            "payload_unreadable", f"Expected a readable file, came {str(path)!r}: {error}."
        ) from error


def _array(given: Any) -> tuple[bytes, str]:
    import numpy as np

    if not isinstance(given, np.ndarray) or given.dtype.hasobject:
        raise InvalidJob(
            "payload_type",
            "Expected bytes, str (text), pathlib.Path (a file), a numeric numpy array or a Ref, "
            f"came {type(given).__name__}.",
        )
    buffer = io.BytesIO()
    np.save(buffer, given, allow_pickle=False)
    return buffer.getvalue(), "application/x-npy"


def _check_size(size: int, card: ModelCard) -> None:
    if size > card.limits.max_bytes:
        raise InvalidJob(
            "payload_too_large",
            f"Model {card.name} takes at most {card.limits.max_bytes} bytes, came {size}.",
        )
