"""The load of a run under way, and all that is noted of it: read once, as it comes."""

import time
import uuid
from pathlib import Path

from loadtests.judging.ledger import Answers
from loadtests.running.generator_samples import GeneratorSamples
from loadtests.running.interruption import Interruption
from loadtests.running.live import LiveLine, Moment
from loadtests.running.locust_process import START_SECONDS, LocustProcess
from loadtests.running.order_samples import ACKNOWLEDGED, OrderSamples, percentile_of
from loadtests.running.plan import Plan
from loadtests.samples import JsonLines, Sample, Window
from loadtests.service_side.metrics_pages import MetricsSampler
from loadtests.service_side.prometheus_sampler import PrometheusSampler

Sampler = MetricsSampler | PrometheusSampler

_TICK_SECONDS = 0.5
_RECENT_SECONDS = 5.0  # what the live line's rate and percentile are of


class Load:
    """Locust under way, and what it wrote down so far."""

    def __init__(self, plan: Plan, url: str, sampler: Sampler, directory: Path) -> None:
        self.plan = plan
        self.sampler = sampler
        self.run_id = uuid.uuid4().hex[:12]
        self.orders = OrderSamples()
        self.answers = Answers()
        self.generator = GeneratorSamples()
        self.window = Window(0.0, 0.0)
        self.trouble = ""  # of Locust
        self._url = url
        self._directory = directory
        self._order_lines = JsonLines(directory, "orders-*.jsonl")
        self._generator_lines = JsonLines(directory, "generator-*.jsonl")
        self._errors = 0
        self._recent: list[tuple[float, int]] = []  # when, and how many rows there were

    def run(self, live: LiveLine, interruption: Interruption) -> None:
        """Start Locust, warm up, measure, stop it."""
        with (
            LocustProcess.started(
                self.plan, self._url, run_id=self.run_id, directory=self._directory
            ) as locust,
            live,
        ):
            started_at = time.time()
            self.window = Window(*self._planned(started_at))
            while not interruption.asked and time.time() < self.window.end:
                time.sleep(min(_TICK_SECONDS, max(0.0, self.window.end - time.time())))
                self._take()
                if locust.ended:
                    break
                self._place_window(started_at)
                live.show(self._moment(started_at))
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
        start = started_at + self.plan.ramp_seconds + self.plan.settle_seconds + START_SECONDS
        return start, start + self.plan.duration_seconds

    def _place_window(self, started_at: float) -> None:
        """Begin the measured time `settle_seconds` after all users are there."""
        latest = self._planned(started_at)[0]
        if self.window.start == latest and self.generator.users >= self.plan.users:
            start = min(latest, time.time() + self.plan.settle_seconds)
            self.window = Window(start, start + self.plan.duration_seconds)

    def _take(self) -> None:
        for _, values in self._order_lines.new():
            sample = Sample(*values)
            self.orders.add(sample)
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
            latency
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
