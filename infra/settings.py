"""Every setting, read once from the environment in a process's `main()` and passed down.

`HEADRACE_DATA_DIR=/srv/headrace`, nested sections by two underscores: `HEADRACE_WORKER__EXECUTORS=2`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.errors import PipelineError

SOCKET_PATH_LIMIT = 100
"""A Unix socket's path may hold about 104 bytes on macOS and 108 on Linux."""


def default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "headrace"


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "headrace"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DispatcherSettings(Section):
    """window: most open jobs per topic. window_bytes: most payload bytes in memory.
    batch_bytes: most payload bytes of a batch. lease_s: how long a batch may go without a sign of
    life from its worker. dedupe_window_s, dedupe_jobs: how long and how many idempotency keys are
    remembered."""

    slot: int = Field(default=0, ge=0)
    window: int = Field(default=4096, ge=1, le=16384)
    window_bytes: int = Field(default=64 * 1024 * 1024, ge=1024 * 1024)
    batch_bytes: int = Field(default=64 * 1024 * 1024, ge=64 * 1024)
    lease_s: float = Field(default=10, ge=2, le=600)
    retry_base_s: float = Field(default=0.5, gt=0)
    retry_cap_s: float = Field(default=60, gt=0)
    dedupe_window_s: float = Field(default=24 * 3600, ge=0)
    dedupe_jobs: int = Field(default=100_000, ge=0)
    max_deadline_s: float = Field(default=3 * 24 * 3600, gt=0)


class WorkerSettings(Section):
    """executors: engine runs at once (0: one per CPU). slots: batches held at once.
    models: the names loaded before the worker asks for work (empty: all that fit the memory budget)."""

    name: str = Field(default="worker-0", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    executors: int = Field(default=0, ge=0)
    slots: int = Field(default=2, ge=1, le=16)
    memory_bytes: int = Field(default=4 * 1024**3, ge=64 * 1024**2)
    models: list[str] = []
    drain_s: float = Field(default=30, ge=0)


class S3Settings(Section):
    """Of an object store at s3://; its address says where the server is and which bucket.
    connect_s, read_s: how long a request may take to connect, and go without a byte. attempts: of
    each request. cache_dir: copies of objects on this machine; cache_bytes: above it, old ones go."""

    access_key: SecretStr = SecretStr("")
    secret_key: SecretStr = SecretStr("")
    region: str = "us-east-1"
    connect_s: float = Field(default=3, gt=0)
    read_s: float = Field(default=10, gt=0)
    attempts: int = Field(default=3, ge=1, le=10)
    cache_dir: Path = Field(default_factory=lambda: default_cache_dir() / "objects")
    cache_bytes: int = Field(default=16 * 1024**3, ge=1024**2)


class KafkaSettings(Section):
    """For an event log at kafka://. tls, sasl: how its servers are spoken to; files are in PEM format.
    partitions, replicas, min_insync_replicas: of topics that `headrace topics apply` makes (0: as the
    cluster has it). session_timeout_s: how long a dispatcher that died keeps its partitions."""

    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    key_password: SecretStr = SecretStr("")
    sasl: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = ""
    username: str = ""
    password: SecretStr = SecretStr("")
    partitions: int = Field(default=6, ge=1, le=1000)
    replicas: int = Field(default=0, ge=0)
    min_insync_replicas: int = Field(default=0, ge=0)
    session_timeout_s: float = Field(default=10, ge=6)


class StackSettings(Section):
    """The embedded stack of `headrace up`. workers: inference worker processes."""

    workers: int = Field(default=1, ge=1, le=64)
    stop_s: float = Field(default=40, gt=0)


class Settings(BaseSettings):
    """Addresses left empty mean the embedded stack in `data_dir`."""

    model_config = SettingsConfigDict(
        env_prefix="HEADRACE_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    data_dir: Path = Field(default_factory=default_data_dir)
    log_url: str = ""
    objects_url: str = ""
    redis_url: SecretStr = SecretStr("")
    tenant: str = "default"
    log_level: str = "info"
    view_ttl_s: int = Field(default=3600, ge=60)
    view_jobs: int = Field(default=500_000, ge=1000)
    engine_cache_bytes: int = Field(default=8 * 1024**3, ge=1024**2)
    kafka: KafkaSettings = KafkaSettings()
    dispatcher: DispatcherSettings = DispatcherSettings()
    worker: WorkerSettings = WorkerSettings()
    s3: S3Settings = Field(default_factory=S3Settings)
    stack: StackSettings = StackSettings()

    @property
    def log_address(self) -> str:
        return self.log_url or f"sqlite://{quote(str(self.data_dir / 'log.db'))}"

    @property
    def objects_address(self) -> str:
        return self.objects_url or (self.data_dir / "objects").as_uri()

    @property
    def redis_address(self) -> str:
        """Secret: it may hold a password. Never logged, never a process argument."""
        return self.redis_url.get_secret_value() or f"unix://{quote(str(self.redis_socket))}"

    @property
    def redis_socket(self) -> Path:
        """Where the embedded Redis listens: in the data folder, or by its hash where that path is too long."""
        inside = self.data_dir / "redis.sock"
        if len(bytes(inside)) <= SOCKET_PATH_LIMIT:
            return inside
        digest = hashlib.sha256(bytes(self.data_dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}-{digest}" / "redis.sock"

    @property
    def engine_cache_dir(self) -> Path:
        return default_cache_dir() / "engines"


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, with overrides (of the command line) on top.

    Raises PipelineError naming each wrong variable.
    """
    try:
        settings = Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        lines = [
            f"HEADRACE_{'__'.join(str(part) for part in problem['loc']).upper()}: {problem['msg']}"
            for problem in error.errors(include_input=False)
        ]
        raise PipelineError("settings_invalid", "Settings are wrong: " + "; ".join(lines)) from None
    return settings.model_copy(update={"data_dir": settings.data_dir.expanduser().resolve()})
