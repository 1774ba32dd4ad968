"""Every order of a run in columns, and what they come to: counts, latencies, figures of each second."""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

from hdrh.histogram import HdrHistogram

from loadtests.judging.analysis import RunData
from loadtests.run_record import Counts, Latency
from loadtests.samples import CUT_OFF, Outcome, Sample, Window

_HIGHEST_US = 3_600_000_000
_DIGITS = 3
_CURVE = (
    0,
    10,
    25,
    50,
    75,
    80,
    85,
    90,
    92.5,
    95,
    96,
    97,
    98,
    98.5,
    99,
    99.25,
    99.5,
    99.75,
    99.9,
    99.95,
    99.99,
    100,
)
_SERVER_ERROR = 500
_CLIENT_ERROR = 400

OUTCOMES: tuple[Outcome, ...] = ("acknowledged", "refused", "unknown")
ACKNOWLEDGED, REFUSED, UNKNOWN = range(3)


class OrderSamples:
    """Every order asked for, in columns: ten minutes of a stress test are more than a million."""

    def __init__(self) -> None:
        self.started_at = array("d")
        self.latency_seconds = array("d")
        self.outcome = array("B")
        self.status = array("H")
        self._type = array("H")
        self._types: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.outcome)

    def add(self, sample: Sample) -> None:
        """Take one; anything but the creation of an order is left out."""
        if sample.operation != "create":
            return
        self.started_at.append(sample.started_at)
        self.latency_seconds.append(sample.latency_seconds)
        self.outcome.append(OUTCOMES.index(sample.outcome))
        self.status.append(sample.status)
        self._type.append(self._types.setdefault(sample.error_type, len(self._types)))

    def within(self, window: Window | None) -> Iterator[int]:
        """The rows that started in *window*; None: all."""
        if window is None:
            return iter(range(len(self)))
        start, end = window.start, window.end
        return (row for row, at in enumerate(self.started_at) if start <= at < end)

    def counts(self, window: Window | None = None) -> Counts:
        """Orders that started in *window*, by what their clients were told."""
        seen = Counter((self.outcome[row], self.status[row], self._type[row]) for row in self.within(window))
        names = {number: name for name, number in self._types.items()}
        outcomes, by_type = Counter[int](), Counter[str]()
        server = client = transport = 0
        for (outcome, status, error_type), count in seen.items():
            outcomes[outcome] += count
            if outcome != ACKNOWLEDGED:
                by_type[names[error_type] or f"http_{status}"] += count
            if status >= _SERVER_ERROR:
                server += count
            elif status >= _CLIENT_ERROR:
                client += count
            elif status == 0 and names[error_type] != CUT_OFF:
                transport += count
        return Counts(
            sent=seen.total(),
            acknowledged=outcomes[ACKNOWLEDGED],
            refused=outcomes[REFUSED],
            unknown=outcomes[UNKNOWN],
            server_errors=server,
            client_errors=client,
            transport_errors=transport,
            by_type=dict(sorted(by_type.items())),
        )

    def latency(self, outcome: int, window: Window | None = None) -> Latency:
        """The latencies of one outcome, of the orders that started in *window*."""
        return distribution(
            self.latency_seconds[row] for row in self.within(window) if self.outcome[row] == outcome
        )

    def test_data(self, window: Window) -> RunData:
        """The orders that started in *window*, as the plan's analysis takes them."""
        rows = [*self.within(window)]
        cut_off = self._types.get(CUT_OFF)
        response_times = [
            self.latency_seconds[row] * 1000 for row in rows if self.outcome[row] == ACKNOWLEDGED
        ]
        return {
            "response_times": response_times,
            "errors": [
                self.status[row] >= _SERVER_ERROR or (self.status[row] == 0 and self._type[row] != cut_off)
                for row in rows
            ],
            "requests": {"acknowledged": len(response_times), "seconds": window.seconds},
        }

    def mean_latency_seconds(self, window: Window) -> float | None:
        """The mean over all outcomes: how long a user was busy with an order."""
        latencies = [self.latency_seconds[row] for row in self.within(window)]
        return math.fsum(latencies) / len(latencies) if latencies else None

    def per_second(
        self, origin: float, seconds: range
    ) -> tuple[dict[str, list[float | None]], dict[str, list[int]]]:
        """Columns over *seconds* since *origin*, by the second the answer came; and the errors by type."""
        acknowledged: dict[int, list[float]] = {second: [] for second in seconds}
        errors: dict[str, Counter[int]] = {}
        names = {number: name for name, number in self._types.items()}
        for row, started_at in enumerate(self.started_at):
            latency = self.latency_seconds[row]
            second = math.floor(started_at + latency - origin)
            if self.outcome[row] == ACKNOWLEDGED:
                if second in acknowledged:
                    acknowledged[second].append(latency)
            else:
                error_type = names[self._type[row]] or f"http_{self.status[row]}"
                errors.setdefault(error_type, Counter())[second] += 1
        columns: dict[str, list[float | None]] = {
            "orders_per_second": [float(len(acknowledged[second])) for second in seconds]
        }
        for latencies in acknowledged.values():
            latencies.sort()
        for percentile in (50, 95, 99):
            columns[f"p{percentile}_ms"] = [
                percentile_of(acknowledged[second], percentile) for second in seconds
            ]
        columns["errors_per_second"] = [
            float(sum(count[second] for count in errors.values())) for second in seconds
        ]
        return columns, {
            name: [count[second] for second in seconds] for name, count in sorted(errors.items())
        }


def percentile_of(ascending_seconds: list[float], percentile: float) -> float | None:
    """The nearest-rank percentile in ms; None of nothing."""
    if not ascending_seconds:
        return None
    rank = max(1, math.ceil(len(ascending_seconds) * percentile / 100))
    return ascending_seconds[rank - 1] * 1000


def distribution(latencies_seconds: Iterable[float]) -> Latency:
    """One distribution, from a histogram of microseconds with three significant digits; the mean is exact."""
    microseconds = Counter(max(1, round(seconds * 1e6)) for seconds in latencies_seconds)
    if not microseconds:
        return Latency(count=0)
    histogram = HdrHistogram(1, _HIGHEST_US, _DIGITS)
    for value, count in microseconds.items():
        histogram.record_value(min(value, _HIGHEST_US), count)

    def at(percentile: float) -> float:
        return float(histogram.get_value_at_percentile(percentile)) / 1000

    return Latency(
        count=microseconds.total(),
        mean_ms=sum(value * count for value, count in microseconds.items()) / microseconds.total() / 1000,
        min_ms=min(microseconds) / 1000,
        p50_ms=at(50),
        p75_ms=at(75),
        p90_ms=at(90),
        p95_ms=at(95),
        p99_ms=at(99),
        p999_ms=at(99.9),
        max_ms=max(microseconds) / 1000,
        curve=tuple((float(percentile), at(percentile)) for percentile in _CURVE),
        hdr=histogram.encode().decode(),
    )
