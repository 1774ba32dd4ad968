"""Two builds side by side: a difference is claimed only where it is beyond the noise.

What a machine does in one hour says nothing of another: a difference is claimed only between runs that took turns
(`make compare A=... B=...`). Their noise is known in one of two ways: from at least five runs a side (exact rank test),
or, with fewer, from the A/A noise floor of this machine: how far runs of one build lay apart, stored whenever five or
more were made (`RUNS=5`).
Calibration work before and after each run tells what the machine itself changed by; no more is claimed than exceeds
that. "No difference that these runs can show" is an answer.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from loadtests.comparing.figures import METRICS, Metric, values_of
from loadtests.comparing.noise_floor import (
    ALPHA,
    RUNS_NEEDED,
    NoiseFloor,
    floor_for,
    measure_floor,
    read_floors,
    store_floor,
)
from loadtests.comparing.rank_statistics import holm, mann_whitney, ratio_interval
from loadtests.comparing.stored_runs import (
    SIDES_FILE,
    Run,
    find,
    last_side,
    load_of,
    machine_of,
    read_run,
    read_side,
)
from loadtests.quantities import change
from loadtests.run_record import Latency, RunRecord

_SOON_SECONDS = 600.0  # from the end of a run to the start of the other side's

Claim = Literal["better", "worse", "no difference", "cannot tell"]


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
    """Two sides, the difference that can be claimed, and how it is known."""

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
    floor = floor_for(first, second, floors)
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
        before, after = values_of(metric, first), values_of(metric, second)
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
    if p is not None and p >= ALPHA:
        return "no difference"
    machine = max(drift, 1 / drift) if drift else 1.0  # it may have moved a metric either way
    if 1 / machine <= high and low <= machine:
        return "no difference" if low <= 1 <= high else "cannot tell"
    return "better" if (low > 1) == metric.more_is_better else "worse"


def _trouble(baseline: Sequence[Run], candidate: Sequence[Run]) -> str:
    """The reason why the sides cannot be compared; empty: they can."""
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
    if not took_turns([run.record for run in baseline], [run.record for run in candidate]):
        return "the two sides did not take turns, and runs of different hours say nothing (make compare A=... B=...)"
    return ""


def took_turns(first: Sequence[RunRecord], second: Sequence[RunRecord]) -> bool:
    """True where runs of the two sides followed each other, as often as the smaller side allows, and soon."""
    runs = sorted(
        (datetime.fromisoformat(record.started_at).timestamp(), side, record.planned_seconds)
        for side, records in enumerate((first, second))
        for record in records
    )
    turns = [
        after - before <= seconds + _SOON_SECONDS
        for (before, side, seconds), (after, other, _) in itertools.pairwise(runs)
        if side != other
    ]
    return all(turns) and len(turns) >= min(len(first), len(second))


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
