"""The target's catalogue, and orders for what is in it, made up beforehand; both once for a target and test."""

import functools
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import orjson
from locust import events

from loadtests.users.answers import UnexpectedAnswerError, error_type_of, unexpected
from loadtests.users.light_http import LightHttp
from loadtests.users.orders import MAX_PRODUCTS, PAGE_SIZE, MadeOrder, Product, made_orders, products_in

_OK = 200

_products: dict[str, list[Product]] = {}


@events.test_start.add_listener
def forget_products(**_: Any) -> None:
    """Read the catalogue again: the next test may have another target, or the target another catalogue."""
    _products.clear()
    order_variants.cache_clear()


def products_of(host: str, http: LightHttp) -> list[Product]:
    """What *host* sells, read over *http* where they are not known yet; raises as `read_products`."""
    if host not in _products:
        _products[host] = read_products(http)
    return _products[host]


def read_products(http: LightHttp) -> list[Product]:
    """The first 10,000 products of what the target sells, page by page.

    Raises:
        TransportError: no answer.
        UnexpectedAnswerError: not the contract's, or there is nothing to order.
    """
    products: list[Product] = []
    cursor: object = ""
    while cursor is not None and len(products) < MAX_PRODUCTS:
        query = f"?limit={PAGE_SIZE}" + (f"&cursor={quote(str(cursor), safe='')}" if cursor else "")
        answer = http.request("GET", f"/products{query}")
        page = answer.document()
        if answer.status != _OK:
            raise unexpected(answer.status, error_type_of(answer.status, page))
        try:
            products += products_in(page)
        except (KeyError, TypeError, ValueError):
            raise UnexpectedAnswerError("no page of products with their prices") from None
        cursor = page.get("next_cursor")
    if not products:
        raise UnexpectedAnswerError("the catalogue is empty")
    return products


@functools.cache
def order_variants(host: str, customer_id: str, head: bytes) -> Sequence[tuple[bytes, bytes, MadeOrder]]:
    """The run's orders as they go over the wire: what is before and after the idempotency key; and the order."""
    variants = []
    for made in made_orders(customer_id, _products[host]):
        body = orjson.dumps(made.document)
        before = b"%b\r\nContent-Length: %d\r\nIdempotency-Key: " % (head, len(body))
        variants.append((before, b"\r\n\r\n" + body, made))
    return variants
