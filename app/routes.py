"""The API: HTTP in, one call of the service, HTTP out."""

import base64
import binascii
import math
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Receive, Scope, Send

from app import schemas
from app.cache import Cached
from app.domain import OrderStatus
from app.domain import Product as DomainProduct
from app.errors import Validation
from app.intake import OrderIntake
from app.schemas import IdempotencyKey, Identifier, order_document, order_json
from app.service import OrderService

PROBLEM = {"content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of the refusals a route can give."""
    return {
        status: {**PROBLEM, "description": _DESCRIPTIONS[status], "headers": _HEADERS.get(status, {})}
        for status in statuses
    }


_DESCRIPTIONS = {
    400: "The body is not JSON.",
    401: "A valid API key is needed.",
    404: "There is no such resource.",
    409: "The order, or its stock, does not allow it.",
    413: "The body is over its limit.",
    422: "The request is not of the contract's form, or names what does not exist.",
    500: "A defect of the service.",
    503: "The service cannot do this now; Retry-After says when to try again.",
    504: "No answer in time.",
}

_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}},
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True}},
}

_bearer = HTTPBearer(auto_error=False, description="An API key, where the service has any.")


class RawOrderRoute(APIRoute):
    """A route that FastAPI documents from its signature and `OrderIntake` answers from the raw bytes."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Skip the framework's way from body to model; everything around it stays."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        intake: OrderIntake = scope["state"]["intake"]
        application: ASGIApp = getattr(intake, self.name)
        await application(scope, receive, send)


def get_orders(request: Request) -> OrderService:
    """The service of this application."""
    return request.scope["state"]["orders"]  # type: ignore[no-any-return]


def get_principal(request: Request, _: Annotated[Any, Security(_bearer)] = None) -> str:
    """Who is asking."""
    return request.scope["state"]["keys"].principal(request.headers.get("authorization"))  # type: ignore[no-any-return]


async def admitted(request: Request) -> AsyncIterator[None]:
    """A place among the requests in flight."""
    admission = request.scope["state"]["admission"]
    admission.enter()
    try:
        yield
    finally:
        admission.leave()


Orders = Annotated[OrderService, Depends(get_orders)]
Principal = Annotated[str, Depends(get_principal)]
Limit = Annotated[int, Query(ge=1, le=100)]
Cursor = Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")]

raw = APIRouter(route_class=RawOrderRoute, tags=["orders"])
api = APIRouter(dependencies=[Depends(admitted)])


@raw.post(
    "/orders",
    status_code=201,
    response_model=schemas.Order,
    dependencies=[Security(_bearer)],
    responses={
        201: {
            "description": "Stored, or stored before under this key.",
            "headers": {
                "Location": {"schema": {"type": "string"}, "description": "Where the order can be read."},
                "Idempotency-Replayed": {
                    "schema": {"type": "string", "enum": ["true"]},
                    "description": "Present when an earlier request had stored the order.",
                },
            },
        },
        **problems(400, 401, 409, 413, 422, 500, 503, 504),
    },
)
def create_order(
    order: schemas.NewOrder,
    idempotency_key: Annotated[
        IdempotencyKey | None, Header(description="Makes the request safe to repeat: one key, one order.")
    ] = None,
) -> None:
    """Take an order: its lines are priced from the catalogue and its stock is taken, all in one commit.

    With an `Idempotency-Key` the request can be repeated after any failure: the order is stored once, and every
    repeat gets the first answer again.
    """


@raw.post(
    "/orders/batch",
    response_model=schemas.BatchResult,
    dependencies=[Security(_bearer)],
    responses=problems(400, 401, 413, 422, 500, 503),
)
def create_batch(batch: schemas.NewBatch) -> None:
    """Take up to 100 orders; each is stored or refused alone, and answered in its place."""


@api.get(
    "/orders/{order_id:uuid}",  # or it would answer for /orders/batch, too
    tags=["orders"],
    response_model=schemas.Order,
    responses=problems(401, 404, 422, 500, 503, 504),
)
async def get_order(order_id: uuid.UUID, principal: Principal, orders: Orders) -> Response:
    """Read one of your orders."""
    return _json(order_json(await orders.order(principal, str(order_id))))


@api.get(
    "/orders", tags=["orders"], response_model=schemas.OrderPage, responses=problems(401, 422, 500, 503, 504)
)
async def list_orders(
    principal: Principal,
    orders: Orders,
    customer_id: Annotated[Identifier | None, Query()] = None,
    status: OrderStatus | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """List your orders, newest first."""
    before = _decode_order_cursor(cursor)
    found = await orders.orders(principal, customer_id=customer_id, status=status, before=before, limit=limit)
    last = _encode_cursor(found[-1].id) if len(found) == limit else None
    return _json(orjson.dumps({"items": [order_document(order) for order in found], "next_cursor": last}))


@api.post(
    "/orders/{order_id:uuid}/cancel",
    tags=["orders"],
    response_model=schemas.Order,
    responses=problems(401, 404, 409, 422, 500, 503, 504),
)
async def cancel_order(order_id: uuid.UUID, principal: Principal, orders: Orders) -> Response:
    """Cancel one of your orders and give its stock back; repeating it changes nothing."""
    return _json(order_json(await orders.cancel(principal, str(order_id))))


@api.get(
    "/products/{product_id}",
    tags=["products"],
    response_model=schemas.Product,
    responses=problems(401, 404, 422, 500, 503, 504),
)
async def get_product(
    product_id: Annotated[Identifier, Path()], _principal: Principal, orders: Orders
) -> Response:
    """Read a product, from the cache; while the database is away what was read before is served, marked stale."""
    cached = await orders.product(product_id)
    return _json(orjson.dumps(cached.value._asdict()), _cache_status("products", cached))


@api.get(
    "/products",
    tags=["products"],
    response_model=schemas.ProductPage,
    responses=problems(401, 422, 500, 503, 504),
)
async def list_products(
    _principal: Principal, orders: Orders, limit: Limit = 50, cursor: Cursor = None
) -> Response:
    """List the products by id, from the cache."""
    cached = await orders.product_page(after=_decode_cursor(cursor), limit=limit)
    products: Sequence[DomainProduct] = cached.value
    last = _encode_cursor(products[-1].id) if len(products) == limit else None
    body = orjson.dumps({"items": [product._asdict() for product in products], "next_cursor": last})
    return _json(body, _cache_status("product-pages", cached))


def _json(body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, media_type="application/json", headers=headers)


def _cache_status(name: str, cached: Cached[Any]) -> dict[str, str]:
    """RFC 9211: `hit` with the seconds of freshness left (negative: stale), or `fwd=miss`."""
    ttl = math.floor(cached.ttl_seconds)  # not int(): what expired a moment ago is -1
    hit = cached.result in ("hit", "stale")
    return {"Cache-Status": f"{name}; hit; ttl={ttl}" if hit else f"{name}; fwd=miss; stored; ttl={ttl}"}


def _encode_cursor(last_id: str) -> str:
    return base64.urlsafe_b64encode(last_id.encode()).decode().rstrip("=")


def _decode_cursor(cursor: str | None) -> str:
    if cursor is None:
        return ""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise Validation("cursor: not one that this service gave out") from None
    if not text or "\x00" in text:
        raise Validation("cursor: not one that this service gave out")
    return text


def _decode_order_cursor(cursor: str | None) -> str | None:
    if cursor is None:
        return None
    try:
        return str(uuid.UUID(_decode_cursor(cursor)))
    except ValueError:
        raise Validation("cursor: not one that this service gave out") from None
