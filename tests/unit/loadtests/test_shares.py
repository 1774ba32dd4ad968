"""Binomial tails: exact against sums that everybody can follow, and quick for millions."""

import math

import pytest

from loadtests.judging import shares


@pytest.mark.parametrize(
    ("seen", "of", "share"), [(0, 10, 0.1), (3, 10, 0.1), (3, 10, 0.5), (9, 10, 0.5), (2, 300, 0.01)]
)
def test_tails(seen: int, of: int, share: float) -> None:
    exact = sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(seen + 1))
    assert shares._at_most(seen, of, share) == pytest.approx(exact, rel=1e-9)


def test_the_rule_of_three() -> None:
    """Without a failure 299 orders show less than 1 % at 95 % confidence, and 298 do not."""
    assert shares.needed(0.01, 0.95) == 299
    assert shares.shows_less(0, 299, 0.01, 0.95)
    assert not shares.shows_less(0, 298, 0.01, 0.95)


def test_nothing_shows_nothing() -> None:
    assert not shares.shows_less(0, 0, 0.01, 0.95)
    assert not shares.shows_more(0, 0, 0.01, 0.95)


def test_millions() -> None:
    assert shares.shows_less(49_000, 5_000_000, 0.01, 0.95)
    assert not shares.shows_less(49_990, 5_000_000, 0.01, 0.95)
    assert shares.shows_more(50_500, 5_000_000, 0.01, 0.95)
