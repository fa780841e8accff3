"""Engines in a tar file, for machines that share no object store. Signed, or not taken in.

<key>/manifest.json, then the files it names, in its order; the next key
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from pipelines.engines.cache import EngineCache
from pipelines.engines.disk import errors_of_disk
from pipelines.engines.manifest import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    Manifest,
    Rejected,
    compare,
    finish,
    open_manifest,
)
from schemas.errors import PipelineError

LOCK_S = 30.0


class Imported(NamedTuple):
    """new: False if it was here already."""

    manifest: Manifest
    new: bool


def export_engines(cache: EngineCache, keys: Iterable[str], target: BinaryIO) -> Iterator[Manifest]:
    """Write engines of this machine to a tar file; gives each manifest as it is written.

    Raises PipelineError (engine_keys_missing; engine_rejected if there is no such engine any more).
    """
    _need_keys(cache)
    with tarfile.open(fileobj=target, mode="w|") as tar:
        for key in keys:
            entry = cache.disk.entry(key)
            lease = cache.disk.find(key)
            if lease is None:
                raise PipelineError(
                    "engine_rejected", f"Expected the engine {key} on this machine, it is gone."
                )
            try:
                manifest = open_manifest((entry / MANIFEST).read_bytes(), key, cache.keyring)
                for name in (MANIFEST, *manifest.files):
                    tar.add(entry / name, f"{key}/{name}", recursive=False, filter=_anonymous)
            finally:
                lease.release()
            yield manifest


def import_engines(cache: EngineCache, source: BinaryIO) -> Iterator[Imported]:
    """Take engines of a tar file into the cache of this machine; gives each when it is there.

    Nothing is written before the manifest is found to be signed by a key that is known here, and
    nothing else than it names. Raises PipelineError (engine_keys_missing, engine_rejected) and
    Transient (disk_full); the engines before stay.
    """
    _need_keys(cache)
    with _rejections(), errors_of_disk(cache.root), tarfile.open(fileobj=source, mode="r|") as tar:
        members = iter(tar)
        for member in members:
            key, _, name = member.name.partition("/")
            if name != MANIFEST or member.size > MANIFEST_LIMIT_BYTES:
                raise Rejected(f"expected the manifest of an engine, found {member.name!r}")
            signed = _content(tar, member).read()
            manifest = open_manifest(signed, key, cache.keyring)
            yield Imported(manifest, _take_in(cache, manifest, signed, tar, members))


def _take_in(
    cache: EngineCache,
    manifest: Manifest,
    signed: bytes,
    tar: tarfile.TarFile,
    members: Iterator[tarfile.TarInfo],
) -> bool:
    key = manifest.key
    with cache.disk.lock(key, LOCK_S), cache.disk.workspace(key) as folder:
        for name, file in manifest.files.items():
            member = next(members, None)
            if member is None or (member.name, member.size) != (f"{key}/{name}", file.size_bytes):
                raise Rejected(f"expected {file.size_bytes} bytes of {key}/{name}, found others")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as target:
                shutil.copyfileobj(_content(tar, member), target)
        compare(folder, manifest)
        if found := cache.disk.find(key):
            found.release()
            return False
        finish(folder, signed)
        cache.disk.put(folder, key).release()
    return True


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    content = tar.extractfile(member) if member.isreg() else None
    if content is None:
        raise Rejected(f"expected plain files, {member.name!r} is none")
    return content  # type: ignore[return-value]


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Neither the user nor the times of this machine."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def _need_keys(cache: EngineCache) -> None:
    if not cache.keyring:
        raise PipelineError(
            "engine_keys_missing",
            "Engines travel between machines only signed: expected at least one key, there is none;"
            " set HEADRACE_ENGINES__KEYS or HEADRACE_ENGINES__KEYS_FILE and build them anew.",
        )


@contextmanager
def _rejections() -> Iterator[None]:
    try:
        yield
    except Rejected as reason:
        raise PipelineError("engine_rejected", f"The file of engines: {reason}.") from reason
    except (
        tarfile.TarError,
        EOFError,
        ValueError,
    ) as error:  # the last is of a header with no number
        raise PipelineError(
            "engine_rejected", f"Expected a tar file of engines, found another or a part: {error}."
        ) from error
