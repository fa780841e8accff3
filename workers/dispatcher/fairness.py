"""Which lane goes next. Pure: state in, lane out.

Stride scheduling: each lane has a weight, and work moves its clock on by cost over weight; the lane whose
clock is furthest behind goes next. So every lane with work gets its share, and none can be starved.
"""

from __future__ import annotations

from collections.abc import Collection

from schemas.topics import Lane

WEIGHTS: dict[Lane, float] = {"premium": 8, "standard": 4, "basic": 2, "bulk": 1}


class LaneClock:
    def __init__(self, weights: dict[Lane, float] = WEIGHTS) -> None:
        self._weights = weights
        self._clocks: dict[Lane, float] = dict.fromkeys(weights, 0.0)
        self._now = 0.0

    def pick(self, waiting: Collection[Lane]) -> Lane | None:
        """The lane to serve next among those with work; the heavier one on a tie."""
        if not waiting:
            return None
        return min(waiting, key=lambda lane: (self._at(lane), -self._weights[lane]))

    def charge(self, lane: Lane, cost: float) -> None:
        """Record that this lane was served. A lane that was idle starts from now: credit is not saved up."""
        start = self._at(lane)
        self._now = start
        self._clocks[lane] = start + cost / self._weights[lane]

    def _at(self, lane: Lane) -> float:
        return max(self._clocks[lane], self._now)
