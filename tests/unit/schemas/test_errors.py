"""The error tree."""

from __future__ import annotations

import copy

from schemas.errors import InvalidJob


def test_an_error_comes_whole_out_of_a_pool_of_processes() -> None:
    again = copy.copy(InvalidJob("payload_empty", "0 bytes came."))  # by the same way as pickle

    assert (type(again), again.code, again.message) == (
        InvalidJob, "payload_empty", "0 bytes came.",
    )  # fmt: skip
