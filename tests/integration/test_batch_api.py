"""Batches of orders over HTTP: each order is stored or refused alone, in order of arrival."""

import json
import random
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from app import schemas
from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import Shop, check_problem, check_refusal, new_customer, new_order, open_shop


@pytest.fixture(scope="module")
def shop(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(postgres, tmp_path_factory.mktemp("service")) as shop:
        yield shop


def test_a_batch_is_answered_order_by_order(shop: Shop) -> None:
    """200 and one result per order, in the order they were sent; each can be read."""
    product, customer = shop.new_product(), new_customer()
    orders = [new_order((product, n), customer_id=customer) for n in range(1, 101)]
    answer = shop.http.post("/orders/batch", json={"orders": orders})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    results = schemas.BatchResult.model_validate_json(answer.content).results
    for n, result in enumerate(results, 1):
        assert isinstance(result, schemas.BatchStored)
        assert not result.replayed
        assert result.order.items[0].quantity == n
    assert len({result.order.id for result in results if isinstance(result, schemas.BatchStored)}) == 100
    first = answer.json()["results"][0]["order"]
    assert shop.http.get(f"/orders/{first['id']}").json() == first
    assert shop.orders_stored(customer) == 100
    assert shop.stock(product) == 1_000_000 - 5050


def test_seven_bad_orders_of_a_hundred_fail_alone(shop: Shop) -> None:
    """93 are stored; each of the seven is told what is wrong with it, in its place; the stock is right."""
    product, scarce, customer = shop.new_product(), shop.new_product(stock=2), new_customer()
    banned = new_customer()
    shop.sql(f"ALTER TABLE orders ADD CONSTRAINT seven CHECK (customer_id <> '{banned}')")
    good = new_order((product, 1), customer_id=customer)
    bad: dict[int, tuple[object, int, str]] = {
        0: (new_order((product, 1), ("SKU-none", 1), customer_id=customer), 422, "unknown_product"),
        13: (new_order((product, 1), (scarce, 3), customer_id=customer), 409, "out_of_stock"),
        14: (new_order((product, 1), customer_id="c\x00"), 422, "validation"),
        50: (new_order((product, 10**30), customer_id=customer), 422, "validation"),
        51: ({**good, "coupon": "x"}, 422, "validation"),
        98: ("an order", 422, "validation"),
        99: (new_order((product, 1), customer_id=banned), 500, "internal"),
    }
    results = shop.place_batch([bad[n][0] if n in bad else good for n in range(100)])

    for n, result in enumerate(results):
        if n in bad:
            _, status, error_type = bad[n]
            assert result["status"] == status
            check_problem(result["error"], status, error_type)
        else:
            assert result["status"] == 201, result
    assert shop.orders_stored(customer) == 93
    assert shop.orders_stored(banned) == 0
    assert shop.stock(product) == 1_000_000 - 93
    assert shop.stock(scarce) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{}",
        b"null",
        b'{"orders": []}',
        b'{"orders": {}}',
        b'{"orders": null}',
        b'{"orders": [{}], "more": 1}',
        b'{"orders": [' + b",".join([b"{}"] * 101) + b"]}",
    ],
    ids=["list", "empty", "null", "no orders", "object", "orders null", "unknown field", "101 orders"],
)
def test_what_is_no_batch_is_refused_as_a_whole(shop: Shop, body: bytes) -> None:
    """422 `validation` where there is no list of 1 to 100 orders to answer one by one."""
    answer = shop.http.post("/orders/batch", content=body, headers={"Content-Type": "application/json"})
    check_refusal(answer, 422, "validation")


def test_a_batch_of_only_bad_orders_is_answered_order_by_order(shop: Shop) -> None:
    """200, and a refusal for each."""
    for result in shop.place_batch([{}, 1, None, [], new_order(("SKU-0001", 0))]):
        check_problem(result["error"], 422, "validation")


def test_a_key_in_the_header_of_a_batch_is_refused(shop: Shop) -> None:
    """422: each order of a batch carries its own."""
    body = {"orders": [new_order(("SKU-0001", 1))]}
    answer = shop.http.post("/orders/batch", json=body, headers={"Idempotency-Key": "k"})
    check_refusal(answer, 422, "validation")


@pytest.mark.parametrize("key", ["", "k" * 256, 1, "k\x00"], ids=["empty", "256 characters", "number", "NUL"])
def test_an_order_with_a_bad_key_fails_alone(shop: Shop, key: object) -> None:
    """Its neighbour is stored."""
    order = new_order(("SKU-0001", 1))
    bad, good = shop.place_batch([{**order, "idempotency_key": key}, {**order, "idempotency_key": None}])
    check_problem(bad["error"], 422, "validation")
    assert good["status"] == 201


def test_one_key_several_times_in_a_batch_is_one_order(shop: Shop) -> None:
    """The first is stored, its repeats are replayed, another order under the key is refused."""
    product, customer, key = shop.new_product(), new_customer(), f"k-{uuid.uuid4()}"
    order = {**new_order((product, 2), customer_id=customer), "idempotency_key": key}
    other = {**new_order((product, 3), customer_id=customer), "idempotency_key": key}
    first, repeat, refused, again = shop.place_batch([order, order, other, order])
    assert (first["status"], first["replayed"]) == (201, False)
    assert repeat == again == {**first, "replayed": True}
    check_problem(refused["error"], 422, "idempotency_mismatch")
    assert shop.orders_stored(customer) == 1
    assert shop.stock(product) == 1_000_000 - 2
    single = shop.place(new_order((product, 2), customer_id=customer), key)
    assert single.json() == first["order"]
    assert single.headers["idempotency-replayed"] == "true"


def test_a_refused_order_leaves_its_key_to_its_neighbour(shop: Shop) -> None:
    """Of two orders of a batch under one key the second is stored where the first is refused."""
    product, key = shop.new_product(stock=2), f"k-{uuid.uuid4()}"
    refused, stored = shop.place_batch(
        [
            {**new_order((product, 3)), "idempotency_key": key},
            {**new_order((product, 2)), "idempotency_key": key},
        ]
    )
    check_problem(refused["error"], 409, "out_of_stock")
    assert (stored["status"], stored["replayed"]) == (201, False)
    assert shop.stock(product) == 0


def test_a_batch_repeated_as_a_whole_is_replayed_as_a_whole(shop: Shop) -> None:
    """The same answers again, each marked; nothing new is stored."""
    product, customer = shop.new_product(), new_customer()
    orders = [
        {**new_order((product, n % 3 + 1), customer_id=customer), "idempotency_key": str(uuid.uuid4())}
        for n in range(50)
    ]
    first, again = shop.place_batch(orders), shop.place_batch(orders)
    assert again == [{**result, "replayed": True} for result in first]
    assert shop.orders_stored(customer) == 50


def _sequentially(stock: dict[str, int], orders: Sequence[dict[str, Any]]) -> list[bool]:
    """Which orders are served when each is taken alone, one after the other; *stock* is what is left then."""
    served = []
    for order in orders:
        lines = [(line["product_id"], line["quantity"]) for line in order["items"]]
        enough = all(stock[product_id] >= quantity for product_id, quantity in lines)
        if enough:
            for product_id, quantity in lines:
                stock[product_id] -= quantity
        served.append(enough)
    return served


def test_a_product_sells_out_exactly(shop: Shop) -> None:
    """Stock 10 and 30 orders of one: the first 10 are served, and no other."""
    product = shop.new_product(stock=10)
    results = shop.place_batch([new_order((product, 1))] * 30)
    assert [result["status"] for result in results] == [201] * 10 + [409] * 20
    assert shop.stock(product) == 0


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("cached", [True, False], ids=["warm cache", "cold cache"])
def test_scarce_stock_goes_to_those_who_came_first(shop: Shop, seed: int, *, cached: bool) -> None:
    """30 orders of 1 to 3 over two products with stock 10 end as if each had come alone, in order of arrival.

    An order of two products is never half taken.
    """
    choose = random.Random(seed)  # noqa: S311
    first, second = shop.new_product(stock=10), shop.new_product(stock=10)
    if cached:
        for product in (first, second):
            assert shop.http.get(f"/products/{product}").status_code == 200
    customer = new_customer()
    wishes = ([first], [second], [first, second], [second, first])
    orders = [
        new_order(
            *((product, choose.randint(1, 3)) for product in choose.choice(wishes)), customer_id=customer
        )
        for _ in range(30)
    ]
    results = shop.place_batch(orders)

    left = {first: 10, second: 10}
    assert [result["status"] == 201 for result in results] == _sequentially(left, orders)
    for result in results:
        if result["status"] != 201:
            check_problem(result["error"], 409, "out_of_stock")
    assert {product: shop.stock(product) for product in left} == left
    assert shop.orders_stored(customer) == sum(result["status"] == 201 for result in results)


def test_an_order_that_cannot_be_served_does_not_hold_the_stock(shop: Shop) -> None:
    """One that asks for more than there is does not count against those after it."""
    product, plenty = shop.new_product(stock=3), shop.new_product()
    results = shop.place_batch(
        [
            new_order((product, 4), (plenty, 1)),
            new_order((product, 2)),
            new_order((product, 2)),
            new_order((product, 1)),
        ]
    )
    assert [result["status"] for result in results] == [409, 201, 409, 201]
    assert (shop.stock(product), shop.stock(plenty)) == (0, 1_000_000)


def test_a_batch_on_the_limit_of_bytes_is_taken(shop: Shop) -> None:
    """100 orders of 50 lines are one batch."""
    lines = [(f"SKU-{n:04}", 1) for n in range(1, 51)]
    orders = [new_order(*lines) for _ in range(100)]
    assert len(json.dumps({"orders": orders})) < schemas.MAX_BATCH_BYTES
    assert {result["status"] for result in shop.place_batch(orders)} == {201}
