"""A run in plain text: the criteria, the verdict, and why; and in one row of a table."""

from pathlib import Path

from loadtests.quantities import duration, number, quantity
from loadtests.reports.replica_line import replica_line
from loadtests.run_record import RunRecord


def summarise(record: RunRecord, directory: Path) -> str:
    """The lines that end a run."""
    counts, latency = record.counts, record.acknowledged
    rows = [
        (
            criterion.title,
            "-" if criterion.value is None else f"{criterion.value:,.4g} {criterion.unit}".strip(),
            f"{criterion.comparison} {criterion.limit:g} {criterion.unit}".strip(),
            criterion.verdict,
        )
        for criterion in record.criteria
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    incomplete = "" if record.complete else " (INCOMPLETE)"
    lines = [
        f"{record.profile}: {counts.sent} orders in {record.duration_seconds:.0f} s, {record.orders_per_second:.1f}/s",
        f"{counts.acknowledged} acknowledged, {counts.refused} refused, {counts.unknown} unknown",
    ]
    if latency.count:
        lines.append(
            f"latency: p50 {latency.p50_ms:.1f} ms, p95 {latency.p95_ms:.1f}, p99 {latency.p99_ms:.1f}, "
            f"max {latency.max_ms:.1f}"
        )
        lines.append(f"judged, with failures and all waiting: {_judged(record)}")
    lines += [f"{replica.url}: {replica_line(replica)}" for replica in record.server.replicas]
    lines += [
        "",
        *(
            f"  {title:<{widths[0]}}  {value:>{widths[1]}}  {limit:<{widths[2]}}  {verdict}"
            for title, value, limit, verdict in rows
        ),
        "",
        f"VERDICT: {record.headline}{incomplete}",
        *(f"  - {reason}" for reason in record.reasons),
        f"report: {directory}",
    ]
    return "\n".join(lines) + "\n"


def _judged(record: RunRecord) -> str:
    sent = record.all_sent
    return f"p95 {quantity(sent.p95_ms, 'ms')}, p99 {quantity(sent.p99_ms, 'ms')}"


HEADINGS = (
    "", "measured", "replicas", "users", "orders/s", "mean", "p95", "p99", "errors", "CPU", "verdict", "machine",
)  # fmt: skip


def row(record: RunRecord) -> list[str]:
    """The run in a line, under `HEADINGS`."""
    latency, machine = record.acknowledged, record.environment.machine
    cpu = next((criterion.value for criterion in record.criteria if criterion.name == "cpu"), None)
    return [
        f"`make loadtest-{record.profile}`",
        duration(record.duration_seconds),
        number(len(record.server.replicas)),
        number(record.users),
        number(record.orders_per_second),
        *(quantity(value, "ms") for value in (latency.mean_ms, latency.p95_ms, latency.p99_ms)),
        number(record.counts.failed),
        quantity(cpu, "%"),
        record.verdict,
        f"{machine['cpu']}, {machine['cores']} cores",
    ]
