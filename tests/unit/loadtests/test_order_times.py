"""The judgement of time: what a run's percentiles say, and what they hide."""

import math
import random
from collections.abc import Sequence

import pytest

from loadtests.running.order_samples import OrderSamples
from loadtests.samples import Outcome, Sample, Window

RUN = Window(1000.0, 1045.0)


def order(
    started_at: float, latency_seconds: float = 0.005, outcome: Outcome = "acknowledged", error_type: str = ""
) -> Sample:
    status = 201 if outcome == "acknowledged" else 503
    return Sample(
        "create",
        "/orders",
        "k",
        "o",
        status,
        outcome,
        error_type,
        started_at,
        latency_seconds,
        0.0,
        replayed=False,
    )


def columns(made: Sequence[Sample]) -> OrderSamples:
    orders = OrderSamples()
    for each in made:
        orders.add(each)
    return orders


def users_that(
    stop_for: float, *, users: int = 100, wait: float = 0.075, stops_at: float = 1020.0
) -> OrderSamples:
    """A closed model of a service that answers in 5 ms, and stands still once for *stop_for* seconds."""
    chance = random.Random(3)  # noqa: S311 - repeatable, not secret
    made = []
    for _ in range(users):
        at = RUN.start + chance.random() * wait
        while at < RUN.end:
            still = stops_at <= at < stops_at + stop_for
            latency = 0.005 + (stops_at + stop_for - at if still else 0.0)
            made.append(order(at, latency))
            at += latency + chance.uniform(0.8, 1.2) * wait
    return columns(made)


def test_a_service_that_stands_still_for_a_while() -> None:
    """8.5 of 45 s without an answer: of the orders sent 0.3 % were late; of those that would have been, a fifth."""
    orders = users_that(8.5)
    assert (orders.latency(0, RUN).p99_ms or 0) < 6
    interval = orders.interval_seconds(RUN, 100) or 0.0
    assert interval == pytest.approx(0.08, rel=0.1)
    late = [each for each in orders.answered_or_failed(RUN, interval) if each > 1000]
    assert len(late) / len(orders.answered_or_failed(RUN, interval)) == pytest.approx(7.5 / 45, rel=0.1)
    assert (orders.corrected(RUN, interval).p99_ms or 0) > 5000
    assert orders.longest_gap_seconds(RUN) == pytest.approx(8.5, abs=0.1)


def test_a_service_that_does_not_is_not_touched() -> None:
    """Nothing is made up where nobody waits for longer than usual."""
    orders = users_that(0.0)
    interval = orders.interval_seconds(RUN, 100)
    assert len(orders.answered_or_failed(RUN, interval)) == orders.counts(RUN).sent
    assert (orders.longest_gap_seconds(RUN) or 1) < 0.1


def test_a_failure_is_infinitely_late() -> None:
    """1.2 % that fail are more than a 99th percentile leaves out; what is agreed or cut off is not in it."""
    made = [order(1000 + n / 100) for n in range(988)]
    made += [order(1000 + n, 0.001, "refused", "overloaded") for n in range(12)]
    made += [order(1000 + n, 0.001, "unknown", "cut_off") for n in range(40)]
    latencies = columns(made).answered_or_failed(RUN, None)
    assert len(latencies) == 1000
    assert latencies[990 - 1] == math.inf
    assert latencies[988 - 1] == pytest.approx(5)


def test_the_worst_minute() -> None:
    """Errors and late orders of one window show, however long the run is; a shorter run is its own window."""
    made = [order(1000 + n / 100) for n in range(4500)]
    for n in range(2000, 2040):
        made[n] = order(1000 + n / 100, 0.005, "refused", "overloaded")
    orders = columns(made)
    assert orders.counts(RUN).failed / orders.counts(RUN).sent < 0.01
    worst = orders.worst_windows(RUN, 10, None)
    assert worst.error_percent == pytest.approx(4)
    assert worst.error_orders == 1000
    assert worst.p99_ms == math.inf
    assert orders.worst_windows(RUN, 60, None).error_percent == pytest.approx(40 / 4500 * 100)
    assert columns([]).worst_windows(RUN, 10, None).p99_ms is None


def test_a_gap_counts_while_orders_wait() -> None:
    """Nobody ordered for 20 s: no gap. Somebody did, and was answered 9 s later: 9 s."""
    quiet = [order(1001), order(1021, 0.5), order(1044.9)]
    assert columns(quiet).longest_gap_seconds(RUN) == pytest.approx(0.5)
    waiting = [order(1001), order(1012, 9.0), order(1044.9)]
    assert columns(waiting).longest_gap_seconds(RUN) == pytest.approx(9.0)
    at_the_end = [order(1001), order(1030, 30.0, "unknown", "client_timeout")]
    assert columns(at_the_end).longest_gap_seconds(RUN) == pytest.approx(15.0)
    assert columns([]).longest_gap_seconds(RUN) is None


def test_time_with_the_service_is_cut_at_the_windows_ends() -> None:
    """A service that hangs at the end is no sign of a bad generator: only what lies in the window is added up."""
    orders = columns([order(995, 10), order(1040, 10), order(1010, 2)])
    busy, ended = orders.busy_seconds(RUN)
    assert busy == pytest.approx(5 + 5 + 2)
    assert ended == 2
