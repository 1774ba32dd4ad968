"""Rules, alerts, dashboards, catalogue and acceptance criteria say the same, and name only what the service exports."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml  # type: ignore[import-untyped]  # it has no annotations of its own

from app.embedded_postgres import EmbeddedPostgres
from loadtests.service_side import plan_queries
from monitoring import generate
from monitoring.dashboards import DASHBOARDS, DATASOURCE_UID, Panel, acceptance_limits
from monitoring.local import Monitor, MonitorError, targets_of
from monitoring.rules import Rule, alerting_rules, metric_names, recording_rules
from tests.support.order_api import new_database
from tests.support.service_process import ServiceProcess

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"
OTHERS = {"up", "ALERTS"}  # made by Prometheus itself

# The two rules of an alert, and the criterion of which they are the limit.
LIMITS = {
    "OrderLatencyP95": "latency_p95",
    "OrderLatencyP99": "latency_p99",
    "OrderLatencyMean": "latency_mean",
    "OrderErrorRate": "error_rate",
    "CpuUsage": "cpu",
    "MemoryUsage": "memory",
    "ConnectionPoolNearLimit": "pool",
}
WARNING_SHARE = 0.8

PANELS = [
    pytest.param(panel, id=f"{board.uid}: {panel.title}") for board in DASHBOARDS for panel in board.panels
]


def promql() -> list[str]:
    """Every expression there is, a panel's as Grafana reads it, a load test's as it is asked."""
    rules = [rule.expr for rule in (*recording_rules(), *alerting_rules())]
    boards = [json.loads(path.read_text()) for path in sorted(generate.DASHBOARD_FILES.glob("*.json"))]
    panels = [panel for board in boards for panel in board["panels"]]
    load_test = [query.promql for query in plan_queries.PLAN_QUERIES]
    load_test += [plan_queries.quantile(0.95, 90), plan_queries.SUCCESS, plan_queries.LAST_SCRAPE]
    load_test += [plan_queries.CPU_NOW, *plan_queries.POOL_NOW]
    return rules + [target["expr"] for panel in panels for target in panel.get("targets", ())] + load_test


@pytest.fixture(scope="module")
def exported(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the families that a running service exports."""
    with new_database(postgres) as dsn:
        service = ServiceProcess(tmp_path_factory.mktemp("service"), dsn).start()
        page = httpx.get(f"{service.url}/metrics").text
        service.kill()
    return set(re.findall(r"^# TYPE (\S+) ", page, flags=re.MULTILINE))


@pytest.mark.parametrize("expr", dict.fromkeys(promql()))
def test_expression(expr: str) -> None:
    """A parser of PromQL understands it: its functions are there, and get what they take."""
    assert promql_parser.parse(expr)


@pytest.mark.parametrize(
    "wrong", ["rate(orders_total)", "sum by (le (up)", "ratio(up[1m])", "up > bool", "up[1m"]
)
def test_no_expression(wrong: str) -> None:
    """The parser refuses what Prometheus would."""
    with pytest.raises(ValueError, match=r"\w"):
        promql_parser.parse(wrong)


def test_only_what_is_exported_is_read(exported: set[str]) -> None:
    """Every metric in rules, alerts and dashboards is exported by a running service, or recorded by a rule."""
    recorded = {rule.name for rule in recording_rules()}
    read = {name for expr in promql() for name in generate.family_names(expr)}
    assert len(read) > 20
    if not any(name.startswith("process_") for name in exported):  # macOS has no /proc
        read -= set(generate.PROCESS_METRICS)
    assert read - recorded - OTHERS <= exported


def test_load_test_reads_what_is_exported(exported: set[str]) -> None:
    """The one query of a load test that finds series by a pattern of names: each alternative is of a metric."""
    selector = promql_parser.parse(plan_queries.SAMPLES)
    assert isinstance(selector, promql_parser.VectorSelector)
    [pattern] = [matcher.value for matcher in selector.matchers.matchers]
    alternatives = re.split(r"\|(?![^(]*\))", pattern)
    assert len(alternatives) > 10
    series = exported | {f"{name}{suffix}" for name in exported for suffix in ("_bucket", "_sum", "_count")}
    if not any(name.startswith("process_") for name in exported):  # macOS has no /proc
        series |= set(generate.PROCESS_METRICS)
    assert [one for one in alternatives if not any(re.fullmatch(one, name) for name in series)] == []


def test_every_metric_is_read() -> None:
    """Each metric that the service exports is on a dashboard or in an alert."""
    assert "nothing here" not in generate.catalogue()


def test_labels_are_those_of_the_metric() -> None:
    """An expression over one metric matches and groups by labels that this metric, or its target, has."""
    declared = {name: set(labels) for name, _, labels, _ in generate.described()}
    wrong = []
    for expr in promql():
        names = generate.family_names(expr) & declared.keys()
        allowed = {"job", "instance", "le"}.union(*(declared[name] for name in names))
        recorded = metric_names(expr) - names
        if any(":" in name for name in recorded):
            allowed |= {"error_type"}
        if recorded & OTHERS:
            allowed |= {"alertstate", "severity"}
        if foreign := label_names(expr) - allowed:
            wrong.append((expr, foreign))
    assert not wrong


@pytest.mark.parametrize("alert", LIMITS)
def test_limits(alert: str) -> None:
    """An alert is critical from the acceptance limit on, and warns at 80 % of it; its summary names the limit."""
    (limit,) = acceptance_limits()[LIMITS[alert]]
    rules = {rule.labels["severity"]: rule for rule in alerting_rules() if rule.name == alert}
    assert threshold(rules["critical"]) == pytest.approx(limit)
    assert threshold(rules["warning"]) == pytest.approx(WARNING_SHARE * limit)
    for rule in rules.values():
        assert re.search(rf"the limit is {limit:g} (s|%)", rule.annotations["summary"])


def test_zero_critical_errors() -> None:
    """The criterion of no critical error is an alert from the first one on."""
    (limit,) = acceptance_limits()["critical_errors"]
    (rule,) = [rule for rule in alerting_rules() if rule.name == "InternalErrors"]
    assert limit == 0
    assert rule.expr.endswith("> 0")
    assert rule.labels["severity"] == "critical"


def test_every_limit_of_the_service_alerts() -> None:
    """No criterion that Prometheus could see is without its alert; the others count alerts, or orders at the client."""
    assert set(acceptance_limits()) == {
        *LIMITS.values(),
        "critical_errors",
        "critical_alerts",
        "warning_alerts",
        "throughput",
    }


def test_alerts() -> None:
    """Each has a severity, a summary with the value where there is one, and its section of the runbook."""
    sections = dict(
        re.findall(
            r"^### (\S+)$\n(.*?)(?=^### |\Z)",
            (MONITORING / "README.md").read_text(),
            re.MULTILINE | re.DOTALL,
        )
    )
    for rule in alerting_rules():
        assert rule.labels.keys() == {"severity"}
        assert rule.labels["severity"] in {"warning", "critical"}
        assert rule.annotations["runbook"] == f"monitoring/README.md#{rule.name.lower()}"
        assert "$value" in rule.annotations["summary"] or rule.name in {"ServiceDown", "TargetDown"}
        for part in ("Meaning", "First look", "Usual causes", "Remedy"):
            assert f"- **{part}.** " in sections[rule.name], rule.name
    assert list(sections) == list(dict.fromkeys(rule.name for rule in alerting_rules()))


def test_inhibition_names_alerts() -> None:
    """Alertmanager hides alerts, and by alerts, that there are."""
    text = (MONITORING / "alertmanager" / "alertmanager.yml").read_text()
    alerts = {rule.name for rule in alerting_rules()}
    named = re.findall(r"alertname (?:=|!=|=~|!~) \"([^\"]+)\"", text)
    assert len(named) >= 6
    for pattern in (part for name in named for part in name.split("|")):
        assert any(re.fullmatch(pattern, alert) for alert in alerts), pattern


@pytest.mark.parametrize("panel", PANELS)
def test_panel(panel: Panel) -> None:
    """It has a unit, a description that is a sentence, and the limit of what it shows where there is one."""
    assert panel.unit
    assert re.fullmatch(r"[A-Za-z0-9].{15,}\.", panel.description)
    judged = {rule.expr.split()[0]: LIMITS[rule.name] for rule in alerting_rules() if rule.name in LIMITS}
    for _, expr in panel.queries:
        if expr in judged:
            assert panel.criterion == judged[expr]


def test_dashboards_as_grafana_reads_them() -> None:
    """The JSON draws the limits, is about one provisioned data source, and panels neither overlap nor share an id."""
    (source,) = yaml.safe_load(
        (MONITORING / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )["datasources"]
    assert source["uid"] == DATASOURCE_UID
    drawn = set()
    for path in sorted((MONITORING / "grafana" / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        assert board["uid"] == path.stem
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        cells: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
            assert not own & cells
            assert max(x for x, _ in own) < 24
            cells |= own
            if panel["type"] != "row":
                assert {target["datasource"]["uid"] for target in panel["targets"]} == {DATASOURCE_UID}
                drawn |= drawn_limits(panel)
    assert drawn == {limit for limits in acceptance_limits().values() for limit in limits}


def test_generated_files_are_current() -> None:
    """`python -m monitoring.generate` would change nothing."""
    for path, text in generate.files().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run python -m monitoring.generate"
    boards = {path.stem for path in generate.DASHBOARD_FILES.glob("*.json")}
    assert boards == {board.uid for board in DASHBOARDS}


def test_metrics_module_names_its_readers() -> None:
    """An alert that a comment of app/metrics.py names is an alert."""
    comments = re.findall(r"^# Read by: (.*)$", (ROOT / "app" / "metrics.py").read_text(), re.MULTILINE)
    named = {
        word for comment in comments for word in re.findall(r"\b(?:[A-Z][a-z0-9]+){2,}[A-Z0-9]*\b", comment)
    }
    assert len(named) >= 5
    assert named <= {rule.name for rule in alerting_rules()}


def test_compose_mounts_what_is_there() -> None:
    """What the stack mounts is in the repository; images are pinned; every service has a health check."""
    compose: dict[str, Any] = yaml.safe_load((MONITORING / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        if "image" in service and "build" not in service:
            assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", service["image"]), name
        assert "healthcheck" in service, name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (MONITORING / source).exists(), source


def test_monitor_without_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make monitor` says what is missing, how to get it, and what needs none of it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MonitorError, match=r"apt install prometheus prometheus-alertmanager.*make stack"):
        Monitor(tmp_path / "monitor", ["localhost:8000"])


def test_monitor_on_a_port_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make monitor` names the port that is in use, and the variable that chooses another, and starts nothing."""
    for name in ("prometheus", "prometheus-alertmanager"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monitor = Monitor(tmp_path / "monitor", ["localhost:8000"], prometheus_port=port)
        with pytest.raises(MonitorError, match=f"port {port} is in use; PROMETHEUS_PORT="), monitor:
            pytest.fail("it started")


def label_names(promql: str) -> set[str]:
    """The labels that *promql* matches, groups or joins by."""
    names: set[str] = set()

    def note(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.update(matcher.name for matcher in node.matchers.matchers)
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            names.update(node.modifier.labels)
        elif isinstance(node, promql_parser.BinaryExpr) and node.modifier and node.modifier.matching:
            names.update(node.modifier.matching.labels)

    promql_parser.walk(promql_parser.parse(promql), note)
    return names


def threshold(rule: Rule) -> float:
    """What the value of a rule is compared with."""
    found = re.match(r"\S+ >= ([\d.]+)(?:\s|$)", rule.expr)
    assert found, rule.expr
    return float(found[1])


def drawn_limits(panel: dict[str, Any]) -> set[float]:
    """The values of the lines in a panel."""
    defaults = panel["fieldConfig"]["defaults"]
    values = {step["value"] for step in defaults["thresholds"]["steps"]} - {None}
    assert defaults["custom"]["thresholdsStyle"]["mode"] == ("line" if values else "off")
    return values


@pytest.mark.parametrize(
    ("environment", "targets"),
    [
        ({}, ["localhost:8000"]),
        ({"REPLICAS": "1"}, ["localhost:8000"]),
        ({"REPLICAS": "3"}, ["localhost:8001", "localhost:8002", "localhost:8003"]),
        ({"REPLICAS": "3", "TARGETS": "a:1, b:2"}, ["a:1", "b:2"]),
    ],
    ids=["alone", "one", "three", "named"],
)
def test_make_monitor_scrapes_what_make_run_started(environment: dict[str, str], targets: list[str]) -> None:
    """The ports of `make run`, and of `make run REPLICAS=3`, unless others are named."""
    assert targets_of(environment) == targets


def test_a_number_of_replicas_that_is_none() -> None:
    """It is told by its variable's name."""
    with pytest.raises(MonitorError, match="REPLICAS: 'x'"):
        targets_of({"REPLICAS": "x"})
