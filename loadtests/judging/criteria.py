"""The acceptance criteria, judged: each PASS, FAIL or NOT MEASURED, never passed on nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loadtests.judging.acceptance import Acceptance, Requirement
from loadtests.run_record import Counts, Criterion, CriterionVerdict, Latency, Ledger, Replica, ServiceFigures

INTERNAL = "internal"


@dataclass(frozen=True)
class Measured:
    """A criterion's value and what it rests on; `value` None: `reason` says why there is none."""

    value: float | None
    source: str
    samples: int | None = None
    reason: str = ""


def measure(
    counts: Counts, latency: Latency, ledger: Ledger, server: ServiceFigures, duration_seconds: float
) -> Mapping[str, Measured]:
    """The value of every criterion, by its name in `acceptance.toml`.

    Args:
        counts, latency: of the measured time; *latency* of acknowledged orders.
        ledger: of the whole run.
        server: of the measured time.
        duration_seconds: the measured time.
    """
    client = "the generator's samples"
    failed = counts.server_errors + counts.transport_errors
    return {
        "throughput": Measured(
            counts.acknowledged / duration_seconds if duration_seconds > 0 and counts.sent else None,
            client,
            counts.acknowledged,
            "no orders were sent",
        ),
        "latency_p95": Measured(latency.p95_ms, client, latency.count, "no order was acknowledged"),
        "latency_p99": Measured(latency.p99_ms, client, latency.count, "no order was acknowledged"),
        "latency_mean": Measured(latency.mean_ms, client, latency.count, "no order was acknowledged"),
        "error_rate": Measured(
            failed / counts.sent * 100 if counts.sent else None, client, counts.sent, "no orders were sent"
        ),
        "critical_errors": _critical_errors(ledger),
        "critical_alerts": _alerts(server.critical_alerts),
        "warning_alerts": _alerts(server.warning_alerts),
        "cpu": _highest("cpu", server, lambda replica: replica.cpu_percent),
        "memory": _highest(
            "memory", server, lambda replica: _percent(replica.rss_max_bytes, replica.memory_limit_bytes)
        ),
        "pool": _highest("pool", server, lambda replica: _percent(replica.pool_in_use_max, replica.pool_max)),
    }


def judge(acceptance: Acceptance, profile: str, measured: Mapping[str, Measured]) -> tuple[Criterion, ...]:
    """Every criterion that applies to *profile*, in the file's order."""
    judged = []
    for requirement in acceptance.criteria:
        limit = requirement.limit_for(profile)
        if limit is not None:
            unknown = Measured(None, "", None, "this test has no such measurement")
            judged.append(_judge(requirement, limit, measured.get(requirement.name, unknown)))
    return tuple(judged)


def _judge(requirement: Requirement, limit: float, measured: Measured) -> Criterion:
    value, reason = measured.value, measured.reason
    enough = measured.samples is None or measured.samples >= requirement.samples
    if value is not None and not enough:
        reason = f"{measured.samples} orders, and {requirement.samples} are needed"
    verdict: CriterionVerdict
    if value is None or not enough:
        verdict = "NOT MEASURED"
    elif requirement.holds(value, limit):
        verdict, reason = "PASS", ""
    else:
        verdict = "FAIL"
        reason = (
            f"{_number(value)} {requirement.unit}".strip() + f" is not {requirement.comparison} {limit:g}"
        )
    return Criterion(
        name=requirement.name,
        title=requirement.title,
        verdict=verdict,
        value=value,
        limit=limit,
        comparison=requirement.comparison,
        unit=requirement.unit,
        samples=measured.samples,
        definition=requirement.definition,
        source=measured.source,
        reason=reason,
    )


def _critical_errors(ledger: Ledger) -> Measured:
    internal = ledger.counts.by_type.get(INTERNAL, 0)
    source = "the generator's samples and the ledger"
    if not ledger.counts.sent:
        return Measured(None, source, 0, "no orders were sent")
    if ledger.source is None and not internal:
        return Measured(None, source, ledger.counts.sent, "what is stored could not be read")
    return Measured(float(internal + len(ledger.lost) + len(ledger.doubled)), source, ledger.counts.sent)


def _alerts(alerts: tuple[str, ...] | None) -> Measured:
    if alerts is None:
        return Measured(None, "", reason="no PROMETHEUS_URL to ask for alerts")
    return Measured(float(len(alerts)), "Prometheus, /api/v1/alerts")


def _highest(name: str, server: ServiceFigures, figure: Callable[[Replica], float | None]) -> Measured:
    """The worst replica; not measured where one of them is not: it could be the worst."""
    figures = [figure(replica) for replica in server.replicas]
    known = [value for value in figures if value is not None]
    source = {"metrics": "/metrics", "prometheus": "Prometheus"}.get(server.source or "", "")
    asked = next((query.promql for query in server.queries if query.criterion == name), None)
    source += f": {asked}" if asked else ""
    if not known or len(known) < len(figures):
        return Measured(
            None, source, reason="a service process did not report it" if figures else "no metrics"
        )
    return Measured(max(known), source)


def _percent(value: float | None, of: float | None) -> float | None:
    return None if value is None or not of else value / of * 100


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004 - digits that mean something
