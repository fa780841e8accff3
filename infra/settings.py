"""Every setting, read once from the environment in a process's `main()` and passed down.

`HEADRACE_DATA_DIR=/srv/headrace`, nested sections by two underscores: `HEADRACE_WORKER__EXECUTORS=2`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from schemas.errors import PipelineError
from schemas.jobs import TENANT

SOCKET_PATH_LIMIT = 100
"""A Unix socket's path may hold about 104 bytes on macOS and 108 on Linux."""


def default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "headrace"


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "headrace"


def default_worker_name() -> str:
    """By the host: each container has a name of its own, and keeps it when its process starts anew."""
    return f"worker-{socket.gethostname()}"[:64]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BreakerSettings(Section):
    """When the jobs of one tenant for one model version only make dead letters, they are held back.
    consecutive: after so many failures in a row. ratio, min_jobs, window_s: or when this share of at
    least so many jobs failed within the window. cooldown_s: until one job is let through as a probe; doubled
    after each that fails, up to cooldown_cap_s. keys: most tenants and versions it remembers."""

    consecutive: int = Field(default=50, ge=1)
    ratio: float = Field(default=0.5, gt=0, le=1)
    min_jobs: int = Field(default=200, ge=1)
    window_s: float = Field(default=60, gt=0)
    cooldown_s: float = Field(default=30, gt=0)
    cooldown_cap_s: float = Field(default=600, gt=0)
    keys: int = Field(default=10_000, ge=1)


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
    """name: no two workers of a fleet have the same. executors: engine runs at once (0: one per CPU).
    slots: batches held at once. memory_bytes: of engines.
    load_s: longest that a model may take to be fetched, loaded and warmed up; then the process ends, as
    it does when a batch overruns.
    models: the names loaded before the worker asks for work (empty: all that fit the memory budget)."""

    name: str = Field(default_factory=default_worker_name, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    executors: int = Field(default=0, ge=0)
    slots: int = Field(default=2, ge=1, le=16)
    memory_bytes: int = Field(default=4 * 1024**3, ge=64 * 1024**2)
    load_s: float = Field(default=900, gt=0)
    models: list[str] = []
    drain_s: float = Field(default=30, ge=0)


class ArchiverSettings(Section):
    """A file is written once it has file_records, file_bytes (as JSON), or its first record has waited
    for file_age_s. memory_bytes: most of all files that are being filled. slot: which member of the
    archivers' group this is. retention_days: how long the lake keeps rows; 0: for ever."""

    slot: int = Field(default=0, ge=0)
    file_records: int = Field(default=16_384, ge=1, le=16_384)
    file_bytes: int = Field(default=32 * 1024 * 1024, ge=1, le=512 * 1024 * 1024)
    file_age_s: float = Field(default=900, gt=0, le=24 * 3600)
    memory_bytes: int = Field(default=64 * 1024 * 1024, ge=1024 * 1024)
    retention_days: int = Field(default=0, ge=0)


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


class RedisSettings(Section):
    """TLS of rediss:// addresses; files are in PEM format. User and password are in the address, which is
    secret: `redis_url`, and `view_url` where the job view lies elsewhere."""

    ca_file: FilePath | None = None
    cert_file: FilePath | None = None
    key_file: FilePath | None = None


TenantName = Annotated[str, Field(pattern=rf"^({TENANT.pattern})$")]
TenantKey = Annotated[SecretStr, Field(min_length=16)]


class TenantSettings(Section):
    """How a job's tenant is proven. require_proof: the dispatcher takes only jobs that their tenant signed.
    keys: by tenant, a secret, or several of which the first signs and all are accepted; as JSON in the
    environment, or in keys_file. A client needs its own tenant's only."""

    require_proof: bool = False
    keys: dict[TenantName, tuple[TenantKey, ...]] = {}
    keys_file: Path | None = None

    @field_validator("keys", mode="before")
    @classmethod
    def _one_or_several(cls, keys: object) -> object:
        if not isinstance(keys, dict):
            return keys
        return {name: (key,) if isinstance(key, str) else key for name, key in keys.items()}

    def secrets(self) -> dict[str, tuple[bytes, ...]]:
        """Reads keys_file. Raises PipelineError if it is not as it should be; what is in it is never shown."""
        keys = self.keys | (self._read() if self.keys_file else {})
        return {
            tenant: tuple(key.get_secret_value().encode() for key in own)
            for tenant, own in keys.items()
        }

    def _read(self) -> dict[str, tuple[SecretStr, ...]]:
        assert self.keys_file is not None
        with _readable_keys(
            f"HEADRACE_TENANTS__KEYS_FILE: {self.keys_file} must hold a JSON object with a key of at "
            "least 16 characters, or a list of them, for each tenant"
        ):
            return TenantSettings(keys=json.loads(self.keys_file.read_bytes())).keys


EngineKeyId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
EngineKey = Annotated[SecretStr, Field(min_length=32)]


class TensorRTSettings(Section):
    """Of the backends tensorrt and tensorrt-rtx; slots aside, what changes an engine makes it another one.
    slots: batches of one engine on the device at once. target: for TensorRT-RTX, the GPUs that engines are
    built for, such as sm89 or sm80,sm89 (empty: this machine's). workspace_bytes: most scratch memory of
    a layer (0: any). The rest is TensorRT's alone: optimization_level, how long to look for faster kernels.
    hardware_compatibility: on which other GPUs engines run as well, slower. version_compatible: later versions
    of the same major load them too, slower."""

    slots: int = Field(default=2, ge=1, le=8)
    target: str = Field(default="", pattern=r"^(sm\d+(,sm\d+)*)?$")
    workspace_bytes: int = Field(default=0, ge=0)
    optimization_level: int = Field(default=3, ge=0, le=5)
    hardware_compatibility: Literal["none", "same_compute_capability", "ampere_plus"] = "none"
    version_compatible: bool = False


class EngineSettings(Section):
    """Compiled engines. cache_dir, cache_bytes: on this machine. keys: by id, what manifests of engines are
    signed with; the first signs, all are accepted; as JSON in the environment, or in keys_file. With keys,
    engines are shared through the object store too. build_wait_s: for somebody else's build of the same
    engine. lease_s: how long a machine that builds may go without a sign of life. failure_memory_s: how long
    a failed build is not tried again."""

    cache_dir: Path = Field(default_factory=lambda: default_cache_dir() / "engines")
    cache_bytes: int = Field(default=8 * 1024**3, ge=1024**2)
    keys: dict[EngineKeyId, EngineKey] = {}
    keys_file: Path | None = None
    build_wait_s: float = Field(default=600, ge=0)
    lease_s: float = Field(default=30, ge=1)
    failure_memory_s: float = Field(default=300, ge=0)
    tensorrt: TensorRTSettings = TensorRTSettings()

    def secrets(self) -> dict[str, bytes]:
        """Reads keys_file. Raises PipelineError if it is not as it should be; what is in it is never shown."""
        keys = self.keys | (self._read() if self.keys_file else {})
        return {key_id: key.get_secret_value().encode() for key_id, key in keys.items()}

    def _read(self) -> dict[str, SecretStr]:
        assert self.keys_file is not None
        with _readable_keys(
            f"HEADRACE_ENGINES__KEYS_FILE: {self.keys_file} must hold a JSON object with a key of at "
            "least 32 characters for each id"
        ):
            return EngineSettings(keys=json.loads(self.keys_file.read_bytes())).keys


@contextmanager
def _readable_keys(expected: str) -> Iterator[None]:
    """Raises PipelineError with what was expected of a file of keys, and why it is not so."""
    try:
        yield
        return
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except ValidationError as error:
        reason = "; ".join(
            f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}"
            for problem in error.errors(include_input=False)
        )
    except ValueError:
        reason = "it is no JSON"
    raise PipelineError("settings_invalid", f"{expected}: {reason}.")


class StackSettings(Section):
    """The embedded stack of `headrace up`. workers: inference worker processes. archiver: whether
    outcomes are archived in the lake."""

    archiver: bool = False
    workers: int = Field(default=1, ge=1, le=64)
    stop_s: float = Field(default=40, gt=0)


class Settings(BaseSettings):
    """Addresses left empty mean the embedded stack in `data_dir`. health_port: where a process answers /livez and
    /readyz (0: nowhere); health_host: beyond loopback for those who probe from elsewhere."""

    model_config = SettingsConfigDict(
        env_prefix="HEADRACE_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    data_dir: Path = Field(default_factory=default_data_dir)
    log_url: str = ""
    objects_url: str = ""
    redis_url: SecretStr = SecretStr("")
    view_url: SecretStr = SecretStr("")
    tenant: str = "default"
    log_level: str = "info"
    health_host: str = "127.0.0.1"
    health_port: int = Field(default=0, ge=0, le=65535)
    view_ttl_s: int = Field(default=3600, ge=60)
    view_jobs: int = Field(default=500_000, ge=1000)
    kafka: KafkaSettings = KafkaSettings()
    dispatcher: DispatcherSettings = DispatcherSettings()
    breaker: BreakerSettings = BreakerSettings()
    worker: WorkerSettings = WorkerSettings()
    archiver: ArchiverSettings = ArchiverSettings()
    engines: EngineSettings = Field(default_factory=EngineSettings)
    s3: S3Settings = Field(default_factory=S3Settings)
    tenants: TenantSettings = TenantSettings()
    redis: RedisSettings = RedisSettings()
    stack: StackSettings = StackSettings()

    @field_validator("redis_url", "view_url")
    @classmethod
    def _is_redis(cls, url: SecretStr) -> SecretStr:
        """Its error does not repeat the address: it is secret."""
        if not url.get_secret_value() or is_redis_address(url.get_secret_value()):
            return url
        raise ValueError(
            "expected redis://user:password@host:port/0, rediss:// with TLS, or unix:///path?db=0; in a user "
            "or password, write special characters as %23"
        )

    @property
    def log_address(self) -> str:
        return self.log_url or f"sqlite://{quote(str(self.data_dir / 'log.db'))}"

    @property
    def objects_address(self) -> str:
        return self.objects_url or (self.data_dir / "objects").as_uri()

    @property
    def has_servers(self) -> bool:
        """Whether log and Redis are servers of their own rather than the embedded stack's."""
        return bool(self.log_url and self.redis_url.get_secret_value())

    @property
    def redis_address(self) -> str:
        """Of queues, leases and slots. Secret: it may hold a password. Never logged, never an argument."""
        return self.redis_url.get_secret_value() or f"unix://{quote(str(self.redis_socket))}"

    @property
    def view_address(self) -> str:
        """Of the job view: the same Redis, unless it has one of its own. As secret."""
        return self.view_url.get_secret_value() or self.redis_address

    @property
    def redis_socket(self) -> Path:
        """Where the embedded Redis listens: in the data folder, or by its hash where that path is too long."""
        inside = self.data_dir / "redis.sock"
        if len(bytes(inside)) <= SOCKET_PATH_LIMIT:
            return inside
        digest = hashlib.sha256(bytes(self.data_dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}-{digest}" / "redis.sock"


def is_redis_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        place = parts.path if parts.scheme == "unix" else parts.hostname and (parts.port or 1)
    except ValueError:
        return False
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    return (
        parts.scheme in ("redis", "rediss", "unix")
        and bool(place)
        and not parts.fragment
        and options.keys() <= {"db"}
    )


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, with overrides (of the command line) on top.

    Raises PipelineError naming each wrong variable.
    """
    try:
        settings = Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        lines = [
            f"HEADRACE_{'__'.join(str(part) for part in problem['loc']).upper()}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_input=False)
        ]
        raise PipelineError("settings_invalid", "Settings are wrong: " + "; ".join(lines)) from None
    except SettingsError as error:
        raise PipelineError(
            "settings_invalid", f"A setting that must be JSON is not: {error}."
        ) from None
    return settings.model_copy(update={"data_dir": settings.data_dir.expanduser().resolve()})
