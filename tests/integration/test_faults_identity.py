"""An order's identity: its key, its id, and the products it names are told apart exactly, on every way in."""

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import jsonschema_rs
import pytest

from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import Shop, check_problem, new_customer, new_order, open_shop


@pytest.fixture(scope="module")
def shop(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(postgres, tmp_path_factory.mktemp("service")) as shop:
        yield shop


# --- keys -------------------------------------------------------------------------------------------------------


def _place(shop: Shop, order: object, *keys: bytes) -> tuple[int, dict[str, Any]]:
    """POST /orders with the key's bytes as they are: clients of a higher level refuse some of them."""
    address = urlsplit(shop.service.url)
    assert address.hostname
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    body = json.dumps(order).encode()
    connection.putrequest("POST", "/orders")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    for key in keys:
        connection.putheader("Idempotency-Key", key)
    connection.endheaders(body)
    answer = connection.getresponse()
    document: dict[str, Any] = json.loads(answer.read())
    connection.close()
    return answer.status, document


_KEYS = ["k", "cart 7", 'a"b', "\\", "~!", "k" * 255]
_NO_KEYS = {
    "Latin-1 letter": "cart-à",
    "no-break space at an end": "cart\xa0",
    "next line at an end": "\x85cart",
    "other script": "日本",
    "control character": "a\x01b",
    "tab inside": "a\tb",
    "delete": "a\x7f",
}


@pytest.mark.parametrize("key", _NO_KEYS.values(), ids=_NO_KEYS)
def test_a_key_that_is_not_printable_ascii_is_refused_on_both_routes(shop: Shop, key: str) -> None:
    """422, and nothing is stored: read as Latin-1 and trimmed, two such keys were one, and one was two."""
    customer = new_customer()
    order = new_order((shop.new_product(), 1), customer_id=customer)
    if "\x01" not in key and "\x7f" not in key:  # those the parser of HTTP refuses by itself, with 400
        check_problem(_place(shop, order, key.encode())[1], 422, "validation")
    [result] = shop.place_batch([{**order, "idempotency_key": key}])
    check_problem(result["error"], 422, "validation")
    assert shop.orders_stored(customer) == 0


@pytest.mark.parametrize("key", [" k", "k ", " "])
def test_a_key_with_a_blank_at_an_end_is_refused(shop: Shop, key: str) -> None:
    """In a batch, and in quotes; blanks around a plain header are HTTP's own, and no part of it."""
    customer = new_customer()
    order = new_order((shop.new_product(), 1), customer_id=customer)
    [result] = shop.place_batch([{**order, "idempotency_key": key}])
    check_problem(result["error"], 422, "validation")
    check_problem(_place(shop, order, f'"{key}"'.encode())[1], 422, "validation")
    assert shop.orders_stored(customer) == 0


@pytest.mark.parametrize("key", _KEYS)
def test_one_key_is_one_key_on_both_routes(shop: Shop, key: str) -> None:
    """Plain or quoted in the header, literal in a batch: one order, stored once."""
    customer = new_customer()
    order = new_order((shop.new_product(), 1), customer_id=customer)
    key = f"{customer}{key}"[-255:]
    quoted = '"{}"'.format(key.replace("\\", "\\\\").replace('"', '\\"'))
    first = _place(shop, order, f"  {key}\t ".encode())
    assert first[0] == 201
    assert _place(shop, order, quoted.encode()) == first
    [result] = shop.place_batch([{**order, "idempotency_key": key}])
    assert (result["status"], result["replayed"], result["order"]) == (201, True, first[1])
    assert shop.orders_stored(customer) == 1


def test_a_quoted_key_of_a_batch_is_literal(shop: Shop) -> None:
    """JSON has quotes of its own: `"\\"k\\""` is the key `"k"`, which a header says as `"\\"k\\""`."""
    customer = new_customer()
    order = new_order((shop.new_product(), 1), customer_id=customer)
    [stored] = shop.place_batch([{**order, "idempotency_key": f'"{customer}"'}])
    assert stored["status"] == 201
    assert _place(shop, order, f'"\\"{customer}\\""'.encode())[1] == stored["order"]
    assert _place(shop, order, f'"{customer}"'.encode())[1]["id"] != stored["order"]["id"]
    assert shop.orders_stored(customer) == 2


@pytest.mark.parametrize(
    "value",
    ['"', '""', '"k', '"k"k"', '"k\\"', '"k\\x"', '"k";a=1', '"k", "l"', '"' + "k" * 256 + '"', '"à"'],
)
def test_a_malformed_quoted_key_is_refused(shop: Shop, value: str) -> None:
    """422: a key that begins with a quotation mark is a whole string, and nothing else."""
    customer = new_customer()
    order = new_order((shop.new_product(), 1), customer_id=customer)
    check_problem(_place(shop, order, value.encode())[1], 422, "validation")
    assert shop.orders_stored(customer) == 0


def test_the_documented_key_is_the_accepted_key(shop: Shop) -> None:
    """The patterns of /openapi.json take what the service takes, and refuse what it refuses."""
    document = shop.http.get("/openapi.json").json()
    [parameter] = document["paths"]["/orders"]["post"]["parameters"]
    header = next(choice for choice in parameter["schema"]["anyOf"] if choice["type"] == "string")
    field = document["components"]["schemas"]["NewBatchOrder"]["properties"]["idempotency_key"]
    batch = next(choice for choice in field["anyOf"] if choice["type"] == "string")
    assert (batch["minLength"], batch["maxLength"]) == (1, 255)
    order = new_order((shop.new_product(), 1), customer_id=new_customer())
    for value in [*_KEYS, *_NO_KEYS.values(), '"k"', '"k', '"a\\"b"', '"a\\x"', "k" * 256]:
        [result] = shop.place_batch([{**order, "idempotency_key": value}])
        fits = len(value) <= 255 and _matches(batch["pattern"], value)
        assert fits == (result.get("error", {}).get("error_type") != "validation"), value
        if "\x01" not in value and "\x7f" not in value:
            _, answer = _place(shop, order, value.encode())
            assert _matches(header["pattern"], value) == (answer.get("error_type") != "validation"), value


def _matches(pattern: str, value: str) -> bool:
    return jsonschema_rs.is_valid({"type": "string", "pattern": pattern}, value)


# --- ids --------------------------------------------------------------------------------------------------------


def test_a_batch_is_listed_newest_first(shop: Shop) -> None:
    """Its ids rise in its order, in which it was stored: 26 of 49 did not, within one millisecond."""
    customer = new_customer()
    cold = [shop.new_product() for _ in range(5)]
    # Every third names a product that must be read first.
    lines = [(cold[n // 10] if n % 3 == 0 else "SKU-0001", 1) for n in range(50)]
    results = shop.place_batch([new_order(line, customer_id=customer) for line in lines])
    orders = [result["order"] for result in results]
    ids = [order["id"] for order in orders]
    assert ids == sorted(ids)
    assert [order["created_at"] for order in orders] == sorted(order["created_at"] for order in orders)
    page = shop.http.get("/orders", params={"customer_id": customer, "limit": 100}).json()
    assert [order["id"] for order in page["items"]] == ids[::-1]
