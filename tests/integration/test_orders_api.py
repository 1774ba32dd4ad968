"""Single orders over HTTP: placing, repeating, reading, listing, cancelling."""

import asyncio
import json
import signal
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest

from app import schemas
from app.embedded_postgres import EmbeddedPostgres
from tests.support.occupation import PATIENT, occupied
from tests.support.order_api import Shop, check_refusal, new_customer, new_order, open_shop
from tests.support.service_process import ServiceProcess


@pytest.fixture(scope="module")
def shop(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(postgres, tmp_path_factory.mktemp("service")) as shop:
        yield shop


# --- placing ---------------------------------------------------------------------------------------------------


def test_a_placed_order_is_answered_with_all_of_it(shop: Shop) -> None:
    """201, Location, and the order at the catalogue's prices; its stock is taken."""
    product, other = shop.new_product(stock=10), shop.new_product(stock=10)
    answer = shop.place(new_order((product, 3), (other, 2), customer_id="c-ä"))

    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/json"
    order = schemas.Order.model_validate_json(answer.content)
    assert answer.headers["location"] == f"/orders/{order.id}"
    assert "idempotency-replayed" not in answer.headers
    assert (order.customer_id, order.status, order.currency) == ("c-ä", "confirmed", "EUR")
    assert [line.model_dump() for line in order.items] == [
        {"product_id": product, "quantity": 3, "unit_price_cents": 100},
        {"product_id": other, "quantity": 2, "unit_price_cents": 100},
    ]
    assert order.total_cents == 500
    assert uuid.UUID(order.id).version == 7
    assert datetime.fromisoformat(order.created_at).tzinfo is not None
    assert (shop.stock(product), shop.stock(other)) == (7, 8)
    assert shop.http.get(answer.headers["location"]).content == answer.content


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_spelled(shop: Shop, media_type: str) -> None:
    """The content type's parameters and case do not matter."""
    body = json.dumps(new_order(("SKU-0001", 1)))
    assert shop.http.post("/orders", content=body, headers={"Content-Type": media_type}).status_code == 201


def _with(**changes: object) -> dict[str, Any]:
    return {**new_order(("SKU-0001", 1)), **changes}


def _line(**changes: object) -> dict[str, Any]:
    return _with(items=[{"product_id": "SKU-0001", "quantity": 1, **changes}])


def _lines(count: int) -> dict[str, Any]:
    return new_order(*((f"SKU-{n:04}", 1) for n in range(1, count + 1)))


REFUSED: dict[str, object] = {
    "not an object": [],
    "null": None,
    "a string": "order",
    "no customer": {"items": [{"product_id": "SKU-0001", "quantity": 1}]},
    "no items": {"customer_id": "c-1"},
    "empty items": _with(items=[]),
    "items not a list": _with(items={"product_id": "SKU-0001", "quantity": 1}),
    "customer empty": _with(customer_id=""),
    "customer too long": _with(customer_id="c" * 65),
    "customer a number": _with(customer_id=1),
    "customer null": _with(customer_id=None),
    "customer with a NUL": _with(customer_id="c\x00"),
    "product empty": _line(product_id=""),
    "product too long": _line(product_id="p" * 65),
    "product with a NUL": _line(product_id="SKU\x00"),
    "quantity zero": _line(quantity=0),
    "quantity negative": _line(quantity=-1),
    "quantity 1001": _line(quantity=1001),
    "quantity of 30 digits": _line(quantity=10**30),
    "quantity a fraction": _line(quantity=1.5),
    "quantity a string": _line(quantity="1"),
    "quantity true": _line(quantity=True),
    "quantity null": _line(quantity=None),
    "51 lines": _lines(51),
    "a product twice": new_order(("SKU-0001", 1), ("SKU-0001", 2)),
    "unknown field": _with(coupon="x"),
    "unknown field in a line": _line(price_cents=1),
    "price of its own": _with(total_cents=1),
    "a key in the body": _with(idempotency_key="k"),
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_a_body_that_is_not_of_the_contract_is_refused(shop: Shop, body: object) -> None:
    """422 `validation`; the problem names the field and never quotes the value."""
    answer = shop.http.post("/orders", content=json.dumps(body), headers={"Content-Type": "application/json"})
    found = check_refusal(answer, 422, "validation")
    assert found.errors
    assert all(set(error) == {"loc", "msg", "type"} for error in found.errors)


@pytest.mark.parametrize(
    "body",
    [_lines(50), _line(quantity=1000), _with(customer_id="c" * 64), _with(customer_id="ü" * 64)],
    ids=["50 lines", "quantity 1000", "customer of 64", "customer of 64 wide characters"],
)
def test_the_limits_themselves_are_allowed(shop: Shop, body: object) -> None:
    """What stands exactly on a limit is accepted."""
    assert shop.place(body).status_code == 201


@pytest.mark.parametrize("body", [b"", b"{", b"order", b"{}{}", b'{"customer_id": "\xff"}', b"\x00"])
def test_a_body_that_is_not_json_is_400(shop: Shop, body: bytes) -> None:
    """400 `validation`."""
    answer = shop.http.post("/orders", content=body, headers={"Content-Type": "application/json"})
    check_refusal(answer, 400, "validation")


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "text/json", ""])
@pytest.mark.parametrize("route", ["/orders", "/orders/batch"])
def test_another_content_type_is_refused(shop: Shop, route: str, media_type: str) -> None:
    """A body that does not call itself JSON is not read."""
    answer = shop.http.post(route, content=b"{}", headers={"Content-Type": media_type})
    check_refusal(answer, 415, "validation")


@pytest.mark.parametrize(("route", "limit"), [("/orders", 64 * 1024), ("/orders/batch", 1024 * 1024)])
@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_a_body_over_the_limit_is_413(shop: Shop, route: str, limit: int, *, chunked: bool) -> None:
    """One byte over the limit is `too_large`; on the limit it is read."""
    headers = {"Content-Type": "application/json"}

    def post(size: int) -> httpx.Response:
        body = b" " * (size - 2) + b"{}"
        return shop.http.post(route, content=iter([body]) if chunked else body, headers=headers)

    check_refusal(post(limit), 422, "validation")
    check_refusal(post(limit + 1), 413, "too_large")


def test_an_unknown_product_is_422(shop: Shop) -> None:
    """`unknown_product`, and nothing is taken of the order's other product."""
    product = shop.new_product(stock=5)
    check_refusal(shop.place(new_order((product, 1), ("SKU-none", 1))), 422, "unknown_product")
    assert shop.stock(product) == 5


def test_too_little_stock_is_409(shop: Shop) -> None:
    """`out_of_stock`, and nothing is taken of the order's other product."""
    scarce, plenty = shop.new_product(stock=2), shop.new_product(stock=5)
    check_refusal(shop.place(new_order((plenty, 1), (scarce, 3))), 409, "out_of_stock")
    assert (shop.stock(scarce), shop.stock(plenty)) == (2, 5)


def test_a_product_that_vanished_is_unknown(shop: Shop) -> None:
    """A product that is still in the cache and no longer in the catalogue is refused, and nothing is stored."""
    product, customer = shop.new_product(), new_customer()
    assert shop.place(new_order((product, 1))).status_code == 201
    shop.sql("DELETE FROM products WHERE id = %(id)s", {"id": product})
    check_refusal(shop.place(new_order((product, 1), customer_id=customer)), 422, "unknown_product")
    assert shop.orders_stored(customer) == 0


def test_what_the_schema_alone_refuses_is_not_executed(shop: Shop) -> None:
    """A constraint that only the database knows makes a 500 that says `not_executed`, and takes no stock."""
    product, customer = shop.new_product(stock=5), new_customer()
    shop.sql(f"ALTER TABLE orders ADD CONSTRAINT banned CHECK (customer_id <> '{customer}')")
    check_refusal(shop.place(new_order((product, 1), customer_id=customer)), 500, "internal")
    assert shop.stock(product) == 5
    assert shop.place(new_order((product, 1))).status_code == 201


# --- idempotency -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "k" * 256], ids=["empty", "256 characters"])
def test_a_key_has_1_to_255_characters(shop: Shop, key: str) -> None:
    """Another key is refused."""
    answer = shop.http.post("/orders", json=new_order(("SKU-0001", 1)), headers={"Idempotency-Key": key})
    check_refusal(answer, 422, "validation")


def test_two_keys_are_refused(shop: Shop) -> None:
    """An order has one key."""
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    answer = shop.http.post("/orders", json=new_order(("SKU-0001", 1)), headers=headers)
    check_refusal(answer, 400, "validation")


def test_a_repeat_is_the_first_answer_again(shop: Shop) -> None:
    """Same key, same order: 201, the first answer byte for byte, marked; also after a cancel and a new price."""
    product, customer, key = shop.new_product(stock=10), new_customer(), "k" * 255
    order = new_order((product, 2), customer_id=customer)
    first = shop.place(order, key)

    for _ in range(2):
        again = shop.place(order, key)
        assert again.status_code == 201
        assert again.content == first.content
        assert again.headers["location"] == first.headers["location"]
        assert again.headers["idempotency-replayed"] == "true"
        assert shop.http.post(f"{first.headers['location']}/cancel").status_code == 200
        shop.sql("UPDATE products SET price_cents = 999 WHERE id = %(id)s", {"id": product})

    assert shop.orders_stored(customer) == 1
    assert shop.stock(product) == 10


def test_spelling_and_route_do_not_matter(shop: Shop) -> None:
    """A repeat may be spaced, ordered and escaped otherwise, and may come over the other route."""
    product, customer, key = shop.new_product(), new_customer(), f"k-{uuid.uuid4()}"
    first = shop.place(new_order((product, 2), customer_id=customer), key)
    spelled = json.dumps(
        {"items": [{"quantity": 2, "product_id": product}], "customer_id": customer}, indent=4
    ).replace("P-", "\\u0050-")
    again = shop.http.post(
        "/orders", content=spelled, headers={"Idempotency-Key": key, "Content-Type": "application/json"}
    )
    assert again.content == first.content
    assert again.headers["idempotency-replayed"] == "true"
    [result] = shop.place_batch([{**new_order((product, 2), customer_id=customer), "idempotency_key": key}])
    assert result == {"status": 201, "replayed": True, "order": first.json()}
    assert shop.orders_stored(customer) == 1


@pytest.mark.parametrize("change", ["customer", "quantity", "product", "line"])
def test_another_order_under_the_key_is_refused(shop: Shop, change: str) -> None:
    """Same key, other order: 422 `idempotency_mismatch`, nothing stored, and the first order still replays."""
    product, other, customer = shop.new_product(stock=10), shop.new_product(stock=10), new_customer()
    key = f"k-{uuid.uuid4()}"
    order = new_order((product, 1), customer_id=customer)
    assert shop.place(order, key).status_code == 201
    changed = {
        "customer": new_order((product, 1), customer_id=f"{customer}x"),
        "quantity": new_order((product, 2), customer_id=customer),
        "product": new_order((other, 1), customer_id=customer),
        "line": new_order((product, 1), (other, 1), customer_id=customer),
    }[change]
    check_refusal(shop.place(changed, key), 422, "idempotency_mismatch")
    assert (shop.stock(product), shop.stock(other)) == (9, 10)
    assert shop.place(order, key).headers["idempotency-replayed"] == "true"


def test_a_refusal_leaves_the_key_free(shop: Shop) -> None:
    """Only a stored order takes its key: what was refused may be corrected under the same key."""
    product, customer, key = shop.new_product(stock=1), new_customer(), f"k-{uuid.uuid4()}"
    check_refusal(shop.place(new_order((product, 2), customer_id=customer), key), 409, "out_of_stock")
    check_refusal(shop.place(new_order(("SKU-none", 1), customer_id=customer), key), 422, "unknown_product")
    check_refusal(shop.place(_with(customer_id=""), key), 422, "validation")
    answer = shop.place(new_order((product, 1), customer_id=customer), key)
    assert answer.status_code == 201
    assert "idempotency-replayed" not in answer.headers


async def test_fifty_at_once_under_one_key_are_one_order(shop: Shop) -> None:
    """One execution, fifty equal answers; one is counted as a success and 49 as replayed."""
    product, customer, key = shop.new_product(), new_customer(), f"k-{uuid.uuid4()}"
    before = _outcomes(shop)
    async with shop.async_client(50) as client:
        answers = await asyncio.gather(
            *(
                client.post(
                    "/orders",
                    json=new_order((product, 1), customer_id=customer),
                    headers={"Idempotency-Key": key},
                )
                for _ in range(50)
            )
        )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 49
    assert shop.orders_stored(customer) == 1
    assert shop.stock(product) == 999_999
    after = _outcomes(shop)
    assert {status: after[status] - before[status] for status in after} == {"success": 1, "replayed": 49}


async def test_fifty_other_orders_at_once_under_one_key_are_one_order(shop: Shop) -> None:
    """Of different orders that race for a key one is stored, and 49 are told that it belongs to another."""
    product, key = shop.new_product(), f"k-{uuid.uuid4()}"
    async with shop.async_client(50) as client:
        answers = await asyncio.gather(
            *(
                client.post("/orders", json=new_order((product, n)), headers={"Idempotency-Key": key})
                for n in range(1, 51)
            )
        )
    stored = [answer for answer in answers if answer.status_code == 201]
    assert len(stored) == 1
    for answer in answers:
        if answer is not stored[0]:
            check_refusal(answer, 422, "idempotency_mismatch")
    assert shop.stock(product) == 1_000_000 - stored[0].json()["items"][0]["quantity"]


def _outcomes(shop: Shop) -> dict[str, float]:
    return {
        status: shop.service.metric("orders_total", status=status, error_type="")
        for status in ("success", "replayed")
    }


# --- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["GET /orders/{}", "POST /orders/{}/cancel"])
def test_an_order_that_is_not_there_is_404(shop: Shop, action: str) -> None:
    """`not_found` for an id nobody has, and for what is no id."""
    method, _, path = action.partition(" ")
    check_refusal(shop.http.request(method, path.format(uuid.uuid4())), 404, "not_found")
    check_refusal(shop.http.request(method, path.format("SKU-0001")), 404, "not_found")


def test_pages_are_complete_newest_first_and_stable(shop: Shop) -> None:
    """Each order of the start is listed exactly once, newest first, while more arrive between the pages."""
    customer = new_customer()
    placed = [_place_for(shop, customer) for _ in range(23)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = _page(shop, customer_id=customer, limit=5, cursor=cursor)
        seen += [order["id"] for order in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        assert len(page["items"]) == 5
        _place_for(shop, customer)
    assert seen == sorted(placed, reverse=True)


def _place_for(shop: Shop, customer: str) -> str:
    answer = shop.place(new_order(("SKU-0001", 1), customer_id=customer))
    assert answer.status_code == 201
    return str(answer.json()["id"])


def _page(shop: Shop, **parameters: object) -> dict[str, Any]:
    answer = shop.http.get(
        "/orders",
        params={name: str(value) for name, value in parameters.items() if value is not None},
    )
    assert answer.status_code == 200, answer.text
    schemas.OrderPage.model_validate_json(answer.content)
    page: dict[str, Any] = answer.json()
    return page


def test_a_page_that_ends_with_the_last_order_leads_to_an_empty_one(shop: Shop) -> None:
    """Where the orders fill the pages exactly, the walk still ends and repeats nothing."""
    customer = new_customer()
    placed = {_place_for(shop, customer) for _ in range(4)}
    first = _page(shop, customer_id=customer, limit=2)
    second = _page(shop, customer_id=customer, limit=2, cursor=first["next_cursor"])
    assert {order["id"] for order in first["items"] + second["items"]} == placed
    if second["next_cursor"] is not None:
        third = _page(shop, customer_id=customer, limit=2, cursor=second["next_cursor"])
        assert third == {"items": [], "next_cursor": None}


def test_the_filters_filter(shop: Shop) -> None:
    """`customer_id` and `status` each narrow the list, alone and together, over several pages."""
    customer, other = new_customer(), new_customer()
    placed = [_place_for(shop, customer) for _ in range(6)]
    elsewhere = _place_for(shop, other)
    for order_id in (*placed[::2], elsewhere):
        assert shop.http.post(f"/orders/{order_id}/cancel").status_code == 200

    def listed(**parameters: object) -> list[str]:
        found: list[str] = []
        cursor = None
        while True:
            page = _page(shop, limit=2, cursor=cursor, **parameters)
            found += [order["id"] for order in page["items"]]
            cursor = page["next_cursor"]
            if cursor is None:
                return found

    assert listed(customer_id=customer) == placed[::-1]
    assert listed(customer_id=customer, status="cancelled") == placed[::2][::-1]
    assert listed(customer_id=customer, status="confirmed") == placed[1::2][::-1]
    assert listed(customer_id=customer, status="declined") == []
    assert listed(customer_id=new_customer()) == []
    cancelled = listed(status="cancelled")
    assert cancelled == sorted(cancelled, reverse=True)
    assert {*placed[::2], elsewhere} <= set(cancelled)
    assert not set(placed[1::2]) & set(cancelled)


@pytest.mark.parametrize(
    "parameters",
    [
        {"cursor": "x"},
        {"cursor": "!!!!"},
        {"cursor": "AAAA"},
        {"cursor": "U0tVLTAwMDE"},  # a product's
        {"cursor": ""},
        {"cursor": "é"},
        {"cursor": "A" * 201},
        {"limit": "0"},
        {"limit": "101"},
        {"limit": "ten"},
        {"limit": "1e1"},
        {"status": "lost"},
        {"customer_id": ""},
        {"customer_id": "c" * 65},
        {"customer_id": "c\x00"},
    ],
    ids=str,
)
def test_a_bad_parameter_is_422(shop: Shop, parameters: dict[str, str]) -> None:
    """`validation`: no parameter is guessed at."""
    check_refusal(shop.http.get("/orders", params=parameters), 422, "validation")


# --- cancelling ------------------------------------------------------------------------------------------------


def test_cancelling_gives_the_stock_back_once(shop: Shop) -> None:
    """The cancelled order is answered, its stock is back, and repeating it changes nothing."""
    product, other = shop.new_product(stock=10), shop.new_product(stock=10)
    placed = shop.place(new_order((product, 3), (other, 4))).json()
    assert (shop.stock(product), shop.stock(other)) == (7, 6)
    for _ in range(3):
        answer = shop.http.post(f"/orders/{placed['id']}/cancel")
        assert answer.status_code == 200
        assert answer.json() == {**placed, "status": "cancelled"}
        assert (shop.stock(product), shop.stock(other)) == (10, 10)
    assert shop.http.get(f"/orders/{placed['id']}").json()["status"] == "cancelled"


async def test_twenty_cancels_at_once_give_the_stock_back_once(shop: Shop) -> None:
    """All are answered with the cancelled order."""
    product = shop.new_product(stock=10)
    placed = shop.place(new_order((product, 3))).json()
    async with shop.async_client(20) as client:
        answers = await asyncio.gather(*(client.post(f"/orders/{placed['id']}/cancel") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["status"] for answer in answers} == {"cancelled"}
    assert shop.stock(product) == 10


def test_a_declined_order_cannot_be_cancelled(shop: Shop) -> None:
    """409 `invalid_state`, and no stock comes back."""
    product = shop.new_product(stock=10)
    order_id = shop.place(new_order((product, 3))).json()["id"]
    shop.sql("UPDATE orders SET status = 'declined' WHERE id = %(id)s", {"id": order_id})
    check_refusal(shop.http.post(f"/orders/{order_id}/cancel"), 409, "invalid_state")
    assert shop.stock(product) == 7
    assert shop.http.get(f"/orders/{order_id}").json()["status"] == "declined"


# --- every route -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/orders", {"GET", "HEAD", "POST"}),
        ("GET", "/orders/batch", {"POST"}),
        ("POST", f"/orders/{uuid.UUID(int=1)}", {"GET", "HEAD"}),
        ("GET", f"/orders/{uuid.UUID(int=1)}/cancel", {"POST"}),
        ("POST", "/products", {"GET", "HEAD"}),
        ("PATCH", "/products/SKU-0001", {"GET", "HEAD"}),
        ("POST", "/livez", {"GET", "HEAD"}),
        ("POST", "/readyz", {"GET", "HEAD"}),
        ("POST", "/metrics", {"GET", "HEAD"}),
        ("POST", "/openapi.json", {"GET", "HEAD"}),
        ("POST", "/docs", {"GET", "HEAD"}),
        ("POST", "/docs/assets/swagger-ui.css", {"GET", "HEAD"}),
        ("TRACE", "/", {"GET", "HEAD"}),
    ],
)
def test_another_method_is_405_and_says_which_are_allowed(
    shop: Shop, method: str, path: str, allowed: set[str]
) -> None:
    """`method_not_allowed` with `Allow`."""
    answer = shop.http.request(method, path)
    check_refusal(answer, 405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    "path", ["/order", "/orders/", "/orders/batch/", "/docs/assets/none", "/products/a/b", "/%ff"]
)
def test_another_path_is_404(shop: Shop, path: str) -> None:
    """`not_found` as a problem."""
    check_refusal(shop.http.get(path), 404, "not_found")


@pytest.mark.parametrize("path", ["/livez", "/orders", "/orders/x", "/nothing", "/metrics", "/docs"])
def test_a_request_id_is_taken_over_or_made(shop: Shop, path: str) -> None:
    """`X-Request-ID` comes back; one that is missing or not plain is replaced."""
    given = {"X-Request-ID": "trace-1/2:3"}
    assert shop.http.get(path, headers=given).headers["x-request-id"] == "trace-1/2:3"
    for header in ({}, {"X-Request-ID": "a b"}, {"X-Request-ID": "x" * 129}):
        made = [shop.http.get(path, headers=header).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        assert made[0] != header.get("X-Request-ID")


def test_the_platforms_routes_answer(shop: Shop) -> None:
    """Probes, metrics and documentation, and `/` leads to the documentation."""
    assert shop.http.get("/livez").json() == {"status": "ok"}
    assert shop.http.get("/readyz").json() == {"status": "ok"}
    assert shop.http.get("/metrics").headers["content-type"].startswith("text/plain; version=")
    openmetrics = {"Accept": "application/openmetrics-text"}
    assert "openmetrics" in shop.http.get("/metrics", headers=openmetrics).headers["content-type"]
    root = shop.http.get("/")
    assert (root.status_code, root.headers["location"]) == (307, "/docs")
    assert shop.http.get("/docs").headers["content-type"].startswith("text/html")
    assert shop.http.get("/docs/assets/swagger-ui-bundle.js").status_code == 200


def test_a_service_that_ends_says_so_on_readyz(start_service: Callable[..., ServiceProcess]) -> None:
    """503 with Retry-After while it drains, and everything else is still served."""
    service = start_service(DRAIN_DELAY_SECONDS=20)
    service.process.send_signal(signal.SIGTERM)
    while (answer := httpx.get(f"{service.url}/readyz")).status_code == 200:
        pass
    check_refusal(answer, 503, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1
    assert httpx.get(f"{service.url}/livez").status_code == 200
    assert httpx.post(f"{service.url}/orders", json=new_order(("SKU-0001", 1))).status_code == 201


def test_every_503_says_when_to_come_back(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """Without a place in flight every route but the platform's is `overloaded`, with Retry-After."""
    service = start_service(**PATIENT, MAX_IN_FLIGHT=100)
    headers = {"Content-Type": "application/json"}
    with service.client() as client, occupied(service, database_url, 100):
        for method, path in (
            ("POST", "/orders"),
            ("POST", "/orders/batch"),
            ("GET", "/orders"),
            ("GET", f"/orders/{uuid.uuid4()}"),
            ("POST", f"/orders/{uuid.uuid4()}/cancel"),
            ("GET", "/products"),
            ("GET", "/products/SKU-0001"),
        ):
            answer = client.request(method, path, content=b"{}", headers=headers)
            check_refusal(answer, 503, "overloaded")
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 200
        assert client.get("/metrics").status_code == 200
    assert service.metric("requests_shed_total", reason="admission") == 2
