"""What a check finds: of this machine, or of a server that the settings name. Asked by `headrace doctor`, and by
each process at its start (`preconditions.py`).

A check of a server raises Transient where the server does not answer, PipelineError where it refuses us.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Level = Literal["ok", "warn", "fail"]

SKEW_NOTED_S = 2.0
SKEW_BORNE_S = 60.0
"""Beyond it deadlines and retention are wrong by more than anybody would notice for themselves."""


class Finding(Struct, frozen=True):
    """level fail: jobs would be lost, or nothing would work. remedy: what to do about it; empty if all is well."""

    check: str
    level: Level
    detail: str
    remedy: str = ""


def clock_finding(check: str, skew_s: float, whose: str) -> Finding:
    """skew_s: how far the other clock is ahead of ours."""
    direction = "ahead of" if skew_s > 0 else "behind"
    if abs(skew_s) <= SKEW_NOTED_S:
        return Finding(check, "ok", f"{whose} agrees with ours to {max(0.1, abs(skew_s)):.1f} s")
    return Finding(
        check,
        "warn" if abs(skew_s) <= SKEW_BORNE_S else "fail",
        f"{whose} is {abs(skew_s):.0f} s {direction} ours",
        "Synchronise the clocks of both machines (NTP): deadlines and retention need it.",
    )
