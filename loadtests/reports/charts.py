"""A run's charts as SVG: drawn once at any width, with their labels in HTML, so that no script is needed to read them.

An SVG fills its frame whatever that measures (`preserveAspectRatio="none"`, strokes that do not scale), and so a phone
shows the same file as a wall. The page's script adds only what hovering tells. The benchmarks' pictures are
matplotlib's (`bench/charts.py`): a README shows files of a fixed size, this page fits every width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.quantities import number

WIDTH, HEIGHT = 1000, 200
OFF_SCALE = 1.6  # times the highest value: a limit beyond it would flatten the line it limits

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
    width: int = WIDTH
    height: int = HEIGHT


def scale(highest: float, *, whole: bool = False) -> tuple[float, list[Tick]]:
    """A round end for an axis from 0, and its ticks."""
    wanted = max(highest * 1.05, 1e-9) if highest > 0 else 1.0
    step = 10 ** math.floor(math.log10(wanted / 2))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if wanted / (step * factor) <= 4)  # noqa: PLR2004
    if whole:
        step = max(1, math.ceil(step))
    count = math.ceil(wanted / step)
    return step * count, [Tick(i / count * 100, number(round(i * step, 9))) for i in range(count + 1)]
