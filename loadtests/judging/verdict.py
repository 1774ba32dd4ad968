"""The verdict: what the service did to its orders, whether the figures mean anything, and what they say."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.judging.acceptance import ValidityLimits
from loadtests.run_record import Check, CheckVerdict, Counts, Criterion, Generator, Ledger, Verdict
from loadtests.samples import OUT_OF_STOCK

_NAMED = 5  # ids in a sentence; the record holds all
_GRAVE = frozenset({"critical_errors", "restarts"})  # no instrument, however bad, makes a service do these


@dataclass(frozen=True)
class Validity:
    """The facts that the checks look at."""

    counts: Counts  # of the measured time
    ledger: Ledger  # of the whole run
    ledger_trouble: str  # why what is stored could not be read; empty: it was
    metrics_trouble: str  # why the rise of orders_total is not known; empty: it is
    generator: Generator
    generator_trouble: str  # empty, or what Locust died of
    users: float | None  # that ran, mean
    planned_users: int
    target_trouble: str  # empty, or what went wrong with what we started
    unsound: Mapping[str, int] = field(
        default_factory=dict
    )  # answers that no client may get, by what they were
    service_is_slow: bool = False  # it kept an open model's users waiting

    def checks(self, limits: ValidityLimits) -> tuple[Check, ...]:
        """Every condition beside the criteria: the service's books, and the instrument's health."""
        return (
            self._requests(),
            *self._books(),
            self._answers(),
            self._rise(),
            self._sold_out(),
            *self._generator(limits),
            _check(
                "target",
                not self.target_trouble,
                f"what was started for this run did not keep running: {self.target_trouble}",
                "what was started for this run kept running",
            ),
        )

    def _requests(self) -> Check:
        return _check(
            "requests",
            self.counts.sent > 0,
            "no orders were sent in the measured time",
            f"{self.counts.sent} orders were sent in the measured time",
        )

    def _books(self) -> Iterable[Check]:
        ledger, unknown = self.ledger, self.ledger_trouble
        if unknown:
            yield Check("ledger", "BREACH", f"what is stored could not be read: {unknown}", about="books")
            return
        acknowledged = ledger.counts.acknowledged
        for name, ids, what, good in (
            (
                "acknowledged_stored",
                ledger.lost,
                "acknowledged orders are not stored",
                f"all {acknowledged} acknowledged orders are stored",
            ),
            (
                "stored_explained",
                ledger.unexpected,
                "stored orders were neither acknowledged nor left unknown",
                f"every stored order was acknowledged, or is one of the {ledger.counts.unknown} unknown",
            ),
            (
                "stored_once",
                ledger.doubled,
                "orders are stored twice, or stand for two requests",
                "no order is stored twice",
            ),
            (
                "stored_for_whom",
                ledger.swapped,
                "ids were given to another client than the one whose order they are",
                "every id was given to the client whose order it is",
            ),
            (
                "stored_as_sent",
                ledger.altered,
                "orders are stored with other lines, another total or currency than they were sent",
                "every order is stored with the lines, total and currency that it was sent with",
            ),
            (
                "cancellations",
                ledger.cancellations,
                "orders are cancelled though nobody asked for it, or not though it was acknowledged",
                "all acknowledged cancellations are stored, and no other",
            ),
            (
                "cancellations_refused",
                ledger.unjust_refusals,
                "cancellations were refused though the order's status allows them",
                "no cancellation was refused that its order's status allows",
            ),
            (
                "replays",
                ledger.not_replayed,
                f"of {ledger.replayed} keys that were sent again did not bring their order, as a replay",
                f"{ledger.replayed} keys that were sent again brought their orders",
            ),
            (
                "stock",
                ledger.stock_not_conserved,
                "products have another stock than their orders leave",
                "stock and orders add up",
            ),
        ):
            if ids is None:
                why = ledger.trouble or "no database to ask"
                yield Check(name, "NOT CHECKED", f"{name}: {why}", about="service")
            else:
                reason = f"{len(ids)} {what}: {_named(ids)}"
                yield dataclasses.replace(_check(name, not ids, reason, good, ids), about="service")

    def _answers(self) -> Check:
        found = ", ".join(f"{count} {name}" for name, count in self.unsound.items())
        reason = f"answers that no client may get: {found}"
        good = "no answer was a 500, another 5xx without an error_type, or a success that was not what was asked for"
        return dataclasses.replace(_check("answers", not self.unsound, reason, good), about="service")

    def _rise(self) -> Check:
        rise, counts = self.ledger.success_rise, self.ledger.counts
        if rise is None:
            return Check("orders_total", "NOT CHECKED", f"orders_total: {self.metrics_trouble or 'not read'}")
        low, high = counts.acknowledged, counts.acknowledged + counts.unknown
        if rise < low:
            reason = (
                f'orders_total{{status="success"}} rose by {rise:g}, less than the {low} acknowledged: '
                "the service counts wrongly, or a replica is not in METRICS_URLS"
            )
        else:
            reason = (
                f'orders_total{{status="success"}} rose by {rise:g}, more than the {low} acknowledged and '
                f"{counts.unknown} unknown: the service counts wrongly, or somebody else orders, too"
            )
        good = f'orders_total{{status="success"}} rose by {rise:g}, {low} acknowledged'
        return dataclasses.replace(_check("orders_total", low <= rise <= high, reason, good), about="books")

    def _sold_out(self) -> Check:
        """Refusals as sold out are the shop's right; without its database they are taken at their word."""
        refused = self.counts.by_type.get(OUT_OF_STOCK, 0)
        if refused and self.ledger.source != "database":
            return Check(
                "sold_out", "NOT CHECKED", f"{refused} orders were refused as sold out: no database to ask"
            )
        return Check("sold_out", "OK", f"{refused} orders were refused as sold out")

    def _generator(self, limits: ValidityLimits) -> Iterable[Check]:
        generator = self.generator
        yield _check(
            "generator_alive",
            not self.generator_trouble,
            self.generator_trouble,
            "the generator ran to its end",
        )
        yield _limited(
            "generator_cpu",
            generator.cpu_percent,
            limits.generator_cpu_percent,
            "the generator's busiest process used {value:.0f} % of a core (limit {limit:g}): "
            "it, not the service, may be what was measured; PROCESSES=n starts more",
        )
        yield _limited(
            "generator_lag",
            generator.lag_p95_ms,
            limits.generator_lag_p95_ms,
            "the generator's own timers were late by {value:.1f} ms, 95th percentile (limit {limit:g})",
        )
        if self.users is not None:
            yield _check(
                "users",
                self.users >= self.planned_users * (1 - limits.little_tolerance),
                f"only {self.users:.1f} of {self.planned_users} users ran",
                f"{self.users:.1f} of {self.planned_users} users ran",
            )
        if generator.achieved_share is not None:
            share = generator.achieved_share
            slow = ", because the service kept all users waiting" if self.service_is_slow else ""
            yield _check(
                "offered",
                share >= limits.achieved_share or self.service_is_slow,
                f"only {share:.1%} of the offered orders were sent (limit {limits.achieved_share:.0%}), and it was not "
                "the service that kept them waiting: more USERS, or PROCESSES=n",
                f"{share:.1%} of the offered orders were sent{slow if share < limits.achieved_share else ''}",
            )
        elif generator.little_users is not None and self.users:
            apart = generator.little_users / self.users - 1
            tolerance = limits.little_tolerance + (generator.little_tolerance or 0.0)
            text = (
                f"rate x (latency + wait) accounts for {generator.little_users:.1f} of {self.users:.1f} users "
                f"({apart:+.1%}; so many orders may be {tolerance:.1%} off)"
            )
            yield _check("little", abs(apart) <= tolerance, text, text)
        else:
            yield Check(
                "little", "NOT CHECKED", "Little's law: no orders, or no steady users, to hold it against"
            )


def decide(
    criteria: Sequence[Criterion], checks: Sequence[Check], *, strict: bool
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict and its reasons, the gravest first; remarks of a PASS come last.

    What a service did to its orders, and that it died, fails it however good the instrument was. Beside that a broken
    instrument makes a run INVALID: it means nothing, and fails nothing. Books that could not be read pass nothing.
    With *strict* what was not measured fails, and what was not checked makes it INVALID. Without a single criterion met
    there is no PASS.
    """
    breached = {
        about: [check.reason for check in checks if check.verdict == "BREACH" and check.about == about]
        for about in ("service", "instrument", "books")
    }
    unchecked = [check.reason for check in checks if check.verdict == "NOT CHECKED"]
    failed = {
        grave: [
            f"{criterion.title}: {criterion.reason}"
            for criterion in criteria
            if criterion.verdict == "FAIL" and (criterion.name in _GRAVE) == grave
        ]
        for grave in (True, False)
    }
    unmeasured = [
        f"{criterion.title}: NOT MEASURED: {criterion.reason}"
        for criterion in criteria
        if criterion.verdict == "NOT MEASURED"
    ]
    passed = any(criterion.verdict == "PASS" for criterion in criteria)
    grave = [*breached["service"], *failed[True]]
    verdict: Verdict = "PASS"
    if grave:
        verdict = "FAIL"
    elif breached["instrument"]:
        verdict = "INVALID"
    elif failed[False]:
        verdict = "FAIL"
    elif breached["books"] or (strict and unchecked):
        verdict = "INVALID"
    elif not passed or (strict and unmeasured):
        verdict = "FAIL"
    reasons = (*grave, *breached["instrument"], *failed[False], *breached["books"])
    return verdict, (*reasons, *unmeasured, *(f"NOT CHECKED: {reason}" for reason in unchecked))


def _check(name: str, holds: bool, breach: str, good: str, ids: Sequence[str] = ()) -> Check:  # noqa: FBT001
    verdict: CheckVerdict = "OK" if holds else "BREACH"
    return Check(name, verdict, good if holds else breach, () if holds else tuple(ids))


def _limited(name: str, value: float | None, limit: float, breach: str) -> Check:
    if value is None:
        return Check(name, "BREACH", f"{name}: the generator wrote nothing down in the measured time")
    text = breach.format(value=value, limit=limit)
    return _check(name, value <= limit, text, text.partition(":")[0])


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(ids[:_NAMED]) + more
