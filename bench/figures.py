"""A figure: what was asked, what came, on what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import quantiles
from typing import Any, Literal

from msgspec import Struct

Effort = Literal["quick", "usual", "long"]
"""quick: fewer and shorter rounds, rough figures. long: what takes too long for every time."""


class Asked(Struct, frozen=True):
    """A bound. aim: the better value that is hoped for, None where there is none."""

    sign: Literal["<=", ">="]
    value: float
    aim: float | None = None

    def met_by(self, measured: float) -> bool:
        return measured <= self.value if self.sign == "<=" else measured >= self.value


class Figure(Struct, frozen=True, kw_only=True):
    """One line of the table. on: the kind of deployment. asked: None where a figure is for information.
    details: for --json."""

    name: str
    on: str = ""
    measured: float
    unit: str = ""
    asked: Asked | None = None
    note: str = ""
    details: dict[str, Any] = {}

    @property
    def verdict(self) -> Literal["ok", "short", ""]:
        if self.asked is None:
            return ""
        return "ok" if self.asked.met_by(self.measured) else "short"

    def row(self) -> tuple[str, str, str, str, str, str]:
        """Name, on, asked, measured, verdict and note, as text."""
        measured = self._with_unit(self.measured)
        return self.name, self.on, self._asked(), measured, self.verdict, self.note

    def _asked(self) -> str:
        if self.asked is None:
            return ""
        bound = f"{self.asked.sign} {self._with_unit(self.asked.value)}"
        return bound if self.asked.aim is None else f"{bound} (aim {rounded(self.asked.aim)})"

    def _with_unit(self, value: float) -> str:
        return f"{rounded(value)} {self.unit}".rstrip()


def rounded(value: float) -> str:
    """Three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(values: Iterable[float]) -> str:
    return " ".join(map(rounded, values))


def p50_p99(values: Sequence[float]) -> tuple[float, float]:
    cuts = quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]
