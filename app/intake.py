"""Where orders come in: admitted, placed, answered and booked, one at a time or a hundred in one request.

These two endpoints are plain ASGI: of all requests they alone come by the thousand, and the framework's generic way
from body to model and back would cost more than the order itself. `routes.py` documents them and names them at their
routes; `short_way.py` says how they are reached.
"""

import time
from collections.abc import Sequence

import structlog
from starlette.types import Receive, Scope, Send

from app.admission import Admission
from app.auth import KeyRing
from app.domain import IncomingOrder, PlacedOrder
from app.errors import InternalError, Overloaded, ServiceError, Unavailable, Validation
from app.metrics import (
    ORDER_OUTCOMES,
    ORDER_PROCESSING_SECONDS,
    ORDER_STAGE_SECONDS,
    ORDER_STAGES,
    ORDERS,
    REQUESTS_SHED,
    SHED_REASONS,
)
from app.parsing import ClientGone, Headers, check_query, parse_batch, parse_order, read_body
from app.problems import send_problem
from app.schemas import MAX_BATCH_BYTES, MAX_ORDER_BYTES, NewBatchOrder, NewOrder, batch_json, order_json
from app.service import OrderService

_log = structlog.get_logger("app.intake")

# Children are looked up once: labels() costs three times what inc() does.
_ORDERS = {
    (status, kind): ORDERS.labels(status, kind) for status, kinds in ORDER_OUTCOMES.items() for kind in kinds
}
_STAGES = {stage: ORDER_STAGE_SECONDS.labels(stage) for stage in ORDER_STAGES}
_SHED = {reason: REQUESTS_SHED.labels(reason) for reason in SHED_REASONS}

_JSON = (b"content-type", b"application/json")
_REPLAYED = (b"idempotency-replayed", b"true")


class OrderIntake:
    """The ASGI applications behind `POST /orders` and `POST /orders/batch`."""

    def __init__(
        self, orders: OrderService, admission: Admission, keys: KeyRing, *, request_deadline_seconds: float
    ) -> None:
        self._orders = orders
        self._admission = admission
        self._keys = keys
        self._deadline_seconds = request_deadline_seconds

    async def create_order(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one order and answer it."""
        arrived_at = time.monotonic()
        incoming: IncomingOrder | None = None
        result: PlacedOrder | ServiceError
        try:
            headers = Headers.of(scope)
            principal = self._keys.principal(headers.authorization)
            check_query(scope["query_string"])
            body = await read_body(headers, receive, MAX_ORDER_BYTES)
            self._admission.enter(principal)
            try:
                request = parse_order(body)
                del body  # or it would stay for as long as its order is in flight
                incoming = self._incoming(request, principal, headers.key(), arrived_at)
                result = await self._orders.place(incoming)
            finally:
                self._admission.leave(principal)
        except ServiceError as refusal:
            # These lead back to this frame: a cycle, which would keep the body in memory until the collector's
            # next full run.
            refusal.__traceback__ = refusal.__context__ = None
            result = refusal
        except ClientGone:
            _count_unread(scope)
            return
        except Exception:  # noqa: BLE001 - logged; the order must be answered and booked
            _log.exception("create_order_failed")
            result = InternalError(outcome="unknown")
        _note(scope, result)
        if isinstance(result, ServiceError):
            await send_problem(result, send)
        else:
            location = (b"location", b"/orders/" + result.order.id.encode())
            more_headers = [location, _REPLAYED] if result.replayed else [location]
            await _send_json(201, order_json(result.order), send, more_headers)
        _count(result, incoming)

    async def create_batch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take up to 100 orders and answer each."""
        arrived_at = time.monotonic()
        requests: Sequence[NewBatchOrder | ServiceError] = ()
        try:
            headers = Headers.of(scope)
            principal = self._keys.principal(headers.authorization)
            check_query(scope["query_string"])
            if headers.idempotency_keys:
                raise Validation("a batch carries its keys in its orders, not in a header")
            body = await read_body(headers, receive, MAX_BATCH_BYTES)
            self._admission.enter(principal)
            admitted = 1
            try:
                requests = parse_batch(body)
                del body
                self._admission.enter(principal, len(requests) - 1)
                admitted = len(requests)
                taken: list[IncomingOrder | ServiceError] = [
                    request
                    if isinstance(request, ServiceError)
                    else self._incoming(request, principal, request.idempotency_key, arrived_at)
                    for request in requests
                ]
                results = await self._orders.place_all(taken)
            finally:
                self._admission.leave(principal, admitted)
        except ServiceError as refusal:
            refusal.__traceback__ = refusal.__context__ = None
            for request in requests or [refusal]:
                _count(request if isinstance(request, ServiceError) else refusal, None)
            _note(scope, refusal)
            await send_problem(refusal, send)
            return
        except ClientGone:
            _count_unread(scope)
            return
        answer = batch_json(
            [result if isinstance(result, PlacedOrder) else result.problem() for result in results]
        )
        scope["log"]["orders"] = len(results)
        await _send_json(200, answer, send)
        for result, incoming in zip(results, taken, strict=True):
            _count(result, incoming if isinstance(incoming, IncomingOrder) else None)

    def _incoming(
        self, request: NewOrder, principal: str, key: str | None, arrived_at: float
    ) -> IncomingOrder:
        return IncomingOrder(
            principal=principal,
            customer_id=request.customer_id,
            items=[(item.product_id, item.quantity) for item in request.items],
            idempotency_key=key,
            arrived_at=arrived_at,
            parsed_at=time.monotonic(),
            deadline=arrived_at + self._deadline_seconds,
        )


async def _send_json(
    status: int, body: bytes, send: Send, more_headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    headers = [_JSON, (b"content-length", b"%d" % len(body)), *more_headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _note(scope: Scope, result: PlacedOrder | ServiceError) -> None:
    """Leave for the access log what became of the order."""
    if isinstance(result, PlacedOrder):
        scope["log"]["order_id"] = result.order.id
        scope["log"]["outcome"] = "replayed" if result.replayed else "stored"
    else:
        scope["log"]["error_type"] = result.error_type
        scope["log"]["outcome"] = result.outcome


def _count_unread(scope: Scope) -> None:
    """Book an order whose body the protocol refused before it was here."""
    refusal: ServiceError | None = scope.get("refusal")
    if isinstance(refusal, Validation | Overloaded):
        _count(refusal, None)


def _count(result: PlacedOrder | ServiceError, incoming: IncomingOrder | None) -> None:
    """Book one order; *incoming* where it was parsed. One of no valid form was not taken into processing."""
    if isinstance(result, PlacedOrder):
        _ORDERS["replayed" if result.replayed else "success", ""].inc()
    else:
        _ORDERS["error" if isinstance(result, Unavailable) else "rejected", result.error_type].inc()
        if isinstance(result, Overloaded):
            _SHED[result.reason].inc()
    if incoming is None or isinstance(result, Validation):
        return
    answered_at = time.monotonic()
    ORDER_PROCESSING_SECONDS.observe(answered_at - incoming.arrived_at)
    _STAGES["parse"].observe(incoming.parsed_at - incoming.arrived_at)
    if incoming.priced_at:
        _STAGES["price"].observe(incoming.priced_at - incoming.parsed_at)
    if incoming.started_at:
        _STAGES["queue"].observe(incoming.started_at - incoming.priced_at)
    if incoming.stored_at:
        _STAGES["store"].observe(incoming.stored_at - incoming.started_at)
        _STAGES["respond"].observe(answered_at - incoming.stored_at)
