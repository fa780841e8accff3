"""When jobs are tried again that wait for what their model lacks, such as an engine. Pure, on a clock handed in.

A job that waits is tried again after a share of the time it has waited, so that it asks seldom. Of a crowd that waits
for one model each takes its turn. When the model answers again they go at once, few at first and twice as many each
time, and few again as soon as anything is found lacking: where one worker has what another lacks, jobs would otherwise
go to and fro between the log and the worker that lacks it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

WAIT_MIN_S = 2.0
WAIT_SHARE = 0.1
WAIT_MOST_S = 60.0

TURNS_PER_S = 250.0
"""For each model: a try is a record, and a place in a batch."""

RELEASE_FIRST = 32
RELEASE_MOST = 1 << 20

FORGET_S = 300.0
"""After the last time it lacked something."""


@dataclass(slots=True)
class _Model:
    """missed, answered: since the last release. release: how many may go then."""

    turn_at: float = 0.0
    missed_at: float = 0.0
    missed: bool = False
    answered: bool = False
    release: int = RELEASE_FIRST


class Waiting:
    """Models are `name/version`. Remembers those that lacked something lately."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._models: dict[str, _Model] = {}

    def missed(self, model: str, submitted_at: float, now: float) -> float:
        """A job found something lacking. Returns when it is tried again, which is never at once: it is not charged."""
        state = self._models.setdefault(model, _Model())
        state.missed, state.missed_at = True, now
        # Bounded on both sides, or a clock that was put back would have them wait for what it lost.
        state.turn_at = max(now, min(state.turn_at + 1 / TURNS_PER_S, now + WAIT_MOST_S))
        most_s = max(WAIT_MIN_S, min(WAIT_MOST_S, WAIT_SHARE * (now - submitted_at)))
        return max(state.turn_at, now + self._rng.uniform(most_s / 2, most_s))

    def waits(self, model: str, now: float) -> None:
        """A job is there that found something lacking before, maybe in another life."""
        self._models.setdefault(model, _Model(missed_at=now))

    def answered(self, model: str) -> None:
        if state := self._models.get(model):
            state.answered = True

    def release(self, now: float) -> dict[str, int]:
        """How many jobs of each model need wait no longer. Call it now and then."""
        released: dict[str, int] = {}
        for model, state in list(self._models.items()):
            if state.missed:
                state.release = RELEASE_FIRST
            elif state.answered:
                released[model] = state.release
                state.release = min(2 * state.release, RELEASE_MOST)
            if state.answered:  # somebody has it: who comes next need not queue behind the crowd
                state.turn_at = now
            if not state.missed and now - state.missed_at > FORGET_S:
                del self._models[model]
            state.missed = state.answered = False
        return released
