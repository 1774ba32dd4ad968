"""Locust users that place orders: lighter than Locust's own, in the same statistics, and with a ledger.

Each request fires Locust's `request` event, so that its console, web interface, CSV and HTML show what they always
show. What those cannot show, what became of each order by its id, goes to `order_sinks`.
"""

import functools
import os
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import orjson
from locust import User, events
from locust.env import Environment
from locust.exception import StopTest
from locust.user.task import LOCUST_STATE_STOPPING, LOCUST_STATE_WAITING

from loadtests.users import session
from loadtests.users.light_http import Answer, LightHttp, NotConnected, TransportError

DEFAULT_HOST = "http://localhost:8000"

_OK = 200
_BAD_REQUEST = 400
_SERVER_ERROR = 500
_MAX_PRODUCTS = 10_000
_PAGE_SIZE = 100
_ORDER_VARIANTS = 1024
_REMEMBERED_ORDERS = 20
_COULD_NOT_RUN = 2  # the exit code

Operation = Literal["create", "cancel"]
Outcome = Literal["acknowledged", "refused", "unknown"]

_ACKNOWLEDGED: dict[Operation, int] = {"create": 201, "cancel": 200}
# Refusals that are the shop's right, not a failure of the service: (operation, status, error_type).
EXPECTED_REFUSALS = frozenset({("create", 409, "out_of_stock"), ("cancel", 409, "invalid_state")})


class OrderRecord(NamedTuple):
    """What became of one request that changes orders."""

    operation: Operation
    key: str  # the idempotency key; empty for a cancellation
    order_id: str  # empty where it is not known
    status: int  # 0: no answer
    # acknowledged: stored. refused: not executed, and never will be. unknown: it may have been executed.
    outcome: Outcome
    error_type: (
        str  # the service's, `http_502` where it gave none, or one of light_http's; `cut_off` at the end
    )
    started_at: float  # seconds since the epoch; an open model's intended start
    latency_seconds: float  # from the start to the whole answer, or to its loss
    late_seconds: float  # an open model's actual start, after the intended one; in the latency
    replayed: bool  # the answer says that an earlier request had stored it, though the key was new


# Called with every record, in the order in which they come, on the event loop: a sink must not wait.
order_sinks: list[Callable[[OrderRecord], object]] = []


class UnexpectedAnswerError(Exception):
    """The service answered, but not what the contract promises for this request."""


class LightUser(User):
    """A Locust user over one `LightHttp` connection.

    LOADTEST_API_KEY, where set, goes with every request as `Authorization: Bearer`.
    """

    abstract = True
    host: str | None = DEFAULT_HOST
    timeout_seconds = 10.0  # twice the service's own deadline
    connect_timeout_seconds = 5.0

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        api_key = os.environ.get("LOADTEST_API_KEY")
        try:
            self.http = LightHttp(
                self.host or DEFAULT_HOST,
                headers={"Accept": "application/json", "User-Agent": "loadtests"}
                | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
                connect_timeout_seconds=self.connect_timeout_seconds,
                timeout_seconds=self.timeout_seconds,
            )
        except ValueError as exc:
            raise self._could_not_run(str(exc)) from None
        self._fire = environment.events.request.fire

    def stop(self, force: bool = False) -> bool:  # noqa: FBT001, FBT002 - Locust's signature
        """Stop as Locust does, but surely without another request.

        Locust kills a waiting user by way of the event loop; where the wait ends just then, the user has sent a
        request before the kill arrives, and its answer is lost.
        """
        if self._state == LOCUST_STATE_WAITING:
            self._state = LOCUST_STATE_STOPPING
            force = True
        return bool(super().stop(force))

    def on_stop(self) -> None:
        """Hang up."""
        self.http.close()

    def call(self, method: str, path: str, name: str, *, expected: Sequence[int] = (200,)) -> Answer | None:
        """One request in the statistics; None where there was no answer or not an *expected* status."""
        started_at, start = time.time(), time.perf_counter()
        answer: Answer | None = None
        failure: Exception | None = None
        try:
            answer = self.http.request(method, path)
        except TransportError as exc:
            failure = exc
        latency_seconds = time.perf_counter() - start
        if answer is not None and answer.status not in expected:
            failure = _unexpected(answer.status, _error_type(answer.status, answer.document()))
        self.report(method, name, started_at, latency_seconds, answer, failure)
        return answer if failure is None else None

    def _could_not_run(self, why: str) -> StopTest:
        """Locust's way to end a test from a constructor; left alone it would exit with 0, and a master not hear it."""
        stop = StopTest(why)
        self.environment.process_exit_code = _COULD_NOT_RUN
        self.environment.events.user_error.fire(user_instance=self, exception=stop, tb=None)
        return stop

    def report(
        self,
        method: str,
        name: str,
        started_at: float,
        latency_seconds: float,
        answer: Answer | None,
        failure: Exception | None,
    ) -> None:
        """Fire Locust's `request` event, with all that Locust's own clients put into it."""
        self._fire(
            request_type=method,
            name=name,
            response_time=latency_seconds * 1000,
            response_length=0 if answer is None else len(answer.body),
            response=answer,
            context=self.context(),
            exception=failure,
            start_time=started_at,
            url=name,
        )


class OrderUser(LightUser):
    """A user who places orders of one to three products that the target really sells."""

    abstract = True

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        host = self.host or DEFAULT_HOST
        if host not in _products:
            try:
                _products[host] = read_products(self.http)
            except (TransportError, UnexpectedAnswerError) as exc:
                raise self._could_not_run(f"no products from {host}: {exc}") from None
        self.product_ids = _products[host]
        head = self.http.head("POST", "/orders", {"Content-Type": "application/json"})
        self.customer_id = session.customer_id(environment)
        self._variants = _order_variants(host, self.customer_id, head)
        self._key_prefix = f"{session.run_id(environment)}-{uuid.uuid4().hex[:16]}-"
        self._count = 0
        self._offset = random.randrange(_ORDER_VARIANTS)  # noqa: S311 - not secret
        self.own_orders: deque[str] = deque(maxlen=_REMEMBERED_ORDERS)

    def place_order(self, *, late_seconds: float = 0.0) -> str | None:
        """POST /orders with a key of its own; returns the order's id where it was acknowledged.

        Args:
            late_seconds: how long ago this should have been done; counted into the latency.
        """
        self._count += 1
        key = f"{self._key_prefix}{self._count}"
        head, body = self._variants[(self._offset + self._count) % _ORDER_VARIANTS]
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
        """Send *request*, once; hand its record to the sinks and its figures to Locust."""
        outcome: Outcome = "unknown"
        error_type = "cut_off"
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
            if status == _ACKNOWLEDGED[operation]:
                outcome, error_type = "acknowledged", ""
                order_id = order_id or _order_id(answer)
                replayed = b"idempotency-replayed" in answer.headers
                failure = None if order_id else UnexpectedAnswerError(f"{status} without an order id")
            else:
                outcome, error_type = _refusal(answer)
                if (operation, status, error_type) in EXPECTED_REFUSALS:
                    name = f"{name} [{error_type}]"  # apart: a fast refusal would flatter the orders' latency
                else:
                    failure = _unexpected(status, error_type)
        finally:  # also where the user is stopped while it waits: Locust counts no request then, the ledger must
            record = OrderRecord(
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
                sink(record)
        self.report("POST", name, started_at, latency_seconds, answer, failure)
        return order_id if outcome == "acknowledged" and order_id else None


_products: dict[str, list[str]] = {}


@events.test_start.add_listener
def forget_products(**_: Any) -> None:
    """Read the catalogue again: the next test may have another target, or the target another catalogue."""
    _products.clear()
    _order_variants.cache_clear()


def read_products(http: LightHttp) -> list[str]:
    """The ids of what the target sells, the first 10,000 of them, page by page.

    Raises:
        TransportError: no answer.
        UnexpectedAnswerError: not the contract's, or there is nothing to order.
    """
    product_ids: list[str] = []
    cursor: object = ""
    while cursor is not None and len(product_ids) < _MAX_PRODUCTS:
        query = f"?limit={_PAGE_SIZE}" + (f"&cursor={quote(str(cursor), safe='')}" if cursor else "")
        answer = http.request("GET", f"/products{query}")
        page = answer.document()
        items = page.get("items")
        if answer.status != _OK or not isinstance(items, list):
            raise _unexpected(answer.status, _error_type(answer.status, page))
        product_ids += [str(item["id"]) for item in items]
        cursor = page.get("next_cursor")
    if not product_ids:
        raise UnexpectedAnswerError("the catalogue is empty")
    return product_ids


@functools.cache
def _order_variants(host: str, customer_id: str, head: bytes) -> Sequence[tuple[bytes, bytes]]:
    """Orders of one to three lines as they go over the wire: what is before and after the idempotency key."""
    choose = random.Random(customer_id)  # noqa: S311 - repeatable, not secret
    product_ids = _products[host]
    variants = []
    for _ in range(_ORDER_VARIANTS):
        lines = choose.sample(product_ids, min(choose.randint(1, 3), len(product_ids)))
        items = [{"product_id": product_id, "quantity": choose.randint(1, 3)} for product_id in lines]
        body = orjson.dumps({"customer_id": customer_id, "items": items})
        variants.append(
            (b"%b\r\nContent-Length: %d\r\nIdempotency-Key: " % (head, len(body)), b"\r\n\r\n" + body)
        )
    return variants


def _order_id(answer: Answer) -> str:
    """The order's id, from Location or else the body; empty where neither names it."""
    location = answer.headers.get(b"location")
    if location:
        return location.rpartition(b"/")[2].decode("latin-1")
    order_id = answer.document().get("id")
    return order_id if isinstance(order_id, str) else ""


def _refusal(answer: Answer) -> tuple[Outcome, str]:
    """What an answer that is no acknowledgement says of the order: its outcome and error type.

    Only a refusal that says `not_executed`, or that blames the request (4xx), is one: a gateway's 502 or 504 does
    not know what became of the order behind it.
    """
    problem = answer.document()
    said = problem.get("outcome")
    refused = said == "not_executed" or (said != "unknown" and answer.status < _SERVER_ERROR)
    if answer.status < _BAD_REQUEST:  # a success or a redirect that the contract does not know
        refused = False
    return "refused" if refused else "unknown", _error_type(answer.status, problem)


def _error_type(status: int, problem: dict[str, object]) -> str:
    error_type = problem.get("error_type")
    return error_type if isinstance(error_type, str) else f"http_{status}"


def _unexpected(status: int, error_type: str) -> UnexpectedAnswerError:
    return UnexpectedAnswerError(f"{status} {error_type}")
