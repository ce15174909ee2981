"""Charts of the campaign report as inline SVG text: vector, no script, no external file.

Every function returns one ``<svg>`` with a title and a description for screen readers. Colours are CSS
classes (``c1`` .. ``c4``, ``grid``, ``axis``), so the page decides on light, dark and print. Coordinates have
one decimal: equal inputs give equal bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeGuard

MINUS = "\u2212"  # typographic minus, as wide as a plus
WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 68, 16, 14, 48
LONGEST_NAME = 36  # letters beside a value and its interval on a phone, where text is larger

# From this height of an axis on: what it counts in, and its name; no number on it has more than five letters.
UNITS = ((1e7, 1e6, "Users, millions"), (1e4, 1e3, "Users, thousands"), (0, 1, "Users"))


@dataclass(frozen=True)
class Series:
    """A named line or set of points; ``colour`` is a CSS class, ``dash`` an SVG dash pattern."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dash: str = ""


@dataclass(frozen=True)
class Whisker:
    """One estimate with its interval; ``is_strong`` marks the model in use.

    ``band`` shades ±band around zero: what the data cannot tell from zero.
    """

    name: str
    value: float
    lower: float
    upper: float
    colour: str
    is_strong: bool = False
    band: float = 0.0


def ticks(lower: float, upper: float, target: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten) inside ``[lower, upper]``."""
    if not upper > lower:
        return [lower]
    raw = (upper - lower) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if raw <= m * power * (1 + 1e-9))
    first = math.ceil(lower / step - 1e-9)
    last = math.floor(upper / step + 1e-9)
    return [round(n * step, 12) + 0.0 for n in range(first, last + 1)]


def wilson(share: float, rows: float, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share seen in ``rows`` independent rows (Wilson's form, valid near 0 and 1)."""
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return max(0.0, centre - half), min(1.0, centre + half)


def forest(
    ident: str,
    title: str,
    text: str,
    whiskers: Sequence[Whisker],
    *,
    signed: bool = False,
    axis: float | None = None,
) -> str:
    """Dot-and-whisker chart, one line per estimate, on a common axis.

    A line stands at ``axis``; ``signed`` values have it at 0.
    """
    axis = 0.0 if signed else axis
    values = [v for w in whiskers for v in (w.value, w.lower, w.upper)]
    values += [] if axis is None else [axis]
    values += [end for w in whiskers for end in (-w.band, w.band) if w.band]
    low, high = min(values), max(values)
    pad = (high - low) * 0.07 or 0.01
    low, high = low - pad, high + pad
    row_height, top = 50, 8
    height = top + row_height * len(whiskers) + 34
    floor = height - 30

    def x(value: float) -> float:
        return 14 + (value - low) / (high - low) * (WIDTH - 28)

    marks = ticks(low, high, 4)
    places = _decimals(marks)
    body = []
    for index, item in enumerate(whiskers):
        if item.band:
            left, right = x(-item.band), x(item.band)
            body.append(_rect(left, top + index * row_height + 23, right - left, 18, "band"))
    for mark in marks:
        body.append(_line(x(mark), top, x(mark), floor, "grid"))
        label = f"{mark:+.{places}f}" if signed and mark else f"{mark:.{places}f}"
        body.append(_text(x(mark), floor + 18, label.replace("-", MINUS), "tick", "middle"))
    if axis is not None:
        body.append(_line(x(axis), top, x(axis), floor, "axis"))
    for index, item in enumerate(whiskers):
        y = top + index * row_height
        form = "{:+.3f}" if signed else "{:.3f}"
        shown = [form.format(v).replace("-", MINUS) for v in (item.value, item.lower, item.upper)]
        weight = " strong" if item.is_strong else ""
        body.append(_text(14, y + 17, _short(item.name), f"label{weight}", "start"))
        body.append(
            _text(WIDTH - 14, y + 17, f"{shown[0]}  [{shown[1]}, {shown[2]}]", f"label{weight}", "end")
        )
        body.append(_line(x(item.lower), y + 32, x(item.upper), y + 32, f"{item.colour} whisker"))
        body += [
            _line(x(end), y + 27, x(end), y + 37, f"{item.colour} whisker")
            for end in (item.lower, item.upper)
        ]
        body.append(_dot(x(item.value), y + 32, 6, item.colour))
    return _svg(ident, title, text, body, height).replace('class="chart"', 'class="chart forest"', 1)


def reliability(
    ident: str,
    title: str,
    text: str,
    after: Sequence[tuple[float, float, float]],
    before: Sequence[tuple[float, float, float]] = (),
) -> str:
    """Predicted against observed rate per group of equal size, ``(predicted, observed, rows)``.

    Solid dots are calibrated, hollow ones are not; whiskers are Wilson intervals of the calibrated groups.
    """
    bounds = [wilson(observed, max(rows, 1.0)) for _, observed, rows in after]
    peak = max(
        [0.02, *(b[1] for b in bounds), *(v for p in (*after, *before) for v in p[:2])],
    )
    top = min(1.0, ticks(0, peak * 1.25, 5)[-1] or peak)
    top = top if top >= peak else min(1.0, peak * 1.05)
    frame = _Frame(0, top, 0, top)
    body = frame.grid("{:.0%}", "{:.0%}", "Predicted conversion probability", "Observed rate")
    body.append(_line(frame.x(0), frame.y(0), frame.x(top), frame.y(top), "ideal"))
    for predicted, observed, _ in before:
        body.append(_dot(frame.x(predicted), frame.y(observed), 4.5, "hollow"))
    for (predicted, _, _), (low, high) in zip(after, bounds, strict=True):
        body.append(
            _line(frame.x(predicted), frame.y(low), frame.x(predicted), frame.y(high), "c1 whisker thin")
        )
    for predicted, observed, _ in after:
        body.append(_dot(frame.x(predicted), frame.y(observed), 5, "c1"))
    return _svg(ident, title, text, body)


def lines(
    ident: str,
    title: str,
    text: str,
    series: Sequence[Series],
    *,
    labels: tuple[str, str],
    formats: tuple[str, str] = ("{:.0%}", "{:.0%}"),
    square: bool = False,
) -> str:
    """Line chart; ``square`` fixes both axes to 0..1 and draws the diagonal of a random order."""
    if square:
        frame = _Frame(0, 1, 0, 1)
    else:
        xs = [p[0] for s in series for p in s.points]
        ys = [p[1] for s in series for p in s.points]
        pad = (max(ys) - min(ys)) * 0.08 or 0.01
        frame = _Frame(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, min(ys) - pad, max(ys) + pad)
    body = frame.grid(*formats, *labels)
    if square:
        body.append(_line(frame.x(0), frame.y(0), frame.x(1), frame.y(1), "ideal"))
    for item in series:
        path = " ".join(f"{_n(frame.x(px))},{_n(frame.y(py))}" for px, py in item.points)
        dash = f' stroke-dasharray="{item.dash}"' if item.dash else ""
        body.append(f'<polyline class="curve {item.colour}" points="{path}"{dash}/>')
        if len(item.points) <= 12:
            body += [_dot(frame.x(px), frame.y(py), 3.2, item.colour) for px, py in item.points]
    return _svg(ident, title, text, body)


def histogram(
    ident: str,
    title: str,
    text: str,
    edges: Sequence[float],
    counts: Sequence[float],
    chosen: Sequence[float],
) -> str:
    """Bars of users per probability bin; the chosen part stands solid at the bottom of each bar."""
    top = max([*counts, 1]) * 1.05
    unit, name = next((unit, name) for least, unit, name in UNITS if top >= least)
    counts, chosen = [count / unit for count in counts], [count / unit for count in chosen]
    frame = _Frame(edges[0], edges[-1], 0, top / unit)
    body = frame.grid("{:.0%}", "{:,g}", "Conversion probability if mailed", name)
    for left, right, count, part in zip(edges[:-1], edges[1:], counts, chosen, strict=True):
        x, width = frame.x(left) + 0.6, max(frame.x(right) - frame.x(left) - 1.2, 0.8)
        if count > part:
            body.append(_rect(x, frame.y(count), width, frame.y(part) - frame.y(count), "rest"))
        if part:
            body.append(_rect(x, frame.y(part), width, frame.y(0) - frame.y(part), "c1 solid"))
    return _svg(ident, title, text, body)


def shares(
    ident: str, title: str, text: str, heights: Sequence[tuple[float, str]], labels: tuple[str, str]
) -> str:
    """One bar per share, in their order, each with its colour class."""
    frame = _Frame(0, len(heights), 0, max(height for height, _ in heights) * 1.05 or 1.0)
    body = frame.grid("{:.0f}", "{:.0%}", *labels)
    for place, (height, colour) in enumerate(heights):
        left, right = frame.x(place), frame.x(place + 1)
        gap = min(0.6, (right - left) / 5)
        body.append(
            _rect(left + gap, frame.y(height), right - left - 2 * gap, frame.y(0) - frame.y(height), colour)
        )
    return _svg(ident, title, text, body)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def draw_all(
    models: Sequence[Mapping[str, Any]],
    used: Mapping[str, Any] | None,
    comparisons: Sequence[Mapping[str, Any]],
    bars: Sequence[tuple[float, float, int, int]],
    losses: Sequence[Series] = (),
    learning: Sequence[Series] = (),
    attention: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """All charts of the report whose data is there, by name; the rows are those of ``modelcard``.

    ``losses``: validation loss per epoch of each model; ``learning``: training and validation of one;
    ``attention``: the events of one send.
    """
    made: dict[str, str] = {}
    whiskers = [
        Whisker(m["label"], m["metrics"]["auc"], lower, upper, m["colour"], m["is_used"])
        for m in models
        if m["intervals"].get("auc") and is_number(m["metrics"].get("auc"))
        for lower, upper in [m["intervals"]["auc"]]
    ]
    if whiskers:
        text = "; ".join(f"{w.name} {w.value:.3f}, {w.lower:.3f} to {w.upper:.3f}" for w in whiskers)
        made["auc"] = forest("auc", "AUC with 95% intervals", text, whiskers)
    compared = [c for c in comparisons if c["interval"] and is_number(c["difference"])]
    compared = [c for c in compared if c["metric"] == compared[0]["metric"]]  # one axis, one unit
    if compared:
        whiskers = [
            Whisker(c["name"], c["difference"], lower, upper, c["colour"], band=_positive(c["detectable"]))
            for c in compared
            for lower, upper in [c["interval"]]
        ]
        text = "; ".join(f"{c['name']}: {c['verdict']}" for c in compared)
        made["differences"] = forest("differences", "Paired differences", text, whiskers, signed=True)
    if used and used["reliability"]:
        after, before = (
            [(p["predicted"], p["observed"], p["rows"]) for p in used[name]]
            for name in ("reliability", "reliability_uncalibrated")
        )
        text = f"{len(after)} groups; the numbers stand in the table below the chart."
        made["reliability"] = reliability("reliability", "Reliability curve", text, after, before)
    curves = [
        Series(m["label"], [(p["share"], p["captured"]) for p in m["gain_curve"]], m["colour"], m["dash"])
        for m in models
        if m["gain_curve"] and all(is_number(p["captured"]) for p in m["gain_curve"])
    ]
    if curves:
        labels = ("Share of users mailed, best first", "Conversions reached")
        text = "Share of conversions reached by mailing the best users first."
        made["gain"] = lines("gain", "Gain curve", text, curves, labels=labels, square=True)
    if bars:
        lefts, rights, counts, chosen = zip(*bars, strict=True)
        text = f"{sum(counts):,} users, {sum(chosen):,} of them selected."
        edges = [*lefts, rights[-1]]
        made["histogram"] = histogram("histogram", "Users by probability", text, edges, counts, chosen)
    for name, title, series in (
        ("training", "Validation log loss", losses),
        ("learning", "Learning curves", learning),
    ):
        if series:
            made[name] = _losses(name, title, series)
    if attention:
        text = "; ".join(
            f"{row['name']}: {row['share']:.0%} on {row['events']} event{'s' * (row['events'] != 1)}"
            for row in attention["shares"]
        )
        labels = ("Events of the history, oldest first", "Share of the attention")
        made["attention"] = shares("attention", "Attention over a history", text, attention["bars"], labels)
    return made


def _losses(name: str, title: str, series: Sequence[Series]) -> str:
    """Loss against epochs."""
    text = "; ".join(f"{s.name}: lowest {min(p[1] for p in s.points):.4f}" for s in series)
    values = [point[1] for curve in series for point in curve.points]
    digits = max(3, _decimals(ticks(min(values), max(values))))
    axes, formats = ("Epoch", "Log loss"), ("{:.0f}", f"{{:.{digits}f}}")
    return lines(name, title, text, series, labels=axes, formats=formats)


class _Frame:
    """Plot area with linear axes."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self.x_range = (x_low, x_high)
        self.y_range = (y_low, y_high)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_format: str, y_format: str, x_label: str, y_label: str) -> list[str]:
        floor, body = HEIGHT - BOTTOM, []
        for mark in ticks(*self.y_range):
            body.append(_line(LEFT, self.y(mark), WIDTH - RIGHT, self.y(mark), "grid"))
            body.append(_text(LEFT - 7, self.y(mark) + 4, y_format.format(mark), "tick", "end"))
        for mark in ticks(*self.x_range):
            body.append(_line(self.x(mark), floor, self.x(mark), floor + 4, "axis"))
            shown = x_format.format(mark)
            is_beyond = mark == self.x_range[1] and len(shown) > 3  # half of it would not fit on the right
            place, anchor = (WIDTH, "end") if is_beyond else (self.x(mark), "middle")
            body.append(_text(place, floor + 18, shown, "tick", anchor))
        body.append(_line(LEFT, floor, WIDTH - RIGHT, floor, "axis"))
        body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "name", "middle"))
        middle = (TOP + floor) / 2
        body.append(
            f'<text class="name" text-anchor="middle" transform="translate(15 {_n(middle)}) rotate(-90)">'
            f"{escape(y_label)}</text>"
        )
        return body


def _svg(ident: str, title: str, text: str, body: Sequence[str], height: float = HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {_n(height)}" role="img" '
        f'aria-labelledby="{ident}-title {ident}-text">'
        f'<title id="{ident}-title">{escape(title)}</title><desc id="{ident}-text">{escape(text)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _positive(value: Any) -> float:
    return float(value) if is_number(value) and value > 0 else 0.0


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1].rstrip()}…"


def _n(value: float) -> str:
    return f"{value:.1f}".replace("-0.0", "0.0")


def _decimals(marks: Sequence[float]) -> int:
    return max((len(f"{m:.4f}".rstrip("0").partition(".")[2]) for m in marks), default=0)


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _rect(x: float, y: float, width: float, height: float, css: str) -> str:
    return f'<rect class="{css}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"/>'


def _dot(x: float, y: float, radius: float, css: str) -> str:
    return f'<circle class="{css} dot" cx="{_n(x)}" cy="{_n(y)}" r="{radius}"/>'


def _text(x: float, y: float, text: str, css: str, anchor: str) -> str:
    return f'<text class="{css}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(text)}</text>'
