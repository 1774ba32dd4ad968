"""Recommendations, each with the figures that say so; the gravest first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from loadtests.quantities import change, duration, mebibytes, number, quantity
from loadtests.run_record import Criterion, RunRecord
from loadtests.users.profiles import PROFILES

# The plan's: the autoscaler's target, its bounds, and the criterion of the pool. Batches are of up to 100 orders.
_CPU_PERCENT = 70
_POOL_PERCENT = 75
_MAX_REPLICAS = 10
_BATCH_MAX_SIZE = 100

_SATURATED_PERCENT = 90  # of a core: what a process used that could have used more
_STOLEN_PERCENT = 5.0
_DRIFT = 1.1


@dataclass(frozen=True)
class Recommendation:
    """An action, and the evidence for it."""

    action: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.action} {self.evidence}"


def recommend(record: RunRecord) -> tuple[Recommendation, ...]:
    """All recommendations that the run gives a reason for, in the order in which they are worth doing."""
    rules = (
        _validity,
        _errors,
        _throughput,
        _latency,
        _cpu,
        _memory,
        _pool,
        _batches,
        _generator,
        _calibration,
        _measuring,
    )
    advice = [recommendation for rule in rules for recommendation in rule(record)]
    if record.verdict != "INVALID":
        advice += [*_capacity(record), *_tightest(record)]
    advice += _longer(record)
    return tuple(advice)


def _validity(record: RunRecord) -> Iterator[Recommendation]:
    """An invalid run says nothing about the service: repair the run first."""
    cures = {
        "acknowledged_stored": "Find out why acknowledged orders are missing, before anything else.",
        "stored_explained": "Find out who stored orders that nobody was told of; is the run alone on this database?",
        "stored_once": "Find out why one request stored two orders: look for the keys in the database.",
        "orders_total": "Name every replica in METRICS_URLS, and let nobody else order during the run.",
        "stock": "Find out where stock and orders part: the products are named in the validity checks.",
        "stored_for_whom": "Find out how answers came to other clients: the batch, the connection, the proxy.",
        "stored_as_sent": "Find out what changed orders on their way into the database.",
        "cancellations": "Find out what became of cancellations: they and their orders part.",
        "cancellations_refused": "Find out why cancellations were refused that the order's status allows.",
        "replays": "Find out why a key did not bring its order again: whoever must ask twice orders twice.",
        "answers": "Read the service's log for the exceptions behind these answers: they are defects.",
        "ledger": "See that what is stored can be read, by DATABASE_URL or GET /orders: nothing passes without it.",
        "generator_cpu": "Give the generator more processes (PROCESSES=n) or a machine of its own, and run again.",
        "generator_lag": "Give the generator a machine of its own, or more processes (PROCESSES=n), and run again.",
        "generator_alive": "Read locust.log beside this report: the generator did not last.",
        "users": "Let the users start more slowly (SPAWN_RATE), or in more processes (PROCESSES=n).",
        "offered": "Give the open model more users or processes: arrivals were late before they were sent.",
        "little": "Look for time the users spend outside requests and waits: a busy generator, most often.",
        "requests": "See that the service is reachable: nothing was measured.",
        "target": "Read the service's and the database's logs: what was started did not keep running.",
    }
    for check in record.checks:
        if check.verdict == "BREACH":
            yield Recommendation(cures.get(check.name, "Repair the run."), f"{_sentence(check.reason)}")


def _errors(record: RunRecord) -> Iterator[Recommendation]:
    cures = {
        "overloaded": "Add a replica, or let fewer in: orders were refused because too many were in flight or waited "
        "for a batch.",
        "circuit_open": "Look at the database first: the circuit breaker refused orders while it was away.",
        "database": "Read the database's log: statements failed.",
        "timeout": "Find what orders waited for: some ran into their deadline.",
        "connect": "See that the service listens and accepts: connections were refused or did not come about.",
        "client_timeout": "Find what the service hung on: it answered neither in time nor with an error.",
        "reset": "Find what ended connections in the middle of a request: a restart, a balancer, a crash.",
        "wrong_answer": "Look at the answers themselves: successes that are not the order that was asked for.",
        "internal": "Read the service's log for the exceptions behind these answers: they are defects.",
    }
    counts = record.counts
    if not counts.failed:
        return
    for error_type, count in sorted(counts.by_type.items(), key=lambda item: -item[1]):
        if error_type == "cut_off":
            continue
        cure = cures.get(
            error_type, f"Find out what `{error_type}` stands for: the service's log has it by request."
        )
        yield Recommendation(
            cure, f"{count:,} of {counts.sent:,} orders ended as `{error_type}` ({count / counts.sent:.2%})."
        )


def _throughput(record: RunRecord) -> Iterator[Recommendation]:
    """Too few users cannot reach the rate, however fast the answers."""
    criterion = _criterion(record, "throughput")
    wait, mean = sum(record.wait_seconds) / 2, record.acknowledged.mean_ms or 0.0
    if criterion is None or criterion.verdict != "FAIL" or record.model == "open" or not wait:
        return
    most = record.users / wait
    if most < criterion.limit:
        needed = math.ceil(criterion.limit * (wait + mean / 1000))
        yield Recommendation(
            f"Run at least {needed} users.",
            f"{record.users} who wait {number(wait)} s between orders ask for {number(most)} orders/s at most; "
            f"the limit is {quantity(criterion.limit, criterion.unit)}.",
        )


def _latency(record: RunRecord) -> Iterator[Recommendation]:
    failed = [c for c in record.criteria if c.name.startswith("latency") and c.verdict == "FAIL"]
    if not failed:
        return
    server, mean = record.server, record.acknowledged.mean_ms
    evidence = "; ".join(f"{c.title} {quantity(c.value, c.unit)}, limit {number(c.limit)}" for c in failed)
    if server.processing_mean_ms is None or mean is None:
        yield Recommendation(
            "Give the run access to /metrics, to see where the time goes.", f"{_sentence(evidence)}"
        )
        return
    outside = mean - server.processing_mean_ms
    if outside > mean / 2:
        yield Recommendation(
            "Look before the order path: at the event loop's queue, the network, the generator.",
            f"Of the mean {quantity(mean, 'ms')} the service accounts for "
            f"{quantity(server.processing_mean_ms, 'ms')}. {_sentence(evidence)}",
        )
    elif server.stage_mean_ms:
        stage, spent = max(server.stage_mean_ms.items(), key=lambda item: item[1])
        yield Recommendation(
            _STAGES.get(stage, f"Shorten the stage `{stage}`."),
            f"`{stage}` takes {quantity(spent, 'ms')} of the mean {quantity(mean, 'ms')}. {_sentence(evidence)}",
        )


_STAGES = {
    "queue": "Let batches start sooner: orders wait for a free writer, so make the commit cheaper or add a replica.",
    "store": "Make the commit cheaper: look at the database's disk, its locks, and its share of the CPU.",
    "price": "Look at the product cache: pricing an order should not leave the process.",
    "parse": "Look at the size of the orders: reading them takes longest.",
    "respond": "Look at what happens between the commit and the answer: it takes longest.",
}


def _cpu(record: RunRecord) -> Iterator[Recommendation]:
    criterion = _criterion(record, "cpu")
    if criterion is None or criterion.verdict != "FAIL":
        return
    spent = [replica.cpu_percent for replica in record.server.replicas if replica.cpu_percent is not None]
    total, running = sum(spent), len(record.server.replicas)
    needed = replicas_below(total, criterion.limit)
    action = f"Run {needed} replicas: that brings CPU under {number(criterion.limit)} % of a core each."
    evidence = f"{running} used {quantity(total, '%')} of a core between them at {_rate(record)}."
    most = _cpu_if_never_waiting(record)
    if (
        max(spent) >= _SATURATED_PERCENT
        and most
        and (bound := replicas_below(most, criterion.limit)) > needed
    ):
        action = f"Run {needed} to {bound} replicas: that brings CPU under {number(criterion.limit)} % of a core each."
        evidence += (
            f" A core that is full hides how much more was asked for: {record.users} users who never waited for an "
            f"answer would need {quantity(most, '%')}, at {quantity(record.server.cpu_us_per_order, 'µs')} an order."
        )
    if needed > _MAX_REPLICAS:
        evidence += f" The plan's autoscaler ends at {_MAX_REPLICAS}."
    yield Recommendation(action, evidence)
    yield from _connections(record, needed)


def replicas_below(total_percent: float, limit_percent: float = _CPU_PERCENT) -> int:
    """The fewest replicas that share *total_percent* of a core with less than *limit_percent* each."""
    return math.floor(total_percent / limit_percent) + 1


def _cpu_if_never_waiting(record: RunRecord) -> float | None:
    """Percent of a core that the closed model's users would need if answers took no time: the most they can ask for."""
    wait = sum(record.wait_seconds) / 2
    cost = record.server.cpu_us_per_order
    return None if record.model == "open" or not wait or cost is None else record.users / wait * cost / 1e4


def _connections(record: RunRecord, replicas: int) -> Iterator[Recommendation]:
    """Replicas multiply connections, and the database has a limit."""
    pool = max((replica.pool_max or 0 for replica in record.server.replicas), default=0)
    limit = record.environment.database.get("max_connections")
    if limit and pool * replicas > (ours := int(limit) * _POOL_PERCENT / 100):
        yield Recommendation(
            f"With {replicas} replicas set DB_POOL_MAX_SIZE to {max(1, int(ours // replicas))}, "
            "or raise max_connections.",
            f"{replicas} pools of {number(pool)} may open {number(pool * replicas)} connections; the database has "
            f"{limit}, three quarters of which are ours to use.",
        )


def _memory(record: RunRecord) -> Iterator[Recommendation]:
    criterion = _criterion(record, "memory")
    if criterion is not None and criterion.verdict == "FAIL":
        highest = max(replica.rss_max_bytes or 0 for replica in record.server.replicas)
        needed = highest / criterion.limit * 100
        yield Recommendation(
            f"Raise the memory limit above {mebibytes(needed)}, or find what holds the memory (make profile).",
            f"A service process held {mebibytes(highest)}, {quantity(criterion.value, '%')} of its limit.",
        )


def _pool(record: RunRecord) -> Iterator[Recommendation]:
    criterion = _criterion(record, "pool")
    if criterion is not None and criterion.verdict == "FAIL":
        fullest = max(
            record.server.replicas,
            key=lambda replica: (replica.pool_in_use_max or 0) / (replica.pool_max or 1),
        )
        in_use = fullest.pool_in_use_max or 0
        yield Recommendation(
            "Find what holds connections for so long; or else raise DB_POOL_MAX_SIZE to "
            f"{math.floor(in_use / criterion.limit * 100) + 1}.",
            f"{number(in_use)} of {quantity(fullest.pool_max)} connections were lent at once"
            + (
                f", and storing a batch took {quantity(store, 'ms')}."
                if (store := record.server.stage_mean_ms.get("store"))
                else "."
            ),
        )


def _batches(record: RunRecord) -> Iterator[Recommendation]:
    """A queue of its own says what to do about it only where it is most of an order's time."""
    size, queue = record.server.batch_size_mean, record.server.stage_mean_ms.get("queue")
    if size is not None and size >= 0.8 * _BATCH_MAX_SIZE:
        yield Recommendation(
            "Add a replica, or raise BATCH_MAX_SIZE: batches are full, so orders queue for the next.",
            f"{number(size)} orders per commit of at most {_BATCH_MAX_SIZE}, after {quantity(queue, 'ms')} of waiting.",
        )


def _generator(record: RunRecord) -> Iterator[Recommendation]:
    breached = {check.name for check in record.checks if check.verdict == "BREACH"}
    cpu, processes = record.generator.cpu_percent, record.generator.processes
    if cpu is not None and cpu >= _CPU_PERCENT and not breached & {"generator_cpu", "generator_lag"}:
        yield Recommendation(
            f"Run the generator with PROCESSES={processes + 1}: beyond this load it would be what is measured.",
            f"Its busiest process used {quantity(cpu, '%')} of a core; at {_SATURATED_PERCENT} % a run is INVALID.",
        )


def _calibration(record: RunRecord) -> Iterator[Recommendation]:
    before, after = record.calibration.before_seconds, record.calibration.after_seconds
    stolen = record.calibration.stolen_percent
    found = []
    if before and after and max(before, after) / min(before, after) > _DRIFT:
        found.append(
            f"One piece of fixed work took {quantity(before * 1000, 'ms')} before the run and "
            f"{quantity(after * 1000, 'ms')} after it ({change(after / before)}): the machine changed meanwhile."
        )
    if stolen is not None and stolen > _STOLEN_PERCENT:
        found.append(f"{quantity(stolen, '%')} of the machine's CPU time went to others on its host.")
    if found:
        yield Recommendation("Run again while the machine has nothing else to do.", " ".join(found))


def _measuring(record: RunRecord) -> Iterator[Recommendation]:
    """Ways to have measured what was not."""
    missing = [criterion for criterion in record.criteria if criterion.verdict == "NOT MEASURED"]
    alerts = [criterion for criterion in missing if criterion.name.endswith("_alerts")]
    short = [criterion for criterion in missing if criterion.samples is not None and criterion.samples]
    others = [criterion for criterion in missing if criterion not in alerts and criterion not in short]
    if alerts:
        yield Recommendation(
            "Set PROMETHEUS_URL to have alerts counted.",
            f"{_sentence(', '.join(criterion.title for criterion in alerts))[:-1]}: NOT MEASURED, {alerts[0].reason}.",
        )
    if short:
        yield Recommendation(
            "Run longer (DURATION) to have every percentile measured.",
            " ".join(f"{criterion.title}: {criterion.reason}." for criterion in short),
        )
    if others and record.counts.sent:
        yield Recommendation(
            "Make /metrics of every replica readable (METRICS_URLS).",
            " ".join(f"{criterion.title}: {criterion.reason}." for criterion in others),
        )


def _capacity(record: RunRecord) -> Iterator[Recommendation]:
    """The load that one replica carries, where it has something left."""
    criterion = _criterion(record, "cpu")
    if (
        criterion is None
        or criterion.verdict != "PASS"
        or not criterion.value
        or not record.orders_per_second
    ):
        return
    share = record.orders_per_second / max(1, len(record.server.replicas))
    yield Recommendation(
        f"Plan with at most {number(_two_digits(share * criterion.limit / criterion.value))} orders/s a replica.",
        f"The busiest used {quantity(criterion.value, '%')} of a core at {_rate(record)}; in proportion it reaches "
        f"{number(criterion.limit)} % there. A guess that grows with the distance: batches get cheaper under load.",
    )


def _tightest(record: RunRecord) -> Iterator[Recommendation]:
    used = {
        c.title: (c.value / c.limit, c)
        for c in record.criteria
        if c.verdict == "PASS" and c.comparison != ">=" and c.value and c.limit
    }
    if used:
        title, (share, c) = max(used.items(), key=lambda item: item[1][0])
        yield Recommendation(
            f"Watch this first as load grows: {title}. Of what passed it is nearest to its limit.",
            f"{quantity(c.value, c.unit)} against {c.comparison} {quantity(c.limit, c.unit)}, {share:.0%} of the way.",
        )


def _longer(record: RunRecord) -> Iterator[Recommendation]:
    profile = PROFILES.get(record.profile)
    if profile is not None and record.duration_seconds < 0.9 * profile.run_time_seconds:
        yield Recommendation(
            "Run the plan's full length before you rely on this for a release.",
            f"{duration(record.duration_seconds)} were measured; the plan has {duration(profile.run_time_seconds)}. "
            "Leaks and slow growth need the time.",
        )


def _criterion(record: RunRecord, name: str) -> Criterion | None:
    return next((criterion for criterion in record.criteria if criterion.name == name), None)


def _rate(record: RunRecord) -> str:
    return f"{number(record.orders_per_second)} orders/s"


def _two_digits(value: float) -> float:
    digits = 1 - math.floor(math.log10(value))
    scale = 10.0**digits
    return math.floor(value * scale) / scale


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
