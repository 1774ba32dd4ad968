"""A run as Markdown: the plan's template first, every field from measurement; then what stands behind it."""

from collections.abc import Iterator, Sequence

from loadtests.comparing.comparison import Comparison
from loadtests.judging import quantiles
from loadtests.quantities import NOT_MEASURED, change, duration, number, quantity
from loadtests.reports.criterion_row import CriterionRow
from loadtests.reports.recommendations import Recommendation
from loadtests.reports.replica_line import replica_line
from loadtests.run_record import RunRecord

_NAMED = 20  # ids in a line; report.json holds all


def render(
    record: RunRecord,
    recommendations: Sequence[Recommendation],
    comparison: Comparison | None = None,
) -> str:
    """The report."""
    return "\n".join(
        (
            *_template(record, recommendations),
            *_criteria(record),
            *_replicas(record),
            *_validity(record),
            *_judged(record),
            *_quantiles(record),
            *_queries(record),
            *(_comparison(comparison) if comparison else ()),
            *_environment(record),
            "",
        )
    )


def _template(record: RunRecord, recommendations: Sequence[Recommendation]) -> Iterator[str]:
    analysis = record.analysis
    rate = analysis["error_rate"]
    latency, replicas = record.acknowledged, record.server.replicas
    memory = next((criterion.value for criterion in record.criteria if criterion.name == "memory"), None)
    cpu = [replica.cpu_percent for replica in replicas if replica.cpu_percent is not None]
    fullest = max(
        (replica for replica in replicas if replica.pool_in_use_max is not None),
        key=lambda replica: replica.pool_in_use_max or 0,
        default=None,
    )
    connections = (
        f"{quantity(fullest.pool_in_use_max)} of {quantity(fullest.pool_max)}" if fullest else NOT_MEASURED
    )
    yield "# Performance Test Results"
    yield ""
    incomplete = "" if record.complete else " (INCOMPLETE: ended before its time)"
    yield f"**{record.headline}**{incomplete}: {record.profile} load on {record.target}, {record.started_at}"
    if record.reasons:
        yield ""
        yield from (f"- {reason}" for reason in record.reasons)
    yield ""
    yield "## Test Summary"
    yield f"- Duration: {duration(record.duration_seconds)}"
    yield f"- Total Requests: {record.counts.sent:,}"
    yield f"- Error Rate: {_with_unit(None if rate is None else rate * 100, '%')}"
    yield f"- Avg Response Time: {_with_unit(analysis['avg_response_time'], 'ms')}"
    yield f"- Throughput: {quantity(analysis['throughput'], 'orders/s')}"
    yield ""
    yield "## Percentiles"
    yield f"- P50: {_with_unit(latency.p50_ms, 'ms')}"
    yield f"- P95: {_with_unit(latency.p95_ms, 'ms')}"
    yield f"- P99: {_with_unit(latency.p99_ms, 'ms')}"
    yield ""
    yield "## Resource Usage"
    yield f"- Max CPU: {_with_unit(max(cpu) if cpu and len(cpu) == len(replicas) else None, '%')}"
    yield f"- Max Memory: {_with_unit(memory, '%')}"
    yield f"- Peak Connections: {connections}"
    yield ""
    yield "## Recommendations"
    yield from (f"{place}. {one}" for place, one in enumerate(recommendations, 1))
    if not recommendations:
        yield "None: the run gives no reason for any."


def _with_unit(value: float | None, unit: str) -> str:
    """The figure as the plan writes it: no space before the unit."""
    return NOT_MEASURED if value is None else f"{number(value)}{unit}"


def _criteria(record: RunRecord) -> Iterator[str]:
    yield from ("", "## Acceptance Criteria", "", "| criterion | value | limit | margin | verdict |")
    yield "| --- | ---: | ---: | ---: | --- |"
    for row in map(CriterionRow, record.criteria):
        verdict = row.of.verdict + (f": {row.of.reason}" if row.of.verdict == NOT_MEASURED else "")
        yield f"| {row.of.title} | {row.value} | {row.limit} | {row.margin} | {_cell(verdict)} |"


def _replicas(record: RunRecord) -> Iterator[str]:
    if record.server.replicas:
        yield from ("", "## Replicas", "")
        yield from (f"- {replica.url}: {replica_line(replica)}" for replica in record.server.replicas)


def _validity(record: RunRecord) -> Iterator[str]:
    yield from ("", "## Checks", "", "| check | about | verdict | finding |", "| --- | --- | --- | --- |")
    for check in record.checks:
        ids = ", ".join(check.ids[:_NAMED]) + (
            f" and {len(check.ids) - _NAMED} more" if len(check.ids) > _NAMED else ""
        )
        finding = check.reason + (f" ({ids})" if ids else "")
        yield f"| {check.name} | {check.about} | {check.verdict} | {_cell(finding)} |"


def _judged(record: RunRecord) -> Iterator[str]:
    """The latencies that are judged, beside those that clients saw; and the other kinds of request."""
    sent, seen, corrected = record.all_sent, record.acknowledged, record.corrected
    yield from (
        "",
        "## Latency as It Is Judged",
        "",
        "| | p95 | p99 | orders |",
        "| --- | ---: | ---: | ---: |",
    )
    for title, p95, p99, count in (
        ("acknowledged, as clients saw it", seen.p95_ms, seen.p99_ms, seen.count),
        ("with what nobody sent while all waited", corrected.p95_ms, corrected.p99_ms, corrected.count),
        ("and failures as infinite: judged", sent.p95_ms, sent.p99_ms, sent.count),
        (f"the worst {duration(sent.window_seconds)}", None, sent.worst_p99_ms, sent.worst_p99_count),
    ):
        shown = "-" if p95 is None else quantity(p95, "ms")
        yield f"| {title} | {shown} | {quantity(p99, 'ms')} | {count:,} |"
    if record.others:
        yield from ("", "| other requests | sent | failed | p50 | p95 | p99 |")
        yield "| --- | ---: | ---: | ---: | ---: | ---: |"
        for each in record.others:
            figures = " | ".join(quantity(value, "ms") for value in (each.p50_ms, each.p95_ms, each.p99_ms))
            yield f"| {_cell(each.route)} | {each.counts.sent:,} | {each.counts.failed:,} | {figures} |"


def _quantiles(record: RunRecord) -> Iterator[str]:
    if not record.quantiles:
        return
    yield from ("", "## Client and Service", "", "| percentile | client | service | gap | buckets |")
    yield "| --- | ---: | ---: | ---: | --- |"
    for gap in record.quantiles:
        client, service = quantity(gap.client_ms, "ms"), quantity(gap.service_ms, "ms")
        apart = quantity(gap.gap_ms, "ms")
        yield f"| p{gap.percentile:g} | {client} | {service} | {apart} | {quantiles.conclusion(gap)} |"
    yield from ("", quantiles.explanation(record.acknowledged, record.server))


def _queries(record: RunRecord) -> Iterator[str]:
    if not record.server.queries:
        return
    yield from ("", "## The Plan's Queries", "", "| asked of Prometheus | at the end | highest | |")
    yield "| --- | ---: | ---: | --- |"
    for query in record.server.queries:
        judged = f"judged: {query.criterion}" if query.criterion else ""
        values = f"{quantity(query.at_end, query.unit)} | {quantity(query.highest, query.unit)}"
        yield f"| `{_cell(query.promql)}` | {values} | {judged} |"


def _comparison(comparison: Comparison) -> Iterator[str]:
    yield from ("", "## Comparison", "", f"**{comparison.conclusion}**", "")
    yield f"Baseline: {', '.join(comparison.baseline)}. This side: {', '.join(comparison.candidate)}."
    if comparison.method != "none":
        yield f"{comparison.explanation}."
    if comparison.drift:
        yield (
            f"Fixed calibration work took {change(comparison.drift)} on this side: "
            "no difference within that is claimed."
        )
    yield from ("", "| figure | baseline | this side | change | interval | p | claim |")
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for row in comparison.rows:
        interval = (
            "not known" if row.low is None or row.high is None else f"{change(row.low)} to {change(row.high)}"
        )
        p = "-" if row.p is None else f"{row.p:.3f}"
        values = (
            f"{quantity(row.baseline, row.unit)} | {quantity(row.candidate, row.unit)} | {change(row.ratio)}"
        )
        yield f"| {row.title} | {values} | {interval} | {p} | {row.claim} |"
    if comparison.changed:
        yield from ("", "What else differs:", "")
        yield from (f"- {what}: {before} → {after}" for what, before, after in comparison.changed)


def _environment(record: RunRecord) -> Iterator[str]:
    environment = record.environment
    yield from ("", "## Environment", "", "```", environment.command, "```", "")
    yield f"- commit: {environment.commit}"
    for title, values in (
        ("machine", environment.machine),
        ("versions", environment.versions),
        ("database", environment.database),
        ("dataset", environment.dataset),
    ):
        if values:
            yield f"- {title}: " + ", ".join(f"{name} {value}" for name, value in values.items())
    before, after = record.calibration.before_seconds, record.calibration.after_seconds
    if before and after:
        yield f"- calibration work: {number(before * 1000)} ms before, {number(after * 1000)} ms after"
    if (stolen := record.calibration.stolen_percent) is not None:
        yield f"- CPU time stolen by the machine's host: {quantity(stolen, '%')}"
    yield f"- warm-up before the measured time: {duration(record.warm_up_seconds)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
