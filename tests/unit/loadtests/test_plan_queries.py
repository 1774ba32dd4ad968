"""Whatever the length of a run, its queries look back no further than its measured time."""

import pytest

from loadtests.service_side.plan_queries import PLAN_QUERIES, range_seconds
from tests.support import performance_test_plan


def test_word_for_word() -> None:
    """The plan's queries, all of them; a minute is the range where the measured time has one."""
    assert [query.promql for query in PLAN_QUERIES] == performance_test_plan.QUERIES
    assert [query.over(60) for query in PLAN_QUERIES] == performance_test_plan.QUERIES


@pytest.mark.parametrize(
    ("measured_seconds", "scrape_seconds", "expected"),
    [
        pytest.param(900, 5, 60, id="the plan's minute"),
        pytest.param(60, 5, 60, id="just a minute"),
        pytest.param(20, 5, 20, id="a short run: all of it"),
        pytest.param(900, 30, 120, id="rare scrapes: four of them"),
        pytest.param(100, 30, 100, id="rare scrapes in a short run"),
        pytest.param(0.2, None, 1, id="ended at once"),
    ],
)
def test_range(measured_seconds: float, scrape_seconds: float | None, expected: int) -> None:
    assert range_seconds(measured_seconds, scrape_seconds) == expected
