from __future__ import annotations

import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.bundle import Bundle
from pipelines.modalities.text import decode_text, load_tokenizer, tokenize
from schemas.errors import InvalidJob, InvalidModel

MakeBundle = Callable[..., Bundle]


@pytest.fixture
def decode(make_bundle: MakeBundle) -> Callable[[bytes], str]:
    return decode_text(make_bundle())


@pytest.fixture
def bundle(make_bundle: MakeBundle, tokenizer_json: Path) -> Bundle:
    return make_bundle(more=f"tokenizer: {tokenizer_json.name}")


def refusal(step: Callable[[bytes], str], data: bytes) -> InvalidJob:
    with pytest.raises(InvalidJob) as caught:
        step(data)
    return caught.value


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "payload_empty"),
        (b" \t\n\xc2\xa0\xe3\x80\x80", "text_empty"),
        (b"\xef\xbb\xbf", "text_empty"),
        (b"a\0b", "text_has_nul"),
        (b"caf\xe9", "text_not_utf8"),
        ("\ud800".encode("utf-8", "surrogatepass"), "text_not_utf8"),
        ("a\udfff".encode("utf-8", "surrogatepass"), "text_not_utf8"),
        ("text".encode("utf-16"), "text_not_utf8"),
        (b"\xc0\x80", "text_not_utf8"),
        (b"\xf4\x90\x80\x80", "text_not_utf8"),
        (b"a" * 10 * 1024 * 1024, "text_too_long"),
    ],
)
def test_text_that_is_refused(decode: Callable[[bytes], str], data: bytes, code: str) -> None:
    assert refusal(decode, data).code == code


def test_the_place_of_a_wrong_byte_is_named(decode: Callable[[bytes], str]) -> None:
    assert "0xe9 at byte 3" in refusal(decode, b"caf\xe9").message


def test_text_is_composed_and_loses_its_byte_order_mark(decode: Callable[[bytes], str]) -> None:
    assert decode("\ufeffcafe\u0301 ﬁ 한".encode()) == "café ﬁ 한"


@pytest.mark.parametrize("text", ["hello", "x\u0301\u0323", "👩‍👩‍👧 é", "a" + "\u0301" * 30])
def test_other_text_is_kept_but_for_its_form(decode: Callable[[bytes], str], text: str) -> None:
    assert decode(text.encode()) == unicodedata.normalize("NFC", text)


def test_marks_that_would_take_minutes_to_sort_are_refused(
    decode: Callable[[bytes], str],
) -> None:
    text = "a" + "\u0315" * 200_000 + "\u0316" * 200_000
    assert refusal(decode, text.encode()).code == "text_marks"


def test_lengths_are_limited_in_bytes_and_in_characters(make_bundle: MakeBundle) -> None:
    step = decode_text(make_bundle(), max_bytes=6, max_chars=4)
    assert step("ééé".encode()) == "ééé"
    assert refusal(step, "éééé".encode()).code == "text_too_long"
    assert "4 characters, came 5" in refusal(step, b"abcde").message


def test_tokens_are_neither_padded_nor_too_many(bundle: Bundle) -> None:
    row = tokenize(bundle, max_tokens=4)("a b c")
    assert {name: array.tolist() for name, array in row.items()} == {
        "input_ids": [2, 4, 5, 3],
        "attention_mask": [1, 1, 1, 1],
    }
    assert row["input_ids"].dtype == np.int64


def test_without_truncation_long_text_is_refused(bundle: Bundle) -> None:
    step = tokenize(bundle, max_tokens=4, truncate=False)
    assert len(step("a b")["input_ids"]) == 4
    with pytest.raises(InvalidJob, match="at most 4 tokens, came 5") as caught:
        step("a b c")
    assert caught.value.code == "text_too_long"


@pytest.mark.parametrize(
    "text", ["a b c " * 5000, "a" * 5000 + " a b c d", " " * 5000 + "a b c a b", "a" * 5000]
)
def test_of_a_long_text_the_same_tokens_come_as_if_all_of_it_were_encoded(
    bundle: Bundle, text: str
) -> None:
    whole = load_tokenizer(bundle)
    whole.no_padding()
    whole.enable_truncation(8)
    assert tokenize(bundle, max_tokens=8)(text)["input_ids"].tolist() == whole.encode(text).ids


def test_inputs_can_have_other_names(bundle: Bundle) -> None:
    step = tokenize(bundle, max_tokens=8, inputs={"ids": "ids", "kinds": "types"})
    assert {name: array.tolist() for name, array in step("a").items()} == {
        "ids": [2, 4, 3],
        "kinds": [0, 0, 0],
    }


def test_one_tokenizer_serves_several_threads(bundle: Bundle) -> None:
    step = tokenize(bundle, max_tokens=64)
    with ThreadPoolExecutor(4) as pool:
        lengths = pool.map(lambda n: len(step("a " * n)["input_ids"]), range(1, 60))
    assert list(lengths) == [n + 2 for n in range(1, 60)]


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", "no json"])
def test_a_tokenizer_that_is_none_is_refused(
    bundle: Bundle, tokenizer_json: Path, content: str
) -> None:
    tokenizer_json.write_text(content)
    with pytest.raises(InvalidModel, match=r"expected a tokenizer\.json") as caught:
        tokenize(bundle, max_tokens=8)
    assert caught.value.code == "model_tokenizer_invalid"
