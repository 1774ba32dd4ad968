import dataclasses
from typing import Any

import pytest

from loadtests.reports.recommendations import recommend, replicas_below
from loadtests.run_record import Calibration, Check, Criterion, RunRecord
from tests.support.run_records import outage, record_of, samples

PLAIN = record_of(samples(seconds=20, rate=60), seconds=20)


def advice(record: RunRecord, action: str) -> str:
    """The evidence of the one recommendation that begins so."""
    (found,) = [one.evidence for one in recommend(record) if one.action.startswith(action)]
    return found


def actions(record: RunRecord) -> str:
    return " ".join(one.action for one in recommend(record))


def failing(record: RunRecord, name: str, **changes: Any) -> RunRecord:
    """*record*, but this criterion failed."""
    criteria = tuple(
        dataclasses.replace(c, verdict="FAIL", **changes) if c.name == name else c for c in record.criteria
    )
    return dataclasses.replace(record, criteria=criteria, verdict="FAIL")


@pytest.mark.parametrize(
    ("total_percent", "replicas"), [(69.9, 1), (70.0, 2), (98.0, 2), (139.9, 2), (140.0, 3), (350.0, 6)]
)
def test_replicas_bring_cpu_below_the_limit_not_to_it(total_percent: float, replicas: int) -> None:
    assert replicas_below(total_percent) == replicas
    assert total_percent / replicas < 70


def test_full_core_says_between_which_numbers_of_replicas() -> None:
    """A saturated process hides the demand: at least what it used, at most what users who never wait could ask for."""
    record = record_of(samples(seconds=20, rate=60), seconds=20, cpu_percent=98.0)
    record = dataclasses.replace(record, server=dataclasses.replace(record.server, cpu_us_per_order=300.0))
    evidence = advice(
        record, "Run 2 replicas"
    )  # 500 / 0.3 s x 300 us is 50 % of a core: no more than was used
    assert "98 %" in evidence
    dearer = dataclasses.replace(record, server=dataclasses.replace(record.server, cpu_us_per_order=1500.0))
    evidence = advice(dearer, "Run 2 to 4 replicas")  # 500 / 0.3 s x 1500 us
    assert "250 %" in evidence


def test_all_replicas_are_added_up() -> None:
    record = record_of(samples(seconds=20, rate=60), seconds=20, cpu_percent=80.0)
    record = dataclasses.replace(
        record, server=dataclasses.replace(record.server, replicas=record.server.replicas * 3)
    )
    assert "3 used 240 %" in advice(record, "Run 4 replicas")


def test_replicas_must_fit_the_databases_connections() -> None:
    """4 pools of 50 against max_connections 120: 22 each leave a quarter of them free."""
    record = record_of(samples(seconds=20, rate=60), seconds=20, cpu_percent=220.0)
    assert "200 connections" in advice(record, "With 4 replicas set DB_POOL_MAX_SIZE to 22")


def test_errors_are_named_by_type_most_frequent_first() -> None:
    record = record_of(samples(trouble=outage))
    said = [one.evidence for one in recommend(record) if "orders ended as" in one.evidence]
    assert ["circuit_open" in said[0], "database" in said[1], "client_timeout" in said[2]] == [True] * 3
    assert f"{record.counts.by_type['circuit_open']:,} of {record.counts.sent:,}" in said[0]


def test_slow_stage_is_named_where_the_service_accounts_for_the_latency() -> None:
    record = failing(record_of(samples(mean_ms=12)), "latency_p95")
    assert "`store` takes 5 ms" in advice(record, "Make the commit cheaper")
    queued = dataclasses.replace(record.server, stage_mean_ms={"queue": 8.0, "store": 1.0})
    assert "`queue` takes 8 ms" in advice(
        dataclasses.replace(record, server=queued), "Let batches start sooner"
    )


def test_latency_outside_of_the_service_is_looked_for_outside() -> None:
    record = failing(record_of(samples(mean_ms=600)), "latency_p95")
    assert "9 ms" in advice(record, "Look before the order path")


def test_pool_names_the_size_that_would_do() -> None:
    """48 lent are 75 % of 64, and must be less."""
    record = failing(PLAIN, "pool", value=96.0)
    replica = dataclasses.replace(record.server.replicas[0], pool_in_use_max=48.0)
    record = dataclasses.replace(record, server=dataclasses.replace(record.server, replicas=(replica,)))
    assert "48 of 50 connections" in advice(record, "Find what holds connections")
    assert "DB_POOL_MAX_SIZE to 65" in actions(record)


def test_memory_names_the_limit_that_would_do() -> None:
    record = failing(PLAIN, "memory", value=90.0)
    replica = dataclasses.replace(record.server.replicas[0], rss_max_bytes=400 * 2**20)
    record = dataclasses.replace(record, server=dataclasses.replace(record.server, replicas=(replica,)))
    assert "400 MiB" in advice(record, "Raise the memory limit above 500 MiB")


def test_full_batches_are_named() -> None:
    record = dataclasses.replace(PLAIN, server=dataclasses.replace(PLAIN.server, batch_size_mean=97.0))
    assert "97 orders per commit" in advice(record, "Add a replica, or raise BATCH_MAX_SIZE")


def test_busy_generator_is_named_before_it_makes_a_run_invalid() -> None:
    generator = dataclasses.replace(PLAIN.generator, cpu_percent=82.0)
    assert "82 %" in advice(
        dataclasses.replace(PLAIN, generator=generator), "Run the generator with PROCESSES=2"
    )


def test_too_few_users_are_named() -> None:
    """10 users who wait 0.3 s cannot ask for 50 orders/s."""
    record = failing(dataclasses.replace(PLAIN, users=10), "throughput")
    assert "33.3 orders/s at most" in advice(record, "Run at least 16 users")


def test_invalid_run_is_repaired_first_and_says_nothing_about_capacity() -> None:
    breach = Check("acknowledged_stored", "BREACH", "3 acknowledged orders are not stored: a, b, c")
    record = dataclasses.replace(PLAIN, verdict="INVALID", checks=(breach,))
    first = recommend(record)[0]
    assert "before anything else" in first.action
    assert "a, b, c" in first.evidence
    assert "Plan with at most" not in actions(record)
    assert "Plan with at most" in actions(dataclasses.replace(PLAIN, verdict="PASS"))


def test_every_check_has_a_cure_of_its_own() -> None:
    """No breach of a check that the runner knows is answered with a commonplace."""
    for name in (
        "requests", "acknowledged_stored", "stored_explained", "stored_once", "orders_total", "stock",
        "stored_for_whom", "stored_as_sent", "cancellations", "cancellations_refused", "replays", "answers", "ledger",
        "generator_alive", "generator_cpu", "generator_lag", "users", "offered", "little", "target",
    ):  # fmt: skip
        record = dataclasses.replace(
            PLAIN, checks=(Check(name, "BREACH", "it was not so"),), verdict="INVALID"
        )
        assert recommend(record)[0].action != "Repair the run."


def test_machine_that_changed_is_named() -> None:
    record = dataclasses.replace(PLAIN, calibration=Calibration(0.25, 0.4))
    assert "+60 %" in advice(record, "Run again while the machine")
    assert "Run again while the machine" not in actions(PLAIN)
    record = dataclasses.replace(PLAIN, calibration=Calibration(0.25, 0.25, 7.5))
    assert advice(record, "Run again while the machine").startswith("7.5 % of the machine's CPU time")
    record = dataclasses.replace(PLAIN, calibration=Calibration(0.25, 0.25, 4.9))
    assert "Run again while the machine" not in actions(record)


def test_what_was_not_measured_says_how_it_would_be() -> None:
    short = Criterion(
        name="latency_p99", title="99th percentile", verdict="NOT MEASURED", value=3.0, limit=1000.0, comparison="<",
        unit="ms", samples=40, definition="", source="", reason="40 orders, and 1000 are needed",
    )  # fmt: skip
    record = dataclasses.replace(PLAIN, criteria=(*PLAIN.criteria, short))
    assert "40 orders, and 1000 are needed" in advice(record, "Run longer")
    assert "no PROMETHEUS_URL" in advice(record, "Set PROMETHEUS_URL")


def test_run_without_a_single_order_can_be_advised_on() -> None:
    """No figure is divided by: a record of nothing still gives the reasons it has."""
    assert "full length" in actions(record_of([], seconds=10))


def test_the_tightest_criterion_is_called_by_its_title() -> None:
    """Of what passed, CPU at 40 % against 70 % is nearest to its limit; an abbreviation stays one."""
    assert "40 %" in advice(PLAIN, "Watch this first as load grows: CPU usage.")
