"""Libraries as they come: the application needs none of what stands in for their parts."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.order_api import Shop, check_refusal, new_customer, new_order
from tests.support.service_process import ServiceProcess

ROOT = Path(__file__).parents[2]
OVERRIDDEN = ("aiopg", "prometheus-client", "uvicorn")


@pytest.fixture
def stock_shop(tmp_path: Path, database_url: str) -> Iterator[Shop]:
    """The application on uvicorn's own server and protocol, with prometheus_client's own metric classes."""
    service = ServiceProcess(tmp_path, database_url, module="tests.support.stock_service")
    shop = Shop(service.start(), database_url)
    yield shop
    shop.http.close()
    service.kill()


def test_orders_on_stock_libraries(stock_shop: Shop) -> None:
    """Orders are placed, replayed, refused, read back and counted on stock uvicorn and prometheus_client."""
    shop, customer = stock_shop, new_customer()
    product = shop.new_product(stock=10)
    order = new_order((product, 2), customer_id=customer)
    first = shop.place(order, key="k-1")
    assert first.status_code == 201
    assert "Idempotency-Replayed" not in first.headers
    assert shop.http.get(first.headers["Location"]).json() == first.json()

    replay = shop.place(order, key="k-1")
    assert (replay.status_code, replay.content) == (201, first.content)
    assert replay.headers["Idempotency-Replayed"] == "true"

    stored, refused = shop.place_batch([order, new_order((product, 100), customer_id=customer)])
    assert (stored["status"], stored["replayed"]) == (201, False)
    assert (refused["status"], refused["error"]["error_type"]) == (409, "out_of_stock")
    check_refusal(shop.place({**order, "colour": "red"}), 422, "validation")
    check_refusal(shop.http.get("/no/such/route"), 404, "not_found")
    assert shop.http.get("/orders", params={"customer_id": customer}).json()["items"] == [
        stored["order"],
        first.json(),
    ]
    assert (shop.orders_stored(customer), shop.stock(product)) == (2, 6)

    metric = shop.service.metric
    assert {
        (status, error_type): metric("orders_total", status=status, error_type=error_type)
        for status, error_type in (
            ("success", ""),
            ("replayed", ""),
            ("rejected", "out_of_stock"),
            ("rejected", "validation"),
        )
    } == {
        ("success", ""): 2,
        ("replayed", ""): 1,
        ("rejected", "out_of_stock"): 1,
        ("rejected", "validation"): 1,
    }
    assert metric("order_processing_seconds_count") == 4
    assert metric("order_processing_seconds_bucket", le="+Inf") == 4
    assert metric("http_requests_total", method="POST", route="/orders", status="201") == 2


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_libraries_are_pinned(name: str) -> None:
    """A library whose private methods are overridden is pinned to the very version of the lock files."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pin,) = (line for line in dependencies if re.match(rf"{name}\b", line))
    for lock in ("requirements.txt", "requirements-local.txt", "requirements-dev.txt"):
        assert f"{pin} \\" in (ROOT / lock).read_text().splitlines()
    assert re.fullmatch(rf"{name}==[\d.]+", pin)
