"""The noise of a machine: how far runs of one build lie apart there."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from loadtests.comparing.figures import METRICS, values_of
from loadtests.comparing.rank_statistics import student_quantile
from loadtests.comparing.stored_runs import load_of, machine_of
from loadtests.run_record import RunRecord

RUNS_NEEDED = 5  # a side: with fewer no order of the runs is rare enough to survive Holm's correction
FLOOR_FILE = "noise-floor.json"
ALPHA = 0.05


@dataclass(frozen=True)
class NoiseFloor:
    """The spread of runs of one build on one machine under one load."""

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
        quantile = student_quantile(1 - ALPHA / len(METRICS) / 2, self.runs - 1)
        return quantile * self.deviation[metric] * math.sqrt(1 / baseline_runs + 1 / candidate_runs)


def measure_floor(records: Sequence[RunRecord]) -> NoiseFloor | None:
    """The noise floor that runs of one build show; None: too few, or not fit to be compared."""
    if len(records) < RUNS_NEEDED or any(r.verdict == "INVALID" or not r.complete for r in records):
        return None
    if any(load_of(r) != load_of(records[0]) or machine_of(r) != machine_of(records[0]) for r in records):
        return None
    deviation = {}
    for metric in METRICS:
        if values := values_of(metric, records):
            deviation[metric.name] = statistics.stdev(map(math.log, values))
    return NoiseFloor(machine_of(records[0]), load_of(records[0]), len(records), deviation)


_FLOORS = TypeAdapter(tuple[NoiseFloor, ...])


def read_floors(results: Path) -> tuple[NoiseFloor, ...]:
    """The floors stored in *results*; none where the file is missing or cannot be read."""
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


def floor_for(
    first: Sequence[RunRecord], second: Sequence[RunRecord], floors: Iterable[NoiseFloor]
) -> NoiseFloor | None:
    """The one of *floors* that was measured on the machine and under the load of both sides."""
    wanted = machine_of(second[-1]), load_of(second[-1])
    if (machine_of(first[-1]), load_of(first[-1])) != wanted:
        return None
    return next((floor for floor in floors if (floor.machine, floor.load) == wanted), None)
