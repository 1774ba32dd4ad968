"""`python -m monitoring.generate` writes what follows from other files.

These are the dashboards' JSON, the metric catalogue, and the rules as a cluster's operator reads them.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml  # type: ignore[import-untyped]  # it has no annotations of its own
from prometheus_client.metrics import MetricWrapperBase

from app import metrics
from monitoring.dashboards import DASHBOARDS, filled, render
from monitoring.rules import RULES, alerting_rules, expecting, metric_names, recording_rules

README = Path(__file__).parent / "README.md"
DASHBOARD_FILES = Path(__file__).parent / "grafana" / "dashboards"
_K8S = Path(__file__).parents[1] / "k8s"
PROMETHEUS_RULE = _K8S / "components" / "monitoring" / "prometheus-rule.yaml"
CLUSTER_EXPECTATION = _K8S / "overlays" / "local" / "prometheus" / "expected.yml"

_CATALOGUE = re.compile(r"(?<=<!-- catalogue -->\n).*?(?=<!-- /catalogue -->)", re.DOTALL)
_SUFFIXES = ("_bucket", "_sum", "_count")

# Of the client library's own metrics, those that are read; it exports them on Linux.
PROCESS_METRICS: Mapping[str, tuple[str, str]] = {
    "process_cpu_seconds_total": ("counter", "CPU time of the process."),
    "process_resident_memory_bytes": ("gauge", "Memory in RAM."),
    "process_start_time_seconds": ("gauge", "When the process began, in Unix time."),
    "process_open_fds": ("gauge", "Open file descriptors."),
    "process_max_fds": ("gauge", "The most open file descriptors."),
}


def files() -> Mapping[Path, str]:
    """What has to stand in each generated file."""
    return {
        README: _CATALOGUE.sub(lambda _: catalogue(), README.read_text()),
        **{
            DASHBOARD_FILES / f"{dashboard.uid}.json": json.dumps(render(dashboard), indent=2) + "\n"
            for dashboard in DASHBOARDS
        },
        PROMETHEUS_RULE: prometheus_rule(),
        CLUSTER_EXPECTATION: cluster_expectation(),
    }


def catalogue() -> str:
    """The metric catalogue: one line per metric of app/metrics.py, in its order, with everything that reads it."""
    readers = metric_readers()
    lines = ["", "| metric | kind | labels | meaning | read by |", "| --- | --- | --- | --- | --- |"]
    for name, kind, labels, meaning in described():
        lines.append(
            f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {meaning} "
            f"| {', '.join(readers.get(name, ['nothing here']))} |"
        )
    return "\n".join([*lines, "", ""])


def described() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Name, kind, labels and meaning of each metric that is read, in the order of app/metrics.py."""
    for instrument in vars(metrics).values():
        if isinstance(instrument, MetricWrapperBase):
            (family,) = instrument.describe()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield name, family.type, tuple(instrument._labelnames), family.documentation  # noqa: SLF001 - no other way
    for name, (kind, meaning) in PROCESS_METRICS.items():
        yield name, kind, (), meaning


def cluster_expectation() -> str:
    """How many replicas there should be where the HPA says so."""
    hpa = yaml.safe_load((_K8S / "base" / "horizontal-pod-autoscaler.yaml").read_text())
    return expecting(hpa["spec"]["minReplicas"])


def prometheus_rule() -> str:
    """All rules as one object of the Prometheus Operator."""
    texts = ((RULES / "recording.yml").read_text(), cluster_expectation(), (RULES / "alerts.yml").read_text())
    groups = [group for text in texts for group in yaml.safe_load(text)["groups"]]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "order-service", "labels": {"app.kubernetes.io/name": "order-service"}},
        "spec": {"groups": groups},
    }
    origin = "# From monitoring/prometheus/rules, by `python -m monitoring.generate`.\n"
    return origin + str(yaml.safe_dump(rule, sort_keys=False, width=110))


def metric_readers() -> Mapping[str, list[str]]:
    """By metric: the alerts that read it, directly or through an indicator, and the dashboards."""
    sources = {rule.name: family_names(rule.expr) for rule in recording_rules()}

    def metrics_of(promql: str) -> set[str]:
        return {metric for name in family_names(promql) for metric in sources.get(name, {name})}

    readers: dict[str, list[str]] = {}
    texts = [(rule.name, rule.expr) for rule in alerting_rules()]
    for dashboard in DASHBOARDS:
        texts += [
            (f"*{dashboard.title}*", filled(expr)) for panel in dashboard.panels for _, expr in panel.queries
        ]
    for reader, promql in texts:
        for metric in metrics_of(promql):
            if reader not in readers.setdefault(metric, []):
                readers[metric].append(reader)
    return readers


def family_names(promql: str) -> set[str]:
    """The metrics that *promql* asks for, a histogram's series under the name of the histogram."""
    histograms = {name for name, kind, _, _ in described() if kind == "histogram"}
    names = set()
    for name in metric_names(promql):
        bases = {name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)}
        names.add(next(iter(bases & histograms), name))
    return names


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
