"""The API: HTTP in, one call of the service, HTTP out.

The two routes that take orders name the code that answers them (`answered_by`), and are reached by the short way
(`short_way.py`); all others are ordinary FastAPI.
"""

import base64
import binascii
import math
import uuid
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Path, Query, Request, Response, Security
from fastapi.security import HTTPBearer

from app import schemas
from app.cache import Cached
from app.checked_route import AdmittedRoute, principal_of
from app.domain import OrderQuery, OrderStatus
from app.errors import Validation
from app.intake import OrderIntake
from app.problems import problems
from app.schemas import CustomerId, Identifier, KeyHeader, order_document, order_json
from app.short_way import ShortRoute, answered_by
from app.state import state_of

_bearer = HTTPBearer(auto_error=False, description="An API key, where the service has any.")


Limit = Annotated[int, Query(ge=1, le=100)]
Cursor = Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")]

short = APIRouter(route_class=ShortRoute, tags=["orders"])
api = APIRouter(route_class=AdmittedRoute)
_SECURED: dict[str, Any] = {"security": [{_bearer.scheme_name: []}]}


@short.post(
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
        **problems(401, 409, 413, 503, 504),
    },
)
@answered_by(OrderIntake.create_order)
def create_order(
    order: schemas.NewOrder,
    idempotency_key: Annotated[
        KeyHeader | None,
        Header(
            description="Makes the request safe to repeat: one key, one order. 1 to 255 printable ASCII characters, "
            'no blank at an end; `"abc"`, quoted as an RFC 9651 string, is the key `abc`.'
        ),
    ] = None,
) -> None:
    """Take an order: its lines are priced from the catalogue and its stock is taken, all in one commit.

    With an `Idempotency-Key` the request can be repeated after any failure: the order is stored once, and every
    repeat gets the first answer again.
    """


@short.post(
    "/orders/batch",
    response_model=schemas.BatchResult,
    dependencies=[Security(_bearer)],
    responses=problems(401, 413, 503),
)
@answered_by(OrderIntake.create_batch)
def create_batch(batch: schemas.NewBatch) -> None:
    """Take up to 100 orders; each is stored or refused alone, and answered in its place."""


@api.get(
    "/orders/{order_id:uuid}",  # or it would answer for /orders/batch, too
    tags=["orders"],
    response_model=schemas.Order,
    responses=problems(401, 404, 503, 504),
    openapi_extra=_SECURED,
)
async def get_order(request: Request, order_id: uuid.UUID) -> Response:
    """Read one of your orders."""
    orders = state_of(request)["orders"]
    return _json(order_json(await orders.order(principal_of(request), str(order_id))))


@api.get(
    "/orders",
    tags=["orders"],
    response_model=schemas.OrderPage,
    responses=problems(401, 503, 504),
    openapi_extra=_SECURED,
)
async def list_orders(
    request: Request,
    customer_id: Annotated[CustomerId | None, Query()] = None,
    status: OrderStatus | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """List your orders, newest first."""
    orders = state_of(request)["orders"]
    before = _decode_order_cursor(cursor)
    found = await orders.orders(OrderQuery(principal_of(request), customer_id, status, before, limit))
    last = _encode_cursor(found[-1].id) if len(found) == limit else None
    return _json(orjson.dumps({"items": [order_document(order) for order in found], "next_cursor": last}))


@api.post(
    "/orders/{order_id:uuid}/cancel",
    tags=["orders"],
    response_model=schemas.Order,
    responses=problems(401, 404, 409, 503, 504),
    openapi_extra=_SECURED,
)
async def cancel_order(request: Request, order_id: uuid.UUID) -> Response:
    """Cancel one of your orders and give its stock back; repeating it changes nothing."""
    orders = state_of(request)["orders"]
    return _json(order_json(await orders.cancel(principal_of(request), str(order_id))))


@api.get(
    "/products/{product_id:segment}",  # of targets.py: any id has a URL
    tags=["products"],
    response_model=schemas.Product,
    responses=problems(401, 404, 503, 504),
    openapi_extra=_SECURED,
)
async def get_product(request: Request, product_id: Annotated[Identifier, Path()]) -> Response:
    """Read a product, from the cache; while the database is away what was read before is served, marked stale."""
    cached = await state_of(request)["catalogue"].product(product_id)
    return _json(orjson.dumps(cached.value._asdict()), _cache_status("products", cached))


@api.get(
    "/products",
    tags=["products"],
    response_model=schemas.ProductPage,
    responses=problems(401, 503, 504),
    openapi_extra=_SECURED,
)
async def list_products(request: Request, limit: Limit = 50, cursor: Cursor = None) -> Response:
    """List the products by id, from the cache."""
    cached = await state_of(request)["catalogue"].page(after=_decode_cursor(cursor), limit=limit)
    page = cached.value
    last = _encode_cursor(page[-1].id) if len(page) == limit else None
    body = orjson.dumps({"items": [product._asdict() for product in page], "next_cursor": last})
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
