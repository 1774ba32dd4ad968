"""Statistics of a handful of runs a side: exact, so that five are enough, and without chance: no seed, one answer."""

import functools
import itertools
import math
from collections.abc import Sequence

_CONFIDENCE = 0.95
_STEPS = 200  # of Simpson's rule: eight digits


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p of the Mann-Whitney rank test: how often chance alone parts the two sides at least as far.

    Exact for every size, ties included: the permutation distribution of the sum of midranks, counted.

    Source: Mann and Whitney, "On a test of whether one of two random variables is stochastically larger than the
    other", Annals of Mathematical Statistics 18 (1947).
    """
    ascending = sorted((*first, *second))
    # Twice the midrank, so that it is a whole number.
    doubled = {value: 2 * ascending.index(value) + ascending.count(value) + 1 for value in ascending}
    ranks = [doubled[value] for value in ascending]
    ways = _ways(ranks, len(first))
    middle = sum(ranks) * len(first)  # of the sum, times the number of runs: a whole number, too
    seen = abs(sum(doubled[value] for value in first) * len(ranks) - middle)
    uneven = sum(count for total, count in ways.items() if abs(total * len(ranks) - middle) >= seen)
    return uneven / sum(ways.values())


def ratio_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float] | None:
    """*second* over *first*: lowest, best estimate, highest, at 95 % confidence; all values positive.

    The Hodges-Lehmann estimate (the median of all ratios of pairs) and the interval that inverts the rank test, so it
    holds its confidence with five runs, where a bootstrap's is far too narrow. None: too few runs for any.

    Source: Hollander and Wolfe, "Nonparametric Statistical Methods", section 4.3.
    """
    ratios = sorted(after / before for before, after in itertools.product(first, second))
    n = len(first)
    ways = _ways(range(1, n + len(second) + 1), n)
    tail, cut = 0, 0
    for total in sorted(ways):
        tail += ways[total]
        if 2 * tail > (1 - _CONFIDENCE) * sum(ways.values()):
            break
        cut += 1
    if cut == 0:
        return None
    middle = len(ratios) // 2
    estimate = ratios[middle] if len(ratios) % 2 else math.sqrt(ratios[middle - 1] * ratios[middle])
    return ratios[cut - 1], estimate, ratios[-cut]


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, raised so that looking at all of them errs no more often than looking at one (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - place)))
        adjusted[index] = highest
    return adjusted


@functools.cache
def student_quantile(probability: float, degrees: int) -> float:
    """Student's t: the value that *probability* (0.5 to 1) of its distribution lies below.

    SciPy has it, and is 100 MB for these few lines; tests hold them to printed tables.
    """
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < probability:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < probability else (low, middle)
    return high


def _ways(ranks: Sequence[int], chosen: int) -> dict[int, int]:
    """By sum: the number of choices of *chosen* of *ranks* that have it."""
    ways: list[dict[int, int]] = [{0: 1}, *({} for _ in range(chosen))]
    for rank in ranks:
        for size in range(chosen, 0, -1):
            for total, count in ways[size - 1].items():
                ways[size][total + rank] = ways[size].get(total + rank, 0) + count
    return ways[chosen]


def _student_cdf(value: float, degrees: int) -> float:
    """The part below *value* >= 0, by Simpson's rule over the angle whose tangent is value / sqrt(degrees)."""
    angle = math.atan(value / math.sqrt(degrees))
    step = angle / _STEPS
    weights = (1 if i in (0, _STEPS) else 4 if i % 2 else 2 for i in range(_STEPS + 1))
    area = sum(w * math.cos(i * step) ** (degrees - 1) for i, w in enumerate(weights)) * step / 3
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    return 0.5 + scale * area
