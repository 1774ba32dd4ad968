"""Payments, as the service asks it: authorise an order's total, or void whatever was authorised for an order.

Both are safe to repeat. An authorisation carries the order's id as its `Idempotency-Key`. A void is by order id, and
also holds for an authorisation that arrives after it, so that nothing sent too late can charge a cancelled order.

    POST {PAYMENTS_URL}/authorisations   {"order_id", "amount_cents", "currency"} -> {"status": "authorised" or
                                         "declined", or "voided" where the order was voided before}
    POST {PAYMENTS_URL}/voids            {"order_id"} -> {"status": "voided"}
"""

import asyncio
import time
from collections.abc import Callable
from typing import Literal

import orjson

from app.errors import Unavailable
from app.http_client import HttpClient
from app.metrics import PAYMENT_SECONDS

Answer = Literal["authorised", "declined", "voided"]
_ANSWERS = {"authorisations": {"authorised", "declined", "voided"}, "voids": {"voided"}}
_SERVER_ERROR = 500
_TOO_EARLY_OR_MANY = frozenset({408, 425, 429})
_OK = frozenset({200, 201})


class PaymentsAway(Unavailable):
    """Payments gave no definite answer; what was asked may have been done."""

    retryable = True


class PaymentsRefused(Unavailable):
    """Payments refuses the request itself: it, or this service, has a defect."""


def is_payments_failure(exc: BaseException) -> bool:
    """True if *exc* says that payments is unwell, and a circuit breaker should count it."""
    return isinstance(exc, PaymentsAway)


class Payments:
    """The payments service over HTTP; one call is one attempt."""

    def __init__(
        self, client: HttpClient, *, timeout_seconds: float, slowness: Callable[[str], float] | None = None
    ) -> None:
        """Ask through *client*.

        Args:
            client: requests to the payments service.
            timeout_seconds: the most one attempt takes.
            slowness: seconds by which the next attempt for an order id is slowed down; a fault on demand.
        """
        self._client = client
        self._timeout_seconds = timeout_seconds
        self._slowness = slowness

    async def authorise(
        self, order_id: str, amount_cents: int, currency: str, *, timeout_seconds: float
    ) -> Answer:
        """Ask once for the authorisation of an order.

        Raises:
            PaymentsAway: no definite answer.
            PaymentsRefused: another attempt would be answered alike.
        """
        document = {"order_id": order_id, "amount_cents": amount_cents, "currency": currency}
        return await self._ask("authorisations", order_id, document, timeout_seconds)

    async def void(self, order_id: str, *, timeout_seconds: float) -> Answer:
        """Ask once that an order be not charged, whatever was or will be sent for it; raises as `authorise` does."""
        return await self._ask("voids", order_id, {"order_id": order_id}, timeout_seconds)

    async def _ask(self, what: str, order_id: str, document: object, timeout_seconds: float) -> Answer:
        started_at = time.monotonic()
        try:
            async with asyncio.timeout(min(timeout_seconds, self._timeout_seconds)):
                if self._slowness is not None:
                    await asyncio.sleep(self._slowness(order_id))
                status, body = await self._client.post(
                    b"/" + what.encode(),
                    orjson.dumps(document),
                    b"Idempotency-Key: %b\r\n" % order_id.encode(),
                )
        except OSError as exc:  # TimeoutError too
            raise PaymentsAway(f"no answer ({type(exc).__name__})", outcome="unknown") from exc
        finally:
            PAYMENT_SECONDS.observe(time.monotonic() - started_at)
        if status in _OK:
            return _read(body, _ANSWERS[what])
        if status >= _SERVER_ERROR or status in _TOO_EARLY_OR_MANY:
            raise PaymentsAway(f"answered {status}", outcome="unknown")
        raise PaymentsRefused(f"answered {status}")


def _read(body: bytes, known: set[str]) -> Answer:
    try:
        answer: Answer = orjson.loads(body)["status"]
    except (ValueError, TypeError, KeyError) as exc:
        raise PaymentsAway("answered no JSON object with a status", outcome="unknown") from exc
    if not isinstance(answer, str) or answer not in known:
        raise PaymentsAway("answered a status that is none", outcome="unknown")
    return answer
