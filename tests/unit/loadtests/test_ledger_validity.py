"""The ledger, told against stored as sets of ids; and what is a breach."""

import dataclasses
from collections.abc import Sequence

import pytest

from loadtests.judging import acceptance
from loadtests.judging.ledger import REPEATED, Answers, StoredOrder, balance
from loadtests.judging.verdict import Validity
from loadtests.run_record import Check, Counts, Generator, Ledger
from loadtests.samples import Operation, Outcome, Sample

LIMITS = acceptance.load().validity


def sample(outcome: Outcome, key: str, order_id: str = "", operation: Operation = "create") -> Sample:
    return Sample(operation, "/orders", key, order_id, 201, outcome, "", 0.0, 0.01, 0.0, replayed=False)


def held(samples: Sequence[Sample], stored: Sequence[tuple[str | None, ...]]) -> Ledger:
    answers = Answers()
    for each in samples:
        answers.add(each)
    orders = [StoredOrder(*each) for each in stored]  # type: ignore[arg-type]
    return balance(answers, orders, Counts(), lambda key: f"what {key} wants")


A1 = sample("acknowledged", "k1", "o1")
A2 = sample("acknowledged", "k2", "o2")
R3 = sample("refused", "k3")
U4 = sample("unknown", "k4")
C1 = sample("acknowledged", "", "o1", "cancel")
R1 = sample("refused", "", "o1", "cancel")._replace(status=409, error_type="invalid_state")


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
        pytest.param(
            [A1, A2], [("o1", "k2"), ("o2", "k1")], "swapped", ("o1", "o2"), id="given-to-each-other"
        ),
        pytest.param(
            [A1, A2],
            [("o1", "k1", "confirmed", "what k1 wants"), ("o2", "k2", "confirmed", "else")],
            "altered",
            ("o2",),
            id="other-content",
        ),
        pytest.param(
            [A1, A2],
            [("o1", None, "confirmed", "what k2 wants"), ("o2", None, "confirmed", "what k1 wants")],
            "altered",
            ("o1", "o2"),
            id="api-given-to-each-other",
        ),
        pytest.param([A1, C1], [("o1", "k1", "confirmed")], "cancellations", ("o1",), id="cancellation-lost"),
        pytest.param([A1], [("o1", "k1", "cancelled")], "cancellations", ("o1",), id="cancelled-by-nobody"),
        pytest.param(
            [A1, R1], [("o1", "k1", "confirmed")], "unjust_refusals", ("o1",), id="cancellation-refused"
        ),
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


def test_cancellations_that_are_in_order() -> None:
    """Acknowledged and cancelled; unknown and cancelled or not; refused, of an order that was not confirmed."""
    unknown = sample("unknown", "", "o2", "cancel")
    for status in ("confirmed", "cancelled"):
        found = held([A1, A2, C1, unknown], [("o1", "k1", "cancelled"), ("o2", "k2", status)])
        assert (found.cancellations, found.unjust_refusals) == ((), ())
    assert held([A1, R1], [("o1", "k1", "declined")]).unjust_refusals == ()


def test_keys_to_repeat_are_chosen_from_the_whole_run() -> None:
    """Not only the first: a service that forgets keys after a while forgets those first."""
    answers = Answers()
    for number in range(1000):
        answers.add(sample("acknowledged", f"k{number}", f"o{number}"))
    chosen = [int(key.removeprefix("k")) for key, _ in answers.to_repeat]
    assert len(set(chosen)) == REPEATED
    assert min(chosen) < 250
    assert max(chosen) > 750
    assert all(order_id == key.replace("k", "o") for key, order_id in answers.to_repeat)


CLEAN = Validity(
    counts=Counts(sent=100, acknowledged=100),
    ledger=Ledger(
        Counts(sent=120, acknowledged=110, unknown=10),
        "database",
        115,
        success_rise=115,
        stock_not_conserved=(),
        not_replayed=(),
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
        pytest.param(with_ledger(swapped=("o1",)), {"stored_for_whom"}, id="swapped"),
        pytest.param(with_ledger(altered=("o1",)), {"stored_as_sent"}, id="altered"),
        pytest.param(with_ledger(cancellations=("o1",)), {"cancellations"}, id="cancellations"),
        pytest.param(
            with_ledger(unjust_refusals=("o1",)), {"cancellations_refused"}, id="cancellation-refused"
        ),
        pytest.param(with_ledger(not_replayed=("k1",)), {"replays"}, id="not-replayed"),
        pytest.param(changed(unsound={"500 from /orders": 1}), {"answers"}, id="internal"),
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
            {"ledger"},
            id="ledger-not-read",
        ),
    ],
)
def test_a_breach(validity: Validity, breached: set[str]) -> None:
    """Each condition is breached alone, by its own figure."""
    assert {name for name, verdict in verdicts(validity).items() if verdict == "BREACH"} == breached


def test_an_open_model_that_waits_for_the_service_is_not_the_generators_fault() -> None:
    late = with_generator(achieved_share=0.6, little_users=None)
    assert verdicts(late)["offered"] == "BREACH"
    assert verdicts(dataclasses.replace(late, service_is_slow=True))["offered"] == "OK"


def test_littles_law_knows_how_few_orders_there_were() -> None:
    assert verdicts(with_generator(little_users=94.0, little_tolerance=0.02))["little"] == "OK"


def test_the_books_are_the_services() -> None:
    """A breach of the books fails the service; what the instrument did makes the run INVALID."""
    checks = {check.name: check.about for check in CLEAN.checks(LIMITS)}
    ours = {"acknowledged_stored", "stored_explained", "stored_once", "stored_for_whom", "stored_as_sent"}
    ours |= {"cancellations", "cancellations_refused", "replays", "stock", "answers"}
    assert {name for name, about in checks.items() if about == "service"} == ours
    assert checks["generator_cpu"] == checks["little"] == "instrument"


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
        about="service",
    )


def test_what_could_not_be_asked_is_not_checked() -> None:
    """Neither passed nor breached."""
    found = verdicts(with_ledger(success_rise=None, stock_not_conserved=None))
    assert (found["orders_total"], found["stock"]) == ("NOT CHECKED", "NOT CHECKED")
