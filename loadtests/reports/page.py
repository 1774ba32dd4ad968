"""A run as one page that needs nothing but itself: `report.html`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loadtests.comparing.comparison import Comparison
from loadtests.judging import quantiles
from loadtests.quantities import NOT_MEASURED, change, duration, mebibytes, number, quantity
from loadtests.reports.criterion_row import CriterionRow
from loadtests.reports.percentile_chart import percentile_chart
from loadtests.reports.recommendations import Recommendation
from loadtests.reports.replica_line import replica_line
from loadtests.reports.time_charts import TimeAxis, hover_data, time_charts
from loadtests.run_record import RunRecord

_FOLDER = Path(__file__).parent
_MOST_IDS = 500  # a page of a million ids opens nowhere; report.json holds all
_TONES = {
    "PASS": "pass",
    "OK": "pass",
    "better": "pass",
    "FAIL": "fail",
    "BREACH": "fail",
    "worse": "fail",
    "INVALID": "invalid",
}
_DISTRIBUTION = (
    ("orders", "count"), ("mean", "mean_ms"), ("min", "min_ms"), ("p50", "p50_ms"), ("p75", "p75_ms"),
    ("p90", "p90_ms"), ("p95", "p95_ms"), ("p99", "p99_ms"), ("p99.9", "p999_ms"), ("max", "max_ms"),
)  # fmt: skip

Pairs = Sequence[tuple[str, str]]


def render(
    record: RunRecord,
    recommendations: Sequence[Recommendation],
    comparison: Comparison | None = None,
) -> str:
    """The page."""
    templates = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    charts = time_charts(record)
    limits = {criterion.name: criterion.limit for criterion in record.criteria}
    lead, remarks = _lead(record)
    return templates.get_template("page.html.jinja").render(
        record=record,
        started=record.started_at[:16].replace("T", " ") + " UTC",
        lead=lead,
        remarks=remarks,
        tiles=_tiles(record),
        criteria=[CriterionRow(criterion) for criterion in record.criteria],
        recommendations=recommendations,
        comparison=comparison,
        percentiles=percentile_chart(
            record.acknowledged, comparison.baseline_latency if comparison else None, limits
        ),
        distribution_names=[name for name, _ in _DISTRIBUTION],
        distributions=[
            (name, [_figure(getattr(latency, field)) for _, field in _DISTRIBUTION])
            for name, latency in (
                ("acknowledged", record.acknowledged),
                ("corrected", record.corrected),
                ("refused", record.refused),
                ("unknown", record.unknown),
            )
        ],
        gaps=[(gap, quantiles.conclusion(gap)) for gap in record.quantiles],
        explanation=quantiles.explanation(record.acknowledged, record.server),
        charts=charts,
        judged=_judged(record),
        others=_others(record),
        step=TimeAxis(record.seconds).step,
        ledger=_ledger(record),
        server=_server(record),
        generator=_generator(record),
        environment=_environment(record),
        series=_json(hover_data(record.seconds, charts)),
        css=Markup((_FOLDER / "page.css").read_text()),  # noqa: S704 - our own file
        script=Markup((_FOLDER / "page.js").read_text()),  # noqa: S704 - our own file
        most_ids=_MOST_IDS,
        missing=NOT_MEASURED,
        tone=lambda text: _TONES.get(text, "unknown"),
        change=change,
        quantity=quantity,
    )


def _json(value: Any) -> Markup:
    """JSON that no text in it can end the script element of."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(text)  # noqa: S704 - escaped just now


def _lead(record: RunRecord) -> tuple[str, Sequence[str]]:
    """The sentence under the verdict, and what else is to be said."""
    if record.verdict == "PASS":
        met = sum(criterion.verdict == "PASS" for criterion in record.criteria)
        missing = len(record.criteria) - met
        rest = f"; {missing} NOT MEASURED" if missing else ""
        return f"{met} of {len(record.criteria)} criteria met{rest}.", record.reasons
    return (record.reasons[0] if record.reasons else "No criterion was met."), record.reasons[1:]


def _tiles(record: RunRecord) -> Pairs:
    by_name = {criterion.name: criterion for criterion in record.criteria}

    def of(name: str) -> str:
        criterion = by_name.get(name)
        return quantity(criterion.value, criterion.unit) if criterion else NOT_MEASURED

    latency = record.acknowledged
    return (
        ("orders acknowledged", f"{record.counts.acknowledged:,}"),
        ("orders per second", number(record.orders_per_second)),
        ("average response time", quantity(latency.mean_ms, "ms")),
        ("95th percentile", quantity(latency.p95_ms, "ms")),
        ("99th percentile", quantity(latency.p99_ms, "ms")),
        ("error rate", of("error_rate")),
        ("CPU, of one core", of("cpu")),
        ("connection pool", of("pool")),
    )


def _judged(record: RunRecord) -> Pairs:
    sent = record.all_sent
    return (
        ("orders", f"{sent.count:,}"),
        ("p95", quantity(sent.p95_ms, "ms")),
        ("p99", quantity(sent.p99_ms, "ms")),
        (f"p99 of the worst {duration(sent.window_seconds)}", quantity(sent.worst_p99_ms, "ms")),
        (f"errors of the worst {duration(sent.window_seconds)}", quantity(sent.worst_error_percent, "%")),
        ("longest time without an acknowledgement", quantity(sent.longest_gap_seconds, "s")),
    )


def _others(record: RunRecord) -> Sequence[Sequence[str]]:
    return [
        (
            each.route,
            f"{each.counts.sent:,}",
            f"{each.counts.failed:,}",
            *(quantity(value, "ms") for value in (each.p50_ms, each.p95_ms, each.p99_ms)),
        )
        for each in record.others
    ]


def _ledger(record: RunRecord) -> Pairs:
    ledger, counts = record.ledger, record.ledger.counts
    return (
        ("asked for", f"{counts.sent:,}"),
        ("acknowledged", f"{counts.acknowledged:,}"),
        ("refused", f"{counts.refused:,}"),
        ("unknown to their clients", f"{counts.unknown:,}"),
        ("stored", _figure(ledger.stored)),
        ("of these unknown", _figure(ledger.unknown_stored)),
        ("acknowledged and lost", _figure(len(ledger.lost) if ledger.source else None)),
        ("stored, unexplained", _figure(len(ledger.unexpected) if ledger.source else None)),
        ("stored twice", _figure(len(ledger.doubled) if ledger.source else None)),
        ("given to the wrong client", _figure(len(ledger.swapped) if ledger.source else None)),
        ("stored otherwise than sent", _figure(None if ledger.altered is None else len(ledger.altered))),
        ("keys sent again", _figure(None if ledger.not_replayed is None else ledger.replayed)),
        ("of these not replayed", _figure(None if ledger.not_replayed is None else len(ledger.not_replayed))),
        ("rise of orders_total success", _figure(ledger.success_rise)),
        ("asked for what is stored", ledger.source or NOT_MEASURED),
    )


def _server(record: RunRecord) -> Pairs:
    server = record.server
    stages = [(f"stage {name}", quantity(ms, "ms")) for name, ms in server.stage_mean_ms.items()]
    transitions = ", ".join(
        f"{count:g} to {state}" for state, count in server.breaker_transitions.items() if count
    )
    rows: list[tuple[str, str]] = [
        ("read from", server.source or NOT_MEASURED),
        ("processing, mean", quantity(server.processing_mean_ms, "ms")),
        ("processing, p95 of buckets", quantity(server.processing_p95_ms, "ms")),
        ("processing, p99 of buckets", quantity(server.processing_p99_ms, "ms")),
        *stages,
        ("CPU per order", quantity(server.cpu_us_per_order, "µs")),
        ("orders per commit", quantity(server.batch_size_mean)),
        ("connections opened", quantity(server.connections_opened)),
        ("breaker transitions", transitions or ("none" if server.source else NOT_MEASURED)),
        ("retries", quantity(server.retries)),
        ("shed", quantity(server.shed)),
        ("critical alerts", _alerts(server.critical_alerts)),
        ("warning alerts", _alerts(server.warning_alerts)),
        *([("alerts from before the run", _alerts(server.alerts_before))] if server.alerts_before else []),
        *(
            [("Prometheus's clock before ours", quantity(server.clock_ahead_seconds * 1000, "ms"))]
            if server.clock_ahead_seconds is not None
            else []
        ),
    ]
    return [*rows, *((replica.url, replica_line(replica)) for replica in server.replicas)]


def _generator(record: RunRecord) -> Pairs:
    generator = record.generator
    rows = [
        ("processes", str(generator.processes)),
        ("CPU, busiest process", quantity(generator.cpu_percent, "%")),
        ("timers late, p95", quantity(generator.lag_p95_ms, "ms")),
        ("timers late, at most", quantity(generator.lag_max_ms, "ms")),
    ]
    if record.model == "closed":
        rows.append(("users by Little's law", f"{quantity(generator.little_users)} of {record.users}"))
    else:
        share = generator.achieved_share
        rows.append(("achieved of offered", quantity(None if share is None else share * 100, "%")))
    return rows


def _environment(record: RunRecord) -> Iterable[tuple[str, Pairs]]:
    environment = record.environment
    least, most = record.wait_seconds
    load = (
        f"{number(record.offered_per_second)} orders/s offered"
        if record.offered_per_second
        else f"{record.users} users, {record.spawn_rate:g} more each second, {least:g} to {most:g} s between orders"
    )
    calibration = record.calibration
    yield (
        "The run",
        (
            ("id", record.run_id),
            ("model", f"{record.model}: {load}"),
            (
                "measured",
                f"{duration(record.duration_seconds)} of {duration(record.planned_seconds)} planned",
            ),
            ("warm-up before it", duration(record.warm_up_seconds)),
            ("from", record.measured_from),
            ("until", record.measured_until),
            ("strict", "yes: what is not measured fails" if record.strict else "no"),
            ("commit", environment.commit),
            ("calibration work before", _milliseconds(calibration.before_seconds)),
            ("calibration work after", _milliseconds(calibration.after_seconds)),
            ("CPU time stolen by the host", quantity(calibration.stolen_percent, "%")),
        ),
    )
    for title, values in (
        ("Machine", environment.machine),
        ("Versions", environment.versions),
        ("Database settings", environment.database),
        ("Dataset", environment.dataset),
    ):
        yield title, _plain(values)


def _plain(values: Mapping[str, Any]) -> Pairs:
    if not values:
        return (("none known", ""),)
    return [
        (
            name.removesuffix("_bytes").replace("_", " ") if name.endswith("_bytes") else name,
            mebibytes(value) if name.endswith("_bytes") else "not known" if value is None else str(value),
        )
        for name, value in values.items()
    ]


def _alerts(names: Sequence[str] | None) -> str:
    return NOT_MEASURED if names is None else ", ".join(names) or "none"


def _milliseconds(seconds: float | None) -> str:
    return quantity(None if seconds is None else seconds * 1000, "ms")


def _figure(value: float | None) -> str:
    return "-" if value is None else number(value)
