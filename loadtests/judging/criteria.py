"""The acceptance criteria, judged: each PASS, FAIL or NOT MEASURED, never passed on nothing."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.judging import shares
from loadtests.judging.acceptance import Acceptance, Judging, OwnRequirement, Requirement
from loadtests.run_record import (
    AllSent,
    Counts,
    Criterion,
    CriterionVerdict,
    Latency,
    Ledger,
    Replica,
    RouteFigures,
    ServiceFigures,
)
from loadtests.samples import CUT_OFF

_SURELY, _CONFIDENCE = 0.01, 0.95  # a route of its own counts where its errors are surely more than this

_P95: Callable[[RouteFigures], float | None] = operator.attrgetter("p95_ms")
_P99: Callable[[RouteFigures], float | None] = operator.attrgetter("p99_ms")

_CLIENT = "the generator's samples"
_NO_ORDERS = "no orders were sent"
_NONE_ACKNOWLEDGED = "no order was acknowledged"


NO_OTHERS = RouteFigures("", Counts())


@dataclass(frozen=True)
class Measured:
    """A criterion's value and what it rests on; `value` None: `reason` says why there is none."""

    value: float | None
    source: str
    samples: int | None = None
    reason: str = ""
    detail: str = ""  # said where it is missed
    failed: int | None = None  # of the samples: the value is their share, in percent
    highest: float | None = None  # the most that could have been measured; None: anything


@dataclass(frozen=True)
class Facts:
    """The facts that criteria are measured by, of the measured time unless another is named."""

    counts: Counts
    latency: Latency  # of acknowledged orders, as their clients saw them
    sent: AllSent
    ledger: Ledger  # of the whole run
    server: ServiceFigures
    seconds: float
    offered_per_second: float | None = None  # open model
    due: float | None = None  # orders that should have been sent; open model
    others: Sequence[RouteFigures] = ()
    others_together: RouteFigures = NO_OTHERS
    # Answers that no client may get, of all kinds of request in the whole run: how many, by what they were.
    unsound: Mapping[str, int] = field(default_factory=dict)


def measure(facts: Facts) -> Mapping[str, Measured]:
    """The value of every criterion that `acceptance.MEASURED` names."""
    counts, sent, server = facts.counts, facts.sent, facts.server
    return {
        "throughput": _throughput(facts),
        "latency_p95": _percentile(sent.p95_ms, sent.count),
        "latency_p99": _percentile(sent.p99_ms, sent.count),
        "latency_mean": Measured(facts.latency.mean_ms, _CLIENT, facts.latency.count, _NONE_ACKNOWLEDGED),
        "error_rate": _share(counts.failed, counts.sent - counts.cut_off, _types(counts)),
        "critical_errors": _critical_errors(facts),
        "critical_alerts": _alerts(server, server.critical_alerts),
        "warning_alerts": _alerts(server, server.warning_alerts),
        "cpu": _highest("cpu", server, _cpu_percent),
        "memory": _highest(
            "memory", server, lambda replica: _percent(replica.rss_max_bytes, replica.memory_limit_bytes)
        ),
        "pool": _highest("pool", server, lambda replica: _percent(replica.pool_in_use_max, replica.pool_max)),
        "restarts": _restarts(server),
        "longest_gap": Measured(
            sent.longest_gap_seconds, _CLIENT, counts.sent, _NO_ORDERS, highest=facts.seconds
        ),
        "worst_window_p99": _percentile(sent.worst_p99_ms, sent.worst_p99_count),
        "worst_window_errors": _share(
            round((sent.worst_error_percent or 0.0) * sent.worst_error_count / 100), sent.worst_error_count
        ),
        **_others(facts),
    }


def _throughput(facts: Facts) -> Measured:
    counts = facts.counts
    if not counts.sent or facts.seconds <= 0:
        return Measured(None, _CLIENT, 0, _NO_ORDERS)
    rate = counts.acknowledged / facts.seconds
    if facts.offered_per_second is not None and facts.due:
        # The arrivals of a Poisson process are not the service's doing: it is judged by its part of those that came.
        rate = facts.offered_per_second * min(1.0, counts.acknowledged / facts.due)
    return Measured(rate, _CLIENT, counts.acknowledged)


def _percentile(value_ms: float | None, samples: int) -> Measured:
    return Measured(value_ms, _CLIENT, samples, _NO_ORDERS)


def _types(counts: Counts) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.by_type.items() if name != CUT_OFF)


def _share(failed: int, of: int, types: str = "") -> Measured:
    """A share of failures, in percent."""
    share = failed / of * 100 if of else None
    return Measured(share, _CLIENT, of, "nothing was sent", types, failed)


def _others(facts: Facts) -> Mapping[str, Measured]:
    """The other kinds of request together, or the worst of them where that says something by itself."""
    all_of_them = facts.others_together
    sent = all_of_them.counts.sent - all_of_them.counts.cut_off
    errors = _share(all_of_them.counts.failed, sent)
    for each in facts.others:
        alone = each.counts.sent - each.counts.cut_off
        # A route that fails in one request of ten is hidden by nine others that do not.
        if shares.shows_more(each.counts.failed, alone, _SURELY, _CONFIDENCE):
            worst = _share(each.counts.failed, alone, f"{each.route}: {_types(each.counts)}")
            errors = max(errors, worst, key=lambda one: one.value or 0.0)
    measured = {"other_errors": errors}
    for name, figure, enough in (("other_p95", _P95, 200), ("other_p99", _P99, 1000)):
        candidates = [(figure(all_of_them), sent, "")]
        candidates += [
            (figure(each), each.counts.sent, each.route)
            for each in facts.others
            if each.counts.sent >= enough
        ]
        known = [candidate for candidate in candidates if candidate[0] is not None]
        value, samples, route = max(known, default=(None, 0, ""))
        measured[name] = Measured(value, _CLIENT, samples, "no other requests were sent", route)
    return measured


def _cpu_percent(replica: Replica) -> float | None:
    return None if replica.cpu_percent is None else replica.cpu_percent / min(1.0, replica.cpu_limit_cores)


def _restarts(server: ServiceFigures) -> Measured:
    source = _source(server)
    if not server.replicas:
        return Measured(None, source, reason="no metrics")
    restarted = [replica.url for replica in server.replicas if replica.restarted]
    gone = [replica.url for replica in server.replicas if replica.gone]
    parts = [
        f"{what}: {', '.join(urls)}" for what, urls in (("restarted", restarted), ("gone", gone)) if urls
    ]
    return Measured(float(len(restarted) + len(gone)), source, detail="; ".join(parts))


def judge(acceptance: Acceptance, profile: str, measured: Mapping[str, Measured]) -> tuple[Criterion, ...]:
    """Every criterion that applies to *profile*, in the file's order."""
    judged = []
    for requirement in acceptance.requirements:
        limit = requirement.limit_for(profile)
        if limit is not None:
            unknown = Measured(None, "", None, "this test has no such measurement")
            value = measured.get(requirement.name, unknown)
            judged.append(_judge(requirement, limit, value, acceptance.judging))
    return tuple(judged)


def _judge(requirement: Requirement, limit: float, measured: Measured, judging: Judging) -> Criterion:
    verdict, reason = _verdict(requirement, limit, measured, judging)
    return Criterion(
        name=requirement.name,
        title=requirement.title,
        verdict=verdict,
        value=measured.value,
        limit=limit,
        comparison=requirement.comparison,
        unit=requirement.unit,
        samples=measured.samples,
        definition=requirement.definition,
        source=measured.source,
        reason=reason,
    )


def _verdict(
    requirement: Requirement, limit: float, measured: Measured, judging: Judging
) -> tuple[CriterionVerdict, str]:
    value = measured.value
    if value is None:
        return "NOT MEASURED", measured.reason
    holds = requirement.holds(value, limit)
    shown = "so many failed that it is infinite: it" if math.isinf(value) else _number(value)
    missed = f"{shown} {requirement.unit if math.isfinite(value) else ''}".strip()
    missed += f" is not {requirement.comparison} {limit:g}"
    if measured.detail and not holds:
        missed += f" ({measured.detail})"
    if measured.failed is not None and measured.samples is not None and 0 < limit < 100:  # noqa: PLR2004 - percent
        return _share_verdict(limit / 100, measured.failed, measured.samples, judging.confidence, missed)
    if measured.samples is not None and measured.samples < requirement.samples:
        return "NOT MEASURED", f"{measured.samples} orders, and {requirement.samples} are needed"
    if holds and measured.highest is not None and not measured.highest > limit:
        return "NOT MEASURED", f"only {_number(measured.highest)} {requirement.unit} were measured"
    return ("PASS", "") if holds else ("FAIL", missed)


def _share_verdict(
    limit: float, failed: int, of: int, confidence: float, missed: str
) -> tuple[CriterionVerdict, str]:
    """A share of failures says something of the service where there are samples enough, and not before."""
    enough = shares.needed(limit, confidence)
    if failed / of >= limit:
        if of >= enough or shares.shows_more(failed, of, limit, confidence):
            return "FAIL", missed
    elif shares.shows_less(failed, of, limit, confidence):
        return "PASS", ""
    return (
        "NOT MEASURED",
        f"{failed} of {of:,} failed, which does not show less than {limit:.3g} at {confidence:.0%} confidence: "
        + (f"at least {enough} are needed" if of < enough else "more are needed"),
    )


def measure_own(
    requirements: Sequence[OwnRequirement],
    figure: Callable[[OwnRequirement], tuple[float | None, int, int | None]],
) -> Mapping[str, Measured]:
    """The values of criteria of one's own; *figure* gives value, samples, and of a share how many failed."""
    measured = {}
    for requirement in requirements:
        value, samples, failed = figure(requirement)
        measured[requirement.name] = Measured(
            value, _CLIENT, samples, "no such requests were sent", failed=failed
        )
    return measured


def _critical_errors(facts: Facts) -> Measured:
    ledger, unsound = facts.ledger, sum(facts.unsound.values())
    source = "the generator's samples and the ledger"
    if not ledger.counts.sent:
        return Measured(None, source, 0, _NO_ORDERS)
    wrong = (
        ledger.lost,
        ledger.unexpected,
        ledger.doubled,
        ledger.swapped,
        ledger.altered or (),
        ledger.cancellations,
        ledger.unjust_refusals,
        ledger.not_replayed or (),
        ledger.stock_not_conserved or (),
    )
    found = unsound + sum(map(len, wrong))
    if ledger.source is None and not found:
        return Measured(None, source, ledger.counts.sent, "what is stored could not be read")
    return Measured(float(found), source, ledger.counts.sent)


def _alerts(server: ServiceFigures, alerts: tuple[str, ...] | None) -> Measured:
    if alerts is None:
        return Measured(None, "", reason=server.alerts_trouble or "no PROMETHEUS_URL to ask for alerts")
    return Measured(float(len(alerts)), "Prometheus: ALERTS", detail=", ".join(alerts))


def _source(server: ServiceFigures) -> str:
    return {"metrics": "/metrics", "prometheus": "Prometheus"}.get(server.source or "", "")


def _highest(name: str, server: ServiceFigures, figure: Callable[[Replica], float | None]) -> Measured:
    """The worst replica; not measured where one of them is not: it could be the worst."""
    figures = [figure(replica) for replica in server.replicas]
    known = [value for value in figures if value is not None]
    source = _source(server)
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
