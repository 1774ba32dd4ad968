"""The alerts of a run, from what a Prometheus remembers of it: this service's, and begun in the run."""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.samples import Window
from loadtests.service_side.prometheus import Instance, Matrix, Prometheus, instance

RULES = Path(__file__).parents[2] / "monitoring" / "prometheus" / "rules"

_ALERTS = "ALERTS"
_LOOK_BACK_SECONDS = 300.0  # for alerts that had begun before the run
_SAME_SECONDS = 150.0  # between two evaluations of an alert that went on: a minute, and one that was missed
_MOST_MISSED_SCRAPES = 5
_LEAST_GAP_SECONDS = 15.0


@dataclass(frozen=True)
class Alerts:
    """The alerts of a run, by severity; None: not known, and `trouble` says why."""

    critical: tuple[str, ...] | None = None
    warning: tuple[str, ...] | None = None
    before: tuple[str, ...] = ()  # that fired already when it began
    trouble: str = ""


def our_rules(folder: Path = RULES) -> frozenset[str]:
    """The names of the alerts that this project ships; none where they are not at hand."""
    return frozenset(
        name
        for path in sorted(folder.glob("*.yml"))
        for name in re.findall(r"^\s*-?\s*alert:\s*['\"]?(\w+)", path.read_text(), re.MULTILINE)
    )


def alerts_of(
    prometheus: Prometheus, run: Window, ours: Collection[Instance], others: Collection[str]
) -> Alerts:
    """The alerts that began in *run*.

    Args:
        ours: the instances that are tested.
        others: jobs of other order services, whose alerts are not ours.

    Raises:
        PrometheusError: it does not answer.
    """
    names = our_rules()
    if trouble := _not_ready(prometheus, names) or _asleep(prometheus, run, ours):
        return Alerts(trouble=trouble)
    since = Window(run.start - _LOOK_BACK_SECONDS, run.end)
    found: dict[str, set[str]] = {"critical": set(), "warning": set()}
    before = set()
    for labels, stretches in _stretches(prometheus.samples(_ALERTS, since)).items():
        shown = dict(labels)
        name, severity = shown.get("alertname", ""), shown.get("severity", "")
        if severity not in found or not _is_ours(shown, names, ours, others):
            continue
        for began, fired in stretches:
            if fired and began <= run.start:
                before.add(name)
            elif fired:
                found[severity].add(name)  # of several replicas one
    return Alerts(tuple(sorted(found["critical"])), tuple(sorted(found["warning"])), tuple(sorted(before)))


def _not_ready(prometheus: Prometheus, names: Collection[str]) -> str:
    """Why nothing could have fired; empty: it could."""
    health = prometheus.alerting_rules()
    if missing := sorted(set(names) - health.keys()):
        return f"{prometheus.url} has not loaded these alerts: {', '.join(missing)} ({RULES.name}/)"
    if not health:
        return f"{prometheus.url} has no alerts"
    if sick := sorted(name for name, its in health.items() if its != "ok" and name in (names or health)):
        return f"{prometheus.url} could not evaluate: {', '.join(sick)}"
    return ""


def _asleep(prometheus: Prometheus, run: Window, ours: Collection[Instance]) -> str:
    """Why something could have been missed; empty: it was there all the time."""
    jobs = {job for job, _ in ours}
    targets = prometheus.samples("up", run)
    times = sorted({at for labels, samples in targets if labels.get("job") in jobs for at, _ in samples})
    if len(times) < 2:  # noqa: PLR2004 - a distance needs two
        return "" if run.seconds < _LEAST_GAP_SECONDS else f"{prometheus.url} scraped nothing in the run"
    between = sorted(after - before for before, after in itertools.pairwise(times))
    usual = between[(len(between) - 1) // 2]
    longest = max(between[-1], times[0] - run.start, run.end - times[-1])
    if longest > max(_LEAST_GAP_SECONDS, _MOST_MISSED_SCRAPES * usual):
        return f"{prometheus.url} did not run for {longest:.0f} s of the run"
    return ""


def _stretches(matrix: Matrix) -> Mapping[tuple[tuple[str, str], ...], Sequence[tuple[float, bool]]]:
    """By the labels of an alert: when each time that it was pending or firing began, and whether it fired then."""
    samples: dict[tuple[tuple[str, str], ...], list[tuple[float, bool]]] = {}
    for labels, values in matrix:
        its = tuple(sorted((k, v) for k, v in labels.items() if k not in ("alertstate", "__name__")))
        firing = labels.get("alertstate") == "firing"
        samples.setdefault(its, []).extend((at, firing) for at, _ in values)
    found: dict[tuple[tuple[str, str], ...], list[tuple[float, bool]]] = {}
    for its, seen in samples.items():
        stretches: list[tuple[float, bool]] = []
        last = float("-inf")
        for at, fires in sorted(seen):
            if at - last > _SAME_SECONDS:
                stretches.append((at, fires))
            else:
                began, fired = stretches[-1]
                stretches[-1] = (began, fired or fires)
            last = at
        found[its] = stretches
    return found


def _is_ours(
    labels: Mapping[str, str],
    names: Collection[str],
    ours: Collection[Instance],
    others: Collection[str],
) -> bool:
    job = labels.get("job")
    if job in others:
        return False
    if "instance" in labels and job in {job for job, _ in ours}:
        return instance(labels) in ours
    return labels.get("alertname") in names or job in {job for job, _ in ours}
