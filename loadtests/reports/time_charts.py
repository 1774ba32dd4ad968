"""A run's charts over time, all on one axis of seconds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.quantities import number
from loadtests.reports.charts import HEIGHT, OFF_SCALE, WIDTH, Chart, Limit, Line, Tick, Values, scale
from loadtests.run_record import RunRecord

_MOST_POINTS = 2000  # more than a wide screen has columns
_ROUND_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 36000)
_MOST_TICKS = 6


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


@dataclass(frozen=True)
class Timeline:
    """The figures of each second of a run, whole or under way."""

    seconds: Sequence[float]
    series: Mapping[str, Values]
    errors: Mapping[str, Sequence[int]]
    limits: Mapping[str, float]  # by criterion


def time_charts(record: RunRecord) -> list[Chart]:
    """Every chart over time for which the run has figures; the others say that there are none."""
    limits = {criterion.name: criterion.limit for criterion in record.criteria}
    return charts_of(Timeline(record.seconds, record.series, record.errors, limits))


def charts_of(timeline: Timeline) -> list[Chart]:
    """The same, of a run that may be under way."""
    axis = TimeAxis(timeline.seconds)
    return [_chart(panel, axis) for panel in _panels(timeline)]


def _panels(record: Timeline) -> Iterable[Panel]:
    series, limits = record.series, record.limits

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
    shown = {label: value for label, value in panel.limits.items() if value <= highest * OFF_SCALE}
    if panel.levels:
        top, y_ticks = (
            max(panel.levels),
            [Tick(level / max(panel.levels) * 100, name) for level, name in panel.levels.items()],
        )
    else:
        top, y_ticks = scale(max(highest, *shown.values(), 0.0) if shown else highest, whole=panel.whole)
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
        x = axis.at(second + axis.step / 2) * WIDTH / 100
        y = HEIGHT * (1 - value / top)
        if open_line and stepped:
            parts.append(f"H{x:.1f}V{y:.1f}")
        else:
            parts.append(f"{'L' if open_line else 'M'}{x:.1f} {y:.1f}" + ("" if open_line else "h.01"))
        open_line = True
    return "".join(parts)


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
