"""Arrivals: when requests should start, in a model where customers come whether or not the service keeps up."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Process = Literal["poisson", "constant"]


def arrival_times(
    rate_per_second: float, process: Process, *, seed: float | str, phase: float = 0.0
) -> Iterator[float]:
    """Endless seconds from the start, ascending.

    Args:
        rate_per_second: above 0.
        process: `poisson`: independent customers, exponentially distributed gaps. `constant`: a metronome.
        seed: of the gaps; the same one gives the same times.
        phase: where in the first gap a metronome begins, in [0, 1): several together beat evenly.
    """
    if process == "constant":
        count = phase
        while True:
            yield count / rate_per_second
            count += 1
    choose = random.Random(seed)  # noqa: S311 - repeatable, not secret
    time = choose.expovariate(rate_per_second)
    while True:
        yield time
        time += choose.expovariate(rate_per_second)


@dataclass
class ArrivalTotals:
    """The figures of an arrival schedule."""

    seconds: float = 0.0  # it has run
    offered: int = 0  # arrivals due by then
    achieved: int = 0  # of these, started by then
    late: int = 0  # of these, started more than LATE_SECONDS after they were due
    worst_late_seconds: float = 0.0

    @property
    def achieved_ratio(self) -> float | None:
        """Achieved / offered; None where nothing was offered."""
        return self.achieved / self.offered if self.offered else None

    def add(self, other: "ArrivalTotals") -> None:
        """Add the totals of another process of the same time."""
        self.seconds = max(self.seconds, other.seconds)
        self.offered += other.offered
        self.achieved += other.achieved
        self.late += other.late
        self.worst_late_seconds = max(self.worst_late_seconds, other.worst_late_seconds)


LATE_SECONDS = 0.01  # a generator that is not saturated starts within a few milliseconds


class ArrivalSchedule:
    """One process's arrivals, which its workers take one after the other, each when it is free.

    Where all workers are busy nobody takes the next arrival, and it starts late; its latency counts from when it was
    due, so that a server that stalls is charged for everybody who waits, and not only for those it was answering.
    Times are seconds of one monotonic clock, whose reading the caller passes.
    """

    def __init__(
        self, rate_per_second: float, process: Process, *, now: float, seed: float | str, phase: float = 0.0
    ) -> None:
        self._started_at = now
        self._times = arrival_times(rate_per_second, process, seed=seed, phase=phase)
        # The same, for counting.
        self._due_times = arrival_times(rate_per_second, process, seed=seed, phase=phase)
        self._next_due = next(self._due_times)
        self._totals = ArrivalTotals()
        self._ended_at = math.inf

    def take(self) -> float:
        """The time at which the next arrival is due, past or future."""
        return self._started_at + next(self._times)

    def start(self, due: float, now: float) -> float:
        """Note that the arrival due at *due* starts; returns how late, in seconds, never below 0."""
        late_seconds = max(0.0, now - due)
        if due <= self._ended_at:
            self._totals.achieved += 1
            self._totals.late += late_seconds > LATE_SECONDS
            self._totals.worst_late_seconds = max(self._totals.worst_late_seconds, late_seconds)
        return late_seconds

    def totals(self, now: float) -> ArrivalTotals:
        """Arrivals offered and achieved so far."""
        elapsed = self._totals.seconds = min(now, self._ended_at) - self._started_at
        while self._next_due <= elapsed:
            self._totals.offered += 1
            self._next_due = next(self._due_times)
        return self._totals

    def end(self, now: float) -> None:
        """Offer nothing further: what is due later belongs to no test."""
        self._ended_at = min(self._ended_at, now)
