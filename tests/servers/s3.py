"""What the tests' S3 servers have in common: where one is, who may use it, and buckets of one's own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from infra.settings import S3Settings

REGION = "us-east-1"


class S3Server(NamedTuple):
    """host: with its port."""

    host: str
    access_key: str
    secret_key: str
    secure: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "HEADRACE_S3__ACCESS_KEY": self.access_key,
            "HEADRACE_S3__SECRET_KEY": self.secret_key,
            "HEADRACE_S3__REGION": REGION,
        }

    def settings(self, cache: Path, **more: object) -> S3Settings:
        own = {"access_key": self.access_key, "secret_key": self.secret_key, "cache_dir": cache}
        return S3Settings.model_validate({"region": REGION, **own, **more})

    def url(self, bucket: str, host: str | None = None) -> str:
        """host: another way to it, through a proxy say."""
        return f"s3://{host or self.host}/{bucket}?secure={str(self.secure).lower()}"

    @contextmanager
    def bucket(self) -> Iterator[str]:
        """The name of an empty bucket; it is gone after the block."""
        from minio import Minio

        client = Minio(
            self.host, self.access_key, self.secret_key, secure=self.secure, region=REGION
        )
        name = f"test-{uuid.uuid4().hex}"
        client.make_bucket(name)
        try:
            yield name
        finally:
            for found in client.list_objects(name, recursive=True):
                client.remove_object(name, found.object_name or "")
            client.remove_bucket(name)


def server_of_environment() -> S3Server | None:
    """`HEADRACE_TEST_S3_URL=s3://host:port?secure=false`, whose credentials may make buckets."""
    from urllib.parse import urlsplit

    given = os.environ.get("HEADRACE_TEST_S3_URL")
    if not given:
        return None
    parts = urlsplit(given)
    return S3Server(
        parts.netloc,
        os.environ["HEADRACE_S3__ACCESS_KEY"],
        os.environ["HEADRACE_S3__SECRET_KEY"],
        secure="secure=false" not in parts.query,
    )
