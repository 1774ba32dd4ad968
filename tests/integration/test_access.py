"""API keys: who may do what, and what each principal sees."""

import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from app.auth import new_key
from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import Shop, check_problem, check_refusal, new_customer, new_order, open_shop
from tests.support.service_process import ServiceProcess

_ALICE, _ALICE_ENTRY = new_key("alice")
_BOB, _BOB_ENTRY = new_key("bob")


@pytest.fixture(scope="module")
def alice(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    keys = f"{_ALICE_ENTRY}, {_BOB_ENTRY.upper().replace('BOB:', 'bob:')}"
    with open_shop(postgres, tmp_path_factory.mktemp("service"), token=_ALICE, API_KEYS=keys) as shop:
        yield shop


@pytest.fixture(scope="module")
def bob(alice: Shop) -> Iterator[Shop]:
    shop = Shop(alice.service, alice.dsn, _BOB)
    yield shop
    shop.http.close()


@pytest.fixture(scope="module")
def nobody(alice: Shop) -> Iterator[Shop]:
    shop = Shop(alice.service, alice.dsn)
    yield shop
    shop.http.close()


def test_the_documentation_says_which_routes_need_a_key(nobody: Shop) -> None:
    """Every operation of /openapi.json that names a security scheme is 401 without a key, and no other is."""
    seen = set()
    for path, operations in nobody.http.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            answer = nobody.http.request(
                method, path.format(order_id=uuid.uuid4(), product_id="SKU-0001"), json={}
            )
            if operation.get("security"):
                seen.add((method, path))
                check_refusal(answer, 401, "unauthorized")
            else:
                assert answer.status_code == 200, (method, path)
    assert len(seen) == 7
    for path in ("/livez", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert nobody.http.get(path).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {_ALICE}x",
        f"Bearer {_ALICE[:-1]}",
        f"Basic {_ALICE}",
        _ALICE,
        f"Bearer {_ALICE_ENTRY.split(':')[1]}",  # the hash is not the key
        "Bearer alice",
        "Bearer \xe9",
    ],
    ids=[
        "none",
        "no key",
        "wrong",
        "longer",
        "shorter",
        "Basic",
        "no scheme",
        "the hash",
        "principal",
        "not ASCII",
    ],
)
@pytest.mark.parametrize(
    "request_line", ["POST /orders", "POST /orders/batch", "GET /orders", "GET /products"]
)
def test_a_wrong_key_is_401(nobody: Shop, request_line: str, authorization: str) -> None:
    """`unauthorized`, before anything else is looked at."""
    method, path = request_line.split()
    headers = httpx.Headers({"Authorization": authorization}, encoding="latin-1")
    check_refusal(nobody.http.request(method, path, headers=headers, content=b"{"), 401, "unauthorized")


def test_the_scheme_may_be_spelled(nobody: Shop) -> None:
    """`bearer` is `Bearer`."""
    assert nobody.http.get("/orders", headers={"Authorization": f"bearer {_ALICE}"}).status_code == 200


def test_orders_are_their_principals_alone(alice: Shop, bob: Shop) -> None:
    """Another principal's order cannot be read, listed or cancelled: it is not there."""
    product, customer = alice.new_product(stock=10), new_customer()
    placed = alice.place(new_order((product, 2), customer_id=customer)).json()
    path = f"/orders/{placed['id']}"

    check_refusal(bob.http.get(path), 404, "not_found")
    check_refusal(bob.http.post(f"{path}/cancel"), 404, "not_found")
    assert bob.http.get("/orders", params={"customer_id": customer}).json()["items"] == []
    assert placed["id"] not in {order["id"] for order in _all_orders(bob)}

    assert alice.stock(product) == 8
    assert alice.http.get(path).json() == placed
    assert [order["id"] for order in _all_orders(alice, customer_id=customer)] == [placed["id"]]
    assert alice.http.post(f"{path}/cancel").json()["status"] == "cancelled"


def _all_orders(shop: Shop, **parameters: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        page = shop.http.get("/orders", params=parameters).json()
        found += page["items"]
        if page["next_cursor"] is None:
            return found
        parameters["cursor"] = page["next_cursor"]


def test_a_key_belongs_to_its_principal(alice: Shop, bob: Shop) -> None:
    """The same idempotency key of two principals is two keys: neither a replay nor a mismatch."""
    product, customer, key = alice.new_product(), new_customer(), f"k-{uuid.uuid4()}"
    order, other = (
        new_order((product, 1), customer_id=customer),
        new_order((product, 2), customer_id=customer),
    )
    first, second = alice.place(order, key), bob.place(other, key)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] != second.json()["id"]
    assert alice.place(order, key).content == first.content
    assert bob.place(other, key).content == second.content
    check_refusal(bob.place(order, key), 422, "idempotency_mismatch")
    [result] = bob.place_batch([{**order, "idempotency_key": key}])
    check_problem(result["error"], 422, "idempotency_mismatch")
    assert alice.stock(product) == 1_000_000 - 3


def test_a_cursor_gives_nothing_away(alice: Shop, bob: Shop) -> None:
    """A cursor of one principal's list leads another one only through his own orders."""
    for _ in range(3):
        alice.place(new_order(("SKU-0001", 1)))
        bob.place(new_order(("SKU-0001", 1)))
    cursor = alice.http.get("/orders", params={"limit": 1}).json()["next_cursor"]
    page = bob.http.get("/orders", params={"cursor": cursor, "limit": 100}).json()
    assert page["items"]
    assert {order["id"] for order in page["items"]} <= {order["id"] for order in _all_orders(bob)}


def test_a_key_of_new_key_works(start_service: Callable[..., ServiceProcess]) -> None:
    """A token of `python -m app new-key carol` opens a service that is given its entry."""
    printed = subprocess.run(
        [sys.executable, "-m", "app", "new-key", "carol"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert printed.stderr == ""
    token, entry = (line.rpartition(" ")[2] for line in printed.stdout.splitlines())
    assert entry.startswith("carol:")
    assert token not in entry

    service = start_service(API_KEYS=entry)
    authorization = {"Authorization": f"Bearer {token}"}
    answer = httpx.post(f"{service.url}/orders", json=new_order(("SKU-0001", 1)), headers=authorization)
    assert answer.status_code == 201
    assert httpx.get(f"{service.url}/orders").status_code == 401
    assert token not in service.log_path.read_text() + service.stderr_path.read_text()


@pytest.mark.parametrize("address", ["0.0.0.0"])  # noqa: S104  # that is the point
def test_anybody_may_come_in_only_where_that_was_said(
    start_service: Callable[..., ServiceProcess], address: str
) -> None:
    """On an address that others reach, a service without keys starts with ALLOW_ANONYMOUS=true only."""
    with pytest.raises(RuntimeError, match="API_KEYS: needed to listen on"):
        start_service(HOST=address)
    service = start_service(HOST=address, ALLOW_ANONYMOUS="true")
    port = service.url.rpartition(":")[2]
    assert httpx.get(f"http://127.0.0.1:{port}/orders").status_code == 200
