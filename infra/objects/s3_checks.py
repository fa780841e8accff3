"""What has to be true of an S3 server and its bucket."""

from __future__ import annotations

import math
import time
from email.utils import parsedate_to_datetime

from infra.checks import Finding, clock_finding
from infra.objects.s3 import S3Objects
from infra.objects.s3_bucket import Bucket, parse
from infra.objects.s3_errors import bucket_missing
from infra.settings import Settings
from schemas.errors import PipelineError
from schemas.payloads import TENANTS
from schemas.topics import DAY_S, TOPICS

APPLY = "`headrace objects apply` sets it."


def s3_findings(settings: Settings) -> list[Finding]:
    """Raises Transient, PipelineError (storage_access, storage_refused, bucket_missing, settings_invalid)."""
    bucket = Bucket(parse(settings.objects_address), settings.s3)
    if not bucket.exists():
        raise bucket_missing(str(bucket.address))
    return [
        conditional_writes(settings),
        lifecycle(bucket.expire_days(TENANTS)),
        clock_finding("object store clock", _skew_s(bucket), "the server's clock"),
    ]


def conditional_writes(settings: Settings) -> Finding:
    try:
        S3Objects(settings.objects_address, settings.s3).probe()
    except PipelineError as error:
        if error.code != "conditional_writes_ignored":
            raise
        return Finding("object store", "fail", error.message, "Use AWS S3 or MinIO.")
    return Finding("object store", "ok", "writable, conditional writes are enforced")


def lifecycle(days: int | None) -> Finding:
    """days: the age at which the server deletes tenants' objects."""
    needed = math.ceil(max(topic.retention_s for topic in TOPICS) / DAY_S)
    if days is None:
        return Finding(
            "object store lifecycle",
            "warn",
            "the server deletes no old objects by itself",
            APPLY,
        )
    found = f"tenants' objects are deleted after {days} days"
    if days < needed:
        return Finding(
            "object store lifecycle",
            "fail",
            f"{found}, but records name them for {needed} days",
            APPLY,
        )
    return Finding("object store lifecycle", "ok", found)


def _skew_s(bucket: Bucket) -> float:
    """By the date in an answer, which is cut to seconds."""
    before = time.time()
    stamp = bucket.send("HEAD", "").headers["date"]
    ours = (before + time.time()) / 2
    return parsedate_to_datetime(stamp).timestamp() + 0.5 - ours
