"""Two builds side by side: a difference is claimed only where it is beyond the noise.

Noise is known in one of two ways: from at least five runs a side (exact rank test), or, with fewer, from the A/A noise
floor of this machine: how far runs of one build lay apart, stored whenever five or more were made (`RUNS=5`).
Calibration work before and after each run tells what the machine itself changed by; no more is claimed than exceeds
that. "No difference that these runs can show" is an answer.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from loadtests.comparing.rank_statistics import holm, mann_whitney, ratio_interval, student_quantile
from loadtests.quantities import change, quantity
from loadtests.run_record import Latency, RunRecord

RUNS_NEEDED = 5  # a side: with fewer no order of the runs is rare enough to survive Holm's correction
FLOOR_FILE = "noise-floor.json"
SIDES_FILE = "comparison.json"

_ALPHA = 0.05

Claim = Literal["better", "worse", "no difference", "cannot tell"]


@dataclass(frozen=True)
class Metric:
    """Something that two builds are compared by."""

    name: str
    title: str
    unit: str
    of: Callable[[RunRecord], float | None]
    more_is_better: bool = False


# Six, not more: complete separation of five runs from five has p = 2/252, which survives six comparisons at 5 %.
METRICS = (
    Metric(
        "orders_per_second", "Orders per second", "/s", lambda r: r.orders_per_second, more_is_better=True
    ),
    Metric("mean_ms", "Average response time", "ms", lambda r: r.acknowledged.mean_ms),
    Metric("p50_ms", "50th percentile", "ms", lambda r: r.acknowledged.p50_ms),
    Metric("p95_ms", "95th percentile", "ms", lambda r: r.acknowledged.p95_ms),
    Metric("p99_ms", "99th percentile", "ms", lambda r: r.acknowledged.p99_ms),
    Metric("cpu_us_per_order", "Service CPU per order", "µs", lambda r: r.server.cpu_us_per_order),
)


@dataclass(frozen=True)
class Run:
    """A run and what its directory is called."""

    name: str
    record: RunRecord


@dataclass(frozen=True)
class NoiseFloor:
    """How far runs of one build lay apart on one machine under one load."""

    machine: Mapping[str, str]
    load: Mapping[str, str]
    runs: int
    deviation: Mapping[str, float]  # of the logarithm of each metric

    def limit(self, metric: str, baseline_runs: int, candidate_runs: int) -> float | None:
        """The largest |log ratio| of two sides' medians that is still noise, all metrics taken together.

        A prediction interval for the difference of new runs (Student's t), with Bonferroni's correction.
        """
        if metric not in self.deviation:
            return None
        quantile = student_quantile(1 - _ALPHA / len(METRICS) / 2, self.runs - 1)
        return quantile * self.deviation[metric] * math.sqrt(1 / baseline_runs + 1 / candidate_runs)


@dataclass(frozen=True)
class Row:
    """One metric of both sides."""

    name: str
    title: str
    unit: str
    baseline: float  # the median of its runs; so is the candidate
    candidate: float
    ratio: float  # candidate / baseline
    low: float | None  # of the ratio; None: not known how far it is to be trusted
    high: float | None
    p: float | None  # after Holm's correction; None: no rank test
    claim: Claim


@dataclass(frozen=True)
class Comparison:
    """What can be said of two sides, and how."""

    baseline: tuple[str, ...]  # names of runs
    candidate: tuple[str, ...]
    method: Literal["rank test", "noise floor", "none"]
    explanation: str  # of the method, or why there is none
    drift: float | None  # what the calibration work took, candidate / baseline
    rows: tuple[Row, ...]
    changed: tuple[tuple[str, str, str], ...]  # what, baseline, candidate: of commit, versions, settings
    baseline_latency: Latency  # of the baseline's middle run, to be drawn

    @property
    def conclusion(self) -> str:
        """The answer in a sentence."""
        said = [
            f"{row.title} {row.claim} ({change(row.ratio)})"
            for row in self.rows
            if row.claim in ("better", "worse")
        ]
        if said:
            return "Beyond the noise: " + "; ".join(said) + "."
        if self.method == "none":
            return f"Cannot tell: {self.explanation}."
        return "No difference that these runs can show."


def compare(
    baseline: Sequence[Run], candidate: Sequence[Run], floors: Iterable[NoiseFloor] = ()
) -> Comparison:
    """Hold *candidate* against *baseline*, each one or more runs of one build."""
    first, second = [run.record for run in baseline], [run.record for run in candidate]
    drift = _drift(first, second)
    floor = _floor_for(first, second, floors)
    trouble = _trouble(baseline, candidate)
    method: Literal["rank test", "noise floor", "none"] = "none"
    if trouble:
        explanation = trouble
    elif min(len(first), len(second)) >= RUNS_NEEDED:
        method = "rank test"
        explanation = (
            f"{len(first)} runs against {len(second)}: exact Mann-Whitney test at 5 %, corrected for {len(METRICS)} "
            "metrics (Holm); the change is the middle of all pairs' ratios, with its 95 % interval (Hodges-Lehmann)"
        )
    elif floor:
        method = "noise floor"
        explanation = (
            f"{len(first)} run{'s' * (len(first) > 1)} against {len(second)}: what lies beyond the spread of "
            f"{floor.runs} runs of one build on this machine"
        )
    else:
        explanation = (
            f"{len(first)} run{'s' * (len(first) > 1)} against {len(second)}, and no noise floor of this machine "
            f"under this load; RUNS={RUNS_NEEDED} measures it"
        )
    return Comparison(
        baseline=tuple(run.name for run in baseline),
        candidate=tuple(run.name for run in candidate),
        method=method,
        explanation=explanation,
        drift=drift,
        rows=tuple(_rows(first, second, method, floor, drift)),
        changed=tuple(_changed(first[-1], second[-1])),
        baseline_latency=sorted((r.acknowledged for r in first), key=lambda one: one.mean_ms or 0.0)[
            len(first) // 2
        ],
    )


def _rows(
    first: Sequence[RunRecord],
    second: Sequence[RunRecord],
    method: str,
    floor: NoiseFloor | None,
    drift: float | None,
) -> Iterable[Row]:
    measured = []
    for metric in METRICS:
        before, after = _values(metric, first), _values(metric, second)
        if before and after:
            measured.append((metric, before, after))
    p_values: Sequence[float | None] = [None] * len(measured)
    if method == "rank test":
        p_values = holm([mann_whitney(before, after) for _, before, after in measured])
    for (metric, before, after), p in zip(measured, p_values, strict=True):
        baseline, candidate = statistics.median(before), statistics.median(after)
        ratio, low, high = candidate / baseline, None, None
        if method == "rank test" and (interval := ratio_interval(before, after)):
            low, ratio, high = interval
        elif method == "noise floor" and floor:
            limit = floor.limit(metric.name, len(before), len(after))
            if limit is not None:
                low, high = ratio / math.exp(limit), ratio * math.exp(limit)
        yield Row(
            name=metric.name,
            title=metric.title,
            unit=metric.unit,
            baseline=baseline,
            candidate=candidate,
            ratio=ratio,
            low=low,
            high=high,
            p=p,
            claim=_claim(metric, low, high, p, drift),
        )


def _claim(
    metric: Metric, low: float | None, high: float | None, p: float | None, drift: float | None
) -> Claim:
    if low is None or high is None:
        return "cannot tell"
    if p is not None and p >= _ALPHA:
        return "no difference"
    machine = max(drift, 1 / drift) if drift else 1.0  # it may have moved a metric either way
    if 1 / machine <= high and low <= machine:
        return "no difference" if low <= 1 <= high else "cannot tell"
    return "better" if (low > 1) == metric.more_is_better else "worse"


def _values(metric: Metric, records: Iterable[RunRecord]) -> list[float]:
    """Of every run that has it; none where one lacks it: the rest would be a selection."""
    values = [metric.of(record) for record in records]
    return [value for value in values if value] if all(values) else []


def load_of(record: RunRecord) -> Mapping[str, str]:
    """What must be the same for two runs to be comparable."""
    return {
        "profile": record.profile,
        "model": record.model,
        "users": str(record.users),
        "wait": "{:g} to {:g} s".format(*record.wait_seconds),
        "offered": quantity(record.offered_per_second, "/s") if record.offered_per_second else "closed model",
        "duration": f"{record.planned_seconds:g} s",
    }


def machine_of(record: RunRecord) -> Mapping[str, str]:
    """What the noise floor belongs to."""
    machine = record.environment.machine
    return {name: str(machine.get(name)) for name in ("cpu", "cores", "memory_bytes")}


def _trouble(baseline: Sequence[Run], candidate: Sequence[Run]) -> str:
    """Why the sides cannot be compared; empty: they can."""
    for run in (*baseline, *candidate):
        if run.record.verdict == "INVALID":
            return f"{run.name} is INVALID, and its figures mean nothing"
        if not run.record.complete:
            return f"{run.name} was ended before its time"
    expected = baseline[0].record
    for run in (*baseline, *candidate):
        for what, mine, other in (
            ("load", load_of(expected), load_of(run.record)),
            ("machine", machine_of(expected), machine_of(run.record)),
        ):
            if mine != other:
                apart = ", ".join(
                    f"{name} {mine[name]} and {other[name]}" for name in mine if mine[name] != other[name]
                )
                return f"not the same {what}: {apart}"
    return ""


def _drift(first: Iterable[RunRecord], second: Iterable[RunRecord]) -> float | None:
    def typical(records: Iterable[RunRecord]) -> float | None:
        seconds = [
            seconds
            for record in records
            for seconds in (record.calibration.before_seconds, record.calibration.after_seconds)
            if seconds is not None
        ]
        return statistics.median(seconds) if seconds else None

    before, after = typical(first), typical(second)
    return after / before if before and after else None


def _changed(first: RunRecord, second: RunRecord) -> Iterable[tuple[str, str, str]]:
    def flat(record: RunRecord) -> dict[str, str]:
        environment = record.environment
        parts: Mapping[str, Mapping[str, Any]] = {
            "": {"commit": environment.commit, "target": record.target},
            "version of ": environment.versions,
            "database setting ": environment.database,
            "dataset, ": environment.dataset,
        }
        return {
            f"{part}{name}": str(value) for part, values in parts.items() for name, value in values.items()
        }

    before, after = flat(first), flat(second)
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name) and name != "target":
            yield name, before.get(name, "-"), after.get(name, "-")


def measure_floor(records: Sequence[RunRecord]) -> NoiseFloor | None:
    """The noise floor that runs of one build show; None: too few, or not fit to be compared."""
    if len(records) < RUNS_NEEDED or any(r.verdict == "INVALID" or not r.complete for r in records):
        return None
    if any(load_of(r) != load_of(records[0]) or machine_of(r) != machine_of(records[0]) for r in records):
        return None
    deviation = {}
    for metric in METRICS:
        if values := _values(metric, records):
            deviation[metric.name] = statistics.stdev(map(math.log, values))
    return NoiseFloor(machine_of(records[0]), load_of(records[0]), len(records), deviation)


_FLOORS = TypeAdapter(tuple[NoiseFloor, ...])


def read_floors(results: Path) -> tuple[NoiseFloor, ...]:
    """What is stored in *results*; nothing where there is none, or it cannot be read."""
    try:
        return _FLOORS.validate_json((results / FLOOR_FILE).read_bytes())
    except (OSError, ValidationError):
        return ()


def store_floor(results: Path, floor: NoiseFloor) -> None:
    """Keep *floor*, in place of an older one of the same machine and load."""
    others = [f for f in read_floors(results) if (f.machine, f.load) != (floor.machine, floor.load)]
    partial = results / f"{FLOOR_FILE}.partial"
    partial.write_bytes(_FLOORS.dump_json((*others, floor), indent=1))
    partial.rename(results / FLOOR_FILE)


def _floor_for(
    first: Sequence[RunRecord], second: Sequence[RunRecord], floors: Iterable[NoiseFloor]
) -> NoiseFloor | None:
    wanted = machine_of(second[-1]), load_of(second[-1])
    if (machine_of(first[-1]), load_of(first[-1])) != wanted:
        return None
    return next((floor for floor in floors if (floor.machine, floor.load) == wanted), None)


def read_run(directory: Path) -> Run:
    """The run in *directory*, or whose `report.json` it is.

    Raises:
        OSError, pydantic.ValidationError: there is no run, or none of this form.
    """
    file = directory if directory.is_file() else directory / "report.json"
    return Run(file.resolve().parent.name, RunRecord.from_json(file.read_bytes()))


def read_side(directory: Path) -> list[Run]:
    """The run in *directory* and the others made in one go with it (`RUNS=n`)."""
    run = read_run(directory)
    folder = directory.resolve().parent if directory.is_file() else directory.resolve()
    try:
        names = json.loads((folder / SIDES_FILE).read_bytes())["runs"]
        return [read_run(folder.parent / name) for name in names if name != run.name] + [run]
    except (OSError, ValueError, KeyError):
        return [run]


def last_side(results: Path, candidate: Sequence[Run]) -> list[Run]:
    """The runs in *results* to compare with unless others are named: the last of the same load that counts."""
    own, newest = {run.name for run in candidate}, candidate[-1].record
    earlier = []
    for file in results.glob(f"{newest.profile}-*/report.json"):
        if file.parent.name in own:
            continue
        try:
            run = read_run(file)
        except (OSError, ValidationError):
            continue
        before = run.record.started_at < candidate[0].record.started_at
        if (
            before
            and run.record.complete
            and run.record.verdict != "INVALID"
            and load_of(run.record) == load_of(newest)
        ):
            earlier.append(run)
    if not earlier:
        return []
    return read_side(results / max(earlier, key=lambda run: run.record.started_at).name)


def find(baseline: str | Path, results: Path) -> Path:
    """The directory that *baseline* means: a path, or the name of a run in *results*.

    Raises:
        FileNotFoundError: there is no such run.
    """
    for path in (Path(baseline), results / baseline):
        if path.is_file() or (path / "report.json").is_file():
            return path
    raise FileNotFoundError(f"BASELINE={baseline}: no run of that name, neither here nor in {results}")


def compare_run(
    record: RunRecord, directory: Path, *, baseline: str | Path | None = None, earlier: Sequence[Path] = ()
) -> Comparison | None:
    """Compare the run in *directory*, and *earlier* ones of the same build, and write down what came of it.

    Five and more runs of a build, if they are fit for it, become this machine's noise floor under their load.

    Args:
        baseline: a run's directory or name; None: the last run before them of the same load in the same folder.
        earlier: directories of runs made in one go with this one.

    Returns:
        None: there is nothing to compare with.

    Raises:
        FileNotFoundError: there is no such baseline.
    """
    results = directory.resolve().parent
    candidate = [*map(read_run, earlier), Run(directory.resolve().name, record)]
    floors = read_floors(results)
    side = read_side(find(baseline, results)) if baseline else last_side(results, candidate)
    comparison = compare(side, candidate, floors) if side else None
    if floor := measure_floor([run.record for run in candidate]):
        store_floor(results, floor)
    document: dict[str, Any] = {"runs": [run.name for run in candidate]}
    if comparison:
        document |= {"conclusion": comparison.conclusion, **asdict(comparison)}
        del document["baseline_latency"]  # it is in that run's own report
    (directory / SIDES_FILE).write_text(json.dumps(document, indent=1))
    return comparison
