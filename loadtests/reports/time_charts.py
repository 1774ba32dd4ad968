"""A run's charts as SVG: drawn once at any width, with their labels in HTML, so that no script is needed to read them.

An SVG fills its frame whatever that measures (`preserveAspectRatio="none"`, strokes that do not scale), and so a phone
shows the same file as a wall. The page's script adds only what hovering tells. The benchmarks' pictures are
matplotlib's (`bench/charts.py`): a README shows files of a fixed size, this page fits every width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.quantities import number
from loadtests.run_record import Latency, RunRecord

_WIDTH, _HEIGHT = 1000, 200
_MOST_POINTS = 2000  # more than a wide screen has columns
_OFF_SCALE = 1.6  # times the highest value: a limit beyond it would flatten the line it limits
_ROUND_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 36000)
_MOST_TICKS = 6
_LOG_FROM = 0.001  # the percentile axis ends at 99.9 %

Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    path: str  # SVG path data
    colour: int  # of the page's palette, from 1
    dashed: bool = False


@dataclass(frozen=True)
class Tick:
    """A label beside an axis."""

    at: float  # percent of the axis
    text: str


@dataclass(frozen=True)
class Limit:
    """A value that a line must keep."""

    at: float  # percent of the height
    text: str
    x: tuple[float, float] = (0.0, 100.0)  # percent of the width


@dataclass(frozen=True)
class Chart:
    """A chart, ready for the template to draw."""

    name: str
    title: str
    note: str
    lines: Sequence[Line]
    y_ticks: Sequence[Tick]
    x_ticks: Sequence[Tick]
    limits: Sequence[Limit] = ()
    warm_up: float = 0.0  # percent of the width
    values: Mapping[str, Values] = field(default_factory=dict)  # label -> for hovering
    width: int = _WIDTH
    height: int = _HEIGHT


@dataclass(frozen=True)
class Panel:
    """The contents of one chart over time: label -> column."""

    name: str
    title: str
    note: str
    columns: Mapping[str, Values]
    limits: Mapping[str, float] = field(default_factory=dict)
    levels: Mapping[float, str] = field(default_factory=dict)  # a state's names, in place of figures
    whole: bool = False  # a count: its axis has no fractions


class TimeAxis:
    """The one axis of all charts: seconds since the measured time began, at most so many points."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.step = max(1, math.ceil(len(seconds) / _MOST_POINTS))
        self.seconds = [seconds[i] for i in range(0, len(seconds), self.step)]
        self._first = self.seconds[0] if seconds else 0.0
        self._span = max(1.0, (self.seconds[-1] - self._first + self.step) if seconds else 1.0)

    def at(self, second: float) -> float:
        """Percent of the width."""
        return (second - self._first) / self._span * 100

    def thin(self, values: Values) -> list[float | None]:
        """The highest of each step: what was bad for a second stays visible."""
        steps = (values[i : i + self.step] for i in range(0, len(values), self.step))
        return [max((v for v in step if v is not None), default=None) for step in steps]

    def ticks(self) -> list[Tick]:
        """At most seven round times."""
        last = self._first + self._span
        every = next(
            (step for step in _ROUND_SECONDS if self._span <= _MOST_TICKS * step), _ROUND_SECONDS[-1]
        )
        return [
            Tick(self.at(s), _clock(s))
            for s in range(math.ceil(self._first / every) * every, int(last) + 1, every)
        ]


def time_charts(record: RunRecord) -> list[Chart]:
    """Every chart over time for which the run has figures; the others say that there are none."""
    axis = TimeAxis(record.seconds)
    return [_chart(panel, axis) for panel in _panels(record)]


def _panels(record: RunRecord) -> Iterable[Panel]:
    series = record.series
    limits = {criterion.name: criterion.limit for criterion in record.criteria}

    def columns(**labels: str) -> dict[str, Values]:
        return {label.replace("_", " "): series[name] for label, name in labels.items() if name in series}

    def of(column: str, by: float) -> Values:
        return [None if value is None else value / by for value in series.get(column, ())]

    yield Panel(
        "latency",
        "Latency",
        "ms, of the orders acknowledged in each second",
        columns(p50="p50_ms", p95="p95_ms", p99="p99_ms"),
        {f"{p} limit": limits[f"latency_{p}"] for p in ("p95", "p99") if f"latency_{p}" in limits},
    )
    yield Panel(
        "orders",
        "Orders",
        "per second, acknowledged",
        columns(orders_per_second="orders_per_second"),
        {"least": limits["throughput"]} if "throughput" in limits else {},
    )
    yield Panel("users", "Users", "running", columns(users="users"), whole=True)
    errors = {
        name: [float(count) for count in column] for name, column in record.errors.items() if any(column)
    }
    yield Panel(
        "errors", "Errors", "per second, by type", errors or {"none": [0.0] * len(record.seconds)}, whole=True
    )
    yield Panel(
        "cpu",
        "CPU",
        "% of one core, busiest process",
        columns(service="cpu_percent", generator="generator_cpu_percent"),
        {"limit": limits["cpu"]} if "cpu" in limits else {},
    )
    memory = {"largest service process": of("rss_bytes", 2**20)} if "rss_bytes" in series else {}
    yield Panel("memory", "Memory", "MiB resident", memory)
    yield Panel(
        "pool", "Connection pool", "connections", columns(in_use="pool_in_use", most="pool_max"), whole=True
    )
    yield Panel("batch", "Batch size", "mean orders per commit", columns(orders_per_commit="batch_size"))
    yield Panel(
        "queue",
        "Queues",
        "orders",
        columns(waiting_for_a_batch="queue_depth", in_flight="in_flight"),
        whole=True,
    )
    yield Panel(
        "breaker",
        "Circuit breaker",
        "state",
        columns(state="breaker_state"),
        levels={0: "closed", 1: "half-open", 2: "open"},
    )
    yield Panel(
        "lag",
        "Event-loop lag",
        "ms, the worst",
        columns(service="loop_lag_ms", generator="generator_lag_ms"),
    )


def _chart(panel: Panel, axis: TimeAxis) -> Chart:
    thin = {label: axis.thin(values) for label, values in panel.columns.items()}
    known = {label: values for label, values in thin.items() if any(value is not None for value in values)}
    highest = max((value for values in known.values() for value in values if value is not None), default=0.0)
    shown = {label: value for label, value in panel.limits.items() if value <= highest * _OFF_SCALE}
    if panel.levels:
        top, y_ticks = (
            max(panel.levels),
            [Tick(level / max(panel.levels) * 100, name) for level, name in panel.levels.items()],
        )
    else:
        top, y_ticks = _scale(max(highest, *shown.values(), 0.0) if shown else highest, whole=panel.whole)
    far = ", ".join(f"{label} {number(value)}" for label, value in panel.limits.items() if label not in shown)
    return Chart(
        name=panel.name,
        title=panel.title,
        note=panel.note + (f"; {far} (off the scale)" if far and known else ""),
        lines=[
            Line(label, _path(axis, values, top, stepped=bool(panel.levels)), place)
            for place, (label, values) in enumerate(known.items(), 1)
        ],
        y_ticks=y_ticks,
        x_ticks=axis.ticks(),
        limits=[Limit(value / top * 100, f"{label} {number(value)}") for label, value in shown.items()],
        warm_up=max(0.0, min(100.0, axis.at(0))),
        values={
            label: [None if value is None else float(f"{value:.4g}") for value in values]
            for label, values in known.items()
        },
    )


def _path(axis: TimeAxis, values: Values, top: float, *, stepped: bool) -> str:
    """SVG path data; a second without a value is a gap, a value between gaps a dot."""
    parts: list[str] = []
    open_line = False
    for second, value in zip(axis.seconds, values, strict=True):
        if value is None:
            open_line = False
            continue
        x = axis.at(second + axis.step / 2) * _WIDTH / 100
        y = _HEIGHT * (1 - value / top)
        if open_line and stepped:
            parts.append(f"H{x:.1f}V{y:.1f}")
        else:
            parts.append(f"{'L' if open_line else 'M'}{x:.1f} {y:.1f}" + ("" if open_line else "h.01"))
        open_line = True
    return "".join(parts)


def percentile_chart(latency: Latency, baseline: Latency | None, limits: Mapping[str, float]) -> Chart:
    """Latency by percentile, on an axis where each nine takes the same room; as far as the samples reach."""
    curves = {"this run": _reach(latency)} | ({"baseline": _reach(baseline)} if baseline else {})
    curves = {label: curve for label, curve in curves.items() if curve}
    highest = max((ms for curve in curves.values() for _, ms in curve), default=0.0)
    marks = {
        percentile: limits[f"latency_p{percentile}"]
        for percentile in (95, 99)
        if f"latency_p{percentile}" in limits
    }
    shown = {percentile: limit for percentile, limit in marks.items() if limit <= highest * _OFF_SCALE}
    top, y_ticks = _scale(max(highest, *shown.values(), 0.0) if shown else highest)
    far = ", ".join(
        f"p{percentile} limit {number(limit)}"
        for percentile, limit in marks.items()
        if percentile not in shown
    )
    note = f"ms, {latency.count:,} acknowledged orders" + (f"; {far} (off the scale)" if far else "")
    return Chart(
        name="percentiles",
        title="Latency by percentile",
        note=note,
        lines=[
            Line(
                label,
                "".join(
                    f"{'L' if i else 'M'}{_nines(percentile) * _WIDTH / 100:.1f} {_HEIGHT * (1 - ms / top):.1f}"
                    for i, (percentile, ms) in enumerate(curve)
                ),
                place,
                dashed=label == "baseline",
            )
            for place, (label, curve) in enumerate(curves.items(), 1)
        ],
        y_ticks=y_ticks,
        x_ticks=[Tick(_nines(p), f"p{p:g}") for p in (0, 50, 90, 95, 99, 99.9)],
        limits=[
            Limit(
                limit / top * 100,
                f"p{p} limit {number(limit)}",
                (max(0.0, _nines(p) - 8), min(100.0, _nines(p) + 8)),
            )
            for p, limit in shown.items()
        ],
    )


def _reach(latency: Latency) -> list[tuple[float, float]]:
    """The part of the curve that at least one sample lies beyond."""
    return [(p, ms) for p, ms in latency.curve if p <= 99.9 and latency.count * (100 - p) > 99.999]  # noqa: PLR2004


def _nines(percentile: float) -> float:
    """Percent of the width: 90, 99 and 99.9 are thirds."""
    return math.log10(1 / (1 - percentile / 100)) / math.log10(1 / _LOG_FROM) * 100


def _scale(highest: float, *, whole: bool = False) -> tuple[float, list[Tick]]:
    """A round end for an axis from 0, and its ticks."""
    wanted = max(highest * 1.05, 1e-9) if highest > 0 else 1.0
    step = 10 ** math.floor(math.log10(wanted / 2))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if wanted / (step * factor) <= 4)  # noqa: PLR2004
    if whole:
        step = max(1, math.ceil(step))
    count = math.ceil(wanted / step)
    return step * count, [Tick(i / count * 100, number(round(i * step, 9))) for i in range(count + 1)]


def _clock(second: float) -> str:
    minutes, rest = divmod(abs(int(second)), 60)
    return f"{'−' if second < 0 else ''}{minutes}:{rest:02d}"  # noqa: RUF001 - a minus as wide as a digit


def hover_data(axis_seconds: Sequence[float], charts: Iterable[Chart]) -> dict[str, Any]:
    """The figures that the page's script shows beside the pointer."""
    axis = TimeAxis(axis_seconds)
    return {
        "clock": [_clock(second) for second in axis.seconds],
        "at": [round(axis.at(second + axis.step / 2), 3) for second in axis.seconds],
        "charts": {chart.name: chart.values for chart in charts},
    }
