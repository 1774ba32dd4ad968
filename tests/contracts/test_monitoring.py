"""Rules, alerts, dashboards, catalogue and acceptance criteria say the same, and name only what the service exports."""

import json
import re
import socket
import tomllib
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml  # type: ignore[import-untyped]  # it has no annotations of its own

from app.embedded_postgres import EmbeddedPostgres
from app.settings import Settings
from loadtests.service_side import plan_queries
from monitoring import generate
from monitoring.dashboards import (
    ACCEPTANCE,
    DASHBOARDS,
    DATASOURCE_UID,
    Panel,
    acceptance_limits,
    filled,
    profiles,
)
from monitoring.local import Monitor, MonitorError, targets_of
from monitoring.rules import Rule, alerting_rules, metric_names, recording_rules
from tests.support.order_api import new_database
from tests.support.service_process import EVERYTHING, ServiceProcess

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"
OTHERS = {"up", "ALERTS"}  # made by Prometheus itself
# What others export than the service. tests/e2e/test_monitoring_live.py finds those of Prometheus and Alertmanager.
SURROUNDINGS = {
    # postgres_exporter
    "pg_up",
    "pg_stat_database_numbackends",
    "pg_settings_max_connections",
    # node_exporter
    "node_filesystem_avail_bytes",
    "node_filesystem_size_bytes",
    # the kubelet, and its cAdvisor
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_capacity_bytes",
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
    # Prometheus and Alertmanager
    "prometheus_config_last_reload_successful",
    "prometheus_rule_evaluation_failures_total",
    "prometheus_rule_group_iterations_missed_total",
    "prometheus_notifications_alertmanagers_discovered",
    "prometheus_notifications_errors_total",
    "prometheus_notifications_sent_total",
    "alertmanager_notifications_failed_total",
    # a load test that runs: monitoring/README.md
    "loadtest_running",
}
# Labels that a target has from whoever discovers it, and those of the surroundings.
TARGET_LABELS = {"namespace", "job", "pod", "instance"}
SURROUNDING_LABELS = {
    "device",
    "mountpoint",
    "fstype",
    "persistentvolumeclaim",
    "container",
    "integration",
    "profile",
    "run",
}

# The two rules of an alert, and the criterion of which they are the limit.
LIMITS = {
    "OrderLatencyP95": "latency_p95",
    "OrderLatencyP99": "latency_p99",
    "OrderLatencyMean": "latency_mean",
    "OrderErrorRate": "error_rate",
    "MemoryUsage": "memory",
    "ConnectionPoolNearLimit": "pool",
}
WARNING_SHARE = 0.8
# What the autoscaler aims at is a criterion and no alert: the figure, and from where on another alert reads it.
NO_ALERT = {"cpu": ("pod:process_cpu:ratio_deriv5m", "CpuSaturated", 0.9)}
# Alerts of an order service's replicas or jobs tell of which: all that aggregates keeps these labels.
JOB = ["namespace", "job"]
NOT_OF_A_JOB = {"Watchdog"}

PANELS = [
    pytest.param(panel, id=f"{board.uid}: {panel.title}") for board in DASHBOARDS for panel in board.panels
]


def promql() -> list[str]:
    """Every expression there is, a panel's as Grafana reads it, a load test's as it is asked."""
    rules = [rule.expr for rule in (*recording_rules(), *alerting_rules())]
    boards = [json.loads(path.read_text()) for path in sorted(generate.DASHBOARD_FILES.glob("*.json"))]
    panels = [
        filled(target["expr"])
        for board in boards
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]
    panels += [filled(note["expr"]) for board in boards for note in board["annotations"]["list"]]
    load_test = [query.promql for query in plan_queries.PLAN_QUERIES]
    load_test += [plan_queries.quantile(0.95, 90), plan_queries.SUCCESS, plan_queries.LAST_SCRAPE]
    load_test += [plan_queries.CPU_NOW, *plan_queries.POOL_NOW]
    return rules + panels + load_test


@pytest.fixture(scope="module")
def exported(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the families that a running service exports."""
    with new_database(postgres) as dsn:
        service = ServiceProcess(tmp_path_factory.mktemp("service"), dsn, EVERYTHING).start()
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
    assert read - recorded - OTHERS - SURROUNDINGS <= exported
    assert read >= SURROUNDINGS


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
        allowed = (TARGET_LABELS | {"le"}).union(*(declared[name] for name in names))
        others = metric_names(expr) - names
        if others & OTHERS:
            allowed |= {"alertname", "alertstate", "severity"}
        if others & SURROUNDINGS:
            allowed |= SURROUNDING_LABELS
        if foreign := label_names(expr) - allowed:
            wrong.append((expr, foreign))
    assert not wrong


@pytest.mark.parametrize("alert", LIMITS)
def test_limits(alert: str) -> None:
    """An alert is critical from the acceptance limit on, and warns at 80 % of it; its summary names the limit."""
    (limit,) = acceptance_limits()[LIMITS[alert]].values()
    rules = {rule.labels["severity"]: rule for rule in alerting_rules() if rule.name == alert}
    assert threshold(rules["critical"]) == pytest.approx(limit)
    assert threshold(rules["warning"]) == pytest.approx(WARNING_SHARE * limit)
    for rule in rules.values():
        shown = f"{limit:g} s" if "seconds" in rule.expr else f"{limit * 100:g} %"
        assert f"the limit is {shown}" in rule.annotations["summary"]


@pytest.mark.parametrize("alert", LIMITS)
def test_samples(alert: str) -> None:
    """An alert on orders rests on as many of them as the acceptance file asks, and on so many that one is no reason."""
    criteria = tomllib.loads(ACCEPTANCE.read_text())["criteria"]
    (asked,) = [criterion.get("samples", 0) for criterion in criteria if criterion["name"] == LIMITS[alert]]
    for rule in (rule for rule in alerting_rules() if rule.name == alert):
        floors = [int(floor) for floor in re.findall(r":increase\d+m >= (\d+)", rule.expr)]
        if rule.expr.startswith("job:"):
            assert floors
            assert min(floors) >= max(asked, 200)
        else:
            assert not asked


@pytest.mark.parametrize("criterion", NO_ALERT)
def test_no_alert_at_what_the_autoscaler_aims_at(criterion: str) -> None:
    """Its figure is recorded, its limit drawn, and the one alert that reads it begins far beyond."""
    figure, alert, least = NO_ALERT[criterion]
    (limit,) = acceptance_limits()[criterion].values()
    assert limit < least
    assert figure in {rule.name for rule in recording_rules()}
    readers = [rule for rule in alerting_rules() if figure in metric_names(rule.expr)]
    assert [rule.name for rule in readers] == [alert]
    assert threshold(readers[0]) >= least
    assert any(panel.criterion == criterion for board in DASHBOARDS for panel in board.panels)


def test_zero_critical_errors() -> None:
    """The criterion of no critical error is an alert from the first one on."""
    (limit,) = acceptance_limits()["critical_errors"].values()
    (rule,) = [rule for rule in alerting_rules() if rule.name == "InternalErrors"]
    assert limit == 0
    assert rule.expr.endswith("> 0")
    assert rule.labels["severity"] == "critical"


def test_every_limit_of_the_service_alerts() -> None:
    """No criterion that Prometheus could see is without its alert; the others count alerts, or orders at the client."""
    assert set(acceptance_limits()) == {
        *LIMITS.values(),
        *NO_ALERT,
        "critical_errors",
        "critical_alerts",
        "warning_alerts",
        "throughput",
    }


def test_alerts() -> None:
    """Each has a severity, a summary with the value, a description, and its section of the runbook."""
    sections = dict(
        re.findall(
            r"^### (\S+)$\n(.*?)(?=^### |\Z)",
            (MONITORING / "README.md").read_text().partition("\n## Runbook\n")[2],
            re.MULTILINE | re.DOTALL,
        )
    )
    for rule in alerting_rules():
        assert rule.labels.keys() == {"severity"}
        assert rule.labels["severity"] in {"warning", "critical"} or rule.name == "Watchdog"
        assert rule.annotations.keys() == {"summary", "description", "runbook_url"}
        assert rule.annotations["runbook_url"] == f"monitoring/README.md#{rule.name.lower()}"
        assert "$value" in rule.annotations["summary"] or rule.name in {"ServiceDown", "TargetDown"}
        assert re.fullmatch(r"[A-Z].{20,}\.", rule.annotations["description"])
        for part in ("Meaning", "First look", "Usual causes", "Remedy"):
            assert f"- **{part}.** " in sections[rule.name], rule.name
    assert list(sections) == list(dict.fromkeys(rule.name for rule in alerting_rules()))


def test_recorded_names() -> None:
    """A recorded series is named level:metric:operations, and its level says which labels it has."""
    levels = {
        "job": {"namespace", "job"},
        "pod": {"namespace", "job", "pod", "instance"},
        "instance": {"namespace", "job", "pod", "instance"},
        "volume": {"namespace", "job", "pod", "instance", "device", "mountpoint", "persistentvolumeclaim"},
    }
    for rule in recording_rules():
        assert re.fullmatch(r"[a-z]+:[a-z_]+:[a-z0-9_]+", rule.name), rule.name
        assert "percent" not in rule.name
        assert not re.search(r"\* 100\b", rule.expr), rule.name
        level = rule.name.partition(":")[0]
        for grouped in grouping(rule.expr):
            assert set(grouped) - {"le"} <= levels[level], rule.name
        if level == "job" and grouping(rule.expr):
            assert all(set(JOB) <= set(grouped) for grouped in grouping(rule.expr)), rule.name


@pytest.mark.parametrize("rule", [*recording_rules(), *alerting_rules()], ids=lambda rule: rule.name)
def test_labels_survive(rule: Rule) -> None:
    """Whatever a rule aggregates keeps namespace and job, or namespace and pod, and what it joins is joined by them."""
    for labels in (*grouping(rule.expr), *joining(rule.expr)):
        assert set(JOB) <= set(labels) or {"namespace", "pod"} <= set(labels), (rule.name, labels)
    if rule.expr in {alert.expr for alert in alerting_rules()} and rule.name not in NOT_OF_A_JOB:
        assert "without" not in rule.expr


def test_no_rule_names_a_job() -> None:
    """Rules and dashboards find the service by what it exports, whatever its job is called."""
    for expr in promql():
        assert not re.search(r'\bjob\s*(=|!=|=~|!~)\s*"(?!\.\*")', expr), expr


@pytest.mark.parametrize("rule", [*recording_rules(), *alerting_rules()], ids=lambda rule: rule.name)
def test_windows_bear_missed_scrapes(rule: Rule) -> None:
    """No rule reads a scraped series at an instant, but `up`; a counter over 5 minutes or more, a gauge over 3."""
    for function, name, seconds in ranges(rule.expr):
        least = 300 if function in {"rate", "increase", "deriv"} else 180
        assert seconds >= least, (rule.name, function, name)
    bare = instants(rule.expr)
    recorded = {rule.name for rule in recording_rules()}
    # A subquery looks at event_loop_lag_seconds every 15 s, and leaves out where it is missing.
    assert bare - recorded - OTHERS <= {"event_loop_lag_seconds"}, rule.name


def test_inhibition_names_alerts() -> None:
    """Alertmanager hides alerts, and by alerts, that there are."""
    text = (MONITORING / "alertmanager" / "alertmanager.yml").read_text()
    alerts = {rule.name for rule in alerting_rules()}
    named = re.findall(r"alertname (?:=|!=|=~|!~) \"([^\"]+)\"", text)
    assert len(named) >= 6
    for pattern in (part for name in named for part in re.split(r"\|(?![^(]*\))", name)):
        assert any(re.fullmatch(pattern, alert) for alert in alerts), pattern
        assert not re.fullmatch(pattern, "Watchdog")


@pytest.mark.parametrize("panel", PANELS)
def test_panel(panel: Panel) -> None:
    """It has a unit, a description that is a sentence; its windows are Grafana's, its series those that are chosen."""
    assert panel.unit
    assert re.fullmatch(r"[A-Za-z0-9].{15,}\.", panel.description)
    for _, expr in panel.queries:
        for window in re.findall(r"\[([^\]]+)\]", expr):
            assert window in {"$__rate_interval", "5m"}
        if "ALERTS" not in expr:
            assert 'namespace=~"$namespace",job=~"$job",pod=~"$pod"' in expr
            assert "{ours" not in expr


def test_a_panel_for_each_breaker() -> None:
    """What shows breakers tells them apart."""
    panels = [panel for board in DASHBOARDS for panel in board.panels]
    found = [query for panel in panels for query in panel.queries if "circuit_breaker" in query[1]]
    assert len(found) >= 2
    assert all("{{breaker}}" in legend for legend, _ in found)


def test_dashboards_as_grafana_reads_them() -> None:
    """The JSON draws the limits, is about the chosen data source, and panels neither overlap nor share an id."""
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
            if panel["type"] == "timeseries":
                drawn |= drawn_limits(panel)
    everywhere = {limit for by_profile in acceptance_limits().values() for limit in by_profile.items()}
    assert drawn == everywhere


def test_variables_and_annotations() -> None:
    """Each dashboard lets choose data source, namespace, job, pod and profile, and shows when a load test ran."""
    (source,) = yaml.safe_load(
        (MONITORING / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )["datasources"]
    assert source["type"] == "prometheus"
    assert source["isDefault"]
    for path in sorted((MONITORING / "grafana" / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        variables = {variable["name"]: variable for variable in board["templating"]["list"]}
        assert list(variables) == ["datasource", "namespace", "job", "pod", "profile"]
        assert variables["datasource"]["query"] == source["type"]
        for name in ("namespace", "job", "pod"):
            assert variables[name]["allValue"] == ".*"  # also what has no such label
        assert variables["profile"]["query"].split(",") == list(profiles())
        runs = [note for note in board["annotations"]["list"] if "loadtest_running" in note["expr"]]
        assert [note["enable"] for note in runs] == [True]
    heatmaps = [panel for board in DASHBOARDS for panel in board.panels if panel.kind == "heatmap"]
    assert ["order_processing_seconds_bucket" in panel.queries[0][1] for panel in heatmaps] == [True]


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


def test_compose() -> None:
    """What the stack mounts is there and readable under SELinux; images are pinned, with their registry; every

    service has a health check, a limit of memory and of CPUs; a published port is on loopback.
    """
    compose: dict[str, Any] = yaml.safe_load((MONITORING / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert re.match(r"(localhost|[a-z]+\.[a-z.]+)/", service["image"]), name
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", service["image"]), name
        assert {"healthcheck", "mem_limit", "cpus"} <= service.keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            source, _, rest = volume.partition(":")
            if source.startswith("."):
                assert (MONITORING / source).exists(), source
                assert rest.endswith(":ro,z"), volume
            elif "/" in source:  # the machine's own: not to be labelled anew
                assert "label=disable" in service["security_opt"]


def test_compose_scales() -> None:
    """Replicas share no host port, Prometheus finds them by DNS, and the database has connections for all."""
    services: dict[str, Any] = yaml.safe_load((MONITORING / "compose.yaml").read_text())["services"]
    replica = services["order-service"]
    assert "container_name" not in replica
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+-\d+:\d+", port) for port in replica["ports"])
    scraped = yaml.safe_load((MONITORING / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = [config for job in scraped for config in job.get("dns_sd_configs", [])]
    assert found["names"] == ["order-service"]
    assert found["port"] == int(replica["ports"][0].rpartition(":")[2])
    budget = int(replica["environment"]["MAX_REPLICAS"]) * Settings().db_pool_max_size
    (allowed,) = re.findall(r"max_connections=(\d+)", " ".join(services["postgres"]["command"]))
    assert budget <= 0.75 * int(allowed)


def test_monitor_expects_its_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make monitor` scrapes each of its TARGETS, by no DNS, and expects as many replicas."""
    for name in ("prometheus", "prometheus-alertmanager"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    targets = ["a:1", "b:2", "c:3"]
    Monitor(tmp_path / "monitor", targets)
    (scraped,) = yaml.safe_load((tmp_path / "monitor" / "targets" / "order-service.yml").read_text())
    assert scraped["targets"] == targets
    assert "dns_sd_configs" not in (tmp_path / "monitor" / "prometheus.yml").read_text()
    expected = (tmp_path / "monitor" / "rules" / "expected.yml").read_text()
    assert "expr: job:order_replicas:max1d * 0 + 3\n" in expected


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


def nodes(promql: str, kind: type[promql_parser.Expr]) -> list[Any]:
    """Every part of *promql* that is of *kind*."""
    found: list[Any] = []

    def note(node: promql_parser.Expr) -> None:
        if isinstance(node, kind):
            found.append(node)

    promql_parser.walk(promql_parser.parse(promql), note)
    return found


def grouping(promql: str) -> list[list[str]]:
    """The labels that each aggregation keeps."""
    aggregates = nodes(promql, promql_parser.AggregateExpr)
    return [list(node.modifier.labels) if node.modifier else [] for node in aggregates]


def joining(promql: str) -> list[list[str]]:
    """The labels by which each operator that names some joins its sides."""
    operators = nodes(promql, promql_parser.BinaryExpr)
    return [
        list(node.modifier.matching.labels)
        for node in operators
        if node.modifier and node.modifier.matching is not None
    ]


def ranges(promql: str) -> list[tuple[str, str | None, float]]:
    """(function, metric, seconds) of each function over a window."""
    return [
        (call.func.name, argument.vector_selector.name, argument.range.total_seconds())
        for call in nodes(promql, promql_parser.Call)
        for argument in call.args
        if isinstance(argument, promql_parser.MatrixSelector)
    ]


def instants(promql: str) -> set[str]:
    """The series that are read at an instant."""
    in_windows = [node.vector_selector.name for node in nodes(promql, promql_parser.MatrixSelector)]
    names = [node.name for node in nodes(promql, promql_parser.VectorSelector)]
    for name in in_windows:
        if name in names:
            names.remove(name)
    return {name for name in names if name}


def threshold(rule: Rule) -> float:
    """What the value of a rule is compared with."""
    found = re.match(r"\S+ >= ([\d.]+)(?:\s|$)", rule.expr)
    assert found, rule.expr
    return float(found[1])


def drawn_limits(panel: dict[str, Any]) -> set[tuple[str, float]]:
    """(profile, value) of each line in a panel; "" is every profile."""
    defaults = panel["fieldConfig"]["defaults"]
    values = {("", step["value"]) for step in defaults["thresholds"]["steps"] if step["value"] is not None}
    assert defaults["custom"]["thresholdsStyle"]["mode"] == ("line" if values else "off")
    for target in panel["targets"]:
        if target["legendFormat"] == "limit: {{profile}}":
            by_profile = re.findall(r'vector\(([\d.]+)\), "profile", "(\w+)"', target["expr"])
            values |= {(profile, float(value)) for value, profile in by_profile}
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
