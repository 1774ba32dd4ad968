"""A flame graph of py-spy's as figures of each function, and two of them beside each other."""

import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any, NamedTuple

CpuProfile = dict[str, Any]

_FRAME = re.compile(r"(?P<name>.*) \(\d[\d,]* samples?, [\d.]+%\)")


def functions(flame_graph: str) -> CpuProfile:
    """The functions in a flame graph of py-spy's, counted from the frames it draws.

    Returns:
        `samples`: how many there are; `functions`: for each name how many of them were [in itself, in it or below].
    """
    frames = sorted(_frames(flame_graph), key=lambda frame: (frame.depth, frame.start))
    counts: dict[str, list[int]] = {}
    # A row of frames, each with the names from it up to the root.
    above: list[tuple[_Frame, frozenset[str]]] = []
    for _, row in itertools.groupby(frames, key=lambda frame: frame.depth):
        here = []
        for frame in row:
            parent, names = next(
                (found for found in above if found[0].start <= frame.start < found[0].end),
                (None, frozenset()),
            )
            count = counts.setdefault(frame.name, [0, 0])
            count[0] += frame.samples
            if frame.name not in names:  # else the outer call has them already
                count[1] += frame.samples
            if parent is not None:
                counts[parent.name][0] -= frame.samples
            here.append((frame, names | {frame.name}))
        above = here
    samples = counts.pop("all", [0, 0])[1]
    return {"samples": samples, "functions": counts}


class _Frame(NamedTuple):
    depth: float
    start: int  # samples left of it
    samples: int
    name: str

    @property
    def end(self) -> int:
        return self.start + self.samples


def _frames(flame_graph: str) -> Iterator[_Frame]:
    """The boxes of the picture; their places in samples are in attributes of inferno's, which draws it."""
    for group in ET.fromstring(flame_graph).iter("{http://www.w3.org/2000/svg}g"):  # noqa: S314 - py-spy wrote it
        title, box = group.find("{*}title"), group.find("{*}rect")
        label = _FRAME.fullmatch(title.text or "") if title is not None else None
        if label is not None and box is not None:
            start, samples = (int(box.attrib[f"{{http://github.com/jonhoo/inferno}}{name}"]) for name in "xw")
            yield _Frame(float(box.attrib["y"]), start, samples, label["name"])


def by_cost(profile: CpuProfile, baseline: CpuProfile | None) -> list[list[Any]]:
    """Functions by what they cost: [name, µs per order in itself, with what it calls, in itself in the baseline].

    A share of the samples is a share of the CPU, so an order's CPU splits the same way. Names are compared without
    their line numbers, which every edit moves. With a baseline the largest differences come first.
    """
    now, before = _costs(profile), _costs(baseline) if baseline else {}
    rows = [
        [name, *now.get(name, (0.0, 0.0)), before.get(name, (0.0, 0.0))[0] if baseline else None]
        for name in now.keys() | before.keys()
    ]
    return sorted(rows, key=lambda row: (-abs(row[1] - (row[3] or 0.0)), row[0]))


def _costs(profile: CpuProfile) -> dict[str, tuple[float, float]]:
    per_sample = profile["cost"]["service_us"] / max(1, profile["samples"])
    costs: dict[str, tuple[float, float]] = {}
    for name, (own, whole) in profile["functions"].items():
        bare = re.sub(r":\d+\)$", ")", name)
        other = costs.get(bare, (0.0, 0.0))
        costs[bare] = (other[0] + own * per_sample, other[1] + whole * per_sample)
    return costs
