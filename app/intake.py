"""Where orders come in: raw bytes to a parsed order, and what became of it to an answer and to the books.

These two endpoints are plain ASGI: of all requests they alone come by the thousand, and the framework's generic way
from body to model and back would cost more than the order itself. `routes.py` documents them.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, TypeGuard, TypeVar

import orjson
import structlog
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.types import Message, Receive, Scope, Send

from app.admission import Admission
from app.auth import KeyRing
from app.domain import PendingOrder, PlacedOrder
from app.errors import InternalError, Overloaded, ServiceError, TooLarge, Unavailable, Validation
from app.metrics import (
    ORDER_OUTCOMES,
    ORDER_PROCESSING_SECONDS,
    ORDER_STAGE_SECONDS,
    ORDER_STAGES,
    ORDERS,
    REQUESTS_SHED,
    SHED_REASONS,
)
from app.problems import problem_headers
from app.schemas import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ORDERS,
    MAX_KEY_LENGTH,
    MAX_ORDER_BYTES,
    NEW_BATCH,
    NEW_BATCH_ORDER,
    NEW_ORDER,
    NewBatchOrder,
    NewOrder,
    batch_json,
    order_json,
)
from app.service import OrderService

_T = TypeVar("_T")
_log = structlog.get_logger("app.intake")

# Children are looked up once: labels() costs three times what inc() does.
_ORDERS = {
    (status, kind): ORDERS.labels(status, kind) for status, kinds in ORDER_OUTCOMES.items() for kind in kinds
}
_STAGES = {stage: ORDER_STAGE_SECONDS.labels(stage) for stage in ORDER_STAGES}
_SHED = {reason: REQUESTS_SHED.labels(reason) for reason in SHED_REASONS}

_JSON = (b"content-type", b"application/json")
_REPLAYED = (b"idempotency-replayed", b"true")
# Of one order, or of a batch as a whole: listing the 100,000 that fit into one would hold up the loop for a second.
_MAX_DEFECTS = 50


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


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
        admitted = 0
        pending: PendingOrder | None = None
        result: PlacedOrder | ServiceError
        try:
            try:
                headers = _Headers.of(scope)
                principal = self._keys.principal(headers.authorization)
                self._admission.enter()
                admitted = 1
                request = _parse(NEW_ORDER, await _body(headers, receive, MAX_ORDER_BYTES))
                pending = self._pending(request, principal, headers.key(), arrived_at)
                result = await self._orders.place(pending)
                body = order_json(result.order)
                answer_headers = [
                    _JSON,
                    (b"content-length", b"%d" % len(body)),
                    (b"location", b"/orders/" + result.order.id.encode()),
                ]
                if result.replayed:
                    answer_headers.append(_REPLAYED)
                status = 201
            except ServiceError as refusal:
                # These lead back to this frame: a cycle, which would keep the body in memory until the collector's
                # next full run.
                refusal.__traceback__ = refusal.__context__ = None
                result = refusal
            except ClientGone:
                return
            except Exception:  # noqa: BLE001 - logged; the order must be answered and booked
                _log.exception("create_order_failed")
                result = InternalError(outcome="unknown")
            if isinstance(result, ServiceError):
                status, body, answer_headers = (
                    result.http_status,
                    orjson.dumps(result.problem()),
                    problem_headers(result),
                )
                answer_headers.append((b"content-length", b"%d" % len(body)))
            _note(scope, result)
            await send({"type": "http.response.start", "status": status, "headers": answer_headers})
            await send({"type": "http.response.body", "body": body})
            _count(result, pending)
        finally:
            self._admission.leave(admitted)

    async def create_batch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take up to 100 orders and answer each."""
        arrived_at = time.monotonic()
        admitted = 0
        try:
            try:
                headers = _Headers.of(scope)
                principal = self._keys.principal(headers.authorization)
                self._admission.enter()
                admitted = 1
                if headers.idempotency_keys:
                    raise Validation("a batch carries its keys in its orders, not in a header")
                requests = _parse_batch(await _body(headers, receive, MAX_BATCH_BYTES))
            except ServiceError as refusal:
                _count(refusal, None)
                _note(scope, refusal)
                await _refuse(refusal, send)
                return
            except ClientGone:
                return
            try:
                self._admission.enter(len(requests) - 1)
                admitted = len(requests)
            except Overloaded as refusal:
                for request in requests:
                    _count(request if isinstance(request, ServiceError) else refusal, None)
                _note(scope, refusal)
                await _refuse(refusal, send)
                return
            taken: list[PendingOrder | ServiceError] = [
                request
                if isinstance(request, ServiceError)
                else self._pending(request, principal, request.idempotency_key, arrived_at)
                for request in requests
            ]
            results = await self._orders.place_all(taken)
            body = batch_json(
                [result if isinstance(result, PlacedOrder) else result.problem() for result in results]
            )
            scope["log"]["orders"] = len(results)
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [_JSON, (b"content-length", b"%d" % len(body))],
                }
            )
            await send({"type": "http.response.body", "body": body})
            for result, pending in zip(results, taken, strict=True):
                _count(result, pending if isinstance(pending, PendingOrder) else None)
        finally:
            self._admission.leave(admitted)

    def _pending(self, request: NewOrder, principal: str, key: str | None, arrived_at: float) -> PendingOrder:
        return PendingOrder(
            principal=principal,
            customer_id=request.customer_id,
            items=[(item.product_id, item.quantity) for item in request.items],
            idempotency_key=key,
            arrived_at=arrived_at,
            parsed_at=time.monotonic(),
            deadline=arrived_at + self._deadline_seconds,
        )


class _Headers(NamedTuple):
    authorization: str | None
    content_type: bytes
    content_length: int
    idempotency_keys: list[bytes]

    @classmethod
    def of(cls, scope: Scope) -> "_Headers":
        authorization, content_type, content_length, keys = None, b"", 0, []
        for name, value in scope["headers"]:
            if name == b"content-type":
                content_type = value
            elif name == b"content-length":
                content_length = int(value)  # the parser has let digits through, and nothing else
            elif name == b"idempotency-key":
                keys.append(value)
            elif name == b"authorization":
                authorization = value.decode("latin-1")
        return cls(authorization, content_type, content_length, keys)

    def key(self) -> str | None:
        """The idempotency key, if one was sent."""
        if not self.idempotency_keys:
            return None
        key = self.idempotency_keys[0].decode("latin-1").strip()
        if len(self.idempotency_keys) > 1 or not 1 <= len(key) <= MAX_KEY_LENGTH:
            raise Validation(f"Idempotency-Key: one value of 1 to {MAX_KEY_LENGTH} characters")
        return key


async def _body(headers: _Headers, receive: Receive, limit: int) -> bytes:
    """The request's body; refused as soon as it is known to be over *limit* bytes, or not to be JSON."""
    media_type = headers.content_type.partition(b";")[0].strip().lower()
    if media_type != b"application/json":
        raise Validation("Content-Type: must be application/json")
    if headers.content_length > limit:
        raise TooLarge(f"the body may be {limit} bytes long")
    message: Message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body") or message["type"] == "http.disconnect":
        chunks, size = [body], len(body)
        while message["type"] != "http.disconnect" and message.get("more_body") and size <= limit:
            message = await receive()
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
        if message["type"] == "http.disconnect":
            raise ClientGone
        body = b"".join(chunks)
    if len(body) > limit:
        raise TooLarge(f"the body may be {limit} bytes long")
    return body


def _parse(adapter: TypeAdapter[_T], body: bytes) -> _T:
    try:
        return adapter.validate_json(body)
    except ValidationError as exc:
        raise _validation(exc) from None


def _parse_batch(body: bytes) -> Sequence[NewBatchOrder | ServiceError]:
    """The orders of a batch, each parsed alone where not all are well-formed."""
    try:
        return NEW_BATCH.validate_json(body).orders
    except ValidationError as exc:
        if not _is_json(exc) or not _is_batch(document := from_json(body)):
            raise _validation(exc) from None
        return [_parse_item(item) for item in document["orders"]]


def _is_batch(document: object) -> TypeGuard[dict[str, list[object]]]:
    """Whether it holds a list of orders that can be answered one by one."""
    return (
        isinstance(document, dict)
        and set(document) == {"orders"}
        and isinstance(document["orders"], list)
        and 1 <= len(document["orders"]) <= MAX_BATCH_ORDERS
    )


def _parse_item(item: object) -> NewBatchOrder | ServiceError:
    try:
        return NEW_BATCH_ORDER.validate_python(item)
    except ValidationError as exc:
        return _validation(exc)


def _validation(exc: ValidationError) -> Validation:
    if exc.error_count() > _MAX_DEFECTS:
        return Validation(f"{exc.error_count()} defects, too many to list")
    errors = [
        dict(error) for error in exc.errors(include_url=False, include_input=False, include_context=False)
    ]
    if not _is_json(exc):
        return Validation("the body is not JSON", status=400, errors=errors)
    return Validation(
        "; ".join(f"{_path(error['loc'])}: {error['msg']}" for error in errors[:3]), errors=errors
    )


def _is_json(exc: ValidationError) -> bool:
    return (
        exc.error_count() > 1
        or exc.errors(include_url=False, include_input=False)[0]["type"] != "json_invalid"
    )


def _path(loc: object) -> str:
    return ".".join(map(str, loc)) if isinstance(loc, Iterable) and loc else "body"


async def _refuse(refusal: ServiceError, send: Callable[[Message], Awaitable[None]]) -> None:
    body = orjson.dumps(refusal.problem())
    headers = [*problem_headers(refusal), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": refusal.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _note(scope: Scope, result: PlacedOrder | ServiceError) -> None:
    """Leave for the access log what became of the order."""
    if isinstance(result, PlacedOrder):
        scope["log"]["order_id"] = result.order.id
        scope["log"]["outcome"] = "replayed" if result.replayed else "stored"
    else:
        scope["log"]["error_type"] = result.error_type
        scope["log"]["outcome"] = result.outcome


def _count(result: PlacedOrder | ServiceError, pending: PendingOrder | None) -> None:
    """Book one order; *pending* where it was taken into processing."""
    if isinstance(result, PlacedOrder):
        _ORDERS["replayed" if result.replayed else "success", ""].inc()
    else:
        _ORDERS["error" if isinstance(result, Unavailable) else "rejected", result.error_type].inc()
        if isinstance(result, Overloaded):
            _SHED[result.reason].inc()
    if pending is None:
        return
    answered_at = time.monotonic()
    ORDER_PROCESSING_SECONDS.observe(answered_at - pending.arrived_at)
    _STAGES["parse"].observe(pending.parsed_at - pending.arrived_at)
    if pending.priced_at:
        _STAGES["price"].observe(pending.priced_at - pending.parsed_at)
    if pending.started_at:
        _STAGES["queue"].observe(pending.started_at - pending.priced_at)
        _STAGES["store"].observe(pending.stored_at - pending.started_at)
        _STAGES["respond"].observe(answered_at - pending.stored_at)
