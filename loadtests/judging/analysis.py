"""The plan's post-test analysis: three figures from the samples of a load test."""

import math
from collections.abc import Sequence
from typing import TypedDict

from loadtests.run_record import Analysis


class RequestTotals(TypedDict):
    """The number of orders acknowledged, and the time it took."""

    acknowledged: int
    seconds: float


class RunData(TypedDict):
    """The samples of a load test, as `analyze_results` takes them."""

    response_times: Sequence[float]  # ms, one for each acknowledged order
    errors: Sequence[bool]  # one for each order sent: True where the service failed (5xx, or no answer)
    requests: RequestTotals


def analyze_results(test_data: RunData) -> Analysis:
    """Sum up a load test.

        analyze_results({
            "response_times": [12.5, 14.1],  # ms
            "errors": [False, False, True],
            "requests": {"acknowledged": 2, "seconds": 0.5},
        }) == {"avg_response_time": 13.3, "error_rate": 1 / 3, "throughput": 4.0}

    A figure of nothing is None, not zero: no orders are no success.
    """
    return {
        "avg_response_time": calculate_average(test_data["response_times"]),
        "error_rate": calculate_error_rate(test_data["errors"]),
        "throughput": calculate_throughput(test_data["requests"]),
    }


def calculate_average(response_times: Sequence[float]) -> float | None:
    """The arithmetic mean, in the unit of the times."""
    return math.fsum(response_times) / len(response_times) if response_times else None


def calculate_error_rate(errors: Sequence[bool]) -> float | None:
    """The share of orders that failed."""
    return sum(map(bool, errors)) / len(errors) if errors else None


def calculate_throughput(requests: RequestTotals) -> float | None:
    """Acknowledged orders per second."""
    return requests["acknowledged"] / requests["seconds"] if requests["seconds"] > 0 else None
