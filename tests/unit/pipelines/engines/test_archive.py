"""Engines that travel in a file: taken in as they were signed, or not at all."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.engines.archive import export_engines, import_engines
from pipelines.engines.cache import EngineCache
from pipelines.engines.manifest import key_of
from pipelines.engines.signing import Keyring
from schemas.errors import PipelineError

KEYRING = Keyring({"k1": b"s" * 32})
PARTS: list[dict[str, object]] = [{"model": "a"}, {"model": "b"}]
KEYS = [key_of(parts) for parts in PARTS]


def build(into: Path) -> None:
    (into / "engine.bin").write_bytes(b"compiled" * 1000)
    (into / "plans").mkdir()
    (into / "plans" / "bucket-1").write_bytes(b"plan")


def never(into: Path) -> None:
    raise AssertionError("expected a hit")


@pytest.fixture
def here(tmp_path: Path) -> EngineCache:
    """A machine that has built two engines."""
    cache = EngineCache(tmp_path / "here", 1 << 30, keyring=KEYRING)
    for parts in PARTS:
        cache.get_or_build(parts, build, label="tiny").release()
    return cache


@pytest.fixture
def there(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "there", 1 << 30, keyring=KEYRING)


@pytest.fixture
def archive(here: EngineCache) -> bytes:
    target = io.BytesIO()
    assert [manifest.key for manifest in export_engines(here, KEYS, target)] == KEYS
    return target.getvalue()


def taken(cache: EngineCache, archive: bytes) -> list[tuple[str, bool]]:
    return [(m.label, new) for m, new in import_engines(cache, io.BytesIO(archive))]


def entries(cache: EngineCache) -> list[str]:
    return sorted(entry.key for entry in cache.disk.entries())


def test_engines_travel_in_a_file(archive: bytes, there: EngineCache) -> None:
    assert taken(there, archive) == [("tiny", True), ("tiny", True)]
    for parts in PARTS:
        artefact = there.get_or_build(parts, never)
        assert (artefact.path / "plans" / "bucket-1").read_bytes() == b"plan"
    assert taken(there, archive) == [("tiny", False), ("tiny", False)]


def test_a_file_tells_nothing_of_the_machine(archive: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            assert (member.uid, member.uname, member.mtime, member.mode) == (0, "", 0, 0o600)


def test_nothing_travels_unsigned(archive: bytes, here: EngineCache, tmp_path: Path) -> None:
    unsigned = EngineCache(tmp_path / "unsigned", 1 << 30)
    unsigned.get_or_build(PARTS[0], build).release()
    for attempt in (
        lambda: list(export_engines(unsigned, KEYS[:1], io.BytesIO())),
        lambda: taken(unsigned, archive),
    ):
        with pytest.raises(PipelineError) as refused:
            attempt()
        assert refused.value.code == "engine_keys_missing"


def test_engines_of_strangers_are_refused_before_anything_is_written(
    archive: bytes, tmp_path: Path
) -> None:
    stranger = EngineCache(tmp_path / "x", 1 << 30, keyring=Keyring({"k1": b"x" * 32}))
    with pytest.raises(PipelineError, match="signature") as refused:
        taken(stranger, archive)
    assert refused.value.code == "engine_rejected"
    assert not (tmp_path / "x").exists()


def changed(archive: bytes, change: Callable[[tarfile.TarInfo, bytes], bytes | None]) -> bytes:
    """The archive with the content of its members changed, or the members left out."""
    result = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as before,
        tarfile.open(fileobj=result, mode="w") as after,
    ):
        for member in before:
            content = before.extractfile(member)
            data = change(member, content.read() if content else b"")
            if data is not None:
                member.size = len(data)
                after.addfile(member, io.BytesIO(data))
    return result.getvalue()


def flipped(member: tarfile.TarInfo, data: bytes) -> bytes:
    return b"C" + data[1:] if member.name.endswith("engine.bin") else data


def renamed(member: tarfile.TarInfo, data: bytes) -> bytes:
    member.name = member.name.replace("plans/bucket-1", "../../../outside")
    return data


def linked(member: tarfile.TarInfo, data: bytes) -> bytes:
    if member.name.endswith("engine.bin"):
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        return b""
    return data


CHANGES: dict[str, Callable[[tarfile.TarInfo, bytes], bytes | None]] = {
    "a flipped bit": flipped,
    "a file longer": lambda m, data: data + b"x" if m.name.endswith("engine.bin") else data,
    "a file missing": lambda m, data: None if m.name.endswith("bucket-1") else data,
    "a file outside": renamed,
    "a link": linked,
    "no manifest": lambda m, data: None if m.name.endswith("manifest.json") else data,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_file_is_refused(
    archive: bytes,
    there: EngineCache,
    tmp_path: Path,
    change: Callable[[tarfile.TarInfo, bytes], bytes | None],
) -> None:
    before = sorted(tmp_path.rglob("outside"))
    with pytest.raises(PipelineError) as refused:
        taken(there, changed(archive, change))
    assert refused.value.code == "engine_rejected"
    assert entries(there) == []
    assert sorted(tmp_path.rglob("outside")) == before


@pytest.mark.parametrize("part", [0.0, 0.2, 0.7])
def test_a_file_that_ends_too_early_is_refused(
    archive: bytes, there: EngineCache, part: float
) -> None:
    cut = archive[: int(len(archive) * part)]
    with pytest.raises(PipelineError) as refused:
        taken(there, cut)
    assert refused.value.code == "engine_rejected"
    assert set(entries(there)) < set(KEYS)
    assert all(there.disk.verify(key, 0) is None for key in entries(there))


def test_what_is_no_tar_file_is_refused(there: EngineCache) -> None:
    with pytest.raises(PipelineError, match="tar file"):
        taken(there, b"something else" * 1000)


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "a,b"},
        {"GNU.sparse.size": "abc"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "x"},
    ],
    ids=" ".join,
)
def test_a_tar_header_that_makes_no_sense_is_refused(
    archive: bytes, there: EngineCache, headers: dict[str, str]
) -> None:
    result = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as before,
        tarfile.open(fileobj=result, mode="w", format=tarfile.PAX_FORMAT) as after,
    ):
        for member in before:
            member.pax_headers = headers
            after.addfile(member, before.extractfile(member))
    with pytest.raises(PipelineError) as refused:
        taken(there, result.getvalue())
    assert refused.value.code == "engine_rejected"
    assert entries(there) == []
