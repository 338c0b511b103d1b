"""Charts as SVG text: lines, stacked areas and bars, with axes. Colors come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TypeAlias

Points: TypeAlias = "Sequence[tuple[float, float | None]]"
"""(x, y) in ascending order of x; y is None if there is no value."""

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 34
COLORS = 8
"""Number of colors in the style."""


def short(value: float) -> str:
    """Return a number as an axis label: 1.5k, 20M, 0.25."""
    size = abs(value)
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= bound:
            return f"{value / bound:.4g}{letter}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from low to high."""
    span = high - low
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


class _Plane:
    """Scales from numbers to positions on the chart."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], *, from_zero: bool) -> None:
        self.x_low, self.x_high = _range(xs, pad=0.0)
        self.y_low, self.y_high = _range([*ys, *([0.0] if from_zero else [])], pad=0.05)
        if from_zero:
            self.y_low = 0.0

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_label: str, y_format: Callable[[float], str]) -> list[str]:
        parts = []
        for value in ticks(self.y_low, self.y_high):
            at = f"{self.y(value):.1f}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 6}" y="{at}" dy="0.32em" text-anchor="end">{y_format(value)}</text>'
            )
        for value in ticks(self.x_low, self.x_high, 6):
            parts.append(
                f'<text class="tick" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">'
                f"{short(value)}</text>"
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{x_label}</text>')
        return parts


def lines(
    series: Mapping[str, Points],
    *,
    x_label: str = "step",
    y_format: Callable[[float], str] = short,
    from_zero: bool = False,
) -> str:
    """Return a line chart of the series."""
    values = [(x, y) for points in series.values() for x, y in points if y is not None]
    if not values:
        return ""
    plane = _Plane([x for x, _ in values], [y for _, y in values], from_zero=from_zero)
    parts = plane.axes(x_label, y_format)
    for number, (name, points) in enumerate(series.items()):
        color = f"c{number % COLORS}"
        for run in _runs(points):
            path = " ".join(f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in run)
            parts.append(f'<polyline class="{color}" points="{path}"/>')
            # Mark every value if there is room, otherwise only the last.
            marked = run if len(run) <= 60 else run[-1:]
            parts += [
                f'<circle class="{color}" cx="{plane.x(x):.1f}" cy="{plane.y(y):.1f}" r="2.5">'
                f"<title>{escape(name)}, {x_label} {short(x)}: {y:.6g}</title></circle>"
                for x, y in marked
            ]
    return _svg(parts) + _legend(list(series))


def stacked(
    series: Mapping[str, Sequence[float]], xs: Sequence[float], *, y_format: Callable[[float], str] = short
) -> str:
    """Return a stacked area chart; every series has a value for each x."""
    if not xs or not series:
        return ""
    if len(xs) == 1:
        xs, series = [xs[0] - 1, xs[0]], {name: [values[0]] * 2 for name, values in series.items()}
    totals = [sum(values[at] for values in series.values()) for at in range(len(xs))]
    plane = _Plane(xs, totals, from_zero=True)
    parts = plane.axes("step", y_format)
    below = [0.0] * len(xs)
    for number, (name, values) in enumerate(series.items()):
        above = [low + value for low, value in zip(below, values, strict=True)]
        top = [f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in zip(xs, above, strict=True)]
        bottom = [f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in zip(xs, below, strict=True)]
        mean = sum(values) / len(values)
        parts.append(
            f'<polygon class="c{number % COLORS}" points="{" ".join([*top, *reversed(bottom)])}">'
            f"<title>{escape(name)}: {y_format(mean)} on average</title></polygon>"
        )
        below = above
    return _svg(parts) + _legend(list(series))


def bars(values: Mapping[str, float], *, unit: str) -> str:
    """Return a bar chart of the values."""
    if not values:
        return ""
    plane = _Plane([0.0, float(len(values))], list(values.values()), from_zero=True)
    parts = [part for part in plane.axes("", short) if "middle" not in part]
    wide = (WIDTH - LEFT - RIGHT) / len(values)
    every = max(1, math.ceil(len(values) / 12))
    for number, (name, value) in enumerate(values.items()):
        left, top = LEFT + number * wide, plane.y(value)
        parts.append(
            f'<rect class="c0" x="{left + 0.1 * wide:.1f}" y="{top:.1f}" width="{0.8 * wide:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{escape(name)}: {value:,.0f} {unit}</title></rect>'
        )
        if number % every == 0:
            parts.append(
                f'<text class="tick" x="{left + wide / 2:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">'
                f"{escape(name)}</text>"
            )
    return _svg(parts)


def _range(values: Sequence[float], *, pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        wide = abs(low) * 0.1 or 1.0
        return low - wide, high + wide
    return low - pad * (high - low), high + pad * (high - low)


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    """Split a series at missing values."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    entries = [f'<span><i class="c{n % COLORS}"></i>{escape(name)}</span>' for n, name in enumerate(names)]
    return f'<p class="legend">{"".join(entries)}</p>'
