"""What an entry must prove before it is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipelines.engines import manifest
from pipelines.engines.manifest import (
    ARTEFACT,
    MANIFEST,
    BuildNote,
    Rejected,
    check,
    finish,
    key_of,
    open_manifest,
    seal,
)
from pipelines.engines.signing import Keyring

PARTS: dict[str, object] = {"model": "abc", "version": 1}
KEY = key_of(PARTS)
KEYRINGS = {"unsigned": Keyring(), "signed": Keyring({"k1": b"s" * 32})}


@pytest.fixture(params=KEYRINGS.values(), ids=KEYRINGS.keys())
def keyring(request: pytest.FixtureRequest) -> Keyring:
    assert isinstance(request.param, Keyring)
    return request.param


@pytest.fixture
def entry(tmp_path: Path, keyring: Keyring) -> Path:
    (tmp_path / ARTEFACT / "plans").mkdir(parents=True)
    (tmp_path / ARTEFACT / "engine.bin").write_bytes(bytes(range(100)))
    (tmp_path / ARTEFACT / "plans" / "empty").write_bytes(b"")
    seal(tmp_path, PARTS, keyring, "model/1", BuildNote(log="built"))
    return tmp_path


def test_a_sealed_entry_is_served(entry: Path, keyring: Keyring) -> None:
    found = check(entry, KEY, keyring)
    assert found == check(entry, KEY, keyring, full=True)
    assert (found.key, found.key_parts, found.label) == (KEY, PARTS, "model/1")
    assert sorted(found.files) == ["artefact/engine.bin", "artefact/plans/empty"]
    assert found.size_bytes == 100
    assert found.build.log == "built"


def test_no_bit_of_the_manifest_can_be_flipped(entry: Path, keyring: Keyring) -> None:
    signed = (entry / MANIFEST).read_bytes()
    open_manifest(signed, KEY, keyring)
    for position in range(len(signed) * 8):
        flipped = bytearray(signed)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(Rejected):
            open_manifest(bytes(flipped), KEY, keyring)


def test_no_part_of_a_manifest_is_one(entry: Path, keyring: Keyring) -> None:
    signed = (entry / MANIFEST).read_bytes()
    for length in range(len(signed)):
        with pytest.raises(Rejected):
            open_manifest(signed[:length], KEY, keyring)


def test_a_flipped_bit_in_any_piece_is_found(
    entry: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "PIECE_BYTES", 33)
    seal(entry, PARTS, keyring, "", BuildNote())
    assert len(check(entry, KEY, keyring).files["artefact/engine.bin"].sha256) == 4
    path = entry / ARTEFACT / "engine.bin"
    for position in (0, 40, 99):
        content = bytearray(bytes(range(100)))
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(Rejected, match=r"engine\.bin"):
            check(entry, KEY, keyring)
    path.write_bytes(bytes(range(100)))
    check(entry, KEY, keyring)


def test_the_manifest_of_another_key_is_refused(entry: Path, keyring: Keyring) -> None:
    other = key_of({"model": "other"})
    with pytest.raises(Rejected, match=f"expected the manifest of {other}, found that of {KEY}"):
        check(entry, other, keyring)


def signed_by(keyring: Keyring, **changes: Any) -> bytes:
    """The manifest of an honest signer, with what it should never have signed."""
    content = msgspec.json.encode(
        {"key": KEY, "key_parts": PARTS, "label": "", "files": {}, "build": {}} | changes
    )
    signature = msgspec.to_builtins(keyring.sign(content))
    return msgspec.json.encode({"signature": signature, "manifest": msgspec.Raw(content)})


def test_a_manifest_that_claims_a_key_must_have_its_parts(keyring: Keyring) -> None:
    open_manifest(signed_by(keyring), KEY, keyring)
    with pytest.raises(Rejected, match="expected the manifest of"):
        open_manifest(signed_by(keyring, key_parts={"model": "other"}), KEY, keyring)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "/etc/passwd",
            "../x",
            "artefact/../../x",
            "artefact",
            "manifest.json",
            "artefact//x",
            "",
        ),
        "artefact/nul\0",
    ],
)
def test_a_manifest_names_files_of_its_artefact_alone(keyring: Keyring, name: str) -> None:
    files = {name: {"size_bytes": 0, "sha256": []}}
    with pytest.raises(Rejected, match="expected files of the artefact"):
        open_manifest(signed_by(keyring, files=files), KEY, keyring)


@pytest.mark.parametrize(
    "file",
    [
        {"size_bytes": 2 * manifest.PIECE_BYTES, "sha256": ["a" * 64]},
        {"size_bytes": 5, "sha256": []},
        {"size_bytes": 0, "sha256": ["a" * 64]},
        {"size_bytes": -1, "sha256": []},
    ],
)
def test_a_manifest_vouches_for_every_piece(keyring: Keyring, file: dict[str, Any]) -> None:
    """Else what it says nothing of would be whatever comes."""
    with pytest.raises(Rejected, match="a SHA-256 for each"):
        open_manifest(signed_by(keyring, files={"artefact/x": file}), KEY, keyring)


@pytest.mark.parametrize("start", ["", '{"signature":{"key_id":"","mac":""},"manifest":'])
def test_what_is_nested_too_deeply_is_refused(keyring: Keyring, start: str) -> None:
    with pytest.raises(Rejected, match="unreadable"):
        open_manifest(start.encode() + b"[" * 100_000, KEY, keyring)


def test_what_was_fetched_is_compared_again_when_the_machine_has_started_anew(
    entry: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for until it is on disk, so a power cut may have taken some of it."""
    monkeypatch.setattr(manifest, "_boot", lambda: "this run")
    with monkeypatch.context() as patched:
        patched.setattr(manifest.os, "fsync", lambda fd: pytest.fail("it is waited for"))
        finish(entry, (entry / MANIFEST).read_bytes(), durable=False)
    hashed: list[str] = []
    sha256_of = manifest.sha256_of
    monkeypatch.setattr(
        manifest, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path)
    )
    check(entry, KEY, keyring)
    assert hashed == []
    for boot in ("the next run", "the run after that"):
        monkeypatch.setattr(manifest, "_boot", lambda boot=boot: boot)
        check(entry, KEY, keyring)
        assert sorted(hashed) == ["empty", "engine.bin"], "compared once, and now on disk for good"


def test_where_the_system_tells_no_start_what_was_fetched_is_waited_for(
    entry: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(manifest, "_boot", lambda: None)
    monkeypatch.setattr(manifest.os, "fsync", synced.append)
    finish(entry, (entry / MANIFEST).read_bytes(), durable=False)
    assert len(synced) == 3, "two files and the manifest"


def test_who_has_keys_refuses_what_was_accepted_without(entry: Path, keyring: Keyring) -> None:
    stricter = Keyring({"k2": b"t" * 32})
    with pytest.raises(Rejected, match="not to be believed"):
        check(entry, KEY, stricter)


def test_what_a_later_version_adds_is_ignored(keyring: Keyring) -> None:
    open_manifest(signed_by(keyring, more={"a": 1}), KEY, keyring)


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    "damage",
    [
        lambda accepted: accepted.unlink(),
        lambda accepted: accepted.write_bytes(b""),
        lambda accepted: accepted.write_bytes(b"[]"),
        lambda accepted: accepted.write_bytes(b'{"artefact/engine.bin": [1, 2, 3, 4]}'),
    ],
    ids=["gone", "empty", "another type", "other stamps"],
)
def test_without_a_note_of_acceptance_the_files_are_compared(
    entry: Path, keyring: Keyring, damage: Damage
) -> None:
    damage(entry / "accepted.json")
    check(entry, KEY, keyring)
    flipped = bytearray(bytes(range(100)))
    flipped[7] ^= 1
    (entry / ARTEFACT / "engine.bin").write_bytes(flipped)
    damage(entry / "accepted.json")
    with pytest.raises(Rejected):
        check(entry, KEY, keyring)
