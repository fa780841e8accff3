"""A bar chart as SVG: groups of bars on a logarithmic axis of milliseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from bench.figures import rounded

WIDTH, LEFT, RIGHT, TOP, FOOT = 960, 290, 90, 56, 24
BAR, GAP = 12, 12
COLOURS = ("#b3401f", "#d9922e", "#2f6f9f", "#4c9a5b")
DECADES = range(-1, 6)


def bars(groups: Mapping[str, Sequence[tuple[str, float]]], kinds: Sequence[str]) -> str:
    """groups: by name, bars of a kind and their milliseconds. kinds: of bars, in the order of the legend."""
    heights = [len(group) * BAR + GAP for group in groups.values()]
    height = TOP + sum(heights) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *_legend(kinds),
        *_axis(height - FOOT),
    ]
    top = TOP
    for (name, group), tall in zip(groups.items(), heights, strict=True):
        middle = top + (tall - GAP) / 2
        parts.append(_text(LEFT - 8, middle + 4, name, "end"))
        for at, (kind, ms) in enumerate(group):
            parts += _bar(top + at * BAR, COLOURS[kinds.index(kind)], ms)
        top += tall
    return "\n".join([*parts, "</svg>", ""])


def _x(ms: float) -> float:
    """Where on the axis; less than its begin is at its begin."""
    share = (math.log10(max(ms, 10.0 ** DECADES[0])) - DECADES[0]) / (DECADES[-1] - DECADES[0])
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _bar(top: float, colour: str, ms: float) -> list[str]:
    wide = _x(ms) - LEFT
    return [
        f'<rect x="{LEFT}" y="{top}" width="{wide:.1f}" height="{BAR - 1}" fill="{colour}"/>',
        _text(LEFT + wide + 4, top + 10, f"{rounded(ms)} ms"),
    ]


def _legend(kinds: Sequence[str]) -> list[str]:
    parts = []
    for at, kind in enumerate(kinds):
        x = LEFT + at * 130
        parts.append(f'<rect x="{x}" y="10" width="11" height="11" fill="{COLOURS[at]}"/>')
        parts.append(_text(x + 16, 20, kind))
    return parts


def _axis(bottom: float) -> list[str]:
    parts = []
    for decade in DECADES:
        x = _x(10.0**decade)
        parts.append(f'<path d="M{x:.1f} {TOP - 8}V{bottom}" stroke="#dddddd"/>')
        parts.append(_text(x, TOP - 12, f"{10.0**decade:g} ms", "middle"))
    return parts


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
