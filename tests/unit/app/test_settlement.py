"""What became of each order of a batch."""

import pytest

from app.domain import IncomingOrder, Order, PlacedOrder
from app.errors import (
    CircuitOpen,
    ConnectionLost,
    DeadlineExceeded,
    IdempotencyMismatch,
    LockTimeout,
    OutOfStock,
    ServiceError,
    StatementRejected,
    UnknownProduct,
)
from app.settlement import Settlement


def _incoming(key: str | None = None, quantity: int = 1, principal: str = "p") -> IncomingOrder:
    return IncomingOrder(
        principal=principal,
        customer_id="c",
        items=[("SKU-0001", quantity)],
        idempotency_key=key,
        arrived_at=0.0,
        parsed_at=0.0,
        deadline=5.0,
    )


def _placed(order_id: str, *, replayed: bool = False) -> PlacedOrder:
    order = Order(
        order_id, "c", "confirmed", "EUR", 100, [("SKU-0001", 1, 100)], "2026-11-22T10:00:00.000000Z"
    )
    return PlacedOrder(order, replayed=replayed)


def _settle_all(settlement: Settlement, results: dict[IncomingOrder, PlacedOrder | ServiceError]) -> None:
    while orders := settlement.next_pass():
        for incoming in orders:
            settlement.settle(incoming, results[incoming])


def test_orders_without_a_key_are_all_sent_at_once() -> None:
    """In order of arrival; their results come back in the same order."""
    batch = [_incoming(), _incoming(), _incoming()]
    settlement = Settlement(batch)
    assert settlement.next_pass() == batch
    for n in (2, 0, 1):
        settlement.settle(batch[n], _placed(str(n)))
    assert settlement.next_pass() == []
    assert [result.order.id for result in settlement.in_order() if isinstance(result, PlacedOrder)] == [
        "0",
        "1",
        "2",
    ]


def test_of_orders_that_share_a_key_only_the_first_is_sent() -> None:
    """Its repeats are replayed with its answer; another order under the key is a mismatch."""
    first, repeat, other = _incoming("k"), _incoming("k"), _incoming("k", quantity=2)
    settlement = Settlement([first, repeat, other])
    assert settlement.next_pass() == [first]
    settlement.settle(first, _placed("1"))
    assert settlement.next_pass() == []
    stored, replayed, refused = settlement.in_order()
    assert stored == _placed("1")
    assert replayed == _placed("1", replayed=True)
    assert isinstance(refused, IdempotencyMismatch)


def test_what_was_replayed_from_the_database_is_replayed_to_all() -> None:
    """The first one's own replay settles its repeats, too."""
    first, repeat = _incoming("k"), _incoming("k")
    settlement = Settlement([first, repeat])
    settlement.next_pass()
    settlement.settle(first, _placed("1", replayed=True))
    assert settlement.next_pass() == []
    assert settlement.in_order() == [_placed("1", replayed=True)] * 2


def test_a_refusal_leaves_the_key_to_the_next() -> None:
    """Orders that share a key take their turns until one is stored."""
    batch = [_incoming("k", quantity=9), _incoming("k", quantity=8), _incoming("k"), _incoming("k")]
    settlement = Settlement(batch)
    for n in range(2):
        assert settlement.next_pass() == [batch[n]]
        settlement.settle(batch[n], OutOfStock())
    assert settlement.next_pass() == [batch[2]]
    settlement.settle(batch[2], _placed("2"))
    assert settlement.next_pass() == []
    assert settlement.in_order()[2:] == [_placed("2"), _placed("2", replayed=True)]


def test_the_keys_of_two_principals_are_two_keys() -> None:
    """Both orders are sent at once."""
    batch = [_incoming("k"), _incoming("k", principal="q")]
    assert Settlement(batch).next_pass() == batch


def test_what_is_not_settled_is_sent_again() -> None:
    """A pass may leave orders undecided: the next one holds them, and only them."""
    batch = [_incoming(), _incoming(), _incoming()]
    settlement = Settlement(batch)
    settlement.next_pass()
    settlement.settle(batch[1], _placed("1"))
    assert settlement.next_pass() == [batch[0], batch[2]]


def test_a_failure_is_for_those_that_have_no_result() -> None:
    """What was stored before the failure stays stored; its repeats, not yet answered, get the failure."""
    stored, open_, repeat = _incoming("k"), _incoming(), _incoming("k")
    settlement = Settlement([stored, open_, repeat])
    settlement.next_pass()
    settlement.settle(stored, _placed("1"))
    settlement.fail_the_rest(CircuitOpen())
    first, *others = settlement.in_order()
    assert first == _placed("1")
    assert [type(other) for other in others] == [CircuitOpen, CircuitOpen]
    assert settlement.next_pass() == []


def test_faults_an_outcome_is_each_orders_own() -> None:
    """Of the orders that fail together only those that were sent and not answered are `unknown`."""
    sent, repeat, other = _incoming("k"), _incoming("k"), _incoming()
    settlement = Settlement([sent, repeat, other])
    settlement.doubt([sent], ConnectionLost(outcome="unknown"))
    settlement.fail_the_rest(CircuitOpen(outcome="unknown"))
    outcomes = [result.outcome for result in settlement.in_order() if isinstance(result, ServiceError)]
    assert outcomes == ["unknown", "not_executed", "not_executed"]


@pytest.mark.parametrize("refusal", [OutOfStock(), UnknownProduct(), StatementRejected(), LockTimeout()])
def test_faults_a_verdict_after_an_unanswered_attempt_is_no_proof(refusal: ServiceError) -> None:
    """A refusal says nothing of what was sent before it, which may still be carried out: it stays `unknown`."""
    incoming = _incoming("k")
    settlement = Settlement([incoming])
    settlement.doubt([incoming], DeadlineExceeded(outcome="unknown"))
    settlement.settle(incoming, refusal)
    (result,) = settlement.in_order()
    assert isinstance(result, DeadlineExceeded)
    assert result.outcome == "unknown"


def test_faults_another_order_with_the_key_is_proof() -> None:
    """The key can be held once only: what was sent before is not stored and never will be."""
    incoming = _incoming("k")
    settlement = Settlement([incoming])
    settlement.doubt([incoming], DeadlineExceeded(outcome="unknown"))
    settlement.settle(incoming, IdempotencyMismatch())
    (result,) = settlement.in_order()
    assert isinstance(result, IdempotencyMismatch)
    assert result.outcome == "not_executed"


def test_all_end_settled() -> None:
    """Any mixture of keys and results ends with one result for each order."""
    batch = [_incoming(key, quantity) for key in (None, "a", "b") for quantity in (1, 2, 1)]
    results = {incoming: _placed(str(n)) if n % 2 else OutOfStock() for n, incoming in enumerate(batch)}
    settlement = Settlement(batch)
    _settle_all(settlement, dict(results))
    assert len(settlement.in_order()) == 9
