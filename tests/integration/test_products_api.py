"""The catalogue over HTTP."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from app import schemas
from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import Shop, check_refusal, open_shop


@pytest.fixture(scope="module")
def shop(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(postgres, tmp_path_factory.mktemp("service"), CATALOG_SIZE=250) as shop:
        yield shop


def test_a_product_is_read_from_the_database_once(shop: Shop) -> None:
    """The first answer is a miss, the next one a hit with the seconds of freshness that are left."""
    first, second = shop.http.get("/products/SKU-0042"), shop.http.get("/products/SKU-0042")
    assert first.status_code == 200
    product = schemas.Product.model_validate_json(first.content)
    assert (product.id, product.name, product.currency) == ("SKU-0042", "Product 42", "EUR")
    assert product.price_cents == 199 + (42 * 7919) % 9800
    assert second.content == first.content
    assert first.headers["cache-status"].startswith("products; fwd=miss")
    name, hit, ttl = second.headers["cache-status"].split("; ")
    assert (name, hit) == ("products", "hit")
    assert 0 < int(ttl.removeprefix("ttl=")) <= 330  # a tenth of jitter


@pytest.mark.parametrize("product_id", ["SKU-9999", "sku-0001", "p" * 64, "%20"])
def test_a_product_that_is_not_there_is_404(shop: Shop, product_id: str) -> None:
    """`not_found`, however often; and it is there once the catalogue has it."""
    for _ in range(2):
        check_refusal(shop.http.get(f"/products/{product_id}"), 404, "not_found")


def test_a_product_that_was_not_there_is_found_as_soon_as_it_is(shop: Shop) -> None:
    """That there is no such product is not kept in the cache."""
    check_refusal(shop.http.get("/products/SKU-0251"), 404, "not_found")
    shop.sql(
        "INSERT INTO products (id, name, price_cents, currency, stock) VALUES ('SKU-0251', 'New', 1, 'EUR', 1)"
    )
    assert shop.http.get("/products/SKU-0251").json()["name"] == "New"
    shop.sql("DELETE FROM products WHERE id = 'SKU-0251'")


@pytest.mark.parametrize("product_id", ["p" * 65, "%00", "SKU%000001"])
def test_what_is_no_product_id_is_422(shop: Shop, product_id: str) -> None:
    """`validation`."""
    check_refusal(shop.http.get(f"/products/{product_id}"), 422, "validation")


@pytest.mark.parametrize("limit", [None, 1, 7, 100])
def test_the_pages_are_the_catalogue(shop: Shop, limit: int | None) -> None:
    """Every product once, by id, in pages of `limit` (50 unless told)."""
    seen: list[str] = []
    cursor: str | None = None
    sizes = []
    while True:
        page = _page(shop, limit=limit, cursor=cursor)
        seen += [product["id"] for product in page["items"]]
        sizes.append(len(page["items"]))
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == sorted(seen)
    assert set(seen) >= {f"SKU-{n:04}" for n in range(1, 251)}
    assert len(seen) == len(set(seen))
    assert set(sizes[:-1]) <= {limit or 50}


def _page(shop: Shop, **parameters: object) -> dict[str, Any]:
    given = {name: str(value) for name, value in parameters.items() if value is not None}
    answer = shop.http.get("/products", params=given)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-status"].startswith("product-pages; ")
    schemas.ProductPage.model_validate_json(answer.content)
    page: dict[str, Any] = answer.json()
    return page


@pytest.mark.parametrize(
    "parameters",
    [
        {"cursor": "x"},
        {"cursor": "!!"},
        {"cursor": ""},
        {"cursor": base64.urlsafe_b64encode(b"\xff\xfe").decode()},
        {"cursor": base64.urlsafe_b64encode(b"SKU\x00").decode()},
        {"limit": "0"},
        {"limit": "101"},
        {"limit": "x"},
    ],
    ids=str,
)
def test_a_bad_parameter_is_422(shop: Shop, parameters: dict[str, str]) -> None:
    """`validation`: no parameter is guessed at."""
    check_refusal(shop.http.get("/products", params=parameters), 422, "validation")
