"""Prometheus's own promtool judges the rules: each alert where it is due and where not, scraped well and badly."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from monitoring.dashboards import LOAD_TEST, acceptance_limits, filled, profiles, render
from monitoring.rules import RULES, alerting_rules, expect_replicas, recording_rules
from tests.support.promtool import (
    Curve,
    Metric,
    World,
    as_input,
    counter,
    gauge,
    judge,
    merged,
    run,
    selector,
    steady,
    stepping,
    turning,
)

MONITORING = Path(__file__).parents[2] / "monitoring"
ALERTMANAGER = MONITORING / "alertmanager" / "alertmanager.yml"

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed here (Debian: prometheus)"
)
needs_amtool = pytest.mark.skipif(
    not shutil.which("amtool"), reason="amtool is not installed here (Debian: prometheus-alertmanager)"
)

KINDS = ("steady", "missed", "pods", "resets")
INTERVALS = (15, 30, 60)
WORLDS = [World(kind, interval) for kind in KINDS for interval in INTERVALS]
EVALUATION_SECONDS = 15

# Bad begins here; so long after it the alert has fired, and so much longer it stays.
BAD = 600
FIRED_SECONDS = 1200
STAYS_SECONDS = 900
BRIEF_SECONDS = 50  # one scrape a minute sees it at most once
REPLICAS = 3

Variant = Callable[[int], Sequence[Metric]]  # what the n-th replica exports
Answers = Callable[[int, float], bool]


def always(_place: int, _t: float) -> bool:
    return True


def none_answers(_place: int, t: float) -> bool:
    return t < BAD


def first_does_not_answer(place: int, t: float) -> bool:
    return place > 0 or t < BAD


def none_answers_briefly(_place: int, t: float) -> bool:
    return not BAD <= t < BAD + BRIEF_SECONDS


@dataclass(frozen=True)
class Job:
    """Replicas that do the same; *severities*: with which the alert fires for them, and with no other."""

    exports: Variant
    severities: Sequence[str] = ()
    answers: Answers = always


@dataclass(frozen=True)
class Condition:
    """An alert, a job for which it fires, and others for which it does not: `fine` is just below the limit,

    `sparse` has so little traffic, or so brief a trouble, that it says nothing.
    """

    bad: Job
    quiet: Mapping[str, Job]
    summary: str
    level: str = "pod"
    labels: Sequence[Mapping[str, str]] = ({},)
    near: Job | None = None  # between the warning's limit and the critical one
    seconds: int = BAD + FIRED_SECONDS + STAYS_SECONDS
    restarts_end_it: bool = False
    from_the_start: bool = False


def brief(usual: float, bad: float, seconds: float = BRIEF_SECONDS) -> Curve:
    return lambda t: bad if BAD <= t < BAD + seconds else usual


def service(place: int) -> Sequence[Metric]:
    """What makes an order service, and nothing else."""
    return [gauge("db_pool_max", lambda _: 50)]


def first(*metrics: Metric, others: Sequence[Metric] = ()) -> Variant:
    """The first replica exports *metrics*, the rest *others*; each is an order service."""
    return lambda place: [*service(place), *(others if place else metrics)]


def orders(per_second: float, errors_after: float = 0, errors_before: float = 0) -> Variant:
    """So many orders a second in all, and which share of them fails from BAD on."""
    each = per_second / REPLICAS

    def exports(place: int) -> Sequence[Metric]:
        return [
            *service(place),
            counter(
                "orders_total",
                turning(each * (1 - errors_before), each * (1 - errors_after), BAD),
                status="success",
                error_type="",
            ),
            counter(
                "orders_total",
                turning(each * errors_before, each * errors_after, BAD),
                status="error",
                error_type="database",
            ),
        ]

    return exports


def spike(place: int) -> Sequence[Metric]:
    """One order in five fails, for five minutes after a good quarter of an hour."""
    each = 10 / REPLICAS
    return [
        *orders(10)(place)[:-1],
        counter(
            "orders_total",
            lambda t: 0.2 * each * min(max(t - BAD - 300, 0), 300),
            status="error",
            error_type="database",
        ),
    ]


def one_failed(per_second: float) -> Variant:
    """So many orders a second in all, of which a single one fails."""
    return lambda place: [
        *orders(per_second)(place)[:-1],
        counter(
            "orders_total",
            stepping(0, 0 if place else 1, BAD),
            status="error",
            error_type="database",
        ),
    ]


def histogram(
    name: str, per_second: float, up_to: Mapping[float, float], mean: float = 0.01, **labels: str
) -> Variant:
    """Of so many a second in all the shares that are *up_to* each edge, from BAD on; before it all are fast."""
    each = per_second / REPLICAS
    edges = {**{f"{edge}": share for edge, share in up_to.items()}, "+Inf": 1}
    return lambda place: [
        *service(place),
        *(
            counter(f"{name}_bucket", turning(each, each * share, BAD), le=edge, **labels)
            for edge, share in edges.items()
        ),
        counter(f"{name}_count", steady(each), **labels),
        counter(f"{name}_sum", turning(each * 0.01, each * mean, BAD), **labels),
    ]


def one_slow(per_second: float, seconds: float) -> Variant:
    """So many orders a second in all, all fast but a single one."""
    each = per_second / REPLICAS
    name = "order_processing_seconds"

    def exports(place: int) -> Sequence[Metric]:
        missing: Curve = stepping(0, 0 if place else 1, BAD)
        return [
            *service(place),
            counter(f"{name}_bucket", lambda t: each * t - missing(t), le="0.1"),
            counter(f"{name}_bucket", lambda t: each * t - missing(t), le="1.0"),
            counter(f"{name}_bucket", steady(each), le="10.0"),
            counter(f"{name}_bucket", steady(each), le="+Inf"),
            counter(f"{name}_count", steady(each)),
            counter(f"{name}_sum", lambda t: each * t * 0.01 + missing(t) * seconds),
        ]

    return exports


def latency(
    quantile: str, limit: str, per_second: float, shares: Sequence[Mapping[float, float]], value: float
) -> Condition:
    """*shares*: up to each edge; below the warning's limit, between the two, beyond the critical one."""
    name = "order_processing_seconds"
    below, between, beyond = shares
    slow = {0.5: 0.8, 1.0: 0.8, 2.5: 1.0}
    return Condition(
        Job(histogram(name, per_second, beyond), ("warning", "critical")),
        {
            "fine": Job(histogram(name, per_second, below)),
            "sparse": Job(histogram(name, {"95": 0.6, "99": 3.0}[quantile], slow)),
            "one slow order": Job(one_slow(1, 10)),
        },
        f"{quantile} % of the orders of bad take up to {value:.3f} s; the limit is {limit} s",
        level="job",
        near=Job(histogram(name, per_second, between), ("warning",)),
    )


def gauges(
    name: str, fine: float, near: float | None, bad: float, summary: str, *, others: Sequence[Metric] = ()
) -> Condition:
    """A gauge of the first replica; *others* are there besides it."""
    usual = [gauge(name, lambda _: 0), *others]
    return Condition(
        Job(
            first(gauge(name, stepping(0, bad, BAD)), *others, others=usual),
            ("critical",) if near is None else ("warning", "critical"),
        ),
        {
            "fine": Job(first(gauge(name, stepping(0, fine, BAD)), *others, others=usual)),
            "sparse": Job(first(gauge(name, brief(0, bad)), *others, others=usual)),
        },
        summary,
        near=None
        if near is None
        else Job(first(gauge(name, stepping(0, near, BAD)), *others, others=usual), ("warning",)),
    )


def started(times: Curve) -> Variant:
    """The first replica's process was started so often."""
    name = "process_start_time_seconds"
    return first(gauge(name, lambda t: 1000 + times(t)), others=[gauge(name, lambda _: 1000)])


def freezing(t: float) -> float:
    """9 s of every 45, and as few scrapes meet it as can be: the gauge shows it for 24 s of the 45."""
    return 9.0 if (t + 14) % 45 < 24 else 0.001


def breaker(state: Curve) -> Variant:
    names = ("postgres", "postgres_reads")
    return first(
        *(gauge("circuit_breaker_state", state, breaker=name) for name in names),
        others=[gauge("circuit_breaker_state", lambda _: 0, breaker=name) for name in names],
    )


def cpu(cores: Curve) -> Variant:
    name = "process_cpu_seconds_total"
    return first(counter(name, cores), others=[counter(name, steady(0.3))])


def throttled(periods: Curve) -> Variant:
    kubelet = {"job": "kubelet", "instance": "node", "container": "order-service"}
    return first(
        counter("container_cpu_cfs_periods_total", steady(10), **kubelet),
        counter("container_cpu_cfs_throttled_periods_total", periods, **kubelet),
    )


def backends(first_database: Curve) -> Variant:
    return lambda place: [
        gauge("pg_settings_max_connections", lambda _: 100),
        gauge("pg_stat_database_numbackends", lambda _: 2 if place else 50, datname="orders"),
        gauge("pg_stat_database_numbackends", (lambda _: 1.0) if place else first_database, datname="other"),
    ]


def disk(available: Curve) -> Variant:
    labels = {"device": "/dev/vda1", "mountpoint": "/var", "fstype": "ext4"}
    full = {"device": "cdrom", "mountpoint": "/media", "fstype": "iso9660"}
    return lambda place: [
        gauge("node_filesystem_size_bytes", lambda _: 1000, **labels),
        gauge("node_filesystem_avail_bytes", (lambda _: 900) if place else available, **labels),
        gauge("node_filesystem_size_bytes", lambda _: 1000, **full),
        gauge("node_filesystem_avail_bytes", lambda _: 0, **full),
    ]


def notifications(errors: float, discovered: Curve = lambda _: 1) -> Variant:
    return lambda place: [
        gauge("prometheus_notifications_alertmanagers_discovered", (lambda _: 1) if place else discovered),
        counter("prometheus_notifications_sent_total", steady(0.5)),
        counter("prometheus_notifications_errors_total", turning(0, 0 if place else errors * 0.5, BAD)),
    ]


def only_first(make: Callable[[Curve], Metric], curve: Curve, usual: Curve) -> Variant:
    return lambda place: [make(usual if place else curve)]


def failures(curve: Curve) -> Variant:
    return only_first(
        lambda c: counter("prometheus_rule_evaluation_failures_total", c, rule_group="orders"),
        curve,
        lambda _: 0,
    )


def failed_notifications(curve: Curve) -> Variant:
    return only_first(
        lambda c: counter("alertmanager_notifications_failed_total", c, integration="webhook"),
        curve,
        lambda _: 0,
    )


def reloaded(curve: Curve) -> Variant:
    return only_first(lambda c: gauge("prometheus_config_last_reload_successful", c), curve, lambda _: 1)


def shed(curve: Curve) -> Variant:
    name = "requests_shed_total"
    return first(counter(name, curve, reason="queue"), others=[counter(name, lambda _: 0, reason="queue")])


def internal_errors(per_second: float, after: float) -> Variant:
    """Orders that fail by the database, and by a defect."""
    return lambda place: [
        *orders(per_second, 0.5)(place),
        counter(
            "orders_total", turning(0, 0 if place else after, BAD), status="error", error_type="internal"
        ),
    ]


def exporter(_place: int) -> Sequence[Metric]:
    return [gauge("pg_up", lambda _: 1)]


GIB = 1024**3
IDLE = Job(service)

CONDITIONS: Mapping[str, Condition] = {
    "ServiceDown": Condition(
        Job(service, ("critical",), none_answers),
        {"fine": Job(service, (), first_does_not_answer), "sparse": Job(service, (), none_answers_briefly)},
        "no replica of bad can be scraped",
        level="job",
    ),
    "TargetDown": Condition(
        Job(service, ("warning",), first_does_not_answer),
        {"fine": IDLE, "sparse": Job(service, (), none_answers_briefly)},
        "bad-p0 of bad cannot be scraped",
    ),
    "ReplicasMissing": Condition(
        Job(service, ("warning",), first_does_not_answer),
        {"fine": IDLE, "sparse": Job(service, (), none_answers_briefly)},
        "bad has 2 replicas, fewer than it should",
        level="job",
    ),
    "ReplicaRestarted": Condition(
        Job(started(lambda t: max(0, (t - BAD) // 420 + 1)), ("warning",)),
        {"fine": Job(started(lambda _: 0)), "sparse": Job(started(lambda _: 0), (), none_answers_briefly)},
        "bad-p0 was started again; in 15 minutes 2 times",
    ),
    "ReplicaCrashLoop": Condition(
        Job(started(lambda t: max(0, (t - BAD) // 300 + 1)), ("critical",)),
        {
            "fine": Job(started(lambda t: max(0, (t - BAD) // 900 + 1))),
            "sparse": Job(started(stepping(0, 1, BAD)), (), none_answers_briefly),
        },
        "bad-p0 was started 5 times in 30 minutes",
    ),
    "ReplicaFreezes": Condition(
        Job(
            first(
                gauge("event_loop_lag_seconds", lambda t: 0.001 if t < BAD else freezing(t)),
                others=[gauge("event_loop_lag_seconds", lambda _: 0.001)],
            ),
            ("critical",),
        ),
        {
            "fine": Job(first(gauge("event_loop_lag_seconds", lambda _: 0.9))),
            "sparse": Job(first(gauge("event_loop_lag_seconds", brief(0.001, 9, 24)))),
        },
        "bad-p0 stands still again and again: for a second or more at 34.15% of the looks at it",
    ),
    "NoTraffic": Condition(
        Job(
            lambda place: [
                *service(place),
                counter("orders_total", turning(3, 0, BAD), status="success", error_type=""),
            ],
            ("warning",),
        ),
        {
            "fine": Job(
                lambda place: [
                    *service(place),
                    counter("orders_total", turning(3, 0.01, BAD), status="success", error_type=""),
                ]
            ),
            "sparse": Job(  # one every 20 minutes, a night long
                lambda place: [
                    *service(place),
                    counter(
                        "orders_total", lambda t: 0 if place else t // 1200, status="success", error_type=""
                    ),
                ]
            ),
            "unused": Job(orders(0)),
        },
        "bad has had no order for ten minutes (0 orders/s)",
        level="job",
        seconds=3 * 3600,
    ),
    "CircuitBreakerOpen": Condition(
        Job(breaker(lambda t: 0 if t < BAD else 1 if t // 15 % 4 == 3 else 2), ("critical",)),
        {"fine": Job(breaker(lambda _: 0)), "sparse": Job(breaker(brief(0, 2)))},
        "the breaker {breaker} of bad-p0 is not closed (state 2): {what} are refused",
        labels=(
            {"breaker": "postgres", "what": "orders"},
            {"breaker": "postgres_reads", "what": "reads"},
        ),
    ),
    # A quantile lies linearly between the edges of its bucket: 0.3 + 0.1 x 10 / 11, and so on.
    "OrderLatencyP95": latency(
        "95",
        "0.5",
        10,
        [
            {0.3: 0.9, 0.4: 0.955, 0.5: 1},  # 0.391
            {0.4: 0.9, 0.5: 0.955, 0.75: 1},  # 0.491
            {0.4: 0.9, 0.5: 0.945, 0.75: 1},  # 0.523
        ],
        0.5 + 0.25 / 11,
    ),
    "OrderLatencyP99": latency(
        "99",
        "1",
        10,
        [
            {0.5: 0.95, 0.75: 0.988, 1.0: 1},  # 0.792
            {0.75: 0.95, 1.0: 0.991, 2.5: 1},  # 0.994
            {0.75: 0.95, 1.0: 0.9895, 2.5: 1},  # 1.071
        ],
        1 + 1.5 * 0.1 / 2.1,
    ),
    "OrderLatencyMean": Condition(
        Job(histogram("order_processing_seconds", 10, {}, 0.201), ("warning", "critical")),
        {
            "fine": Job(histogram("order_processing_seconds", 10, {}, 0.159)),
            "sparse": Job(histogram("order_processing_seconds", 0.6, {}, 5)),
            "one slow order": Job(one_slow(1, 10)),
        },
        "an order of bad takes 0.201 s on average; the limit is 0.2 s",
        level="job",
        near=Job(histogram("order_processing_seconds", 10, {}, 0.199), ("warning",)),
    ),
    "OrderErrorRate": Condition(
        Job(orders(10, 0.0101), ("warning", "critical")),
        {
            "fine": Job(orders(10, 0.0079)),
            "sparse": Job(orders(1.5, 0.05)),
            "one failed order": Job(one_failed(1)),
        },
        "1.01% of the orders of bad fail; the limit is 1 %",
        level="job",
        near=Job(orders(10, 0.0099), ("warning",)),
    ),
    "InternalErrors": Condition(
        Job(internal_errors(10, 0.05), ("critical",)),
        {"fine": Job(internal_errors(10, 0)), "sparse": Job(one_failed(0.1))},
        "about 15 orders of bad met a defect of the service in 5 minutes; the limit is 0",
        level="job",
    ),
    "ErrorBudgetBurnFast": Condition(
        Job(orders(10, 0.145, 0.145), ("critical",)),
        {
            "fine": Job(orders(10, 0.143, 0.143)),
            "sparse": Job(orders(0.14, 0.5)),
            "spike": Job(spike),  # the short window alone
            "one failed order": Job(one_failed(0.05)),
        },
        "14.5% of the orders of bad failed in an hour: 14.4 times what the objective allows, or more",
        level="job",
        from_the_start=True,
    ),
    "ErrorBudgetBurnSlow": Condition(
        Job(orders(10, 0.061, 0.061), ("warning",)),
        {
            "fine": Job(orders(10, 0.059, 0.059)),
            "sparse": Job(orders(0.05, 0.5)),
            "one failed order": Job(one_failed(0.01)),
        },
        "6.1% of the orders of bad failed in 6 hours: 6 times what the objective allows, or more",
        level="job",
        from_the_start=True,
    ),
    "CpuSaturated": Condition(
        Job(cpu(turning(0.3, 1, BAD)), ("warning",)),
        {  # at what the autoscaler aims, and beyond
            "fine": Job(cpu(turning(0.7, 0.94, BAD))),
            "sparse": Job(cpu(lambda t: 0.3 * t + 0.7 * min(max(t - BAD, 0), 240))),
        },
        "bad-p0 uses 100% of a core: all that one process can",
        restarts_end_it=True,
    ),
    "CpuThrottled": Condition(
        Job(throttled(turning(0, 5, BAD)), ("warning",)),
        {
            "fine": Job(throttled(turning(0, 2.4, BAD))),
            "sparse": Job(throttled(lambda t: 5 * min(max(t - BAD, 0), 240))),
        },
        "bad-p0 is held back by its CPU limit in 50% of the periods",
    ),
    "MemoryUsage": gauges(
        "process_resident_memory_bytes",
        0.639 * 2 * GIB,
        0.799 * 2 * GIB,
        0.81 * 2 * GIB,
        "bad-p0 holds 81% of 2 GiB; the limit is 80 %",
    ),
    "ConnectionPoolNearLimit": gauges(
        "db_pool_in_use", 29, 37, 38, "bad-p0 has lent 76% of its connections; the limit is 75 %"
    ),
    "ConnectionPoolExhausted": gauges(
        "db_pool_in_use", 47, None, 50, "bad-p0 has lent 100% of its connections"
    ),
    "BatchQueueNearLimit": Condition(
        Job(histogram("order_stage_seconds", 10, {0.25: 0.86, 0.5: 1}, stage="queue"), ("warning",)),
        {
            "fine": Job(histogram("order_stage_seconds", 10, {0.25: 0.885, 0.5: 1}, stage="queue")),
            "sparse": Job(histogram("order_stage_seconds", 0.6, {0.25: 0.5, 0.5: 1}, stage="queue")),
            "another stage": Job(histogram("order_stage_seconds", 10, {0.25: 0.5, 0.5: 1}, stage="store")),
        },
        f"5 % of the orders of bad wait {0.25 + 0.25 * 9 / 14:.3f} s or more for their batch; "
        "at 0.5 s they are refused",
        level="job",
    ),
    "OrdersShed": Condition(
        Job(shed(turning(0, 1, BAD)), ("warning",)),
        {"fine": Job(shed(turning(0, 0.02, BAD))), "sparse": Job(shed(stepping(0, 5, BAD)))},
        "about 300 requests to bad were refused in 5 minutes to protect the rest (queue)",
        level="job",
        labels=({"reason": "queue"},),
    ),
    "EventLoopLag": gauges(
        "event_loop_lag_seconds",
        0.099,
        0.499,
        0.5,
        "the event loop of bad-p0 keeps standing still, for 0.500 s",
    ),
    "PostgresExporterDown": Condition(
        Job(exporter, ("warning",), none_answers),
        {
            "fine": Job(exporter, (), first_does_not_answer),
            "sparse": Job(exporter, (), none_answers_briefly),
        },
        "bad no longer tells about PostgreSQL (0 exporters that can ask it)",
        level="job",
    ),
    "PostgresConnectionsNearLimit": Condition(
        Job(backends(stepping(0, 46, BAD)), ("warning", "critical")),
        {"fine": Job(backends(stepping(0, 29, BAD))), "sparse": Job(backends(brief(0, 49)))},
        "96% of the connections that PostgreSQL allows are open (bad-p0)",
        near=Job(backends(stepping(0, 44, BAD)), ("warning",)),
    ),
    "DiskNearFull": Condition(
        Job(disk(stepping(500, 40, BAD)), ("warning", "critical")),
        {"fine": Job(disk(stepping(500, 160, BAD))), "sparse": Job(disk(brief(500, 0)))},
        "/var of bad-p0 is 96% full",
        labels=({"device": "/dev/vda1", "mountpoint": "/var"},),
        near=Job(disk(stepping(500, 60, BAD)), ("warning",)),
    ),
    "PrometheusConfigFailed": Condition(
        Job(reloaded(stepping(1, 0, BAD)), ("warning",)),
        {"fine": Job(reloaded(lambda _: 1)), "sparse": Job(reloaded(brief(1, 0)))},
        "bad-p0 could not read its configuration (last reload 0)",
    ),
    "PrometheusRulesFail": Condition(
        Job(failures(turning(0, 0.1, BAD)), ("warning",)),
        {"fine": Job(failures(lambda _: 7)), "sparse": Job(failures(stepping(0, 1, BAD)))},
        "bad-p0 failed or left out about 30 evaluations of rules in 5 minutes",
    ),
    "AlertmanagerUnreachable": Condition(
        Job(notifications(0.5), ("warning",)),
        {
            "fine": Job(notifications(0.2)),
            "sparse": Job(notifications(0, brief(1, 0))),
        },
        "bad-p0 cannot tell Alertmanager of its alerts (0.50 of them)",
    ),
    "AlertmanagerNotificationsFail": Condition(
        Job(failed_notifications(turning(0, 0.05, BAD)), ("warning",)),
        {
            "fine": Job(failed_notifications(lambda _: 7)),
            "sparse": Job(failed_notifications(stepping(0, 1, BAD))),
        },
        "bad-p0 could not send about 30 notifications by webhook in 10 minutes",
        labels=({"integration": "webhook"},),
    ),
}


def scraped(name: str, job: Job, world: World, seconds: int) -> Mapping[str, str]:
    return merged(
        *(
            world.scraped(
                name,
                place,
                life,
                job.exports(place),
                seconds,
                lambda t, place=place: job.answers(place, t),  # type: ignore[misc]
            )
            for place, life in world.lives(seconds, REPLICAS)
        )
    )


def firing(
    alert: str,
    at: int,
    jobs: Mapping[str, Job],
    level: str,
    *,
    over: int = 0,
    at_each_evaluation: bool = False,
) -> Mapping[str, Any]:
    """Exactly what each job's severities say fires at *at*, or did in the *over* seconds before; labels of *level*."""
    alerts = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
    if over:
        alerts = f"count_over_time({alerts}[{over}s])"

    def labels(name: str, severity: str) -> Mapping[str, str]:
        pod = {"pod": f"{name}-p0"} if level == "pod" else {}
        return {"namespace": "shop", "job": name, **pod, "severity": severity}

    if at_each_evaluation:
        alerts += f" >= {over // EVALUATION_SECONDS}"
    return {
        "expr": f"group by (namespace, job, pod, severity) ({alerts})",
        "eval_time": f"{at}s",
        "exp_samples": [
            {"labels": selector("", labels(name, severity)), "value": 1}
            for name, job in jobs.items()
            for severity in job.severities
        ],
    }


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules as they are shipped, where three replicas are expected."""
    directory = tmp_path_factory.mktemp("rules")
    shutil.copytree(RULES, directory, dirs_exist_ok=True)
    expect_replicas(directory, REPLICAS)
    return directory


@pytest.mark.slow
@needs_promtool
@pytest.mark.parametrize("alert", CONDITIONS)
def test_alert(alert: str, rules: Path, tmp_path: Path) -> None:
    """It fires where it is due, and stays; it is silent below its limit and where too little is known.

    At scrapes 15, 30 and 60 s apart, of which none or every fourth fails, while pods come and go, and while counters
    begin anew. It keeps namespace, job and pod.
    """
    condition = CONDITIONS[alert]
    jobs = {"bad": condition.bad, **condition.quiet}
    if condition.near:
        jobs["near"] = condition.near
    end = condition.seconds
    tests = []
    for world in WORLDS:
        # In all that time: what is due, and nothing else.
        checks = [firing(alert, end, jobs, condition.level, over=end)]
        if not condition.from_the_start:
            checks.append(firing(alert, BAD - 1, {}, condition.level))
        if condition.restarts_end_it and world.kind == "resets":
            world = replace(world, change_seconds=1800)  # noqa: PLW2901 - the same world, slower
        else:
            stays = end - BAD - FIRED_SECONDS
            checks.append(firing(alert, BAD + FIRED_SECONDS, jobs, condition.level))
            checks.append(firing(alert, end, jobs, condition.level, over=stays, at_each_evaluation=True))
        series = merged(*(scraped(name, job, world, end) for name, job in jobs.items()))
        tests.append(
            {
                "name": f"{alert}: {world}",
                "interval": f"{world.interval}s",
                "input_series": as_input(series),
                "promql_expr_test": checks,
            }
        )
    judge(tmp_path, tests, evaluation_seconds=EVALUATION_SECONDS, rules=rules, alert=alert)


@pytest.mark.slow
@needs_promtool
@pytest.mark.parametrize("alert", CONDITIONS)
def test_annotations(alert: str, rules: Path, tmp_path: Path) -> None:
    """Its summary tells whom it is about and how much; the description and the way to the runbook are there."""
    condition = CONDITIONS[alert]
    world = World("steady", 15)
    target = {"pod": "bad-p0", "instance": "bad-p0:8000"} if condition.level == "pod" else {}
    (description,) = {rule.annotations["description"] for rule in alerting_rules() if rule.name == alert}
    judge(
        tmp_path,
        [
            {
                "interval": f"{world.interval}s",
                "input_series": as_input(scraped("bad", condition.bad, world, BAD + FIRED_SECONDS)),
                "alert_rule_test": [
                    {
                        "eval_time": f"{BAD + FIRED_SECONDS}s",
                        "alertname": alert,
                        "exp_alerts": [
                            {
                                "exp_labels": {
                                    "namespace": "shop",
                                    "job": "bad",
                                    **target,
                                    **{name: value for name, value in labels.items() if name != "what"},
                                    "severity": severity,
                                },
                                "exp_annotations": {
                                    "summary": condition.summary.format(**labels),
                                    "description": description,
                                    "runbook_url": f"monitoring/README.md#{alert.lower()}",
                                },
                            }
                            for severity in condition.bad.severities
                            for labels in condition.labels
                        ],
                    }
                ],
            }
        ],
        evaluation_seconds=EVALUATION_SECONDS,
        rules=rules,
    )


HOUR = 3600
DAY = 24 * HOUR
NOON, CLOSING, OPENING = 12 * HOUR, 22 * HOUR, 30 * HOUR


def shop(closes_at: float, opens_at: float, *, days: int = 3, per_second: float = 3) -> str:
    """A counter of orders, a value a minute, of a shop that is closed at night; its first day begins at 0."""
    values, total = [], 0.0
    for minute in range(days * 24 * 60):
        t = minute * 60
        of_day = t % DAY
        closed = closes_at % DAY <= of_day or of_day < opens_at % DAY
        total += 0 if closed else per_second * 60
        values.append(f"{total:g}")
    return " ".join(values)


@pytest.mark.slow
@needs_promtool
def test_no_traffic_at_night(tmp_path: Path) -> None:
    """A night that was as quiet a day before is no alert; an outage by day is one until orders come, however long."""
    quiet = shop(CLOSING, OPENING).split()
    outage = list(quiet)  # from the noon of the third day on nobody orders, but for the last half hour
    since, until = (2 * DAY + NOON) // 60, len(outage) - 150
    outage[since:until] = [outage[since]] * (until - since)
    started = float(outage[since])
    outage[until:] = [f"{started + 180 * n:g}" for n in range(len(outage) - until)]
    labels = 'status="success",error_type=""'
    pools = {f'db_pool_max{{job="{job}"}}': f"50x{3 * 24 * 60}" for job in ("quiet", "outage")}
    firing = 'ALERTS{alertname="NoTraffic",alertstate="firing"}'

    def check(at: int, *jobs: str, over: str = "") -> Mapping[str, Any]:
        return {
            "expr": f"group by (job) (count_over_time({firing}[{over}]))"
            if over
            else f"group by (job) ({firing})",
            "eval_time": f"{at}s",
            "exp_samples": [{"labels": f'{{job="{job}"}}', "value": 1} for job in jobs],
        }

    judge(
        tmp_path,
        [
            {
                "interval": "1m",
                "input_series": as_input(
                    {
                        f'orders_total{{job="quiet",{labels}}}': " ".join(quiet),
                        f'orders_total{{job="outage",{labels}}}': " ".join(outage),
                        **pools,
                    }
                ),
                "promql_expr_test": [
                    check(2 * DAY + NOON, over="12h"),  # the second night; nothing was known of the first
                    check(2 * DAY + NOON + 20 * 60, "outage"),
                    check(2 * DAY + NOON + 9 * HOUR, "outage"),
                    check(3 * DAY - 60, over="1h"),
                ],
            }
        ],
        evaluation_seconds=60,
    )


@pytest.mark.slow
@needs_promtool
def test_no_order_service_at_all(tmp_path: Path) -> None:
    """ServiceDown fires where Prometheus has never seen an order service, and stays where the last target is gone."""
    world = World("steady", 15)
    lives = [(place, replace(life, dies=BAD)) for place, life in world.lives(HOUR)]
    gone = merged(*(world.scraped("gone", place, life, service(place), HOUR) for place, life in lives))
    description = "Nobody can order, or Prometheus looks in the wrong place."
    runbook = "monitoring/README.md#servicedown"

    def check(at: str, labels: Mapping[str, str], summary: str) -> Mapping[str, Any]:
        annotations = {"summary": summary, "description": description, "runbook_url": runbook}
        alert = {"exp_labels": {"severity": "critical", **labels}, "exp_annotations": annotations}
        return {"eval_time": at, "alertname": "ServiceDown", "exp_alerts": [alert]}

    judge(
        tmp_path,
        [
            {
                "interval": "15s",
                "input_series": as_input({'up{job="prometheus",instance="p"}': "1x20"}),
                "alert_rule_test": [
                    {"eval_time": "1m45s", "alertname": "ServiceDown"},
                    check("2m", {}, "no order service can be scraped"),
                ],
            },
            {
                "interval": "15s",
                "input_series": as_input(gone),
                "alert_rule_test": [
                    {"eval_time": "10m", "alertname": "ServiceDown"},
                    check("1h", {"namespace": "shop", "job": "gone"}, "no replica of gone can be scraped"),
                ],
            },
        ],
        evaluation_seconds=EVALUATION_SECONDS,
    )


@pytest.mark.slow
@needs_promtool
def test_watchdog(tmp_path: Path) -> None:
    """It fires from the first evaluation on, with nothing to scrape."""
    alert = {
        "exp_labels": {"severity": "none"},
        "exp_annotations": next(r.annotations for r in alerting_rules() if r.name == "Watchdog")
        | {"summary": "alerts are being evaluated and sent (1)"},
    }
    judge(
        tmp_path,
        [
            {
                "interval": "15s",
                "input_series": [],
                "alert_rule_test": [
                    {"eval_time": at, "alertname": "Watchdog", "exp_alerts": [alert]} for at in ("0s", "1h")
                ],
            }
        ],
        evaluation_seconds=EVALUATION_SECONDS,
    )


def constant(value: float) -> str:
    return f"{value}+0x2000"


def rising(per_second: float) -> str:
    return f"0+{per_second * 15:.9g}x2000"


def of_replicas(name: str, labels: str, up_to: Mapping[float, float]) -> Mapping[str, str]:
    """Of 100 observations a second so many are up to each edge."""
    edges = {**{f"{edge}": count for edge, count in up_to.items()}, "+Inf": 100.0}
    return {f'{name}_bucket{{{labels},le="{edge}"}}': rising(count) for edge, count in edges.items()}


TWO_REPLICAS = merged(
    of_replicas("order_processing_seconds", 'namespace="n",job="j",pod="a"', {0.1: 100, 0.2: 100, 1.0: 100}),
    of_replicas("order_processing_seconds", 'namespace="n",job="j",pod="b"', {0.1: 0, 0.2: 80, 1.0: 100}),
    of_replicas("order_stage_seconds", 'namespace="n",job="j",stage="queue"', {0.25: 90, 0.5: 100}),
    of_replicas("order_stage_seconds", 'namespace="n",job="j",stage="store"', {0.25: 0, 0.5: 0}),
    {
        'order_processing_seconds_sum{namespace="n",job="j",pod="a"}': rising(10),
        'order_processing_seconds_count{namespace="n",job="j",pod="a"}': rising(100),
        'order_processing_seconds_sum{namespace="n",job="j",pod="b"}': rising(30),
        'order_processing_seconds_count{namespace="n",job="j",pod="b"}': rising(100),
        'order_stage_seconds_count{namespace="n",job="j",stage="queue"}': rising(100),
        'order_stage_seconds_count{namespace="n",job="j",stage="store"}': rising(1),
        'orders_total{namespace="n",job="j",pod="a",status="success",error_type=""}': rising(90),
        'orders_total{namespace="n",job="j",pod="a",status="rejected",error_type="out_of_stock"}': rising(2),
        'orders_total{namespace="n",job="j",pod="b",status="error",error_type="database"}': rising(5),
        'orders_total{namespace="n",job="j",pod="b",status="error",error_type="timeout"}': rising(3),
        'process_cpu_seconds_total{namespace="n",job="j",pod="a"}': rising(0.25),
        'process_cpu_seconds_total{job="prometheus",instance="p"}': rising(0.25),
        'process_resident_memory_bytes{namespace="n",job="j",pod="a"}': constant(GIB // 2),
        'process_resident_memory_bytes{job="prometheus",instance="p"}': constant(GIB),
        'up{namespace="n",job="j",pod="a"}': constant(1),
        'db_pool_in_use{namespace="n",job="j",pod="a"}': constant(30),
        'db_pool_max{namespace="n",job="j",pod="a"}': constant(50),
        'event_loop_lag_seconds{namespace="n",job="j",pod="a"}': "0.1 0.3 2" + " 0.1 0.3 2" * 600,
        'container_cpu_cfs_periods_total{namespace="n",job="kubelet",pod="a",container="c"}': rising(10),
        'container_cpu_cfs_throttled_periods_total{namespace="n",job="kubelet",pod="a",container="c"}': rising(
            1
        ),
        'pg_up{job="postgres"}': constant(1),
        'pg_stat_database_numbackends{job="postgres",instance="e",datname="x"}': constant(20),
        'pg_stat_database_numbackends{job="postgres",instance="e",datname="y"}': constant(5),
        'pg_settings_max_connections{job="postgres",instance="e",server="s"}': constant(100),
        'node_filesystem_avail_bytes{instance="h",device="d",mountpoint="/",fstype="ext4"}': constant(20),
        'node_filesystem_size_bytes{instance="h",device="d",mountpoint="/",fstype="ext4"}': constant(100),
        'kubelet_volume_stats_available_bytes{namespace="n",persistentvolumeclaim="v"}': constant(10),
        'kubelet_volume_stats_capacity_bytes{namespace="n",persistentvolumeclaim="v"}': constant(100),
    },
)
J = '{namespace="n",job="j"}'
A = '{namespace="n",job="j",pod="a"}'
VALUES: Mapping[str, Mapping[str, float]] = {
    "pod:order_replicas:info": {A: 1},
    "job:order_replicas:count": {J: 1},
    "job:order_replicas:max1d": {J: 1},
    "job:order_replicas:expected": {J: 1},
    # 200 a second, of which 180 are up to 0.2 s and 200 up to 1 s: the 190th and the 198th
    "job:order_processing_seconds:p95_rate5m": {J: 0.2 + 0.8 * 10 / 20},
    "job:order_processing_seconds:p99_rate5m": {J: 0.2 + 0.8 * 18 / 20},
    "job:order_processing_seconds:mean_rate5m": {J: 40 / 200},
    "job:order_processing_seconds_count:increase5m": {J: 60000},
    "job:order_queue_seconds:p95_rate5m": {J: 0.25 + 0.25 * 5 / 10},
    "job:order_queue_seconds_count:increase5m": {J: 30000},
    "job:orders:increase5m": {J: 30000},
    "job:orders:increase30m": {J: 180000},
    "job:orders:rate10m": {J: 100},
    "job:orders:rate1h": {J: 100},
    "job:order_errors_per_order:ratio_rate5m": {J: 0.08},
    "job:order_errors_per_order:ratio_rate30m": {J: 0.08},
    "job:order_errors_per_order:ratio_rate1h": {J: 0.08},
    "job:order_errors_per_order:ratio_rate6h": {J: 0.08},
    "pod:process_cpu:ratio_deriv5m": {A: 0.25},
    "pod:cpu_throttled_per_period:ratio_rate5m": {A: 0.1},
    "pod:process_memory:ratio_avg5m": {A: 0.25},
    "pod:db_pool:ratio_avg5m": {A: 0.6},
    "pod:event_loop_lag_seconds:median5m": {A: 0.3},
    "pod:event_loop_stalls:ratio_avg10m": {A: 14 / 41},
    "job:pg_up:max3m": {'{job="postgres"}': 1},
    "instance:pg_connections:ratio_avg5m": {'{job="postgres",instance="e"}': 0.25},
    "volume:disk_used:ratio": {
        '{instance="h",device="d",mountpoint="/"}': 0.8,
        '{namespace="n",persistentvolumeclaim="v"}': 0.9,
    },
}


@pytest.mark.slow
@needs_promtool
def test_recorded_values(tmp_path: Path) -> None:
    """Each rule records the value that a calculation by hand has, over two replicas and for nothing else."""
    checks = [
        {
            "expr": f"round({name} * 100)",
            "eval_time": "2h",
            "exp_samples": [
                {"labels": labels, "value": round(value * 100)} for labels, value in values.items()
            ],
        }
        for name, values in VALUES.items()
    ]
    tests = [{"interval": "15s", "input_series": as_input(TWO_REPLICAS), "promql_expr_test": checks}]
    judge(tmp_path, tests, evaluation_seconds=EVALUATION_SECONDS)


@pytest.mark.slow
@needs_promtool
def test_limit_of_the_profile_that_runs(tmp_path: Path) -> None:
    """The line of a limit by profile is that of the load test which runs, and otherwise of the one that is chosen."""
    (panel,) = [panel for panel in render(LOAD_TEST)["panels"] if panel["title"] == "Throughput"]
    (expr,) = [target["expr"] for target in panel["targets"] if target["legendFormat"].startswith("limit")]
    limits = acceptance_limits()["throughput"]
    chosen, running = profiles()[0], "peak"
    assert limits[chosen] != limits[running]
    series = selector("loadtest_running", {"profile": running, "run": "r", "instance": "l:9646"})
    checks = [
        {
            "expr": filled(expr),
            "eval_time": at,
            "exp_samples": [{"labels": selector("", {"profile": profile}), "value": limits[profile]}],
        }
        for at, profile in (("1m", chosen), ("5m", running), ("9m", chosen))
    ]
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": "0x3 1x3 0x3"}],
            "promql_expr_test": checks,
        }
    ]
    judge(tmp_path, tests, evaluation_seconds=60)


def test_nothing_is_left_untested() -> None:
    """Every alert has each severity in every world, a job that is fine, one that is sparse; every rule its value."""
    fired = {
        (alert, severity) for alert, condition in CONDITIONS.items() for severity in condition.bad.severities
    }
    assert fired | {("Watchdog", "none")} == {
        (rule.name, rule.labels["severity"]) for rule in alerting_rules()
    }
    assert {(world.kind, world.interval) for world in WORLDS} == {
        (kind, interval) for kind in ("steady", "missed", "pods", "resets") for interval in (15, 30, 60)
    }
    for alert, condition in CONDITIONS.items():
        assert {"fine", "sparse"} <= condition.quiet.keys(), alert
        assert not any(job.severities for job in condition.quiet.values()), alert
        if len(condition.bad.severities) > 1:
            assert condition.near is not None, alert
    assert set(VALUES) == {rule.name for rule in recording_rules()}


@pytest.mark.slow
@needs_promtool
def test_promtool_has_nothing_to_say() -> None:
    """`promtool check` accepts the configuration, and its lint finds nothing in the rules."""
    configuration = MONITORING / "prometheus" / "prometheus.yml"
    run("promtool", "check", "config", "--lint=all", "--lint-fatal", configuration)
    run("promtool", "check", "rules", "--lint=all", "--lint-fatal", *sorted(RULES.glob("*.yml")))


@pytest.mark.slow
@needs_promtool
@pytest.mark.parametrize(
    ("alert", "was", "spoilt"),
    [
        ("OrderErrorRate", "rate5m >= 0.01\n", "rate5m >= 0.0102\n"),
        ("OrderErrorRate", "increase5m >= 500", "increase5m >= 400"),
        ("OrderLatencyP99", "increase5m >= 1000", "increase5m >= 800"),
        ("CircuitBreakerOpen", "last_over_time(circuit_breaker_state[3m])", "circuit_breaker_state"),
        ("CpuSaturated", "deriv(process_cpu_seconds_total", "rate(process_cpu_seconds_total"),
        ("ReplicaFreezes", "avg10m >= 0.2", "avg10m >= 0.5"),
        ("TargetDown", "for: 3m", "for: 30s"),
        ("NoTraffic", ' or ALERTS{alertname="NoTraffic"}', ""),
        (
            "MemoryUsage",
            "namespace, job, pod, instance) (avg_over_time(process",
            "instance) (avg_over_time(process",
        ),
    ],
)
def test_a_rule_that_is_wrong_is_found(
    alert: str, was: str, spoilt: str, rules: Path, tmp_path: Path
) -> None:
    """The tests can fail: with a limit, a window, a label or a waiting time that is wrong, promtool objects."""
    wrong = tmp_path / "wrong"
    shutil.copytree(rules, wrong)
    found = 0
    for file in wrong.glob("*.yml"):
        text = file.read_text()
        found += text.count(was)
        file.write_text(text.replace(was, spoilt))
    assert found
    with pytest.raises(AssertionError, match=alert):
        test_alert(alert, wrong, tmp_path)


@pytest.mark.slow
@needs_amtool
@pytest.mark.parametrize(
    ("severity", "receiver"),
    [("critical", "critical"), ("warning", "warnings"), ("", "warnings"), ("none", "watchdog")],
)
def test_routing(severity: str, receiver: str) -> None:
    """Alertmanager takes its configuration, and sends each severity where it belongs."""
    run("amtool", "check-config", ALERTMANAGER)
    labels = [f"severity={severity}"] if severity else []
    route = ["config", "routes", "test", f"--config.file={ALERTMANAGER}", f"--verify.receivers={receiver}"]
    run("amtool", *route, "alertname=Any", *labels)
