from __future__ import annotations

import hashlib
import hmac

import pytest

from pipelines.engines.signing import UNSIGNED, Keyring, Signature

OLD, NEW = b"o" * 32, b"n" * 32
CONTENT = b'{"key": "abc"}'


def test_what_was_signed_is_believed_and_nothing_else() -> None:
    keyring = Keyring({"old": OLD})
    signature = keyring.sign(CONTENT)
    assert signature.key_id == "old"
    assert keyring.fault(CONTENT, signature) is None
    for position in range(len(CONTENT) * 8):
        flipped = bytearray(CONTENT)
        flipped[position // 8] ^= 1 << position % 8
        assert keyring.fault(bytes(flipped), signature)


def test_another_key_under_the_same_id_is_not_believed() -> None:
    fault = Keyring({"a": OLD}).fault(CONTENT, Keyring({"a": NEW}).sign(CONTENT))
    assert fault == "its signature is not that of its content"


def test_keys_are_rotated() -> None:
    before, during, after = (
        Keyring({"old": OLD}),
        Keyring({"new": NEW, "old": OLD}),
        Keyring({"new": NEW}),
    )
    by_old, by_new = before.sign(CONTENT), during.sign(CONTENT)
    assert (by_old.key_id, by_new.key_id) == ("old", "new")
    assert during.fault(CONTENT, by_old) is None
    assert after.fault(CONTENT, by_new) is None
    assert after.fault(CONTENT, by_old) == "it is signed by the key 'old', which is not known here"


def test_who_has_keys_takes_nothing_unsigned() -> None:
    unsigned = Keyring().sign(CONTENT)
    assert Keyring().fault(CONTENT, unsigned) is None
    assert Keyring({"a": OLD}).fault(CONTENT, unsigned) == "it is not signed"


def test_who_has_no_keys_takes_nothing_signed() -> None:
    assert "not known here" in (Keyring().fault(CONTENT, Keyring({"a": OLD}).sign(CONTENT)) or "")


@pytest.mark.parametrize("keyring", [Keyring(), Keyring({"a": OLD})], ids=["checksum", "key"])
@pytest.mark.parametrize("mac", ["", "0" * 64, "\N{SNOWMAN}", "ß" * 64])
def test_a_mac_that_is_none_is_refused(keyring: Keyring, mac: str) -> None:
    key_id = keyring.sign(CONTENT).key_id
    assert keyring.fault(CONTENT, Signature(key_id, mac))


def test_a_signature_of_the_same_bytes_for_another_purpose_is_none() -> None:
    plain = hmac.digest(OLD, CONTENT, "sha256").hex()
    assert Keyring({"a": OLD}).fault(CONTENT, Signature("a", plain))
    checksum = hashlib.sha256(CONTENT).hexdigest()
    assert Keyring().fault(CONTENT, Signature(UNSIGNED, checksum))
