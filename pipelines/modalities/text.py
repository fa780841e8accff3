"""Text steps: from a payload's bytes to token ids, and from a sentence's vector to the nearest of
a few labels."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from pipelines.bundle import Bundle
from pipelines.modalities import postprocess_step, preprocess_step
from pipelines.modalities.answers import classification, output_vector, softmax_of
from schemas.errors import InvalidJob, InvalidModel

if TYPE_CHECKING:
    from pipelines.model import LoadedModel

Row = dict[str, NDArray[Any]]
TokenPart = Literal["ids", "mask", "types"]

_MARKS_LIMIT = 30
"""Combining marks in a row, as in the Stream-Safe Text Format of UAX #15. Sorting them takes time
by the square of their number: 1 MiB of them would hold the interpreter for minutes."""
_MARKS = re.compile(rb"[^\0]{%d}" % (_MARKS_LIMIT + 1))


@preprocess_step("decode_text")
def decode_text(
    bundle: Bundle,
    max_bytes: Annotated[int, Meta(ge=1)] = 1024 * 1024,
    max_chars: Annotated[int, Meta(ge=1)] | None = None,
) -> Callable[[bytes], str]:
    """UTF-8 bytes to text in NFC, without a byte order mark."""

    def decode(data: bytes) -> str:
        if not data:
            raise InvalidJob("payload_empty", "Expected text, came 0 bytes.")
        if len(data) > max_bytes:
            raise _too_long(f"{max_bytes} bytes", len(data))
        text = _utf8(data)
        if "\0" in text:
            raise InvalidJob(
                "text_has_nul",
                f"Expected text without NUL, came one at character {text.find(chr(0))}; drop it.",
            )
        if not text.strip():
            raise InvalidJob("text_empty", "Expected text, came white space alone.")
        if max_chars is not None and len(text) > max_chars:
            raise _too_long(f"{max_chars} characters", len(text))
        return text if text.isascii() else _composed(text)

    return decode


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidJob(
            "text_not_utf8",
            f"Expected UTF-8, came 0x{data[error.start]:02x} at byte {error.start}"
            f" ({error.reason}); encode it anew.",
        ) from error


def _composed(text: str) -> str:
    if _MARKS.search(bytes(map(unicodedata.combining, text))):
        raise InvalidJob(
            "text_marks",
            f"Expected at most {_MARKS_LIMIT} combining marks in a row, came more; remove some.",
        )
    return unicodedata.normalize("NFC", text)


def _too_long(limit: str, came: int) -> InvalidJob:
    return InvalidJob("text_too_long", f"Expected at most {limit}, came {came}; send it in parts.")


@preprocess_step("tokenize")
def tokenize(
    bundle: Bundle,
    max_tokens: Annotated[int, Meta(ge=1)],
    truncate: bool = True,
    inputs: dict[str, TokenPart] | None = None,
) -> Callable[[str], Row]:
    """Text to int64[tokens] rows, of different lengths, by the bundle's `tokenizer`.

    max_tokens: with the special ones. inputs: which engine input takes what; by default
    {input_ids: ids, attention_mask: mask}.
    """
    tokenizer = load_tokenizer(bundle)
    tokenizer.no_padding()
    if truncate:
        tokenizer.enable_truncation(max_tokens)
    else:
        tokenizer.no_truncation()
    takes: dict[str, TokenPart] = inputs or {"input_ids": "ids", "attention_mask": "mask"}

    def encode(text: str) -> Row:
        encoding = _beginning(tokenizer, text, max_tokens)
        if len(encoding.ids) > max_tokens:
            raise _too_long(f"{max_tokens} tokens", len(encoding.ids))
        if not encoding.ids:
            raise InvalidJob("text_empty", "Expected text, came none that the tokenizer knows.")
        parts: dict[TokenPart, list[int]] = {
            "ids": encoding.ids,
            "mask": encoding.attention_mask,
            "types": encoding.type_ids,
        }
        return {name: np.array(parts[part], np.int64) for name, part in takes.items()}

    return encode


def _beginning(tokenizer: Any, text: str, max_tokens: int) -> Any:
    """The encoding of as much of a text as `max_tokens` can be about.

    A MiB of text takes seconds, so no more than needed is encoded. One text at a time:
    encode_batch would start threads of its own beside the worker's.
    """
    for chars in (32 * max_tokens, 512 * max_tokens):
        if chars < len(text):
            encoding = tokenizer.encode(text[:chars])
            if encoding.overflowing or len(encoding.ids) > max_tokens:
                return encoding
    return tokenizer.encode(text)


def load_tokenizer(bundle: Bundle) -> Any:
    """A `tokenizers.Tokenizer` of the bundle's file. Raises InvalidModel."""
    from tokenizers import Tokenizer  # not needed by a text model that has a step of its own

    if bundle.config.tokenizer is None:
        raise InvalidModel(
            "model_step_invalid", "expected `tokenizer: tokenizer.json` in model.yaml for this step"
        )
    path = bundle.path(bundle.config.tokenizer)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InvalidModel(
            "model_tokenizer_invalid", f"{path}: expected a tokenizer.json, came: {error}"
        ) from error


@postprocess_step("nearest_label")
class NearestLabel:
    """Classify a sentence by the label whose phrases mean nearly the same: cosines of the
    sentence's vector with each label's mean vector, made probabilities by softmax."""

    def __init__(
        self,
        bundle: Bundle,
        output: str,
        labels: dict[str, Annotated[list[str], Meta(min_length=1)]],
        temperature: Annotated[float, Meta(gt=0)] = 0.05,
    ) -> None:
        self._output = output
        self._phrases = labels
        self._temperature = temperature
        self._vectors: NDArray[np.float64] = np.empty((0, 0))

    def prepare(self, model: LoadedModel) -> None:
        """Embed the phrases by the model itself."""
        means = []
        for phrases in self._phrases.values():
            rows = [model.decode(phrase.encode(), "text/plain", {}) for phrase in phrases]
            means.append(sum(self._unit(row) for row in model.infer(rows)))
        self._vectors = np.stack([mean / np.linalg.norm(mean) for mean in means])

    def __call__(self, row: Row) -> dict[str, Any]:
        cosines = self._vectors @ self._unit(row)
        return classification(softmax_of(cosines / self._temperature), list(self._phrases))

    def _unit(self, row: Row) -> NDArray[np.float64]:
        vector = output_vector(row, self._output).astype(np.float64)
        return vector / max(float(np.linalg.norm(vector)), 1e-12)
