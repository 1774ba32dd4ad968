"""Runs whose records are kept: one, those of one side, the last that a new run can be compared with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from loadtests.quantities import quantity
from loadtests.run_record import RunRecord

SIDES_FILE = "comparison.json"


@dataclass(frozen=True)
class Run:
    """A run and what its directory is called."""

    name: str
    record: RunRecord


def load_of(record: RunRecord) -> Mapping[str, str]:
    """The load, which must be the same for two runs to be comparable."""
    return {
        "profile": record.profile,
        "model": record.model,
        "users": str(record.users),
        "replicas": str(len(record.server.replicas)),
        "wait": "{:g} to {:g} s".format(*record.wait_seconds),
        "offered": quantity(record.offered_per_second, "/s") if record.offered_per_second else "closed model",
        "duration": f"{record.planned_seconds:g} s",
    }


def machine_of(record: RunRecord) -> Mapping[str, str]:
    """The machine, to which a noise floor belongs."""
    machine = record.environment.machine
    return {name: str(machine.get(name)) for name in ("cpu", "cores", "memory_bytes")}


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
