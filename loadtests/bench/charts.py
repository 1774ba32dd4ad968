"""The benchmarks' pictures: SVG and PNG on a transparent ground, in tones that read on light and on dark pages.

Of matplotlib: a README shows files of a fixed size. A run's page, which fits every width and can be hovered over, draws
its own (`reports/charts.py`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_INK = "#7a828c"  # 4:1 against white and against GitHub's dark ground alike
SERVICE, POSTGRES = "#3b82f6", "#f59e0b"
SERIES = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#14b8a6")

mpl.rcParams.update(
    {
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "legend.frameon": False,
        "savefig.transparent": True,
        "savefig.dpi": 160,
        "svg.hashsalt": "order-service",  # the same figures give the same file
    }
)


def bench(summary: Sequence[Mapping[str, Any]], path: Path) -> None:
    """CPU per order, split into service and Postgres: a panel per load, a bar per contestant."""
    loads = list(dict.fromkeys(row["connections"] for row in summary))
    contestants = list(dict.fromkeys(row["contestant"] for row in summary))
    figure = Figure(figsize=(10, 0.9 + 0.45 * len(contestants)), layout="constrained")
    panels = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
    for axes, connections in zip(panels, loads, strict=True):
        rows = [row for row in summary if row["connections"] == connections]
        names = [row["contestant"] for row in rows]
        own = [row["service_us"] for row in rows]
        total = [row["total_us"] for row in rows]
        axes.barh(names, own, color=SERVICE, label="the server itself", height=0.62)
        axes.barh(
            names,
            [row["postgres_us"] for row in rows],
            left=own,
            color=POSTGRES,
            label="Postgres",
            height=0.62,
        )
        for name, value in zip(names, total, strict=True):
            axes.annotate(
                f"{value:,.0f}", (value, name), xytext=(4, 0), textcoords="offset points", va="center"
            )
        axes.set_xlim(0, max(total) * 1.2)
        axes.set_title(f"{connections} connection{'' if connections == 1 else 's'}")
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=5)
    panels[0].invert_yaxis()
    panels[len(panels) // 2].set_xlabel("CPU per durable order (µs)")
    panels[0].legend(loc="upper right", handlelength=1)
    save(figure, path)


def lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    path: Path,
    *,
    x_label: str,
    y_label: str,
    x_log: bool = False,
) -> None:
    """A panel per title, in it a line (x values, y values) per name."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, named) in zip(drawn, panels.items(), strict=True):
        for colour, (name, (x, y)) in zip(SERIES, named.items(), strict=False):
            axes.plot(x, y, color=colour, label=name, marker="o", markersize=3, linewidth=1.5)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylim(bottom=0, top=1.1 * max((max(y) for _, y in named.values() if y), default=1) or 1)
        if x_log:  # a few round numbers: name them
            axes.set_xscale("log")
            ticks = sorted({value for x, _ in named.values() for value in x})
            axes.set_xticks(ticks, [f"{value:,.0f}" for value in ticks])
            axes.minorticks_off()
        if len(named) > 1:
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, handlelength=1, columnspacing=1
            )
    drawn[0].set_ylabel(y_label)
    save(figure, path)


def shares(bars: Mapping[str, Mapping[str, float]], path: Path, *, unit: str) -> None:
    """A bar per name, cut into its parts, each labelled with its size and its share."""
    figure = Figure(figsize=(10, 0.9 + 0.6 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for row, (name, parts) in enumerate(bars.items()):
        total = sum(parts.values()) or 1.0
        left = 0.0
        for colour, (part, value) in zip(SERIES, parts.items(), strict=False):
            share = value / total
            axes.barh([name], [share], left=left, color=colour, label=part if row == 0 else None, height=0.6)
            if share > 0.05:  # noqa: PLR2004 - narrower than its label
                axes.annotate(
                    f"{share:.0%}\n{value:,.0f} {unit}",
                    (left + share / 2, name),
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=8,
                )
            left += share
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_visible(False)
    axes.tick_params(axis="y", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(loc="outside upper center", ncols=6, handlelength=1)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write *figure* as SVG and as PNG."""
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None)
