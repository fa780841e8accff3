from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.engines import machine_cache
from pipelines.engines.machine_cache import MachineCache
from pipelines.engines.signing import Keyring

KERNELS = b"first\nsecond"


def stored(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


@pytest.mark.parametrize("keyring", [Keyring(), Keyring({"k1": b"k" * 32})])
def test_what_was_written_is_read_where_all_parts_are_the_same(
    tmp_path: Path, keyring: Keyring
) -> None:
    cache = MachineCache(tmp_path / "machine", keyring)
    assert cache.entry("kernels", "1.7", 89).read() == b""
    cache.entry("kernels", "1.7", 89).write(KERNELS)
    assert cache.entry("kernels", "1.7", 89).read() == KERNELS
    assert cache.entry("kernels", "1.8", 89).read() == b""
    assert stored(cache.folder).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("byte", [0, 3, 40, -1])
def test_a_flipped_bit_is_found(tmp_path: Path, byte: int) -> None:
    entry = MachineCache(tmp_path).entry("kernels")
    entry.write(KERNELS)
    content = bytearray(stored(tmp_path).read_bytes())
    content[byte] ^= 1
    stored(tmp_path).write_bytes(content)
    assert entry.read() == b""


def test_with_keys_what_none_of_them_signed_is_not_believed(tmp_path: Path) -> None:
    signed = MachineCache(tmp_path, Keyring({"k1": b"k" * 32})).entry("kernels")
    for other in (Keyring(), Keyring({"k1": b"o" * 32}), Keyring({"k2": b"k" * 32})):
        MachineCache(tmp_path, other).entry("kernels").write(KERNELS)
        assert signed.read() == b""


def test_what_was_learnt_of_models_that_are_gone_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_cache, "_MOST_BYTES", 600)
    first, second, third = (MachineCache(tmp_path).entry("kernels", n) for n in range(3))
    for age, entry in enumerate((second, first)):
        entry.write(bytes(100))
        os.utime(entry._path, (age, age))
    assert second.read(), "so it is the other one that was not used for longest"
    third.write(bytes(300))
    assert [bool(entry.read()) for entry in (first, second, third)] == [False, True, True]
