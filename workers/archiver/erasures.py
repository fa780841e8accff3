"""What has been erased: kept in the lake, because the log may still hold what the archiver reads later.

lake/_erased/job/id=<job id>/<when>        lake/_erased/tenant/id=<tenant>/<when>
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from infra.lake import ERASED
from infra.objects import ObjectStore
from schemas.errors import InvalidJob
from schemas.jobs import JOB_ID, TENANT

_KEY = re.compile(rf"{ERASED}/(job|tenant)/id=([^/]+)/([0-9.]+)")


class Erasure(NamedTuple):
    """Of everything of this job or tenant that was submitted, or had ended, by a time (seconds since the epoch)."""

    kind: Literal["job", "tenant"]
    name: str
    at: float

    @property
    def key(self) -> str:
        return f"{ERASED}/{self.kind}/id={self.name}/{self.at:.6f}"


class Erasures(NamedTuple):
    """All of them: when each job and each tenant was last erased."""

    jobs: dict[str, float]
    tenants: dict[str, float]

    def covers(
        self, job_id: str, tenant: str, submitted_at: float, finished_at: float | None
    ) -> bool:
        began = min(submitted_at, finished_at or 0.0)
        return began <= max(self.jobs.get(job_id, -1.0), self.tenants.get(tenant, -1.0))


def new_erasure(kind: Literal["job", "tenant"], name: str, at: float) -> Erasure:
    """Raises InvalidJob (job_id_invalid, tenant_invalid)."""
    if kind == "job" and not JOB_ID.fullmatch(name):
        raise InvalidJob("job_id_invalid", f"Expected a job id, came {name[:80]!r}.")
    if kind == "tenant" and not TENANT.fullmatch(name):
        raise InvalidJob(
            "tenant_invalid", f"Expected a tenant matching {TENANT.pattern}, came {name[:80]!r}."
        )
    return Erasure(kind, name, at)


def record_erasure(objects: ObjectStore, erasure: Erasure) -> None:
    """From now on nobody writes to the lake what it covers; what is there already goes by a rewrite."""
    objects.put(erasure.key, b"")


def read_erasures(objects: ObjectStore) -> Erasures:
    found = Erasures({}, {})
    for info in objects.list(ERASED):
        if parts := _KEY.fullmatch(info.key):
            kind, name, at = parts.groups()
            by_name = found.jobs if kind == "job" else found.tenants
            by_name[name] = max(float(at), by_name.get(name, 0.0))
    return found
