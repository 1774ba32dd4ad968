"""Figures as a reader wants them: three digits that mean something, the unit, and a word where there is no figure."""

import math

NOT_MEASURED = "NOT MEASURED"

_MIB = 2**20


def number(value: float) -> str:
    """Three significant digits, thousands apart; a whole number stays whole."""
    if math.isinf(value):
        return "infinite"
    if value == int(value) or abs(value) >= 100:  # noqa: PLR2004 - three digits stand before the point
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"  # noqa: PLR2004 - as above


def quantity(value: float | None, unit: str = "") -> str:
    """The figure with its unit, or NOT MEASURED."""
    return NOT_MEASURED if value is None else f"{number(value)} {unit}".strip()


def mebibytes(value: float | None) -> str:
    """A size in bytes, as MiB."""
    return quantity(None if value is None else value / _MIB, "MiB")


def change(ratio: float) -> str:
    """A ratio as a change: 1.3 is +30 %."""
    percent = (ratio - 1) * 100
    return f"{percent:+.0f} %" if abs(percent) >= 10 else f"{percent:+.1f} %"  # noqa: PLR2004 - two digits


def duration(seconds: float) -> str:
    """90 is `1 min 30 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{number(round(seconds, 1))} s"
    return f"{minutes} min" + (f" {rest} s" if rest else "")
