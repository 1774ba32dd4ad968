"""The target's catalogue, and orders for what is in it, made up beforehand; both once for a target and test."""

import functools
import random
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import orjson
from locust import events

from loadtests.users.answers import UnexpectedAnswerError, error_type_of, unexpected
from loadtests.users.light_http import LightHttp

ORDER_VARIANTS = 1024

_OK = 200
_MAX_PRODUCTS = 10_000
_PAGE_SIZE = 100

_products: dict[str, list[str]] = {}


@events.test_start.add_listener
def forget_products(**_: Any) -> None:
    """Read the catalogue again: the next test may have another target, or the target another catalogue."""
    _products.clear()
    order_variants.cache_clear()


def products_of(host: str, http: LightHttp) -> list[str]:
    """The ids of what *host* sells, read over *http* where they are not known yet; raises as `read_products`."""
    if host not in _products:
        _products[host] = read_products(http)
    return _products[host]


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
            raise unexpected(answer.status, error_type_of(answer.status, page))
        product_ids += [str(item["id"]) for item in items]
        cursor = page.get("next_cursor")
    if not product_ids:
        raise UnexpectedAnswerError("the catalogue is empty")
    return product_ids


@functools.cache
def order_variants(host: str, customer_id: str, head: bytes) -> Sequence[tuple[bytes, bytes]]:
    """Orders of one to three lines as they go over the wire: what is before and after the idempotency key."""
    choose = random.Random(customer_id)  # noqa: S311 - repeatable, not secret
    product_ids = _products[host]
    variants = []
    for _ in range(ORDER_VARIANTS):
        lines = choose.sample(product_ids, min(choose.randint(1, 3), len(product_ids)))
        items = [{"product_id": product_id, "quantity": choose.randint(1, 3)} for product_id in lines]
        body = orjson.dumps({"customer_id": customer_id, "items": items})
        variants.append(
            (b"%b\r\nContent-Length: %d\r\nIdempotency-Key: " % (head, len(body)), b"\r\n\r\n" + body)
        )
    return variants
