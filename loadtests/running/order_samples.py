"""Every order of a run in columns, and what they come to: counts, latencies, figures of each second and minute.

An order failed that was sent and neither acknowledged, nor cut off by the run's end, nor refused as the shop may.
"""

import itertools
import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hdrh.histogram import HdrHistogram

from loadtests.judging.analysis import RunData
from loadtests.run_record import Counts, Latency
from loadtests.samples import CUT_OFF, INVALID_STATE, OUT_OF_STOCK, Outcome, Sample, Window

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
_CONFLICT = 409
_GAPS_LOOKED_AT = 5

OUTCOMES: tuple[Outcome, ...] = ("acknowledged", "refused", "unknown")
ACKNOWLEDGED, REFUSED, UNKNOWN = range(3)


@dataclass(frozen=True)
class WorstWindows:
    """The worst of the windows of a run, each figure for itself."""

    p99_ms: float | None  # of all orders sent, a failure counting as infinite
    p99_orders: int  # it rests on
    error_percent: float | None
    error_orders: int


class OrderSamples:
    """Every order asked for, in columns: ten minutes of a stress test are more than a million.

    Another kind of request has columns of its own.
    """

    refusals_agreed = True  # False: what was refused as sold out was not

    def __init__(self) -> None:
        self.started_at = array("d")
        self.latency_seconds = array("d")
        self.outcome = array("B")
        self.status = array("H")
        self.late_seconds = array("f")  # an open model's, in the latency
        self._type = array("H")
        self._types: dict[str, int] = {}
        self.names: list[str] = []  # the error types, by their number

    def __len__(self) -> int:
        return len(self.outcome)

    def add(self, sample: Sample) -> None:
        """Take one."""
        self.started_at.append(sample.started_at)
        self.latency_seconds.append(sample.latency_seconds)
        self.outcome.append(OUTCOMES.index(sample.outcome))
        self.status.append(sample.status)
        self.late_seconds.append(sample.late_seconds)
        if sample.error_type not in self._types:
            self._types[sample.error_type] = len(self.names)
            self.names.append(sample.error_type)
        self._type.append(self._types[sample.error_type])

    def within(self, window: Window | None) -> Iterator[int]:
        """The rows that started in *window*; None: all."""
        if window is None:
            return iter(range(len(self)))
        start, end = window.start, window.end
        return (row for row, at in enumerate(self.started_at) if start <= at < end)

    def failed(self, row: int) -> bool:
        """True where the service failed: neither acknowledged, nor cut off, nor refused as the shop may."""
        if self.outcome[row] == ACKNOWLEDGED:
            return False
        name = self.names[self._type[row]]
        return name != CUT_OFF and not self._agreed(self.status[row], name)

    def _agreed(self, status: int, error_type: str) -> bool:
        return self.refusals_agreed and status == _CONFLICT and error_type in (OUT_OF_STOCK, INVALID_STATE)

    def counts(self, window: Window | None = None) -> Counts:
        """Orders that started in *window*, by what their clients were told."""
        seen = Counter((self.outcome[row], self.status[row], self._type[row]) for row in self.within(window))
        names = self.names
        outcomes, by_type = Counter[int](), Counter[str]()
        server = client = transport = cut_off = agreed = undeclared = 0
        for (outcome, status, number), count in seen.items():
            error_type = names[number]
            outcomes[outcome] += count
            if outcome == ACKNOWLEDGED:
                continue
            by_type[error_type or f"http_{status}"] += count
            if status == _SERVER_ERROR or (status > _SERVER_ERROR and error_type == f"http_{status}"):
                undeclared += count
            if status >= _SERVER_ERROR:
                server += count
            elif status >= _CLIENT_ERROR:
                client += count
            elif status == 0 and error_type != CUT_OFF:
                transport += count
            cut_off += count * (error_type == CUT_OFF)
            agreed += count * self._agreed(status, error_type)
        return Counts(
            sent=seen.total(),
            acknowledged=outcomes[ACKNOWLEDGED],
            refused=outcomes[REFUSED],
            unknown=outcomes[UNKNOWN],
            cut_off=cut_off,
            agreed=agreed,
            server_errors=server,
            client_errors=client,
            transport_errors=transport,
            undeclared_errors=undeclared,
            by_type=dict(sorted(by_type.items())),
        )

    def latency(self, outcome: int, window: Window | None = None) -> Latency:
        """The latencies of one outcome, of the orders that started in *window*."""
        return distribution(
            self.latency_seconds[row] for row in self.within(window) if self.outcome[row] == outcome
        )

    def answered_or_failed(self, window: Window, interval_seconds: float | None) -> list[float]:
        """Latencies in ms of all orders that started in *window*, ascending; a failure counts as infinite."""
        return sorted(self._latencies(self.within(window), interval_seconds))

    def _latencies(self, rows: Iterable[int], interval_seconds: float | None) -> Iterator[float]:
        """Latencies in ms, a failure as infinite.

        Args:
            interval_seconds: from order to order of a user who is not kept waiting (closed model): one who waits for
                longer sends nothing meanwhile, and what would have been sent waits for what is left of the time.
        """
        for row in rows:
            latency = self.latency_seconds[row]
            if self.failed(row):
                yield math.inf
            elif self.outcome[row] == ACKNOWLEDGED:
                yield latency * 1000
            else:
                continue
            if interval_seconds:
                while (latency := latency - interval_seconds) > 0:
                    yield latency * 1000

    def corrected(self, window: Window, interval_seconds: float) -> Latency:
        """The latencies of acknowledged orders, with those that nobody sent because everybody waited."""
        rows = (row for row in self.within(window) if self.outcome[row] == ACKNOWLEDGED)
        return distribution(latency / 1000 for latency in self._latencies(rows, interval_seconds))

    def interval_seconds(self, window: Window, users: float) -> float | None:
        """The usual time from order to order of one of *users*; None: no orders."""
        starts = Counter(math.floor(self.started_at[row] - window.start) for row in self.within(window))
        return users / statistics.median(starts.values()) if starts else None

    def worst_windows(self, window: Window, seconds: float, interval_seconds: float | None) -> WorstWindows:
        """The worst of all windows of *seconds*, half of one apart; of the whole where that is shorter."""
        length = min(seconds, window.seconds)
        count = max(1, math.floor((window.seconds - length) / (length / 2)) + 1) if length > 0 else 0
        rows: list[list[int]] = [[] for _ in range(count)]
        for row in self.within(window) if count else ():
            half = math.floor((self.started_at[row] - window.start) / (length / 2))
            for place in (half - 1, half):
                if 0 <= place < count:
                    rows[place].append(row)
        p99, errors = (-1.0, 0), (-1.0, 0)
        for inside in rows:
            latencies = sorted(self._latencies(inside, interval_seconds))
            if latencies:
                p99 = max(p99, (percentile_of(latencies, 99) or 0.0, len(latencies)))
            failed = sum(map(self.failed, inside))
            if inside:
                errors = max(errors, (failed / len(inside) * 100, len(inside)))
        return WorstWindows(p99[0] if p99[1] else None, p99[1], errors[0] if errors[1] else None, errors[1])

    def longest_gap_seconds(self, window: Window) -> float | None:
        """The longest time in *window* in which orders waited and none was acknowledged; None: there were none."""
        acknowledged, waited = [window.start, window.end], []
        for row, started_at in enumerate(self.started_at):
            ended_at = started_at + self.latency_seconds[row]
            if ended_at > window.start and started_at < window.end:
                waited.append((started_at, ended_at))
                if self.outcome[row] == ACKNOWLEDGED and ended_at < window.end:
                    acknowledged.append(ended_at)
        acknowledged.sort()
        gaps = sorted(itertools.pairwise(acknowledged), key=lambda gap: gap[0] - gap[1])[:_GAPS_LOOKED_AT]
        longest = 0.0
        for start, end in gaps:
            first = min((max(start, at) for at, until in waited if until > start and at < end), default=end)
            longest = max(longest, end - first)
        return longest if waited else None

    def test_data(self, window: Window) -> RunData:
        """The orders that started in *window*, as the plan's analysis takes them."""
        rows = [*self.within(window)]
        response_times = [
            self.latency_seconds[row] * 1000 for row in rows if self.outcome[row] == ACKNOWLEDGED
        ]
        return {
            "response_times": response_times,
            "errors": [self.failed(row) for row in rows],
            "requests": {"acknowledged": len(response_times), "seconds": window.seconds},
        }

    def busy_seconds(self, window: Window) -> tuple[float, int]:
        """The time that users spent waiting for answers in *window*, together, and how many answers ended in it."""
        busy, ended = 0.0, 0
        for row, at in enumerate(self.started_at):
            started_at, ended_at = at + self.late_seconds[row], at + self.latency_seconds[row]
            busy += max(0.0, min(ended_at, window.end) - max(started_at, window.start))
            ended += window.start <= ended_at < window.end
        return busy, ended

    def service_seconds(self, window: Window) -> list[float]:
        """The time that orders were with the service, ascending: an open model's lateness is not in it."""
        return sorted(self.latency_seconds[row] - self.late_seconds[row] for row in self.within(window))

    def per_second(
        self, origin: float, seconds: range
    ) -> tuple[dict[str, list[float | None]], dict[str, list[int]]]:
        """Columns over *seconds* since *origin*, by the second the answer came; and the errors by type."""
        acknowledged: dict[int, list[float]] = {second: [] for second in seconds}
        errors: dict[str, Counter[int]] = {}
        names = self.names
        for row, started_at in enumerate(self.started_at):
            latency = self.latency_seconds[row]
            second = math.floor(started_at + latency - origin)
            if self.outcome[row] == ACKNOWLEDGED:
                if second in acknowledged:
                    acknowledged[second].append(latency * 1000)
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


def percentile_of(ascending: Sequence[float], percentile: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    if not ascending:
        return None
    rank = max(1, math.ceil(len(ascending) * percentile / 100))
    return ascending[rank - 1]


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
