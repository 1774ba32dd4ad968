"""What an answer of payments means: definite, to be asked again, or a defect."""

from typing import cast

import pytest

from app.http_client import HttpClient
from app.payments import Payments, PaymentsAway, PaymentsRefused, is_payments_failure


class ScriptedClient:
    """Answers every request with the same."""

    def __init__(self, answer: tuple[int, bytes] | OSError) -> None:
        self.answer = answer
        self.asked: list[tuple[bytes, bytes, bytes]] = []

    async def post(self, target: bytes, body: bytes, headers: bytes) -> tuple[int, bytes]:
        self.asked.append((target, body, headers))
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


def payments(answer: tuple[int, bytes] | OSError) -> tuple[Payments, ScriptedClient]:
    client = ScriptedClient(answer)
    return Payments(cast("HttpClient", client), timeout_seconds=1), client


@pytest.mark.parametrize("status", ["authorised", "declined", "voided"])
async def test_a_definite_answer(status: str) -> None:
    """The order's id is the key, so that asking again charges nobody twice."""
    asked, client = payments((200, b'{"order_id":"o-1","status":"%b"}' % status.encode()))
    assert await asked.authorise("o-1", 250, "EUR", timeout_seconds=1) == status
    assert client.asked == [
        (
            b"/authorisations",
            b'{"order_id":"o-1","amount_cents":250,"currency":"EUR"}',
            b"Idempotency-Key: o-1\r\n",
        )
    ]


@pytest.mark.parametrize(
    "answer",
    [
        (200, b""),
        (200, b"[]"),
        (200, b'{"status": null}'),
        (200, b'{"status": "perhaps"}'),
        (200, b'{"status": ["authorised"]}'),
        (500, b"{}"),
        (503, b'{"status":"authorised"}'),
        (429, b""),
        (408, b""),
        ConnectionResetError(),
        TimeoutError(),
    ],
    ids=str,
)
async def test_no_definite_answer(answer: tuple[int, bytes] | OSError) -> None:
    """It may have been done, is asked again, and counts against payments."""
    asked, _ = payments(answer)
    with pytest.raises(PaymentsAway) as failed:
        await asked.authorise("o-1", 250, "EUR", timeout_seconds=1)
    assert (failed.value.outcome, failed.value.retryable) == ("unknown", True)
    assert is_payments_failure(failed.value)


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
async def test_a_refusal_is_a_defect_and_no_failure_of_payments(status: int) -> None:
    """One order that payments will not have keeps no other from being asked about."""
    asked, _ = payments((status, b"{}"))
    with pytest.raises(PaymentsRefused) as refused:
        await asked.void("o-1", timeout_seconds=1)
    assert not refused.value.retryable
    assert not is_payments_failure(refused.value)


async def test_a_void_is_answered_by_nothing_but_voided() -> None:
    asked, client = payments((200, b'{"status":"authorised"}'))
    with pytest.raises(PaymentsAway):
        await asked.void("o-1", timeout_seconds=1)
    assert client.asked[0][:2] == (b"/voids", b'{"order_id":"o-1"}')
