"""Arrival schedules, on clocks of the test's own."""

import itertools
import statistics

import pytest

from loadtests.users.arrivals import LATE_SECONDS, ArrivalSchedule, ArrivalTotals, Process, arrival_times


def take(count: int, rate_per_second: float, process: Process, *, phase: float = 0.0) -> list[float]:
    times = arrival_times(rate_per_second, process, seed="a test's", phase=phase)
    return list(itertools.islice(times, count))


def test_constant_arrivals_are_a_metronome() -> None:
    """Ten per second are one every 100 ms."""
    assert take(4, 10, "constant") == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_metronomes_of_several_processes_beat_evenly() -> None:
    """Two processes at half the rate, half a beat apart, are one at the whole rate."""
    both = sorted(take(50, 5, "constant") + take(50, 5, "constant", phase=0.5))
    assert both == pytest.approx(take(100, 10, "constant"))


def test_poisson_arrivals_have_the_rate_and_independent_gaps() -> None:
    """Gaps are as long as the rate says on average, and vary as much (an exponential's deviation is its mean)."""
    times = take(20_000, 50, "poisson")
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    """A run can be repeated."""
    assert take(100, 50, "poisson") == take(100, 50, "poisson")


def test_a_schedule_that_is_kept() -> None:
    """A schedule that is kept has started every arrival that was due, on time."""
    schedule = ArrivalSchedule(10, "constant", now=0.0, seed=1)
    for _ in range(11):
        due = schedule.take()
        assert schedule.start(due, due) == 0.0
    assert schedule.totals(1.05) == ArrivalTotals(1.05, offered=11, achieved=11)
    assert schedule.totals(1.05).achieved_ratio == 1.0


def test_arrivals_that_nobody_takes_are_offered_all_the_same() -> None:
    """With one worker that needs a second for each, ten per second are offered, one achieved, and ever later."""
    schedule = ArrivalSchedule(10, "constant", now=0.0, seed=1)
    late_seconds = [schedule.start(schedule.take(), now) for now in (0.0, 1.0, 2.0, 3.0)]
    assert late_seconds == pytest.approx([0.0, 0.9, 1.8, 2.7])
    totals = schedule.totals(3.95)
    assert (totals.offered, totals.achieved, totals.late) == (40, 4, 3)
    assert totals.worst_late_seconds == pytest.approx(2.7)


def test_late_begins_beyond_what_a_healthy_generator_needs() -> None:
    """A start within the tolerance is late in its latency, but not counted."""
    schedule = ArrivalSchedule(1, "constant", now=0.0, seed=1)
    assert schedule.start(schedule.take(), LATE_SECONDS / 2) == LATE_SECONDS / 2
    schedule.start(schedule.take(), 1 + LATE_SECONDS * 2)
    assert schedule.totals(2).late == 1


def test_nothing_is_offered_after_the_end() -> None:
    """Arrivals due after the end count neither as offered nor as achieved; one due before may still start."""
    schedule = ArrivalSchedule(10, "constant", now=0.0, seed=1)
    due = [schedule.take() for _ in range(5)]
    for each in due[:2]:
        schedule.start(each, each)
    schedule.end(0.25)
    schedule.start(due[2], 0.26)
    schedule.start(due[3], 0.3)
    totals = schedule.totals(9.0)
    assert (totals.seconds, totals.offered, totals.achieved) == (0.25, 3, 3)


def test_totals_of_several_processes_add_up() -> None:
    """Counts add up; the time and the worst are those of the longest and the worst."""
    total = ArrivalTotals()
    assert total.achieved_ratio is None
    total.add(ArrivalTotals(5.0, 100, 90, 10, 0.3))
    total.add(ArrivalTotals(4.0, 100, 100, 0, 0.1))
    assert total == ArrivalTotals(5.0, 200, 190, 10, 0.3)
    assert total.achieved_ratio == 0.95
