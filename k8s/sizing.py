"""`python -m k8s.sizing` writes the table of replicas in k8s/README.md, from the figures of `make bench`.

The HPA's documented algorithm, in a loop with replicas whose CPU follows from the rate of orders as it was measured.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # it has no annotations of its own

from loadtests import marked_block
from loadtests.quantities import number
from loadtests.users.profiles import NORMAL, PEAK, STRESS, Profile

README = Path(__file__).with_name("README.md")
_HPA = Path(__file__).parent / "base" / "horizontal-pod-autoscaler.yaml"
HEADINGS = ("load", "orders/s", "CPU of each of three", "replicas", "where a core is half as fast")
CONTROL_SECONDS = 15  # --horizontal-pod-autoscaler-sync-period
TOLERANCE = 0.1  # --horizontal-pod-autoscaler-tolerance
READING_SECONDS = 15  # metrics-server's resolution
START_SECONDS = 20  # until a replica is ready, and counts


@dataclass(frozen=True)
class Autoscaler:
    """What the HPA's manifest says."""

    fewest: int
    most: int
    target_percent: float
    up_pods: int  # per period
    up_percent: float
    up_period_seconds: float
    down_pods: int
    down_period_seconds: float
    down_stabilization_seconds: float


def autoscaler(manifest: Mapping[str, Any]) -> Autoscaler:
    """The figures of a HorizontalPodAutoscaler."""
    spec = manifest["spec"]
    up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
    ups = {policy["type"]: policy for policy in up["policies"]}
    (falls,) = down["policies"]
    return Autoscaler(
        fewest=spec["minReplicas"],
        most=spec["maxReplicas"],
        target_percent=spec["metrics"][0]["resource"]["target"]["averageUtilization"],
        up_pods=ups["Pods"]["value"],
        up_percent=ups["Percent"]["value"],
        up_period_seconds=ups["Pods"]["periodSeconds"],
        down_pods=falls["value"],
        down_period_seconds=falls["periodSeconds"],
        down_stabilization_seconds=down["stabilizationWindowSeconds"],
    )


def desired_replicas(current: int, utilization_percent: float, target_percent: float) -> int:
    """The HPA's documented rule: in proportion to how far the mean is off, but for a tenth either way."""
    ratio = utilization_percent / target_percent
    if abs(ratio - 1) <= TOLERANCE:
        return current
    return math.ceil(current * ratio)


def replicas_over_time(
    scaler: Autoscaler,
    offered: Callable[[float], float],
    cpu_percent: Callable[[float], float],
    seconds: float,
) -> Iterator[tuple[float, int, float]]:
    """Time, ready replicas and the CPU of each, at every decision of the controller.

    Args:
        offered: orders per second that come at a time.
        cpu_percent: of one core, that a replica spends on so many orders per second.
    """
    ready = scaler.fewest
    starting: list[float] = []  # when each of them will be ready
    wishes: list[tuple[float, int]] = []
    changes: list[tuple[float, int]] = []  # when, and by how many
    reading = 0.0
    for step in range(int(seconds / CONTROL_SECONDS)):
        now = float(step * CONTROL_SECONDS)
        ready += sum(at <= now for at in starting)
        starting = [at for at in starting if at > now]
        total = ready + len(starting)
        # The controller sees a reading that may be as old as two of metrics-server's.
        seen, reading = reading, cpu_percent(offered(now) / ready)
        yield now, ready, reading
        wish = desired_replicas(ready, seen, scaler.target_percent) if seen else total
        if starting and wish > ready:
            # Those that are not ready count as idle on the way up: they will take their share.
            wish = max(total, desired_replicas(total, seen * ready / total, scaler.target_percent))
        wishes.append((now, wish))
        recent = [one for at, one in wishes if now - at <= scaler.down_stabilization_seconds]
        wanted = wish if wish > total else min(total, max(recent))
        wanted = min(scaler.most, max(scaler.fewest, _paced(scaler, changes, now, total, wanted)))
        if wanted > total:
            starting += [now + START_SECONDS] * (wanted - total)
        elif wanted < total and not starting:
            ready -= total - wanted
        if wanted != total:
            changes.append((now, wanted - total))


def _paced(
    scaler: Autoscaler, changes: Sequence[tuple[float, int]], now: float, total: int, wanted: int
) -> int:
    """*wanted* within what the policies allow of the period that has passed."""
    added = sum(by for at, by in changes if by > 0 and now - at < scaler.up_period_seconds)
    removed = -sum(by for at, by in changes if by < 0 and now - at < scaler.down_period_seconds)
    start = total - added
    most = max(start + scaler.up_pods, math.ceil(start * (1 + scaler.up_percent / 100)))
    return max(total + removed - scaler.down_pods, min(wanted, most))


def settled(scaler: Autoscaler, orders_per_second: float, cpu_percent: Callable[[float], float]) -> int:
    """The replicas that a steady rate comes to, from the fewest on."""
    *_, (_, ready, _) = replicas_over_time(scaler, lambda _: orders_per_second, cpu_percent, 1800)
    return ready


def measured_cpu(bench: str, *, slowness: float = 1.0) -> Callable[[float], float]:
    """Percent of one core by orders per second of one replica, between the points that *bench* measured.

    Args:
        bench: the block that `make bench` writes; its rows of the service, for one and for more connections.
        slowness: how much longer a core takes than there.
    """
    orders = "".join(
        re.findall(r"^\*\*\d+ connections?: .*?durable order.*?(?=^\*\*|\Z)", bench, re.MULTILINE | re.DOTALL)
    )
    rows = re.findall(r"^\| service \| ([\d,]+) \| [\d.,]+ \| [\d.,]+ \| ([\d,]+) \|", orders, re.MULTILINE)
    points = [(0.0, 0.0)]
    for rate, cost in sorted((float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in rows):
        points.append((rate, rate * cost / 1e4 * slowness))

    def percent(rate: float) -> float:
        for (left, low), (right, high) in itertools.pairwise(points):
            if rate <= right:
                return min(100.0, low + (rate - left) / (right - left) * (high - low))
        return min(100.0, points[-1][1] * rate / points[-1][0])

    return percent


def offered_rate(profile: Profile) -> float:
    """Orders per second of a profile's users where the answer takes no time: the most that they can send."""
    least, most = profile.wait_seconds
    return profile.users / ((least + most) / 2)


def table(scaler: Autoscaler, bench: str) -> str:
    """The table of the README."""
    here, half = measured_cpu(bench), measured_cpu(bench, slowness=2.0)
    loads = [
        (f"{profile.name}, {profile.users:,} users", offered_rate(profile))
        for profile in (NORMAL, PEAK, STRESS)
    ]
    loads.append(("three times the stress load", 3 * offered_rate(STRESS)))
    rows = []
    for name, rate in loads:
        share = here(rate / scaler.fewest)
        counts = [str(settled(scaler, rate, cpu)) for cpu in (here, half)]
        rows.append([name, number(rate), f"{share:.0f} %", *counts])
    return marked_block.markdown_table(HEADINGS, rows)


def current_table() -> str:
    """The table as the manifest and the last `make bench` have it."""
    bench = marked_block.content_of(marked_block.README.read_text(), "bench")
    return table(autoscaler(yaml.safe_load(_HPA.read_text())), bench)


if __name__ == "__main__":
    README.write_text(marked_block.replaced(README.read_text(), "sizing", current_table()))
