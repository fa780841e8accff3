"""Who vouches for a compiled engine: HMAC-SHA256 over its manifest, by keys that can be rotated.

Loading an artefact may run code that is in it, so nothing of an entry is read as an artefact before
its manifest has passed here.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from msgspec import Struct

UNSIGNED = ""

_PURPOSE = b"headrace engine manifest 1\0"
"""A signature of something else under the same key is none of a manifest."""


class Signature(Struct, frozen=True):
    """key_id: UNSIGNED if no key vouches; then `mac` is a checksum, which shows damage only."""

    key_id: str
    mac: str


class Keyring:
    """keys: by id. The first signs, all are accepted: to rotate, put the new one first, and take the
    old one away when nothing that it signed is needed any longer.

    Without keys, manifests are unsigned, and only such are accepted: for one machine's own cache.
    """

    def __init__(self, keys: Mapping[str, bytes] | None = None) -> None:
        self._keys = dict(keys or {})

    def __bool__(self) -> bool:
        return bool(self._keys)

    def sign(self, content: bytes) -> Signature:
        key_id = next(iter(self._keys), UNSIGNED)
        return Signature(key_id, self._mac(content, key_id))

    def fault(self, content: bytes, signature: Signature) -> str | None:
        """Why these bytes must not be believed, or None if they may be."""
        if self._keys and signature.key_id == UNSIGNED:
            return "it is not signed"
        if signature.key_id != UNSIGNED and signature.key_id not in self._keys:
            return f"it is signed by the key {signature.key_id!r}, which is not known here"
        if not hmac.compare_digest(
            self._mac(content, signature.key_id).encode(), signature.mac.encode()
        ):
            return "its signature is not that of its content"
        return None

    def _mac(self, content: bytes, key_id: str) -> str:
        if key_id == UNSIGNED:
            return hashlib.sha256(_PURPOSE + content).hexdigest()
        return hmac.digest(self._keys[key_id], _PURPOSE + content, "sha256").hex()
