"""The HPA's documented algorithm with the manifest's figures and the measured cost of an order."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # it has no annotations of its own

from k8s import sizing
from k8s.sizing import Autoscaler, desired_replicas, measured_cpu, offered_rate, replicas_over_time
from loadtests import marked_block
from loadtests.users.profiles import NORMAL, PEAK, STRESS

K8S = Path(sizing.__file__).parent
BENCH = marked_block.content_of(marked_block.README.read_text(), "bench")
MINUTE = 60
SLOWER = [1.0, 1.5, 2.0, 3.0]


@pytest.fixture
def scaler() -> Autoscaler:
    return sizing.autoscaler(yaml.safe_load((K8S / "base" / "horizontal-pod-autoscaler.yaml").read_text()))


@pytest.mark.parametrize(
    ("current", "utilization", "target", "expected"),
    [
        pytest.param(1, 200, 100, 2, id="twice-the-target-doubles"),
        pytest.param(4, 50, 100, 2, id="half-of-it-halves"),
        pytest.param(3, 109, 100, 3, id="within-a-tenth-above"),
        pytest.param(3, 91, 100, 3, id="within-a-tenth-below"),
        pytest.param(3, 111, 100, 4, id="rounded-up"),
        pytest.param(10, 62, 70, 9, id="rounded-up-on-the-way-down"),
    ],
)
def test_the_rule(current: int, utilization: float, target: float, expected: int) -> None:
    """As Kubernetes documents it, with its examples."""
    assert desired_replicas(current, utilization, target) == expected


def day(minutes_of_each: float) -> Callable[[float], float]:
    """Normal, peak, stress load, three times that, and normal load again for as long as it takes."""
    rates = [offered_rate(profile) for profile in (NORMAL, PEAK, STRESS)]
    rates += [3 * rates[-1]]

    def rate(seconds: float) -> float:
        step = int(seconds / MINUTE / minutes_of_each)
        return rates[step] if step < len(rates) else rates[0]

    return rate


@pytest.mark.parametrize("slowness", SLOWER)
def test_up_and_back_without_flapping(scaler: Autoscaler, slowness: float) -> None:
    """At no load does it go down and up again; after the last it goes down one a minute, to the fewest."""
    course = list(replicas_over_time(scaler, day(10), measured_cpu(BENCH, slowness=slowness), 70 * MINUTE))
    counts = [ready for _, ready, _ in course]
    changes = [(at, after - before) for (_, before, _), (at, after, _) in pairwise(course) if after != before]
    assert (counts[0], max(counts), counts[-1]) == (scaler.fewest, scaler.most, scaler.fewest)
    for step in range(4):
        here = [by for at, by in changes if int(at / MINUTE / 10) == step]
        assert sorted(here, key=lambda by: by < 0) == here, (
            f"down, then up again, at the same load: {changes}"
        )
    back = [(at, by) for at, by in changes if at >= 40 * MINUTE]
    assert {by for _, by in back} == {-1}
    assert all(later - earlier >= MINUTE for (earlier, _), (later, _) in pairwise(back))
    assert back[0][0] >= 40 * MINUTE + scaler.down_stabilization_seconds


@pytest.mark.parametrize("slowness", SLOWER)
def test_it_is_there_within_two_minutes(scaler: Autoscaler, slowness: float) -> None:
    """When normal load turns into three times the stress load, all replicas that may be are ready in two minutes."""
    rise = 5 * MINUTE

    def offered(at: float) -> float:
        return offered_rate(NORMAL) if at < rise else 3 * offered_rate(STRESS)

    course = list(replicas_over_time(scaler, offered, measured_cpu(BENCH, slowness=slowness), 15 * MINUTE))
    assert next(at for at, ready, _ in course if ready == scaler.most) <= rise + 2 * MINUTE


def test_a_swing_does_not_shake_it(scaler: Autoscaler) -> None:
    """Load that falls to a third and comes back, every two minutes, changes nothing once it is up."""
    cpu = measured_cpu(BENCH)

    def offered(at: float) -> float:
        return offered_rate(STRESS) * (3, 1)[int(at / MINUTE / 2) % 2]

    counts = [ready for at, ready, _ in replicas_over_time(scaler, offered, cpu, 40 * MINUTE) if at > 300]
    assert len(set(counts)) == 1


def test_keda_asks_for_what_a_replica_can_take() -> None:
    """The orders per second at which KEDA adds a replica are fewer than 70 % of a core take, by less than a third."""
    spec = yaml.safe_load((K8S / "components" / "keda" / "scaled-object.yaml").read_text())["spec"]
    (threshold,) = [
        float(one["metadata"]["threshold"])
        for one in spec["triggers"]
        if one.get("name") == "orders-per-second"
    ]
    cpu = measured_cpu(BENCH)
    assert cpu(threshold) < 70 <= cpu(threshold * 1.5)


def test_the_table_is_current() -> None:
    """`python -m k8s.sizing` would change nothing."""
    table = marked_block.content_of((K8S / "README.md").read_text(), "sizing")
    assert table == sizing.current_table(), "run python -m k8s.sizing"
