"""What a job carries: bytes inline in its record, or a reference to an object (claim check)."""

from __future__ import annotations

import hashlib

from msgspec import Struct

INLINE_LIMIT_BYTES = 32 * 1024
"""Larger payloads go to the object store before the job is appended."""

TENANTS = "tenants"
"""Folder of everything in the object store that belongs to a tenant."""

RESULT_INLINE_LIMIT_BYTES = 8 * 1024
"""Larger results become objects."""


class Ref(Struct, frozen=True, array_like=True):
    """An object in our own bucket. key: under the tenant's prefix. sha256: hex digest of the bytes."""

    key: str
    size_bytes: int
    sha256: str


class Payload(Struct, frozen=True, array_like=True):
    """Exactly one of data and ref is set. content_type: a MIME type; a hint, the bytes decide."""

    content_type: str
    data: bytes | None = None
    ref: Ref | None = None

    @property
    def size_bytes(self) -> int:
        return self.ref.size_bytes if self.ref else len(self.data or b"")

    @property
    def sha256(self) -> str:
        return self.ref.sha256 if self.ref else hashlib.sha256(self.data or b"").hexdigest()


def payload_key(tenant: str, job_id: str, unique: str) -> str:
    """Where a large payload goes. unique: random, because a second submission under the same
    idempotency key must not overwrite the payload of the job that was accepted."""
    return f"{_prefix(tenant)}payloads/{job_id}.{unique}"


def result_key(tenant: str, job_id: str, attempt: str) -> str:
    """Where a large result goes. attempt: random; the outcome names the one that counts."""
    return f"{_prefix(tenant)}results/{job_id}.{attempt}"


def belongs_to(tenant: str, key: str) -> bool:
    """Whether the key lies under the tenant's prefix. The object store refuses `..` in a key."""
    return key.startswith(_prefix(tenant))


def _prefix(tenant: str) -> str:
    return f"{TENANTS}/{tenant}/"
