"""Locust users that place orders: lighter than Locust's own, in the same statistics, and with a ledger.

Each request fires Locust's `request` event, so that its console, web interface, CSV and HTML show what they always
show. What those cannot show, what became of each order by its id, goes to `order_sinks`.
"""

import random
import time
import uuid
from collections import deque
from collections.abc import Callable

from locust.env import Environment

from loadtests.samples import CUT_OFF, Operation, Outcome, Sample
from loadtests.users import answers, session
from loadtests.users.catalogue import ORDER_VARIANTS, order_variants, products_of
from loadtests.users.light_http import Answer, NotConnected, TransportError
from loadtests.users.light_user import DEFAULT_HOST, LightUser

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
            self.product_ids = products_of(host, self.http)
        except (TransportError, answers.UnexpectedAnswerError) as exc:
            raise self.could_not_run(f"no products from {host}: {exc}") from None
        head = self.http.head("POST", "/orders", {"Content-Type": "application/json"})
        self.customer_id = session.customer_id(environment)
        self._variants = order_variants(host, self.customer_id, head)
        self._key_prefix = f"{session.run_id(environment)}-{uuid.uuid4().hex[:16]}-"
        self._count = 0
        self._offset = random.randrange(ORDER_VARIANTS)  # noqa: S311 - not secret
        self.own_orders: deque[str] = deque(maxlen=_REMEMBERED_ORDERS)

    def place_order(self, *, late_seconds: float = 0.0) -> str | None:
        """POST /orders with a key of its own; returns the order's id where it was acknowledged.

        Args:
            late_seconds: how long ago this should have been done; counted into the latency.
        """
        self._count += 1
        key = f"{self._key_prefix}{self._count}"
        head, body = self._variants[(self._offset + self._count) % ORDER_VARIANTS]
        return self._change(
            "create", "/orders", b"%b%b%b" % (head, key.encode(), body), key=key, late_seconds=late_seconds
        )

    def cancel_order(self, order_id: str) -> bool:
        """POST /orders/{id}/cancel; whether it was acknowledged."""
        head = self.http.head("POST", f"/orders/{order_id}/cancel")
        request = head + b"\r\nContent-Length: 0\r\n\r\n"
        return self._change("cancel", "/orders/{id}/cancel", request, order_id=order_id) is not None

    def _change(
        self,
        operation: Operation,
        name: str,
        request: bytes,
        *,
        key: str = "",
        order_id: str = "",
        late_seconds: float = 0.0,
    ) -> str | None:
        """Send *request*, once; hand its sample to the sinks and its figures to Locust."""
        outcome: Outcome = "unknown"
        error_type = CUT_OFF
        status, replayed = 0, False
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
                outcome, error_type = "acknowledged", ""
                order_id = order_id or answers.order_id(answer)
                replayed = b"idempotency-replayed" in answer.headers
                failure = None if order_id else answers.UnexpectedAnswerError(f"{status} without an order id")
            else:
                outcome, error_type = answers.refusal(answer)
                if (operation, status, error_type) in answers.EXPECTED_REFUSALS:
                    name = f"{name} [{error_type}]"  # apart: a fast refusal would flatter the orders' latency
                else:
                    failure = answers.unexpected(status, error_type)
        finally:  # also where the user is stopped while it waits: Locust counts no request then, the ledger must
            sample = Sample(
                operation,
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
        self.report("POST", name, started_at, latency_seconds, answer, failure)
        return order_id if outcome == "acknowledged" and order_id else None
