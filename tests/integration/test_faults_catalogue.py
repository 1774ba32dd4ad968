"""What is sold: each product at its own URL, in one currency an order, and as many as were asked for."""

import contextlib
import http.client
import json
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from app import migrations
from app.db import Database
from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import (
    Shop,
    check_problem,
    check_refusal,
    execute,
    new_customer,
    new_order,
    open_shop,
)


@pytest.fixture(scope="module")
def shop(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(postgres, tmp_path_factory.mktemp("service")) as shop:
        yield shop


def _sell(shop: Shop, product_id: str, *, price_cents: int = 100, currency: str = "EUR") -> str:
    shop.sql(
        "INSERT INTO products (id, name, price_cents, currency, stock)"
        " VALUES (%(id)s, 'A product of a test', %(price)s, %(currency)s, 1000000)"
        " ON CONFLICT DO NOTHING",
        {"id": product_id, "price": price_cents, "currency": currency},
    )
    return product_id


def _request(shop: Shop, method: str, target: str) -> tuple[int, dict[str, Any]]:
    """One request whose target is sent as it is: clients of a higher level tidy it up."""
    address = urlsplit(shop.service.url)
    assert address.hostname
    with contextlib.closing(
        http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    ) as connection:
        connection.putrequest(method, "/", skip_accept_encoding=True)
        connection._buffer[0] = f"{method} {target} HTTP/1.1".encode("latin-1")  # type: ignore[attr-defined]
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "2")
        connection.endheaders(b"{}")
        answer = connection.getresponse()
        document: dict[str, Any] = json.loads(answer.read())
        return answer.status, document


# --- products and their URLs ------------------------------------------------------------------------------------

_IDS = [
    "A/B", "/", "//", "a?b", "a#b", "50%", "%2F", "%252F", "A%2FB", "a b", " ", "+", "à", "日本", "🛒", ".", "..",
    "a;b=c", "a&b", "\\", '"', "x\n", "\t", "batch", "\N{COMBINING GRAVE ACCENT}",
]  # fmt: skip


@pytest.mark.parametrize("product_id", _IDS)
def test_every_product_that_can_be_ordered_can_be_read(shop: Shop, product_id: str) -> None:
    """`/products/` and its id, quoted, is the product itself, and no other: `A/B` was ordered and not found."""
    _sell(shop, product_id)
    assert shop.place(new_order((product_id, 1))).status_code == 201
    for target in (quote(product_id, safe=""), "".join(f"%{byte:02x}" for byte in product_id.encode())):
        status, product = _request(shop, "GET", f"/products/{target}")
        assert (status, product.get("id")) == (200, product_id), product


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/orders%2Fbatch"),
        ("POST", "/orders%2fbatch"),
        ("POST", "/orders%252Fbatch"),
        ("POST", "%2Forders"),
        ("GET", "/orders%2F019ab5f0-7c3e-7d1a-9c55-0a4f7e1b2c3d"),
        ("POST", "/orders/019ab5f0-7c3e-7d1a-9c55-0a4f7e1b2c3d%2Fcancel"),
        ("GET", "/products%2FSKU-0001"),
        ("GET", "/products/SKU-0001%2F"),
        ("GET", "/products/SKU-0001/"),
        ("GET", "/docs%2Fassets%2Fswagger-ui.css"),
        ("GET", "/products/%ff"),
        ("GET", "/products/%C3"),
        ("GET", "/products/%ED%A0%80"),  # a surrogate
        ("GET", "/products/%"),
        ("GET", "/products/%zz"),
        ("GET", "/products/%%32F"),
        ("POST", "/orders%ff"),
    ],
)
def test_another_path_is_another_resource(shop: Shop, method: str, target: str) -> None:
    """404: an encoded slash does not divide a path, and what is no UTF-8 names nothing."""
    _sell(shop, "/")
    status, problem = _request(shop, method, target)
    assert status in (400, 404)
    check_problem(problem, status, "not_found" if status == 404 else "validation")


@pytest.mark.parametrize("target", ["/products/\xc3\xa9", "/\xff", "/orders?customer_id=\xe9"])
def test_a_path_of_raw_bytes_is_refused(shop: Shop, target: str) -> None:
    """4xx: a URL is ASCII."""
    status, problem = _request(shop, "GET", target)
    assert 400 <= status < 500
    check_problem(problem, status, "validation" if status == 400 else "not_found")


@pytest.mark.parametrize("value", ["%ff", "%C3", "a%ED%A0%80"])
def test_a_query_that_is_no_utf_8_is_refused(shop: Shop, value: str) -> None:
    """422: it asked for the orders of the customer `\ufffd`."""
    status, problem = _request(shop, "GET", f"/orders?customer_id={value}")
    assert status == 422
    check_problem(problem, 422, "validation")


@pytest.mark.parametrize("target", ["/%6Frders", "/orders", "/%6f%72ders"])
def test_what_need_not_be_encoded_may_be(shop: Shop, target: str) -> None:
    """It is the same path (RFC 3986, 6.2.2.2): this one reads `{}` as an order, and says what it lacks."""
    check_problem(_request(shop, "POST", target)[1], 422, "validation")


# --- money ------------------------------------------------------------------------------------------------------


def _counted(shop: Shop) -> float:
    """Orders asked for, less those of no valid form, less those taken into processing: never other than 0."""
    metrics = shop.service.metrics()
    asked = {labels: value for (name, labels), value in metrics.items() if name == "orders_total"}
    invalid = sum(value for labels, value in asked.items() if ("error_type", "validation") in labels)
    return sum(asked.values()) - invalid - metrics["order_processing_seconds_count", ()]


@pytest.mark.parametrize("cached", [True, False])
def test_an_order_in_two_currencies_is_refused(shop: Shop, *, cached: bool) -> None:
    """422 `validation` on both routes, and nothing is stored: euros and yen were added up."""
    customer = new_customer()
    euros, yen = (_sell(shop, f"P-{uuid.uuid4().hex[:12]}", currency=currency) for currency in ("EUR", "JPY"))
    if cached:
        for product_id in (euros, yen):
            assert shop.place(new_order((product_id, 1), customer_id=new_customer())).status_code == 201
    for lines in ([(euros, 1), (yen, 2)], [(yen, 2), (euros, 1)]):
        order = new_order(*lines, customer_id=customer)
        problem = check_refusal(shop.place(order), 422, "validation")
        assert "EUR" in problem.detail
        assert "JPY" in problem.detail
        refused, stored = shop.place_batch([order, new_order(lines[1], customer_id=customer)])
        check_problem(refused["error"], 422, "validation")
        assert stored["order"]["currency"] == ("EUR" if lines[1][0] == euros else "JPY")
    assert shop.orders_stored(customer) == 2
    assert shop.stock(euros) + shop.stock(yen) == 2_000_000 - 2 * cached - 3
    assert _counted(shop) == 0


@pytest.mark.parametrize("lines", [[("half", 2)], [("half", 1), ("rest", 1), ("one", 1)], [("most", 1000)]])
def test_an_order_beyond_bigint_is_refused(shop: Shop, lines: list[tuple[str, int]]) -> None:
    """422 `validation`, and its neighbour is stored; the greatest sum that fits is an order."""
    prices = {"half": 2**62, "rest": 2**62 - 1, "one": 1, "most": 2**63 - 1}
    for name, price_cents in prices.items():
        _sell(shop, f"big-{name}", price_cents=price_cents)
    order = new_order(*((f"big-{name}", quantity) for name, quantity in lines))
    check_refusal(shop.place(order), 422, "validation")
    refused, stored = shop.place_batch([order, new_order(("big-half", 1), ("big-rest", 1))])
    check_problem(refused["error"], 422, "validation")
    assert stored["order"]["total_cents"] == 2**63 - 1
    assert _counted(shop) == 0


# --- how many there are -----------------------------------------------------------------------------------------


async def test_a_catalogue_of_any_size_is_whole(database_url: str) -> None:
    """20,000 products are 20,000 (there were 9,999), 300,000 are no overflow; a smaller start takes none away."""
    db = await Database.connect(
        database_url,
        pool_min_size=1,
        pool_max_size=1,
        pool_timeout_seconds=30,
        acquire_timeout_seconds=5,
        connect_timeout_seconds=5,
        statement_timeout_seconds=30,
    )
    try:
        await migrations.migrate(db)
        for size, expected in ((12, 12), (20_000, 20_000), (5, 20_000), (300_000, 300_000)):
            await migrations.seed_catalogue(db, size=size, stock=7)
            assert execute(database_url, "SELECT count(*) FROM products") == [(expected,)]
    finally:
        await db.close(5)
    sample = (
        "SELECT id, price_cents FROM products WHERE id = ANY (ARRAY['SKU-0001','SKU-10000','SKU-300000'])"
    )
    assert sorted(execute(database_url, sample)) == [
        (f"SKU-{n:04}", 199 + n * 7919 % 9800) for n in (1, 10_000, 300_000)
    ]
