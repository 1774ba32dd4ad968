"""The ledger, told against stored as sets of ids; and what is a breach."""

import dataclasses
from collections.abc import Sequence

import pytest

from loadtests.judging import acceptance
from loadtests.judging.ledger import Answers, balance
from loadtests.judging.verdict import Validity
from loadtests.run_record import Check, Counts, Generator, Ledger
from loadtests.samples import Operation, Outcome, Sample

LIMITS = acceptance.load().validity


def sample(outcome: Outcome, key: str, order_id: str = "", operation: Operation = "create") -> Sample:
    return Sample(operation, key, order_id, 201, outcome, "", 0.0, 0.01, 0.0, replayed=False)


def held(samples: Sequence[Sample], stored: Sequence[tuple[str, str | None]]) -> Ledger:
    answers = Answers()
    for each in samples:
        answers.add(each)
    return balance(answers, stored, Counts())


A1 = sample("acknowledged", "k1", "o1")
A2 = sample("acknowledged", "k2", "o2")
R3 = sample("refused", "k3")
U4 = sample("unknown", "k4")


def test_a_clean_ledger() -> None:
    """Acknowledged orders are stored, an unknown one may be."""
    found = held([A1, A2, R3, U4], [("o1", "k1"), ("o2", "k2"), ("o4", "k4")])
    assert (found.lost, found.unexpected, found.doubled) == ((), (), ())
    assert (found.stored, found.unknown_stored) == (3, 1)


@pytest.mark.parametrize(
    ("samples", "stored", "figure", "named"),
    [
        pytest.param([A1, A2], [("o1", "k1")], "lost", ("o2",), id="acknowledged-not-stored"),
        pytest.param([A1, R3], [("o1", "k1"), ("o3", "k3")], "unexpected", ("o3",), id="refused-and-stored"),
        pytest.param([A1, U4], [("o1", "k1"), ("o9", "k9")], "unexpected", ("o9",), id="nobody-asked"),
        pytest.param([A1], [("o1", "k1"), ("o9", "")], "unexpected", ("o9",), id="stored-again-without-key"),
        pytest.param([A1], [("o1", "k1"), ("o9", "k1")], "doubled", ("key k1",), id="one-key-two-orders"),
        pytest.param([A1], [("o1", "k1"), ("o1", "k1")], "doubled", ("id o1",), id="listed-twice"),
        pytest.param(
            [A1, sample("acknowledged", "k2", "o1")],
            [("o1", "k1")],
            "doubled",
            ("id o1",),
            id="one-id-for-two",
        ),
        pytest.param(
            [sample("acknowledged", "k1")],
            [],
            "lost",
            ("none, for the key k1",),
            id="acknowledged-without-id",
        ),
        pytest.param([A1], [("o1", None), ("o9", None)], "unexpected", ("o9",), id="api-nobody-asked"),
    ],
)
def test_what_is_found(
    samples: Sequence[Sample], stored: Sequence[tuple[str, str | None]], figure: str, named: tuple[str, ...]
) -> None:
    """A breach names the order or the key."""
    assert getattr(held(samples, stored), figure) == named


def test_the_api_tells_no_keys() -> None:
    """Without keys, as many orders may be stored without acknowledgement as requests are unknown."""
    found = held([A1, U4], [("o1", None), ("o4", None)])
    assert (found.unexpected, found.unknown_stored) == ((), 1)


def test_a_cancellation_is_no_order() -> None:
    assert held([sample("acknowledged", "", "o1", "cancel")], []).lost == ()


CLEAN = Validity(
    counts=Counts(sent=100, acknowledged=100),
    ledger=Ledger(
        Counts(sent=120, acknowledged=110, unknown=10),
        "database",
        115,
        success_rise=115,
        stock_not_conserved=(),
    ),
    ledger_trouble="",
    metrics_trouble="",
    generator=Generator(1, 40.0, 3.0, 9.0, little_users=100.0),
    generator_trouble="",
    users=100.0,
    planned_users=100,
    target_trouble="",
)


def verdicts(validity: Validity) -> dict[str, str]:
    return {check.name: check.verdict for check in validity.checks(LIMITS)}


def test_all_checks_hold() -> None:
    assert set(verdicts(CLEAN).values()) == {"OK"}


def changed(**changes: object) -> Validity:
    return dataclasses.replace(CLEAN, **changes)  # type: ignore[arg-type]


def with_ledger(**changes: object) -> Validity:
    return changed(ledger=dataclasses.replace(CLEAN.ledger, **changes))  # type: ignore[arg-type]


def with_generator(**changes: object) -> Validity:
    return changed(generator=dataclasses.replace(CLEAN.generator, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("validity", "breached"),
    [
        pytest.param(changed(counts=Counts()), {"requests"}, id="no-requests"),
        pytest.param(with_ledger(lost=("o1",)), {"acknowledged_stored"}, id="lost"),
        pytest.param(with_ledger(unexpected=("o1",)), {"stored_explained"}, id="unexpected"),
        pytest.param(with_ledger(doubled=("key k1",)), {"stored_once"}, id="doubled"),
        pytest.param(with_ledger(success_rise=109), {"orders_total"}, id="counted-too-few"),
        pytest.param(with_ledger(success_rise=121), {"orders_total"}, id="counted-too-many"),
        pytest.param(with_ledger(stock_not_conserved=("SKU-0001",)), {"stock"}, id="stock"),
        pytest.param(
            changed(counts=Counts(sent=100, client_errors=2)), {"client_errors"}, id="client-errors"
        ),
        pytest.param(with_generator(cpu_percent=91.0), {"generator_cpu"}, id="generator-cpu"),
        pytest.param(with_generator(lag_p95_ms=51.0), {"generator_lag"}, id="generator-lag"),
        pytest.param(with_generator(cpu_percent=None), {"generator_cpu"}, id="generator-silent"),
        pytest.param(with_generator(lag_p95_ms=None), {"generator_lag"}, id="generator-without-timers"),
        pytest.param(with_generator(little_users=94.0), {"little"}, id="littles-law"),
        pytest.param(with_generator(achieved_share=0.98), {"offered"}, id="open-model-behind"),
        pytest.param(changed(users=90.0), {"users", "little"}, id="users-missing"),
        pytest.param(changed(generator_trouble="it died"), {"generator_alive"}, id="generator-died"),
        pytest.param(changed(target_trouble="it died"), {"target"}, id="postgres-died"),
        pytest.param(
            changed(ledger_trouble="503"),
            {"acknowledged_stored", "stored_explained", "stored_once"},
            id="ledger-not-read",
        ),
    ],
)
def test_a_breach(validity: Validity, breached: set[str]) -> None:
    """Each condition is breached alone, by its own figure."""
    assert {name for name, verdict in verdicts(validity).items() if verdict == "BREACH"} == breached


@pytest.mark.parametrize("rise", [110, 120])
def test_an_unknown_order_may_have_been_counted(rise: int) -> None:
    """acknowledged <= rise <= acknowledged + unknown."""
    assert verdicts(with_ledger(success_rise=rise))["orders_total"] == "OK"


def test_a_breach_names_the_orders_and_keeps_them_all() -> None:
    lost = tuple(f"o{number}" for number in range(8))
    [check] = [c for c in with_ledger(lost=lost).checks(LIMITS) if c.name == "acknowledged_stored"]
    assert check == Check(
        "acknowledged_stored",
        "BREACH",
        "8 acknowledged orders are not stored: o0, o1, o2, o3, o4 and 3 more",
        lost,
    )


def test_what_could_not_be_asked_is_not_checked() -> None:
    """Neither passed nor breached."""
    found = verdicts(with_ledger(success_rise=None, stock_not_conserved=None))
    assert (found["orders_total"], found["stock"]) == ("NOT CHECKED", "NOT CHECKED")
