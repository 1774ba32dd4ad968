"""The load of a run under way, and all that is noted of it: read once, as it comes."""

import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loadtests.judging.ledger import Answers
from loadtests.running.client_metrics import ClientMetrics
from loadtests.running.generator_samples import GeneratorSamples
from loadtests.running.interruption import Interruption
from loadtests.running.live import LiveLine, Moment
from loadtests.running.locust_process import LocustProcess, start_seconds
from loadtests.running.order_samples import ACKNOWLEDGED, OrderSamples, percentile_of
from loadtests.running.plan import Plan
from loadtests.samples import JsonLines, Sample, Window
from loadtests.service_side.metrics_pages import MetricsSampler
from loadtests.service_side.prometheus_sampler import PrometheusSampler

Sampler = MetricsSampler | PrometheusSampler
Values = Sequence[float | None]

_TICK_SECONDS = 0.5
_LOOK_SECONDS = 2.0  # whether all is lost: all orders so far are gone through
_RECENT_SECONDS = 5.0  # what the live line's rate and percentile are of


class Load:
    """Locust under way, and what it wrote down so far."""

    def __init__(self, plan: Plan, url: str, sampler: Sampler, directory: Path) -> None:
        self.plan = plan
        self.sampler = sampler
        self.run_id = uuid.uuid4().hex[:12]
        self.orders = OrderSamples()
        self.others: dict[str, OrderSamples] = {}  # every other kind of request, by its route
        self.answers = Answers()
        self.generator = GeneratorSamples()
        self.window = Window(0.0, 0.0)
        self.trouble = ""  # of Locust
        self.aborted = ""  # why it was ended before its time, by nobody's wish but its own
        self.moment: Moment | None = None
        self._client = ClientMetrics(plan.profile.name, self.run_id)
        self._lock = threading.Lock()  # over what was noted: the live page reads it from another thread
        self._url = url
        self._directory = directory
        self._order_lines = JsonLines(directory, "orders-*.jsonl")
        self._generator_lines = JsonLines(directory, "generator-*.jsonl")
        self._errors = 0
        self._recent: list[tuple[float, int]] = []  # when, and how many rows there were

    def run(self, live: LiveLine, interruption: Interruption, lost: Callable[[], str] = lambda: "") -> None:
        """Start Locust, warm up, measure, stop it.

        Args:
            lost: why it is of no use to go on; empty: it is.
        """
        with (
            LocustProcess.started(
                self.plan, self._url, run_id=self.run_id, directory=self._directory
            ) as locust,
            live,
        ):
            started_at = time.time()
            look_at = time.monotonic()
            self.window = Window(*self._planned(started_at))
            while not interruption.asked and time.time() < self.window.end:
                time.sleep(min(_TICK_SECONDS, max(0.0, self.window.end - time.time())))
                self._take()
                if locust.ended:
                    break
                self._place_window(started_at)
                self.moment = self._moment(started_at)
                live.show(self.moment)
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + _LOOK_SECONDS
                    self.aborted = lost()
                if self.aborted:
                    break
            ended_at = time.time()
            self.window = Window(
                *(round(min(at, ended_at), 3) for at in (self.window.start, self.window.end))
            )
            locust.stop()
            self.trouble = locust.trouble
        self._take()
        self._order_lines.close()
        self._generator_lines.close()

    def _planned(self, started_at: float) -> tuple[float, float]:
        """The latest that the measured time may be: Locust may be slow to start its users, but not for ever."""
        start = started_at + self.plan.ramp_seconds + self.plan.settle_seconds + start_seconds(self.plan)
        return start, start + self.plan.duration_seconds

    def _place_window(self, started_at: float) -> None:
        """Begin the measured time `settle_seconds` after all users are there."""
        latest = self._planned(started_at)[0]
        if self.window.start == latest and self.generator.users >= self.plan.users:
            start = min(latest, time.time() + self.plan.settle_seconds)
            self.window = Window(start, start + self.plan.duration_seconds)

    def timeline(self) -> tuple[Sequence[float], Mapping[str, Values], Mapping[str, list[int]]]:
        """Seconds, columns and errors so far, as a record has them."""
        with self._lock:
            now = time.time()
            origin = min(self.window.start, now)
            first = min(self.orders.started_at, default=now)
            seconds = range(math.floor(first - origin), max(1, math.ceil(now - origin)))
            columns, errors = self.orders.per_second(origin, seconds)
            series = {
                **columns,
                **self.generator.per_second(origin, seconds),
                **self.sampler.per_second(origin, seconds),
            }
        return [float(second) for second in seconds], series, errors

    def client_page(self) -> bytes:
        """The client's own figures so far, in Prometheus's text format."""
        with self._lock:
            return self._client.page(self.generator.users)

    def _take(self) -> None:
        with self._lock:
            self._take_lines()

    def _take_lines(self) -> None:
        for _, values in self._order_lines.new():
            sample = Sample(*values)
            self._client.add(sample)
            if sample.operation == "create":
                self.orders.add(sample)
            else:
                self.others.setdefault(sample.route, OrderSamples()).add(sample)
            self.answers.add(sample)
        for name, values in self._generator_lines.new():
            self.generator.add(name, values)

    def _moment(self, started_at: float) -> Moment:
        now = time.time()
        expected = started_at + self.plan.ramp_seconds + self.plan.settle_seconds + self.plan.duration_seconds
        self._recent.append((now, len(self.orders)))
        while now - self._recent[0][0] > _RECENT_SECONDS and len(self._recent) > 1:
            self._recent.pop(0)
        since, first = self._recent[0]
        outcomes = self.orders.outcome[first:]
        latencies = sorted(
            latency * 1000
            for latency, outcome in zip(self.orders.latency_seconds[first:], outcomes, strict=True)
            if outcome == ACKNOWLEDGED
        )
        last = self._recent[-2][1] if len(self._recent) > 1 else 0
        self._errors += sum(outcome != ACKNOWLEDGED for outcome in self.orders.outcome[last:])
        cpu, in_use, pool_max = self.sampler.now()
        warm = now < self.window.start
        return Moment(
            phase="warm-up" if warm else "measured",
            seconds_left=min(self.window.end, max(expected, now)) - now if warm else self.window.end - now,
            users=self.generator.users,
            orders_per_second=len(latencies) / (now - since) if now > since else 0.0,
            p95_ms=percentile_of(latencies, 95),
            errors=self._errors,
            cpu_percent=cpu,
            pool_in_use=in_use,
            pool_max=pool_max,
        )
