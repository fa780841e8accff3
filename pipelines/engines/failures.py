"""Builds that failed for good, remembered for a while with their log, so that nobody repeats them."""

from __future__ import annotations

from msgspec import Struct

from schemas.errors import InvalidModel


class Failure(Struct, frozen=True):
    """at: seconds since the epoch, by the clock of who tried. log: the builder's."""

    code: str
    message: str
    at: float
    label: str = ""
    log: str = ""

    def left_s(self, now: float, memory_s: float) -> float:
        """How much longer it counts. One that lies in the future, by a clock that went back, does not."""
        age_s = now - self.at
        return memory_s - age_s if age_s >= 0 else 0.0

    def again(self, left_s: float) -> InvalidModel:
        return InvalidModel(
            self.code,
            f"{self.message} (The build failed a moment ago; it is not tried again for "
            f"{left_s:.0f} s, unless forced.)",
        )
