"""A load that has ended, judged and summed up in a record."""

import dataclasses
from datetime import UTC, datetime

from loadtests.judging import criteria, ledger, quantiles
from loadtests.judging.acceptance import Acceptance
from loadtests.judging.analysis import analyze_results
from loadtests.judging.verdict import Validity, decide
from loadtests.machine.target import Target
from loadtests.run_record import Environment, Generator, Ledger, RunRecord
from loadtests.running.load import Load
from loadtests.running.order_samples import ACKNOWLEDGED, REFUSED, UNKNOWN


def sum_up(
    load: Load,
    tested: Target,
    limits: Acceptance,
    described: Environment,
    pieces: dict[str, int] | None,
    *,
    complete: bool,
) -> RunRecord:
    """The record of *load*, without what only the time after it can tell.

    Args:
        pieces: of every product before the load (see `ledger.pieces_in_database`); None: no database to ask.
        complete: False: it was ended before its time.
    """
    plan, window, orders = load.plan, load.window, load.orders
    counts = orders.counts(window)
    acknowledged = orders.latency(ACKNOWLEDGED, window)
    balanced, ledger_trouble = _ledger(load, tested, pieces)
    server = load.sampler.server(window, memory_limit_bytes=tested.memory_limit_bytes)
    generator = _generator(load)
    judged = criteria.judge(
        limits,
        plan.profile.name,
        criteria.measure(counts, acknowledged, balanced, server, window.seconds),
    )
    checks = Validity(
        counts=counts,
        ledger=balanced,
        ledger_trouble=ledger_trouble,
        metrics_trouble="; ".join(load.sampler.trouble.values()),
        generator=generator,
        generator_trouble=load.trouble,
        users=load.generator.mean_users(window),
        planned_users=plan.users,
        target_trouble=tested.trouble,
    ).checks(limits.validity)
    verdict, reasons = decide(judged, checks, strict=plan.strict)
    if not complete:
        reasons = ("ended before its time: the figures are of the part that ran", *reasons)
    first = min(orders.started_at, default=window.start)
    seconds = range(int(first - window.start) - 1, max(1, -int(-window.seconds // 1)))
    columns, errors = orders.per_second(window.start, seconds)
    series = {
        **columns,
        **load.generator.per_second(window.start, seconds),
        **load.sampler.per_second(window.start, seconds),
    }
    return RunRecord(
        profile=plan.profile.name,
        run_id=load.run_id,
        model="closed" if plan.rate_per_second is None else "open",
        target=tested.url,
        started_at=_iso(first),
        measured_from=_iso(window.start),
        measured_until=_iso(window.end),
        duration_seconds=window.seconds,
        planned_seconds=plan.duration_seconds,
        warm_up_seconds=window.start - first,
        users=plan.users,
        spawn_rate=plan.spawn_rate,
        wait_seconds=plan.profile.wait_seconds,
        offered_per_second=plan.rate_per_second,
        orders_per_second=counts.acknowledged / window.seconds if window.seconds > 0 else 0.0,
        complete=complete,
        strict=plan.strict,
        verdict=verdict,
        reasons=reasons,
        counts=counts,
        acknowledged=acknowledged,
        refused=orders.latency(REFUSED, window),
        unknown=orders.latency(UNKNOWN, window),
        seconds=tuple(float(second) for second in seconds),
        series={name: tuple(column) for name, column in series.items()},
        errors={name: tuple(column) for name, column in errors.items()},
        server=server,
        generator=generator,
        ledger=balanced,
        criteria=judged,
        checks=checks,
        environment=described,
        analysis=analyze_results(orders.test_data(window)),
        quantiles=quantiles.gaps(acknowledged, server),
    )


def _ledger(load: Load, tested: Target, pieces: dict[str, int] | None) -> tuple[Ledger, str]:
    """The ledger of the whole run, and why what is stored could not be read (empty: it was)."""
    customer_id = f"loadtest-{load.run_id}"
    counts = load.orders.counts()
    rise = load.sampler.success_rise()
    try:
        stored = (
            ledger.stored_in_database(tested.dsn, customer_id)
            if tested.dsn
            else ledger.stored_by_api(tested.url, customer_id, load.plan.api_key)
        )
        balanced = ledger.balance(load.answers, stored, counts)
        changed = None
        if tested.dsn and pieces is not None:
            after = ledger.pieces_in_database(tested.dsn)
            changed = tuple(sorted(name for name in pieces if after.get(name) != pieces[name]))
    except ledger.LedgerError as exc:
        return Ledger(counts=counts, success_rise=rise), str(exc)
    return (
        dataclasses.replace(
            balanced,
            source="database" if tested.dsn else "api",
            success_rise=rise,
            stock_not_conserved=changed,
        ),
        "",
    )


def _generator(load: Load) -> Generator:
    plan, window, samples = load.plan, load.window, load.generator
    lateness = samples.lateness_ms(window)
    little = share = None
    if plan.rate_per_second is None:
        latency = load.orders.mean_latency_seconds(window)
        if latency is not None and window.seconds > 0 and plan.profile.name != "mixed":
            sent = load.orders.counts(window).sent
            wait = sum(plan.profile.wait_seconds) / 2
            little = sent / window.seconds * (latency + wait)
    else:
        due, sent = samples.arrivals(window)
        share = sent / due if due else None
    return Generator(
        processes=samples.processes,
        cpu_percent=samples.cpu_percent(window),
        lag_p95_ms=lateness[int(len(lateness) * 0.95)] if lateness else None,
        lag_max_ms=lateness[-1] if lateness else None,
        little_users=little,
        achieved_share=share,
    )


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds")
