"""The verdict: first whether the figures mean anything, then what they say."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtests.judging.acceptance import ValidityLimits
from loadtests.run_record import Check, CheckVerdict, Counts, Criterion, Generator, Ledger, Verdict

_NAMED = 5  # ids in a sentence; the record holds all


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

    def checks(self, limits: ValidityLimits) -> tuple[Check, ...]:
        """Every condition without which the figures mean nothing."""
        return (
            self._requests(),
            *self._sets(),
            self._rise(),
            self._stock(),
            self._client_errors(limits),
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

    def _sets(self) -> Iterable[Check]:
        names = ("acknowledged_stored", "stored_explained", "stored_once")
        if self.ledger_trouble:
            for name in names:
                yield Check(name, "BREACH", f"what is stored could not be read: {self.ledger_trouble}")
            return
        ledger = self.ledger
        for name, ids, what, good in (
            (
                names[0],
                ledger.lost,
                "acknowledged orders are not stored",
                f"all {ledger.counts.acknowledged} acknowledged orders are stored",
            ),
            (
                names[1],
                ledger.unexpected,
                "stored orders were neither acknowledged nor left unknown",
                f"every stored order was acknowledged, or is one of the {ledger.counts.unknown} unknown",
            ),
            (
                names[2],
                ledger.doubled,
                "orders are stored twice, or stand for two requests",
                "no order is stored twice",
            ),
        ):
            yield _check(name, not ids, f"{len(ids)} {what}: {_named(ids)}", good, ids)

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
        return _check("orders_total", low <= rise <= high, reason, good)

    def _stock(self) -> Check:
        products = self.ledger.stock_not_conserved
        if products is None:
            return Check("stock", "NOT CHECKED", "stock: no database to ask")
        reason = f"the stock of {len(products)} products is not what their orders leave: {_named(products)}"
        return _check("stock", not products, reason, "stock and orders add up", products)

    def _client_errors(self, limits: ValidityLimits) -> Check:
        share = self.counts.client_errors / self.counts.sent * 100 if self.counts.sent else 0.0
        types = ", ".join(f"{count} {name}" for name, count in self.counts.by_type.items())
        reason = f"{share:.1f} % of the orders were refused as the client's fault ({types}): not what was to be tested"
        return _check(
            "client_errors",
            share <= limits.client_error_percent,
            reason,
            f"{share:.1f} % of the orders were refused as the client's fault",
        )

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
            yield _check(
                "offered",
                share >= limits.achieved_share,
                f"only {share:.1%} of the offered orders were sent (limit {limits.achieved_share:.0%})",
                f"{share:.1%} of the offered orders were sent",
            )
        elif generator.little_users is not None and self.users:
            apart = generator.little_users / self.users - 1
            text = (
                f"rate x (latency + wait) accounts for {generator.little_users:.1f} of {self.users:.1f} users "
                f"({apart:+.1%})"
            )
            yield _check("little", abs(apart) <= limits.little_tolerance, text, text)
        else:
            yield Check(
                "little", "NOT CHECKED", "Little's law: no orders, or no steady users, to hold it against"
            )


def decide(
    criteria: Sequence[Criterion], checks: Sequence[Check], *, strict: bool
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict and its reasons, the gravest first; remarks of a PASS come last.

    INVALID goes before FAIL: a run that means nothing fails nothing. With *strict* what was not measured fails, and
    what was not checked makes it invalid. Without a single criterion met there is no PASS.
    """
    invalid = [check.reason for check in checks if check.verdict == "BREACH"]
    unchecked = [check.reason for check in checks if check.verdict == "NOT CHECKED"]
    failed = [
        f"{criterion.title}: {criterion.reason}" for criterion in criteria if criterion.verdict == "FAIL"
    ]
    unmeasured = [
        f"{criterion.title}: NOT MEASURED: {criterion.reason}"
        for criterion in criteria
        if criterion.verdict == "NOT MEASURED"
    ]
    passed = any(criterion.verdict == "PASS" for criterion in criteria)
    verdict: Verdict = "PASS"
    if invalid or (strict and unchecked):
        verdict = "INVALID"
    elif failed or not passed or (strict and unmeasured):
        verdict = "FAIL"
    return verdict, (*invalid, *failed, *unmeasured, *(f"NOT CHECKED: {reason}" for reason in unchecked))


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
