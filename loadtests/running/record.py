"""A load that has ended, judged and summed up in a record."""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from loadtests.judging import criteria, ledger, quantiles
from loadtests.judging.acceptance import Acceptance, OwnRequirement
from loadtests.judging.analysis import analyze_results
from loadtests.judging.verdict import Validity, decide
from loadtests.machine.target import Target
from loadtests.run_record import (
    AllSent,
    Counts,
    Environment,
    Generator,
    Ledger,
    RouteFigures,
    RunRecord,
    ServiceFigures,
)
from loadtests.running.load import Load
from loadtests.running.order_samples import ACKNOWLEDGED, REFUSED, UNKNOWN, OrderSamples, percentile_of
from loadtests.samples import WRONG_ANSWER, Window
from loadtests.service_side.readings import Limits
from loadtests.users.orders import MadeOrder

# The plan's limits of the 99th percentile and the mean: a service beyond them is what an open model waits for.
_KNOWN_AT_ONCE = frozenset({"latency_p95", "latency_p99", "error_rate", "longest_gap"})
_SLOW_P99_SECONDS, _SLOW_SECONDS = 1.0, 0.2


def sum_up(
    load: Load,
    tested: Target,
    limits: Acceptance,
    described: Environment,
    pieces: dict[str, int] | None,
    allowed: Limits,
    *,
    complete: bool,
) -> RunRecord:
    """The record of *load*, without what only the time after it can tell.

    Args:
        pieces: of every product before the load (see `ledger.pieces_in_database`); None: no database to ask.
        allowed: the limits of the service's processes.
        complete: False: it was ended before its time.
    """
    plan, window, orders = load.plan, load.window, load.orders
    balanced, ledger_trouble = _ledger(load, tested, pieces)
    counts = orders.counts(window)
    acknowledged = orders.latency(ACKNOWLEDGED, window)
    server = load.sampler.server(window, limits=allowed)
    generator = _generator(load)
    sent = _all_sent(load, window, limits.judging.window_seconds)
    others = tuple(_route(route, load.others[route], window) for route in sorted(load.others))
    unsound = _unsound(load)
    due = None
    if plan.rate_per_second is not None:
        due = counts.sent - counts.cut_off + load.generator.overdue(plan.rate_per_second)
    facts = criteria.Facts(
        counts=counts,
        latency=acknowledged,
        sent=sent,
        ledger=balanced,
        server=server,
        seconds=window.seconds,
        offered_per_second=plan.rate_per_second,
        due=due,
        others=others,
        others_together=_together(load),
        unsound=unsound,
    )
    measured = {**criteria.measure(facts), **criteria.measure_own(limits.own, lambda own: _own(load, own))}
    judged = criteria.judge(limits, plan.profile.name, measured)
    checks = Validity(
        counts=counts,
        ledger=balanced,
        ledger_trouble=ledger_trouble,
        metrics_trouble=load.sampler.unread,
        generator=generator,
        generator_trouble=load.trouble,
        users=load.generator.mean_users(window),
        planned_users=plan.users,
        target_trouble=tested.trouble,
        unsound=unsound,
        service_is_slow=_kept_waiting(orders.service_seconds(window)),
    ).checks(limits.validity)
    verdict, reasons = decide(judged, checks, strict=plan.strict)
    if load.aborted:
        verdict = "FAIL" if verdict == "PASS" else verdict
        reasons = (f"ended early: {load.aborted}", *reasons)
    elif not complete:
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
        aborted=load.aborted,
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
        all_sent=sent,
        corrected=orders.corrected(window, sent.interval_seconds or 0.0),
        others=others,
    )


def _ledger(load: Load, tested: Target, pieces: dict[str, int] | None) -> tuple[Ledger, str]:
    """The ledger of the whole run, and why what is stored could not be read (empty: it was).

    Refusals as sold out are agreed, unless the database says that nothing is.
    """
    customer_id = f"loadtest-{load.run_id}"
    rise = load.sampler.success_rise()
    api_key = load.plan.api_key
    made: Sequence[MadeOrder] = ()
    trouble = ""
    try:
        made = ledger.orders_of_run(tested.url, customer_id, api_key)
    except ledger.LedgerError as exc:
        trouble = str(exc)
    try:
        stored = (
            ledger.stored_in_database(tested.dsn, customer_id)
            if tested.dsn
            else ledger.stored_by_api(tested.url, customer_id, api_key)
        )
        wanted = ledger.wanted_content(made) if made else None
        balanced = ledger.balance(load.answers, stored, load.orders.counts(), wanted)
        changed = None
        if tested.dsn and pieces is not None:
            after = ledger.pieces_in_database(tested.dsn)
            changed = tuple(sorted(name for name in pieces if after.get(name) != pieces[name]))
        if tested.dsn and load.answers.sold_out:
            load.orders.refusals_agreed = ledger.is_scarce(tested.dsn)
    except ledger.LedgerError as exc:
        return Ledger(counts=load.orders.counts(), success_rise=rise), str(exc)
    not_replayed = None
    if made and load.answers.to_repeat:
        try:
            not_replayed = ledger.not_replayed(tested.url, api_key, made, load.answers)
        except ledger.LedgerError as exc:
            trouble = str(exc)
    return (
        dataclasses.replace(
            balanced,
            counts=load.orders.counts(),
            source="database" if tested.dsn else "api",
            success_rise=rise,
            stock_not_conserved=changed,
            altered=balanced.altered if made else None,
            not_replayed=not_replayed,
            replayed=len(load.answers.to_repeat),
            trouble=trouble,
        ),
        "",
    )


def lost(load: Load, limits: Acceptance) -> str:
    """Why a run under way has failed already, past the grace that it is given; empty: it has not, or runs on."""
    plan, now = load.plan, time.time()
    window = Window(load.window.start, now)
    if plan.abort_after_seconds is None or window.seconds < plan.abort_after_seconds:
        return ""
    facts = criteria.Facts(
        counts=load.orders.counts(window),
        latency=load.orders.latency(ACKNOWLEDGED, window),
        sent=_all_sent(load, window, limits.judging.window_seconds),
        ledger=Ledger(Counts()),
        server=ServiceFigures(),
        seconds=window.seconds,
    )
    for criterion in criteria.judge(limits, plan.profile.name, criteria.measure(facts)):
        if criterion.name in _KNOWN_AT_ONCE and criterion.verdict == "FAIL":
            return f"{criterion.title}: {criterion.reason}"
    return ""


def _all_sent(load: Load, window: Window, window_seconds: float) -> AllSent:
    """The latencies that are judged: of all orders, corrected for a closed model's waiting."""
    orders = load.orders
    users = load.generator.mean_users(window) or load.plan.users
    interval = orders.interval_seconds(window, users) if load.plan.rate_per_second is None else None
    latencies = orders.answered_or_failed(window, interval)
    worst = orders.worst_windows(window, window_seconds, interval)
    return AllSent(
        count=len(latencies),
        p95_ms=percentile_of(latencies, 95),
        p99_ms=percentile_of(latencies, 99),
        interval_seconds=interval,
        window_seconds=min(window_seconds, window.seconds),
        worst_p99_ms=worst.p99_ms,
        worst_p99_count=worst.p99_orders,
        worst_error_percent=worst.error_percent,
        worst_error_count=worst.error_orders,
        longest_gap_seconds=orders.longest_gap_seconds(window),
    )


def _route(route: str, samples: OrderSamples, window: Window) -> RouteFigures:
    latencies = samples.answered_or_failed(window, None)
    return RouteFigures(
        route,
        samples.counts(window),
        *(percentile_of(latencies, percentile) for percentile in (50, 95, 99)),
    )


def _together(load: Load) -> RouteFigures:
    """All requests that are no orders."""
    latencies = sorted(
        latency for each in load.others.values() for latency in each.answered_or_failed(load.window, None)
    )
    counts = [each.counts(load.window) for each in load.others.values()]
    return RouteFigures(
        "",
        Counts(
            **{
                field: sum(getattr(one, field) for one in counts)
                for field in ("sent", "acknowledged", "refused", "unknown", "cut_off", "agreed")
            }
        ),
        *(percentile_of(latencies, percentile) for percentile in (50, 95, 99)),
    )


def _unsound(load: Load) -> dict[str, int]:
    """Answers that no client may get, of every kind of request in the whole run, by what they were."""
    found: Counter[str] = Counter()
    for route, samples in (("/orders", load.orders), *load.others.items()):
        counts = samples.counts()
        if counts.undeclared_errors:
            found[f"500, or another 5xx without an error_type, from {route}"] = counts.undeclared_errors
        if wrong := counts.by_type.get(WRONG_ANSWER, 0):
            found[f"successes from {route} that were not what was asked for"] = wrong
    return dict(found)


def _own(load: Load, own: OwnRequirement) -> tuple[float | None, int, int | None]:
    """The value of a criterion of one's own, the requests it rests on, and of a share how many failed."""
    kinds = {"create": {"/orders": load.orders}, "cancel": {}, "read": {}}
    for route, samples in load.others.items():
        kinds["cancel" if route.endswith("/cancel") else "read"][route] = samples
    everything = {**load.others, "/orders": load.orders}
    chosen = [everything[own.route]] if own.route in everything else []
    if own.route is None:
        chosen = [*kinds[own.tag or "create"].values()]
    window = load.window
    counts = [samples.counts(window) for samples in chosen]
    sent = sum(one.sent - one.cut_off for one in counts)
    if not sent:
        return None, 0, None
    if own.measure == "error_rate":
        failed = sum(one.failed for one in counts)
        return failed / sent * 100, sent, failed
    acknowledged = sum(one.acknowledged for one in counts)
    if own.measure == "throughput":
        return acknowledged / window.seconds, sent, None
    latencies = sorted(each for samples in chosen for each in samples.answered_or_failed(window, None))
    if own.measure == "mean":
        finite = [each for each in latencies if math.isfinite(each)]
        return (math.fsum(finite) / len(finite) if finite else None), len(finite), None
    percentile = 100.0 if own.measure == "max" else float(own.measure[1:])
    return percentile_of(latencies, percentile), len(latencies), None


def _kept_waiting(ascending_seconds: Sequence[float]) -> bool:
    """True where the service itself was so slow that users of an open model had none free for the next order."""
    slowest = percentile_of(ascending_seconds, 99)
    return slowest is not None and (
        slowest >= _SLOW_P99_SECONDS or math.fsum(ascending_seconds) / len(ascending_seconds) >= _SLOW_SECONDS
    )


def _generator(load: Load) -> Generator:
    plan, window, samples = load.plan, load.window, load.generator
    lateness = samples.lateness_ms(window)
    little = tolerance = share = None
    if plan.rate_per_second is None:
        busy, ended = load.orders.busy_seconds(window)
        if ended and window.seconds > 0 and plan.profile.name != "mixed":
            least, most = plan.profile.wait_seconds
            wait = (least + most) / 2
            little = (busy + ended * wait) / window.seconds
            # Chance: the waits' own spread, and the waits that the window cuts at its two ends.
            spread = (most - least) / math.sqrt(12) * math.sqrt(ended)
            cut = plan.users * (wait / 2 + (most - least) ** 2 / 24 / wait)
            tolerance = (3 * spread + cut) / window.seconds / plan.users
    else:
        due, sent = samples.arrivals(window)
        share = sent / due if due else None
    return Generator(
        processes=samples.processes,
        cpu_percent=samples.cpu_percent(window),
        lag_p95_ms=lateness[int(len(lateness) * 0.95)] if lateness else None,
        lag_max_ms=lateness[-1] if lateness else None,
        little_users=little,
        little_tolerance=tolerance,
        achieved_share=share,
    )


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds")
