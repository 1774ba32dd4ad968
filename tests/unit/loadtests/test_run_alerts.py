"""The alerts of a run: this service's, begun in the run, and known only where nothing could have been missed."""

import pytest

from loadtests.samples import Window
from loadtests.service_side.alerts import Alerts, alerts_of, our_rules
from loadtests.service_side.prometheus import Matrix, Prometheus

RUN = Window(10_000.0, 10_060.0)
OURS = {("orders", "one:8000"), ("orders", "two:8000")}
RULES = dict.fromkeys(our_rules(), "ok")
NAME = min(RULES)


class Remembering(Prometheus):
    """A Prometheus as far as the alerts of a run are asked of it."""

    def __init__(
        self, *alerts: tuple[dict[str, str], list[float]], health: dict[str, str] | None = None
    ) -> None:
        self.url = "http://prometheus"
        self.scrapes = [RUN.start + 5 * n for n in range(13)]
        self._alerts = alerts
        self._health = RULES if health is None else health

    def alerting_rules(self) -> dict[str, str]:
        return self._health

    def samples(self, selector: str, window: Window) -> Matrix:
        if selector == "up":  # another job was scraped all the time
            others = [(float(at), 1.0) for at in range(int(window.start), int(window.end), 5)]
            return [({"job": "orders"}, [(at, 1.0) for at in self.scrapes]), ({"job": "billing"}, others)]
        return [
            (labels, [(at, 1.0) for at in times if window.start <= at <= window.end])
            for labels, times in self._alerts
        ]


def alert(
    name: str = NAME, severity: str = "critical", state: str = "firing", **labels: str
) -> dict[str, str]:
    return {"__name__": "ALERTS", "alertname": name, "severity": severity, "alertstate": state, **labels}


def found(prometheus: Remembering) -> Alerts:
    return alerts_of(prometheus, RUN, OURS, {"billing"})


def test_an_alert_between_two_looks() -> None:
    """A second of firing, long over when the run ends, counts."""
    assert found(Remembering((alert(), [RUN.start + 20]))).critical == (NAME,)


def test_an_alert_of_several_replicas_is_one() -> None:
    firing = [(alert("Near", "warning", job="orders", pod=f"p{n}"), [RUN.start + 20]) for n in range(6)]
    assert found(Remembering(*firing)).warning == ("Near",)


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        pytest.param(alert(job="orders", instance="one:8000"), True, id="ours"),
        pytest.param(alert(job="orders", instance="three:8000"), False, id="another-instance"),
        pytest.param(alert(job="billing"), False, id="another-order-service"),
        pytest.param(alert(job="postgres"), True, id="our-rule-about-our-database"),
        pytest.param(alert("Theirs", job="search"), False, id="a-rule-that-is-not-ours"),
        pytest.param(alert("Theirs", job="orders"), True, id="another-rule-about-us"),
        pytest.param(alert("Watchdog", severity="none"), False, id="no-severity-of-ours"),
        pytest.param(alert(state="pending"), False, id="never-fired"),
    ],
)
def test_whose_alert_it_is(labels: dict[str, str], counts: bool) -> None:  # noqa: FBT001
    assert (found(Remembering((labels, [RUN.start + 20]))).critical != ()) == counts


def test_an_alert_of_before_the_run() -> None:
    """What began before, pending even, and went on is an earlier run's; what ended long ago and came again is ours."""
    times = [RUN.start + each for each in (-60.0, -45, -30, -15, 0, 15, 30)]
    before = found(Remembering((alert(), times)))
    assert (before.critical, before.before) == ((), (NAME,))
    pending = (alert(state="pending"), times[:4])
    assert found(Remembering(pending, (alert(), times[4:]))).before == (NAME,)
    again = found(Remembering((alert(), [RUN.start - 280, RUN.start + 30])))
    assert again.critical == (NAME,)


@pytest.mark.parametrize(
    ("health", "said"),
    [
        pytest.param({}, "has not loaded these alerts", id="no-rules"),
        pytest.param(dict.fromkeys(sorted(RULES)[1:], "ok"), f"alerts: {NAME} ", id="one-is-missing"),
        pytest.param({**RULES, NAME: "err"}, f"could not evaluate: {NAME}", id="one-is-broken"),
    ],
)
def test_rules_that_could_not_fire(health: dict[str, str], said: str) -> None:
    """No alert of rules that are not there is not zero alerts."""
    alerts = found(Remembering(health=health))
    assert (alerts.critical, alerts.warning) == (None, None)
    assert said in alerts.trouble


def test_a_prometheus_that_was_away() -> None:
    prometheus = Remembering()
    assert found(prometheus).critical == ()
    prometheus.scrapes = [at for at in prometheus.scrapes if not 10_010 < at < 10_040]
    assert "did not run for 30 s" in found(prometheus).trouble
    prometheus.scrapes = [RUN.start, RUN.start + 5]
    assert "did not run for 55 s" in found(prometheus).trouble
    prometheus.scrapes = []
    assert "scraped nothing" in found(prometheus).trouble
