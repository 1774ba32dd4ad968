"""Latency by percentile as a chart, beside a baseline's."""

import math
from collections.abc import Mapping

from loadtests.quantities import number
from loadtests.reports.charts import HEIGHT, OFF_SCALE, WIDTH, Chart, Limit, Line, Tick, scale
from loadtests.run_record import Latency

_LOG_FROM = 0.001  # the percentile axis ends at 99.9 %


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
    shown = {percentile: limit for percentile, limit in marks.items() if limit <= highest * OFF_SCALE}
    top, y_ticks = scale(max(highest, *shown.values(), 0.0) if shown else highest)
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
                    f"{'L' if i else 'M'}{_nines(percentile) * WIDTH / 100:.1f} {HEIGHT * (1 - ms / top):.1f}"
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
