"""The raw samples of a run: followed while Locust writes them, and summed up in the end."""

import gzip
import math
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
from hdrh.histogram import HdrHistogram

from loadtests.run_record import Counts, Latency

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

OUTCOMES = ("acknowledged", "refused", "unknown")
ACKNOWLEDGED, REFUSED, UNKNOWN = range(3)
CUT_OFF = "cut_off"  # the run ended before the answer came: nobody's error


class Sample(NamedTuple):
    """One request that changes orders, as the generator wrote it down."""

    operation: str  # create | cancel
    key: str
    order_id: str
    status: int  # 0: no answer
    outcome: str
    error_type: str
    started_at: float  # seconds since the epoch; open model: the intended start
    latency_seconds: float
    late_seconds: float
    replayed: bool


def compress(directory: Path) -> None:
    """Replace the samples in *directory* by their gzip: a line takes a third."""
    for path in directory.glob("*.jsonl"):
        with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb", compresslevel=1) as packed:
            shutil.copyfileobj(plain, packed, 1 << 20)
        path.unlink()


class JsonLines:
    """Follows files that others append whole lines to, also those that appear later."""

    def __init__(self, directory: Path, pattern: str) -> None:
        self._directory = directory
        self._pattern = pattern
        self._files: dict[Path, tuple[BinaryIO, bytes]] = {}

    def new(self) -> Iterator[tuple[str, Any]]:
        """The file name and value of every line that is new since the last call."""
        for path in sorted(self._directory.glob(self._pattern)):
            file, rest = self._files.get(path) or (path.open("rb"), b"")
            *lines, rest = (rest + file.read()).split(b"\n")
            self._files[path] = file, rest
            for line in lines:
                yield path.name, orjson.loads(line)

    def close(self) -> None:
        """Close all files."""
        for file, _ in self._files.values():
            file.close()


def read_samples(directory: Path) -> Iterator[Sample]:
    """Every sample in *directory*, compressed or not, file by file."""
    for path in sorted(directory.glob("orders-*.jsonl*")):
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # a killed process may leave half a line
                    yield Sample(*orjson.loads(line))


@dataclass(frozen=True)
class Window:
    """The measured time, in seconds since the epoch: what *starts* in it counts."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


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
        """What clients were told, of the orders that started in *window*."""
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
        return summarise(
            self.latency_seconds[row] for row in self.within(window) if self.outcome[row] == outcome
        )

    def mean_latency_seconds(self, window: Window) -> float | None:
        """Over all outcomes: how long a user was busy with an order."""
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


def summarise(latencies_seconds: Iterable[float]) -> Latency:
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


class GeneratorSamples:
    """How the generator's processes did, second by second."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[float, int, float, list[float], int, int]]] = {}

    def add(self, process: str, row: list[Any]) -> None:
        """Take a line of a process's file."""
        at, users, cpu_seconds, lateness_ms, due, sent = row
        self._rows.setdefault(process, []).append((at, users, cpu_seconds, lateness_ms, due, sent))

    @property
    def processes(self) -> int:
        """How many have reported."""
        return len(self._rows)

    @property
    def users(self) -> int:
        """Running now, in all processes."""
        return sum(rows[-1][1] for rows in self._rows.values())

    def cpu_percent(self, window: Window) -> float | None:
        """Of one core, the mean of the busiest process over *window*."""
        busiest = None
        for rows in self._rows.values():
            inside = [row for row in rows if window.start <= row[0] <= window.end]
            if len(inside) > 1:
                share = (inside[-1][2] - inside[0][2]) / (inside[-1][0] - inside[0][0]) * 100
                busiest = max(busiest or 0.0, share)
        return busiest

    def lateness_ms(self, window: Window) -> list[float]:
        """Every sample within *window*, ascending."""
        return sorted(
            late
            for rows in self._rows.values()
            for at, _, _, lateness, *_ in rows
            if window.start <= at <= window.end
            for late in lateness
        )

    def mean_users(self, window: Window) -> float | None:
        """Over *window*, all processes together."""
        means = [
            [users for at, users, *_ in rows if window.start <= at <= window.end]
            for rows in self._rows.values()
        ]
        return sum(sum(users) / len(users) for users in means if users) if any(means) else None

    def arrivals(self, window: Window) -> tuple[int, int]:
        """How many were due, and sent, in *window*; open model."""
        due = sent = 0
        for rows in self._rows.values():
            inside = [row for row in rows if window.start <= row[0] <= window.end]
            if inside:
                due += inside[-1][4] - inside[0][4]
                sent += inside[-1][5] - inside[0][5]
        return due, sent

    def per_second(self, origin: float, seconds: range) -> Mapping[str, list[float | None]]:
        """Users, CPU of the busiest process, the worst lateness, over *seconds* since *origin*."""
        users: dict[int, dict[str, int]] = {}
        cpu: dict[int, float] = {}
        late: dict[int, float] = {}
        for process, rows in self._rows.items():
            before = None
            for row in rows:
                second = math.floor(row[0] - origin)
                users.setdefault(second, {})[process] = row[1]
                late[second] = max(late.get(second, 0.0), *row[3])
                if before is not None:
                    share = (row[2] - before[2]) / (row[0] - before[0]) * 100
                    cpu[second] = max(cpu.get(second, 0.0), share)
                before = row
        return {
            "users": [float(sum(users[second].values())) if second in users else None for second in seconds],
            "generator_cpu_percent": [cpu.get(second) for second in seconds],
            "generator_lag_ms": [late.get(second) for second in seconds],
        }
