"""Locust users that place orders: lighter than Locust's own, in the same statistics, and with a ledger.

Each request fires Locust's `request` event, so that its console, web interface, CSV and HTML show what they always
show. What those cannot show, what became of each order by its id, goes to `order_sinks`.
"""

import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

from locust.env import Environment

from loadtests.samples import CUT_OFF, WRONG_ANSWER, Operation, Outcome, Sample
from loadtests.users import answers, orders, session
from loadtests.users.catalogue import order_variants, products_of
from loadtests.users.light_http import Answer, NotConnected, TransportError
from loadtests.users.light_user import DEFAULT_HOST, LightUser
from loadtests.users.orders import ORDER_VARIANTS

_REMEMBERED_ORDERS = 20

# Called with every sample, in the order in which they come, on the event loop: a sink must not wait.
order_sinks: list[Callable[[Sample], object]] = []


class OrderUser(LightUser):
    """A user who places orders of one to three products that the target really sells."""

    abstract = True

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        host = self.host or DEFAULT_HOST
        try:
            self.product_ids = [product.id for product in products_of(host, self.http)]
        except (TransportError, answers.UnexpectedAnswerError) as exc:
            raise self.could_not_run(f"no products from {host}: {exc}") from None
        head = self.http.head("POST", "/orders", {"Content-Type": "application/json"})
        self.customer_id = session.customer_id(environment)
        self._variants = order_variants(host, self.customer_id, head)
        self._run_id, self._user = session.run_id(environment), uuid.uuid4().hex[:16]
        self._count = 0
        self._offset = int(self._user, 16)
        self.own_orders: deque[str] = deque(maxlen=_REMEMBERED_ORDERS)

    def place_order(self, *, late_seconds: float = 0.0) -> str | None:
        """POST /orders with a key of its own; returns the order's id where it was acknowledged.

        Args:
            late_seconds: how long ago this should have been done; counted into the latency.
        """
        self._count += 1
        key = orders.key(self._run_id, self._user, self._count)
        head, body, made = self._variants[(self._offset + self._count) % ORDER_VARIANTS]
        request = b"%b%b%b" % (head, key.encode(), body)
        return self._send(
            "create",
            "POST",
            "/orders",
            request,
            lambda answer: answers.acknowledgement(answer, made),
            key=key,
            late_seconds=late_seconds,
        )

    def cancel_order(self, order_id: str) -> bool:
        """POST /orders/{id}/cancel; whether it was acknowledged."""
        head = self.http.head("POST", f"/orders/{order_id}/cancel")
        request = head + b"\r\nContent-Length: 0\r\n\r\n"
        acknowledged = self._send(
            "cancel",
            "POST",
            "/orders/{id}/cancel",
            request,
            lambda answer: (order_id, answers.cancellation(answer, order_id)),
            order_id=order_id,
        )
        return acknowledged is not None

    def read(self, path: str, route: str, wrong: Callable[[dict[str, Any]], str]) -> bool:
        """GET *path*; whether it was answered with what was asked for.

        Args:
            route: its name in the statistics.
            wrong: how a document is not what was asked for; empty: it is.
        """
        request = self.http.head("GET", path) + b"\r\n\r\n"
        return (
            self._send("read", "GET", route, request, lambda answer: ("", wrong(answer.document())))
            is not None
        )

    def _send(
        self,
        operation: Operation,
        method: str,
        route: str,
        request: bytes,
        read: Callable[[Answer], tuple[str, str]],
        *,
        key: str = "",
        order_id: str = "",
        late_seconds: float = 0.0,
    ) -> str | None:
        """Send *request*, once; hand its sample to the sinks and its figures to Locust.

        Args:
            read: of an answer that acknowledges: the order's id, and how it is not what was asked for.

        Returns:
            The id of the order that was acknowledged, "" of what was read; None of anything else.
        """
        outcome: Outcome = "unknown"
        error_type = CUT_OFF
        status, replayed, name = 0, False, route
        answer: Answer | None = None
        failure: Exception | None = None
        started_at, start = time.time() - late_seconds, time.perf_counter() - late_seconds
        latency_seconds = 0.0
        try:
            answer = self.http.send(request)
        except TransportError as exc:
            latency_seconds = time.perf_counter() - start
            error_type, failure = exc.error_type, exc
            if isinstance(exc, NotConnected):
                outcome = "refused"
        else:
            latency_seconds = time.perf_counter() - start
            status = answer.status
            if status == answers.ACKNOWLEDGED[operation]:
                replayed = b"idempotency-replayed" in answer.headers
                order_id, how = _understood(answer, read)
                outcome, error_type = ("unknown", WRONG_ANSWER) if how else ("acknowledged", "")
                failure = answers.UnexpectedAnswerError(f"{status} {how}") if how else None
            else:
                outcome, error_type = answers.refusal(answer)
                if (operation, status, error_type) in answers.EXPECTED_REFUSALS:
                    name = (
                        f"{route} [{error_type}]"  # apart: a fast refusal would flatter the orders' latency
                    )
                else:
                    failure = answers.unexpected(status, error_type)
        finally:  # also where the user is stopped while it waits: Locust counts no request then, the ledger must
            sample = Sample(
                operation,
                route,
                key,
                order_id,
                status,
                outcome,
                error_type,
                started_at,
                latency_seconds or time.perf_counter() - start,
                late_seconds,
                replayed,
            )
            for sink in order_sinks:
                sink(sample)
        self.report(method, name, started_at, latency_seconds, answer, failure)
        return order_id if outcome == "acknowledged" else None


def _understood(answer: Answer, read: Callable[[Answer], tuple[str, str]]) -> tuple[str, str]:
    try:
        return read(answer)
    except (AttributeError, TypeError):
        return "", "not of the contract's form"
