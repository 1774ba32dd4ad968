"""The plan's post-test analysis: three figures from what a load test has written down."""

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TypedDict

from loadtests.run_record import RunRecord
from loadtests.samples import ACKNOWLEDGED, CUT_OFF, OUTCOMES, Window, read_samples

_SERVER_ERROR = 500


class Requests(TypedDict):
    """How many orders were acknowledged, and over which time."""

    acknowledged: int
    seconds: float


class RunData(TypedDict):
    """What `analyze_results` takes."""

    response_times: Sequence[float]  # ms, one for each acknowledged order
    errors: Sequence[bool]  # one for each order sent: True where the service failed (5xx, or no answer)
    requests: Requests


class Metrics(TypedDict):
    """What `analyze_results` gives; None: there was nothing to take it from."""

    avg_response_time: float | None  # ms
    error_rate: float | None  # a fraction: 0.01 is 1 %
    throughput: float | None  # acknowledged orders per second


def analyze_results(test_data: RunData) -> Metrics:
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
    """Their arithmetic mean, in their unit."""
    return math.fsum(response_times) / len(response_times) if response_times else None


def calculate_error_rate(errors: Sequence[bool]) -> float | None:
    """The share of orders that failed."""
    return sum(map(bool, errors)) / len(errors) if errors else None


def calculate_throughput(requests: Requests) -> float | None:
    """Acknowledged orders per second."""
    return requests["acknowledged"] / requests["seconds"] if requests["seconds"] > 0 else None


def read_test_data(record: RunRecord, directory: Path) -> RunData:
    """The raw samples in *directory*: the orders that were sent in the run's measured time."""
    window = Window(
        *(datetime.fromisoformat(at).timestamp() for at in (record.measured_from, record.measured_until))
    )
    response_times: list[float] = []
    errors: list[bool] = []
    for sample in read_samples(directory):
        if sample.operation != "create" or not window.start <= sample.started_at < window.end:
            continue
        unanswered = sample.status == 0 and sample.error_type != CUT_OFF
        errors.append(sample.status >= _SERVER_ERROR or unanswered)
        if sample.outcome == OUTCOMES[ACKNOWLEDGED]:
            response_times.append(sample.latency_seconds * 1000)
    return {
        "response_times": response_times,
        "errors": errors,
        "requests": {"acknowledged": len(response_times), "seconds": record.duration_seconds},
    }
