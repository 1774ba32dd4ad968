"""Prometheus's own promtool judges the rules: the value of each indicator, and both edges of each alert."""

import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from monitoring.rules import RULES, alerting_rules, recording_rules

PROMTOOL = shutil.which("promtool")
AMTOOL = shutil.which("amtool")
MONITORING = Path(__file__).parents[2] / "monitoring"
STEP_SECONDS = 5  # as prometheus.yml scrapes and evaluates
ALERTMANAGER = MONITORING / "alertmanager" / "alertmanager.yml"

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed here (Debian: prometheus)"
)
needs_amtool = pytest.mark.skipif(
    AMTOOL is None, reason="amtool is not installed here (Debian: prometheus-alertmanager)"
)

Series = Mapping[str, str]


@dataclass(frozen=True)
class Firing:
    """An alert that is expected to fire."""

    labels: Mapping[str, str]
    severity: str
    summary: str


@dataclass(frozen=True)
class Case:
    """Series as promtool writes them, and what must fire when; a time at which nothing may fire has ()."""

    alert: str
    series: Series
    at: Mapping[str, Sequence[Firing]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.alert


def constant(value: float) -> str:
    return f"{value}+0x800"


def rising(per_second: float) -> str:
    return f"0+{per_second * STEP_SECONDS:.9g}x800"


def orders(job: str, per_second: float, error_percent: float = 0) -> Series:
    return {
        f'orders_total{{job="{job}",status="success",error_type=""}}': rising(
            per_second * (1 - error_percent / 100)
        ),
        f'orders_total{{job="{job}",status="error",error_type="database"}}': rising(
            per_second * error_percent / 100
        ),
    }


def histogram(name: str, labels: str, up_to: Mapping[float, float], total: float = 200) -> Series:
    """Of *total* observations a second so many are up to each edge; all are up to the last."""
    edges = {**{f"{edge}": count for edge, count in up_to.items()}, "+Inf": total}
    return {f'{name}_bucket{{{labels},le="{edge}"}}': rising(count) for edge, count in edges.items()}


def merged(*parts: Series) -> Series:
    return {name: values for part in parts for name, values in part.items()}


# A quantile lies linearly between the edges of its bucket: 0.3 + 0.1 x 10 / 11, and so on.
BELOW_WARNING = {0.3: 180.0, 0.4: 191.0, 0.5: 200.0}  # p95 0.391
AT_WARNING = {0.3: 180.0, 0.4: 189.0, 0.5: 200.0}  # p95 0.409
BELOW_CRITICAL = {0.4: 180.0, 0.5: 191.0, 0.75: 200.0}  # p95 0.491
AT_CRITICAL = {0.4: 180.0, 0.5: 189.0, 0.75: 200.0}  # p95 0.523
P99_BELOW_WARNING = {0.5: 190.0, 0.75: 197.6, 1.0: 200.0}  # p99 0.792
P99_AT_WARNING = {0.5: 190.0, 0.75: 197.4, 1.0: 200.0}  # p99 0.808
P99_BELOW_CRITICAL = {0.75: 190.0, 1.0: 198.2, 2.5: 200.0}  # p99 0.994
P99_AT_CRITICAL = {0.75: 190.0, 1.0: 197.9, 2.5: 200.0}  # p99 1.071


AT_ONCE = dict.fromkeys("bcdD", 0)
# A counter that begins at 0 reaches its full rate after a whole window: 1.1 orders/s are 1 from here on.
ENOUGH_TRAFFIC_SECONDS = 55
WITH_TRAFFIC = dict.fromkeys("bcdD", ENOUGH_TRAFFIC_SECONDS)


def quantile_case(
    alert: str, summary: str, edges: Sequence[Mapping[float, float]], values: Sequence[float]
) -> Case:
    """Jobs a, b, c, d below and at the warning and the critical limit; e as d, with too little traffic."""
    jobs = dict(zip("abcde", [*edges, edges[-1]], strict=True))
    series = merged(
        *(histogram("order_processing_seconds", f'job="{job}"', up_to) for job, up_to in jobs.items()),
        *(orders(job, 0.9 if job == "e" else 1.1) for job in jobs),
    )
    return limits(alert, "job", summary, values, series, true_from=WITH_TRAFFIC)


def limits(
    alert: str,
    label: str,
    summary: str,
    values: Sequence[float],
    series: Series,
    *,
    true_from: Mapping[str, int],
    more: Mapping[str, str] | None = None,
    warning_for: int = 60,
    critical_for: int = 30,
) -> Case:
    """What must fire where *label* is a, b, c, d: warnings at b, c and d, critical at d, each after its time.

    Args:
        values: at a, b, c and d: below and at the warning's limit, below and at the critical one.
        true_from: the second from which the warning's expression holds at b, c and d, and the critical one's (D) at d.
    """
    fires_at: list[tuple[int, Firing]] = []
    for severity, which, seconds in (
        ("critical", "D", critical_for),
        *(("warning", which, warning_for) for which in "bcd"),
    ):
        instance = which.lower()
        text = summary.format(value=values["abcd".index(instance)], instance=instance)
        firing = Firing({label: instance, **(more or {})}, severity, text)
        fires_at.append((true_from[which] + seconds, firing))
    moments = sorted({at - before for at, _ in fires_at for before in (STEP_SECONDS, 0)})
    return Case(
        alert,
        series,
        {f"{moment}s": [firing for at, firing in fires_at if at <= moment] for moment in moments},
    )


def per_instance(name: str, values: Iterable[str]) -> Series:
    return {
        f'{name}{{job="order-service",instance="{instance}"}}': value
        for instance, value in zip("abcd", values, strict=True)
    }


def job(name: str, severity: str, summary: str, **more: str) -> Firing:
    return Firing({"job": name, **more}, severity, summary)


GIB = 1024**3
SERVICE = {"job": "order-service"}
POOLS = per_instance("db_pool_max", [constant(1000)] * 4)

CASES = [
    Case(
        "ServiceDown",
        {
            'up{job="order-service",instance="a"}': "1x20 0x40",
            'up{job="order-service",instance="b"}': "0x60",
            'up{job="prometheus",instance="p"}': "0x60",
        },
        {
            "115s": (),  # the last falls at 105 s
            "120s": (job("order-service", "critical", "no replica of the order service can be scraped"),),
        },
    ),
    Case(  # nothing is even tried
        "ServiceDown",
        {'up{job="prometheus",instance="p"}': "1x60"},
        {
            "10s": (),
            "15s": (job("order-service", "critical", "no replica of the order service can be scraped"),),
        },
    ),
    Case(
        "TargetDown",
        {
            'up{job="order-service",instance="a"}': "1x60",
            'up{job="order-service",instance="b"}': "0x60",
            'up{job="order-service",instance="c"}': "0 0 1 0 0 1 0 0 1 0 0 1 0 0 1",
            'up{job="prometheus",instance="p"}': "0x60",
        },
        {
            "10s": (),
            "15s": (job("order-service", "warning", "b cannot be scraped", instance="b"),),
            "60s": (job("order-service", "warning", "b cannot be scraped", instance="b"),),
        },
    ),
    Case(
        "NoTraffic",
        {
            'orders_total{job="stopped",status="success",error_type=""}': "0+50x180 9000+0x400",  # at 15 min
            'orders_total{job="flows",status="success",error_type=""}': rising(1),
            'orders_total{job="unused",status="success",error_type=""}': constant(0),
        },
        {
            "20m55s": (),
            "21m5s": (job("stopped", "warning", "0 orders/s for 5 minutes, where there were some before"),),
            "31m": (),
        },
    ),
    Case(
        "CircuitBreakerOpen",
        {
            'circuit_breaker_state{job="order-service",instance="a",breaker="postgres"}': "0x60",
            'circuit_breaker_state{job="order-service",instance="b",breaker="postgres"}': "0 2 1 2 1 2 1 2 1 2",
            'circuit_breaker_state{job="order-service",instance="c",breaker="postgres"}': "2 2 0 2 2 0 2 2 0",
            'circuit_breaker_state{job="order-service",instance="d",breaker="postgres_reads"}': "0 2 1 2 1 2 1 2 1 2",
        },
        {
            "15s": (),
            "20s": (
                Firing(
                    {**SERVICE, "instance": "b", "breaker": "postgres"},
                    "critical",
                    "the breaker postgres of b is not closed (state 1): orders are refused",
                ),
                Firing(
                    {**SERVICE, "instance": "d", "breaker": "postgres_reads"},
                    "critical",
                    "the breaker postgres_reads of d is not closed (state 1): reads are refused",
                ),
            ),
        },
    ),
    quantile_case(
        "OrderLatencyP95",
        "95 % of the orders take up to {value:.3f} s; the limit is 0.5 s",
        [BELOW_WARNING, AT_WARNING, BELOW_CRITICAL, AT_CRITICAL],
        [0.3 + 0.1 * 10 / 11, 0.4 + 0.1 / 11, 0.4 + 0.1 * 10 / 11, 0.5 + 0.25 / 11],
    ),
    quantile_case(
        "OrderLatencyP99",
        "99 % of the orders take up to {value:.3f} s; the limit is 1 s",
        [P99_BELOW_WARNING, P99_AT_WARNING, P99_BELOW_CRITICAL, P99_AT_CRITICAL],
        [0.75 + 0.25 * 0.4 / 2.4, 0.75 + 0.25 * 0.6 / 2.6, 0.75 + 0.25 * 8 / 8.2, 1 + 1.5 * 0.1 / 2.1],
    ),
    limits(
        "OrderLatencyMean",
        "job",
        "an order takes {value:.3f} s on average; the limit is 0.2 s",
        [0.159, 0.161, 0.199, 0.201],
        merged(
            *(
                {
                    f'order_processing_seconds_sum{{job="{name}"}}': rising(100 * mean),
                    f'order_processing_seconds_count{{job="{name}"}}': rising(100),
                    **orders(name, 0.9 if name == "e" else 1.1),
                }
                for name, mean in zip("abcde", (0.159, 0.161, 0.199, 0.201, 0.201), strict=True)
            )
        ),
        true_from=WITH_TRAFFIC,
    ),
    limits(
        "OrderErrorRate",
        "job",
        "{value:.2f} % of the orders fail; the limit is 1 %",
        [0.79, 0.81, 0.99, 1.01],
        merged(
            *(
                orders(name, 0.9 if name == "e" else 1.1, percent)
                for name, percent in zip("abcde", (0.79, 0.81, 0.99, 1.01, 1.01), strict=True)
            )
        ),
        true_from=WITH_TRAFFIC,
    ),
    Case(
        "InternalErrors",
        {
            'orders_total{job="a",status="error",error_type="internal"}': "0x20 1x40",
            'orders_total{job="b",status="error",error_type="internal"}': "0x60",
            'orders_total{job="b",status="error",error_type="database"}': rising(1),
        },
        {
            "100s": (),
            "105s": (
                job(
                    "a",
                    "critical",
                    "about 1 orders a minute fail with a defect of the service; the limit is 0",
                ),
            ),
            "170s": (),
        },
    ),
    Case(
        "ErrorBudgetBurnFast",
        merged(
            orders("below", 10, 14.3),
            orders("beyond", 10, 14.5),
            orders("little", 0.09, 50),
            {
                # The short window alone: a spike. The long one alone: it is over.
                'orders_total{job="spike",status="success",error_type=""}': rising(10),
                'orders_total{job="spike",status="error",error_type="database"}': "0x110 0+10x20",
                'orders_total{job="over",status="success",error_type=""}': rising(10),
                'orders_total{job="over",status="error",error_type="database"}': "0+50x106 5300x40",
            },
        ),
        {
            "10m": (
                job(
                    "beyond",
                    "critical",
                    "14.5 % of the orders failed in 5 minutes: 14.4 times what the objective allows, or more",
                ),
            )
        },
    ),
    Case(
        "ErrorBudgetBurnSlow",
        merged(
            orders("below", 10, 5.9),
            orders("beyond", 10, 6.1),
            orders("little", 0.09, 50),
            {
                'orders_total{job="spike",status="success",error_type=""}': rising(10),
                'orders_total{job="spike",status="error",error_type="database"}': "0x420 0+5x80",
                'orders_total{job="over",status="success",error_type=""}': rising(10),
                'orders_total{job="over",status="error",error_type="database"}': "0+50x408 20400x80",
            },
        ),
        {
            "40m": (
                job(
                    "beyond",
                    "warning",
                    "6.1 % of the orders failed in 30 minutes: 6 times what the objective allows, or more",
                ),
            )
        },
    ),
    limits(
        "CpuUsage",
        "instance",
        "{instance} uses {value:.1f} % of a core; the limit is 70 %",
        [55.9, 56.1, 69.9, 70.1],
        merged(
            POOLS,
            per_instance("process_cpu_seconds_total", map(rising, (0.559, 0.561, 0.699, 0.701))),
            {'process_cpu_seconds_total{job="prometheus",instance="p"}': rising(0.99)},  # has no pool
        ),
        true_from={"b": 60, "c": 50, "d": 50, "D": 60},  # 60 s x 56 / 56.1, 56 / 69.9, 56 / 70.1, 70 / 70.1
        more=SERVICE,
    ),
    limits(
        "MemoryUsage",
        "instance",
        "{instance} holds {value:.1f} % of 2 GiB; the limit is 80 %",
        [63.9, 64.1, 79.9, 80.1],
        merged(
            POOLS,
            per_instance(
                "process_resident_memory_bytes",
                (constant(round(2 * GIB * n)) for n in (0.639, 0.641, 0.799, 0.801)),
            ),
            {'process_resident_memory_bytes{job="prometheus",instance="p"}': constant(3 * GIB)},
        ),
        true_from=AT_ONCE,
        more=SERVICE,
    ),
    limits(
        "ConnectionPoolNearLimit",
        "instance",
        "{instance} has lent {value:.1f} % of its connections; the limit is 75 %",
        [59.9, 60, 74.9, 75],
        merged(POOLS, per_instance("db_pool_in_use", map(constant, (599, 600, 749, 750)))),
        true_from=AT_ONCE,
        more=SERVICE,
    ),
    Case(
        "ConnectionPoolExhausted",
        merged(
            POOLS,
            per_instance(
                "db_pool_in_use", (constant(0), constant(949), "950x60", "1000 1000 1000 900 1000 1000 1000")
            ),
            {  # a pool that is closed
                'db_pool_max{job="order-service",instance="e"}': constant(0),
                'db_pool_in_use{job="order-service",instance="e"}': constant(0),
            },
        ),
        {
            "10s": (),
            "15s": (
                job(
                    "order-service",
                    "critical",
                    "c has lent 95.0 % of its connections: what comes next waits, then is refused",
                    instance="c",
                ),
            ),
        },
    ),
    Case(
        "BatchQueueNearLimit",
        merged(
            histogram("order_stage_seconds", 'job="below",stage="queue"', {0.25: 177, 0.5: 200}),
            histogram("order_stage_seconds", 'job="below",stage="store"', {0.25: 0, 0.5: 200}),
            histogram("order_stage_seconds", 'job="at",stage="queue"', {0.25: 172, 0.5: 200}),
            histogram("order_stage_seconds", 'job="little",stage="queue"', {0.25: 172, 0.5: 200}),
            orders("below", 1.1),
            orders("at", 1.1),
            orders("little", 0.9),
        ),
        {
            "80s": (),
            "85s": (
                job(
                    "at",
                    "warning",
                    f"5 % of the orders wait {0.25 + 0.25 * 18 / 28:.3f} s or more for their batch; "
                    "at 0.5 s they are refused",
                ),
            ),
        },
    ),
    Case(
        "OrdersShed",
        {
            'requests_shed_total{job="a",reason="queue"}': rising(2),  # for 20 s of the minute
            'requests_shed_total{job="a",reason="pool"}': constant(7),  # long ago
        },
        {
            "15s": (),
            "20s": (
                job("a", "warning", "0.7 requests/s are refused to protect the rest (queue)", reason="queue"),
            ),
        },
    ),
    limits(
        "EventLoopLag",
        "instance",
        "the event loop of {instance} stood still for {value:.3f} s",
        [0.099, 0.1, 0.499, 0.5],
        per_instance("event_loop_lag_seconds", map(constant, (0.099, 0.1, 0.499, 0.5))),
        true_from=AT_ONCE,
        more=SERVICE,
        warning_for=30,
    ),
]

TWO_REPLICAS = merged(
    histogram("order_processing_seconds", 'job="j",instance="a"', {0.1: 100, 0.2: 100, 1.0: 100}, 100),
    histogram("order_processing_seconds", 'job="j",instance="b"', {0.1: 0, 0.2: 80, 1.0: 100}, 100),
    histogram("order_stage_seconds", 'job="j",stage="queue"', {0.25: 90, 0.5: 100}, 100),
    histogram("order_stage_seconds", 'job="j",stage="store"', {0.25: 0, 0.5: 0}, 100),
    {
        'order_processing_seconds_sum{job="j",instance="a"}': rising(10),
        'order_processing_seconds_count{job="j",instance="a"}': rising(100),
        'order_processing_seconds_sum{job="j",instance="b"}': rising(30),
        'order_processing_seconds_count{job="j",instance="b"}': rising(100),
        'orders_total{job="j",instance="a",status="success",error_type=""}': rising(90),
        'orders_total{job="j",instance="a",status="rejected",error_type="out_of_stock"}': rising(2),
        'orders_total{job="j",instance="b",status="error",error_type="database"}': rising(5),
        'orders_total{job="j",instance="b",status="error",error_type="timeout"}': rising(3),
        'process_cpu_seconds_total{job="j",instance="a"}': rising(0.25),
        'process_cpu_seconds_total{job="prometheus",instance="p"}': rising(0.25),
        'process_resident_memory_bytes{job="j",instance="a"}': constant(GIB // 2),
        'process_resident_memory_bytes{job="prometheus",instance="p"}': constant(GIB),
        'db_pool_in_use{job="j",instance="a"}': constant(30),
        'db_pool_max{job="j",instance="a"}': constant(50),
    },
)
VALUES: Mapping[str, Mapping[str, float]] = {
    # 200 a second, of which 180 are up to 0.2 s and 200 up to 1 s: the 190th and the 198th
    "job:order_processing_seconds:p95_1m": {'{job="j"}': 0.2 + 0.8 * 10 / 20},
    "job:order_processing_seconds:p99_1m": {'{job="j"}': 0.2 + 0.8 * 18 / 20},
    "job:order_processing_seconds:mean_1m": {'{job="j"}': 40 / 200},
    "job:order_queue_seconds:p95_1m": {'{job="j"}': 0.25 + 0.25 * 5 / 10},
    "job:orders:rate_1m": {'{job="j"}': 100},
    "job:orders:rate_5m": {'{job="j"}': 100},
    "job:orders:error_percent_1m": {'{job="j"}': 8},
    "job:orders:error_percent_5m": {'{job="j"}': 8},
    "job:orders:error_percent_30m": {'{job="j"}': 8},
    "job_error_type:orders:error_rate_1m": {
        '{job="j",error_type="database"}': 5,
        '{job="j",error_type="timeout"}': 3,
    },
    "instance:process_cpu:percent_1m": {'{job="j",instance="a"}': 25},
    "instance:process_memory:percent": {'{job="j",instance="a"}': 25},
    "instance:db_pool:percent": {'{job="j",instance="a"}': 60},
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.slow
@needs_promtool
def test_alert(case: Case, tmp_path: Path) -> None:
    """It fires beyond its limit and not below, after its time and not before, and its summary tells the value."""
    runbook = f"monitoring/README.md#{case.alert.lower()}"
    promtool_test(
        tmp_path,
        case.series,
        alert_rule_test=[
            {
                "eval_time": moment,
                "alertname": case.alert,
                "exp_alerts": [
                    {
                        "exp_labels": {**firing.labels, "severity": firing.severity},
                        "exp_annotations": {"summary": firing.summary, "runbook": runbook},
                    }
                    for firing in expected
                ],
            }
            for moment, expected in case.at.items()
        ],
    )


@pytest.mark.slow
@needs_promtool
def test_indicators(tmp_path: Path) -> None:
    """Each has the value that a calculation by hand has, over two replicas and for nothing else."""
    promtool_test(
        tmp_path,
        TWO_REPLICAS,
        promql_expr_test=[
            {
                "expr": f"round({name} * 1000)",
                "eval_time": "31m",
                "exp_samples": [
                    {"labels": labels, "value": round(value * 1000)} for labels, value in values.items()
                ],
            }
            for name, values in VALUES.items()
        ],
    )


def test_nothing_is_left_untested() -> None:
    """Every alert has a case in which it fires, with each of its severities, and every indicator has a value."""
    fired = {
        (case.alert, firing.severity)
        for case in CASES
        for expected in case.at.values()
        for firing in expected
    }
    assert fired == {(rule.name, rule.labels["severity"]) for rule in alerting_rules()}
    assert set(VALUES) == {rule.name for rule in recording_rules()}


@pytest.mark.slow
@needs_promtool
def test_promtool_has_nothing_to_say() -> None:
    """`promtool check` accepts the configuration, and its lint finds nothing in the rules."""
    run(
        "promtool",
        "check",
        "config",
        "--lint=all",
        "--lint-fatal",
        MONITORING / "prometheus" / "prometheus.yml",
    )
    run("promtool", "check", "rules", "--lint=all", "--lint-fatal", *sorted(RULES.glob("*.yml")))


@pytest.mark.slow
@needs_promtool
def test_a_rule_that_is_wrong_is_found(tmp_path: Path) -> None:
    """The tests can fail: with a limit moved by a little, or an indicator of another window, promtool objects."""
    case = next(case for case in CASES if case.alert == "CpuUsage")
    for file in RULES.glob("*.yml"):
        (tmp_path / file.name).write_text(file.read_text().replace("percent_1m >= 70", "percent_1m >= 70.2"))
    with pytest.raises(AssertionError, match="CpuUsage"):
        promtool_test(
            tmp_path,
            case.series,
            rules=tmp_path,
            alert_rule_test=[
                {
                    "eval_time": "90s",
                    "alertname": "CpuUsage",
                    "exp_alerts": [{"exp_labels": {"severity": "critical", "instance": "d", **SERVICE}}],
                }
            ],
        )


@pytest.mark.slow
@needs_amtool
@pytest.mark.parametrize(
    ("severity", "receiver"), [("critical", "critical"), ("warning", "warnings"), ("", "warnings")]
)
def test_routing(severity: str, receiver: str) -> None:
    """Alertmanager takes its configuration, and sends each severity where it belongs."""
    run("amtool", "check-config", ALERTMANAGER)
    labels = [f"severity={severity}"] if severity else []
    route = ["config", "routes", "test", f"--config.file={ALERTMANAGER}", f"--verify.receivers={receiver}"]
    run("amtool", *route, "alertname=Any", *labels)


def promtool_test(directory: Path, series: Series, *, rules: Path = RULES, **checks: object) -> None:
    """`promtool test rules` with one test; what it says is the failure. JSON is YAML, too."""
    groups = dict.fromkeys(rule.group for rule in [*recording_rules(), *alerting_rules()])
    document = {
        "rule_files": [str(rules / "*.yml")],
        "evaluation_interval": f"{STEP_SECONDS}s",
        "group_eval_order": list(groups),  # indicators before the alerts that read them
        "tests": [
            {
                "interval": f"{STEP_SECONDS}s",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                **checks,
            }
        ],
    }
    path = directory / "test.json"
    path.write_text(json.dumps(document))
    run("promtool", "test", "rules", path)


def run(*command: object) -> None:
    """Run *command*; it must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
