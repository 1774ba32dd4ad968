"""Rules under `promtool test rules`: replicas as a Prometheus scrapes them, well and badly."""

import json
import math
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # it has no annotations of its own

from monitoring.rules import RULES, alerting_rules, metric_names, recording_rules

Series = Mapping[str, str]
Curve = Callable[[float], float]

_NOTHING = "_"
_STALE = "stale"  # what Prometheus writes of each series when a scrape fails, or a target is gone
_MISS = 4  # every fourth scrape


@dataclass(frozen=True)
class Metric:
    """A series of one replica: its value over the seconds since it began to be watched."""

    name: str
    value: Curve
    labels: Mapping[str, str]
    counter: bool = False


def counter(name: str, value: Curve, **labels: str) -> Metric:
    """A counter: it begins at 0 with its process."""
    return Metric(name, value, labels, counter=True)


def gauge(name: str, value: Curve, **labels: str) -> Metric:
    """A gauge: a new process shows the same as the one before."""
    return Metric(name, value, labels)


def steady(per_second: float) -> Curve:
    """A counter that rises so fast."""
    return lambda t: per_second * t


def turning(before: float, after: float, at: float) -> Curve:
    """A counter that rises so fast before *at* seconds, and otherwise after it."""
    return lambda t: before * min(t, at) + after * max(0.0, t - at)


def stepping(before: float, after: float, at: float) -> Curve:
    """A gauge that has one value before *at* seconds, and another from then on."""
    return lambda t: before if t < at else after


@dataclass(frozen=True)
class Life:
    """A replica's time, in seconds; where *restarts_every* is given its process is a new one so often."""

    pod: str
    born: float = 0
    dies: float = math.inf
    restarts_every: float | None = None

    def process_born(self, t: float) -> float:
        """When the process that runs at *t* began."""
        if self.restarts_every is None:
            return self.born
        return self.born + (t - self.born) // self.restarts_every * self.restarts_every


@dataclass(frozen=True)
class World:
    """How replicas live and how they are scraped.

    `steady` is undisturbed. In the others every fourth scrape of each target fails; in `pods` all replicas but the
    first are replaced by new ones every *change_seconds*, in `resets` every process is.
    """

    kind: str
    interval: int
    change_seconds: int = 420

    def __str__(self) -> str:
        return f"{self.kind}, a scrape every {self.interval} s"

    def lives(self, seconds: float, replicas: int = 3) -> Sequence[tuple[int, Life]]:
        """Whose place each is (0 to *replicas* - 1), and each life; every place is always filled."""
        if self.kind == "resets":
            return [(n, Life(f"p{n}", restarts_every=self.change_seconds)) for n in range(replicas)]
        if self.kind != "pods":
            return [(n, Life(f"p{n}")) for n in range(replicas)]
        lives = [(0, Life("p0"))]
        for n in range(1, replicas):
            born, name = 0.0, 0
            while born < seconds:
                dies = born + self.change_seconds + (60 * n if name == 0 else 0)
                lives.append((n, Life(f"p{n}-{name}", born, dies)))
                born, name = dies, name + 1
        return lives

    def scraped(
        self,
        job: str,
        place: int,
        life: Life,
        metrics: Iterable[Metric],
        seconds: float,
        answers: Callable[[float], bool] = lambda _: True,
    ) -> Series:
        """The series of a replica, and its `up`; *answers*: at which seconds it does."""
        times = range(0, int(seconds) + 1, self.interval)
        pod = f"{job}-{life.pod}"
        target = {"namespace": "shop", "job": job, "pod": pod, "instance": f"{pod}:8000"}

        def sample(metric: Metric | None, number: int, t: float) -> str:
            if t < life.born:
                return _NOTHING
            if t >= life.dies:
                return _STALE if t < life.dies + self.interval else _NOTHING
            unlucky = self.kind != "steady" and (number + place) % _MISS == _MISS - 1
            missed = unlucky or not answers(t)
            if metric is None:
                return "0" if missed else "1"
            if missed:
                return _STALE
            value = metric.value(t)
            if metric.counter:
                value -= metric.value(life.process_born(t))
            return f"{value:.6f}".rstrip("0").rstrip(".")

        def line(metric: Metric | None) -> str:
            return " ".join(sample(metric, number, t) for number, t in enumerate(times))

        series = {selector("up", target): line(None)}
        for metric in metrics:
            series[selector(metric.name, {**target, **metric.labels})] = line(metric)
        return series


def selector(name: str, labels: Mapping[str, str]) -> str:
    """A series as PromQL writes it."""
    inside = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return f"{name}{{{inside}}}"


def merged(*parts: Series) -> Series:
    """All of them, as one."""
    return {name: values for part in parts for name, values in part.items()}


def judge(
    directory: Path,
    tests: Sequence[Mapping[str, Any]],
    *,
    evaluation_seconds: int,
    rules: Path = RULES,
    alert: str | None = None,
) -> None:
    """`promtool test rules`, of *alert* and what it reads or of all; what it says is the failure."""
    groups = [
        group for file in sorted(rules.glob("*.yml")) for group in yaml.safe_load(file.read_text())["groups"]
    ]
    if alert is not None:
        groups = [
            {**group, "rules": kept} for group in groups if (kept := _read_by(alert, group["rules"], groups))
        ]
    names = {group["name"] for group in groups}
    order = dict.fromkeys(rule.group for rule in [*recording_rules(), *alerting_rules()])
    (directory / "rules.json").write_text(json.dumps({"groups": groups}))
    path = directory / "test.json"
    path.write_text(
        json.dumps(
            {
                "rule_files": ["rules.json"],
                "evaluation_interval": f"{evaluation_seconds}s",
                "group_eval_order": [name for name in order if name in names],  # figures before their readers
                "tests": list(tests),
            }
        )
    )
    run("promtool", "test", "rules", path)


def _read_by(
    alert: str, rules: Sequence[Mapping[str, Any]], groups: Sequence[Any]
) -> list[Mapping[str, Any]]:
    """Of *rules* those that are *alert*, and those whose series it reads, directly or not."""
    everything = [rule for group in groups for rule in group["rules"]]
    names, found = set[str](), {alert}
    while found:
        names |= found
        read = {
            name
            for rule in everything
            if {rule.get("alert"), rule.get("record")} & found
            for name in metric_names(rule["expr"])
        }
        found = read - names
    return [rule for rule in rules if {rule.get("alert"), rule.get("record")} & names]


def as_input(series: Series) -> list[Mapping[str, str]]:
    """The series as promtool reads them."""
    return [{"series": name, "values": values} for name, values in series.items()]


def run(*command: object) -> None:
    """Run *command*; it must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, re.sub(r"\n\s*\n", "\n", done.stdout + done.stderr)
