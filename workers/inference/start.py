"""How long a start takes, step by step: of the worker's process, and of each model that it loads.

The steps follow one another without a gap, so that none is missing from the whole. Each goes to the log as it ends,
but those of loads after the start, which may be tried often; those of the process are in the worker's sign of life too.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from infra.logs import get_logger

logger = get_logger("worker.start")


class Steps:
    """seconds: by step, in the order they ended."""

    def __init__(
        self,
        model: str = "",
        *,
        age_s: float = 0.0,
        quiet: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """model: whose load this is, "" for the process's start. age_s: how long ago the first step began.
        quiet: in the log only at its finest."""
        self.model = model
        self.seconds: dict[str, float] = {}
        self._log = logger.debug if quiet else logger.info
        self._monotonic = monotonic
        self._began = self._ended = monotonic() - age_s

    @property
    def total_s(self) -> float:
        """From the begin of the first step to the end of the last."""
        return round(self._ended - self._began, 6)

    def ended(self, step: str) -> None:
        """Of the step that began when the one before ended."""
        now = self._monotonic()
        self.seconds[step] = round(now - self._ended, 6)
        self._ended = now
        about = {"model": self.model} if self.model else {}
        self._log("step", step=step, seconds=self.seconds[step], **about)

    def include(self, load: Steps) -> None:
        """The steps of a model's load, which has just ended."""
        for step, seconds in load.seconds.items():
            self.seconds[f"{load.model} {step}"] = seconds
        self._ended = self._monotonic()
