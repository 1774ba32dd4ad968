"""What an order is."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from app.domain import (
    TRANSITIONS,
    IncomingOrder,
    OrderIds,
    OrderStatus,
    statuses_that_may_become,
)


def _incoming(
    customer_id: str = "c", items: Sequence[tuple[str, int]] = (("a", 1), ("b", 2)), key: str | None = None
) -> IncomingOrder:
    return IncomingOrder(
        principal="p",
        customer_id=customer_id,
        items=items,
        idempotency_key=key,
        arrived_at=1.0,
        parsed_at=2.0,
        deadline=3.0,
    )


@given(st.integers(0, 2**48 * 1_000_000 - 1))
def test_an_id_is_a_uuid_of_its_millisecond(now_ns: int) -> None:
    """Version 7, RFC variant, the Unix milliseconds in its first 48 bits, in the usual spelling."""
    text, made_ns = OrderIds(lambda: now_ns).next()
    made = uuid.UUID(text)
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert made.int >> 80 == now_ns // 1_000_000
    assert (str(made), made_ns) == (text, now_ns)


def test_the_clock_is_the_default() -> None:
    """Without a time an id carries the present."""
    before = datetime.now(UTC)
    milliseconds = uuid.UUID(OrderIds().next()[0]).int >> 80
    assert int(before.timestamp() * 1000) <= milliseconds <= int(datetime.now(UTC).timestamp() * 1000)


def test_equal_orders_have_equal_fingerprints() -> None:
    """Whoever sends them, when, and under which key."""
    first, second = _incoming(key="k"), _incoming(key="other")
    second.principal, second.arrived_at = "q", 9.0
    assert first.fingerprint() == second.fingerprint()


_text = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=3)
_items = st.lists(st.tuples(_text, st.integers(1, 1000)), max_size=3)


@given(st.tuples(_text, _items), st.tuples(_text, _items))
def test_other_orders_have_other_fingerprints(
    one: tuple[str, list[tuple[str, int]]], other: tuple[str, list[tuple[str, int]]]
) -> None:
    """No two different orders can be told for the same, however their texts are chosen."""
    assert (_incoming(*one).fingerprint() == _incoming(*other).fingerprint()) == (one == other)


def test_the_states_an_order_can_be_cancelled_from() -> None:
    """Not from `declined`; and nothing leads out of an end."""
    assert set(statuses_that_may_become("cancelled")) == {"pending", "confirmed"}
    assert statuses_that_may_become("pending") == []
    assert set(TRANSITIONS) == set(get_args(OrderStatus))
    assert {status for status, targets in TRANSITIONS.items() if not targets} == {"declined", "cancelled"}
