"""What every route promises, whatever is sent to it: a coding, a type, HEAD, a query, a value that cannot be seen."""

import asyncio
import codecs
import json
import socket
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.embedded_postgres import EmbeddedPostgres
from app.main import create_app
from app.server.protocol import Limits
from app.server.serve import _Server
from app.settings import Settings
from tests.support.order_api import Shop, check_problem, check_refusal, new_customer, new_order, open_shop

JSON = {"Content-Type": "application/json"}
PLATFORM = ("/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/")
READS = ("/orders", f"/orders/{uuid.UUID(int=1)}", "/products", "/products/SKU-0001")


@pytest.fixture(scope="module")
def shop(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(postgres, tmp_path_factory.mktemp("service")) as shop:
        yield shop


def _order(customer: str = "c") -> bytes:
    return json.dumps(new_order(("SKU-0001", 1), customer_id=customer)).encode()


# --- codings and types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/orders"),
        ("POST", "/orders/batch"),
        ("POST", f"/orders/{uuid.UUID(int=1)}/cancel"),
        *(("GET", path) for path in (*READS, *PLATFORM)),
    ],
)
@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip"])
def test_an_encoded_body_is_refused(shop: Shop, method: str, path: str, coding: str) -> None:
    """415 on every route: nobody would decode it."""
    answer = shop.http.request(method, path, content=b"{}", headers={**JSON, "Content-Encoding": coding})
    check_refusal(answer, 415, "validation")


@pytest.mark.parametrize("route", ["/orders", "/orders/batch"])
@pytest.mark.parametrize("media_type", [None, "", "text/json", "application/json; charset=latin-1"])
def test_a_body_that_does_not_say_it_is_json_is_refused(
    shop: Shop, route: str, media_type: str | None
) -> None:
    """415, counted as an order that was rejected."""
    before = shop.service.metric("orders_total", status="rejected", error_type="validation")
    headers = {} if media_type is None else {"Content-Type": media_type}
    check_refusal(shop.http.post(route, content=_order(), headers=headers), 415, "validation")
    assert shop.service.metric("orders_total", status="rejected", error_type="validation") == before + 1


@pytest.mark.parametrize(
    "media_type", ["application/json; charset=UTF-8", 'Application/JSON ; charset="utf-8"; v=1']
)
def test_json_may_be_spelled(shop: Shop, media_type: str) -> None:
    answer = shop.http.post("/orders", content=_order(), headers={"Content-Type": media_type})
    assert answer.status_code == 201


def test_a_byte_order_mark_is_ignored(shop: Shop) -> None:
    """Before the JSON, once, on both routes (RFC 8259, 8.1)."""
    mark = codecs.BOM_UTF8
    assert shop.http.post("/orders", content=mark + _order(), headers=JSON).status_code == 201
    batch = b'{"orders": [%b, 0]}' % _order()
    answer = shop.http.post("/orders/batch", content=mark + batch, headers=JSON)
    assert [result["status"] for result in answer.json()["results"]] == [201, 422]
    check_refusal(shop.http.post("/orders", content=mark * 2 + _order(), headers=JSON), 400, "validation")


# --- HEAD -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *READS,
        *PLATFORM,
        "/orders?limit=0",
        "/products/none",
        "/nothing",
        "/docs/assets/swagger-ui.css",
        "/orders?limit=1",
    ],
)
def test_head_answers_as_get(shop: Shop, path: str) -> None:
    """Its status and its headers, the length too, without the body; counted as HEAD of the same route."""
    shop.http.get(path)  # what is cached is cached
    got, head = shop.http.get(path), shop.http.head(path)
    assert head.status_code == got.status_code
    assert head.content == b""
    varying = {"date", "x-request-id", "cache-status"}
    if path == "/metrics":
        varying.add("content-length")  # it grows by this very request
        assert int(head.headers["content-length"]) > 1000
    assert {name: value for name, value in head.headers.items() if name not in varying} == {
        name: value for name, value in got.headers.items() if name not in varying
    }
    assert shop.http.get(path).status_code == got.status_code  # the connection goes on


def test_head_of_what_has_no_get_is_refused(shop: Shop) -> None:
    answer = shop.http.head("/orders/batch")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


def test_head_is_counted_as_head_of_its_route(shop: Shop) -> None:
    labels = {"method": "HEAD", "route": "/orders/{order_id}", "status": "404"}
    before = shop.service.metric("http_requests_total", **labels)
    assert shop.http.head(f"/orders/{uuid.UUID(int=7)}").status_code == 404
    assert shop.service.metric("http_requests_total", **labels) == before + 1


# --- the query --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query", ["customerid=c", "x", "limit=1&x=", "limit=1&limit=1", "limit=1&limit=2", "%20"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/orders"),
        ("POST", "/orders/batch"),
        ("POST", f"/orders/{uuid.UUID(int=1)}/cancel"),
        *(("GET", path) for path in (*READS, *PLATFORM)),
        ("HEAD", "/livez"),
    ],
)
def test_a_query_that_is_not_known_is_refused(shop: Shop, method: str, path: str, query: str) -> None:
    """422 on every route, for a parameter that it does not have, or that stands twice."""
    answer = shop.http.request(method, f"{path}?{query}", content=_order(), headers=JSON)
    assert answer.status_code == 422
    if method != "HEAD":
        check_refusal(answer, 422, "validation")


def test_a_known_query_is_served(shop: Shop) -> None:
    path = "/orders?customer_id=c&status=confirmed&limit=1"
    assert shop.http.get(path).status_code == 200
    assert shop.http.get("/livez?").status_code == 200


# --- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["2.0", "2e0", "0.2e1", "20E-1"])
def test_a_quantity_is_an_integer_as_json_schema_means_it(shop: Shop, quantity: str) -> None:
    """2.0 is 2: alone, in a batch, in a batch with a bad neighbour, and for the hash of an idempotency key."""
    customer = new_customer()
    text = f'{{"customer_id": "{customer}", "items": [{{"product_id": "SKU-0001", "quantity": {quantity}}}]}}'
    key = {"Idempotency-Key": str(uuid.uuid4())}
    alone = shop.http.post("/orders", content=text, headers={**JSON, **key})
    assert alone.json()["items"][0]["quantity"] == 2
    assert b'"quantity":2,' in alone.content
    again = shop.http.post("/orders", content=text.replace(quantity, "2"), headers={**JSON, **key})
    assert again.content == alone.content
    for orders in (f"[{text}]", f"[{text}, 0]"):
        answer = shop.http.post("/orders/batch", content=f'{{"orders": {orders}}}', headers=JSON)
        assert b'"quantity":2,' in answer.content


BLANK = {
    "blank": " ",
    "blanks": "   ",
    "tab and line feed": "\t\n",
    "no-break space": "\u00a0",
    "ideographic space": "\u3000",
    "zero width space": "\u200b",
    "byte order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "right-to-left override": "\u202e",
    "control": "\x01\x7f",
    "Hangul filler": "\u3164",
    "variation selector": "\ufe0f",
    "tags": "\U000e0001\U000e0041",
    "a mixture": " \u200d\u2003\u2060",
}


@pytest.mark.parametrize("customer", BLANK.values(), ids=BLANK)
def test_a_customer_must_be_seen(shop: Shop, customer: str) -> None:
    """422 alone, in a batch, and as a filter, where no character of it can be seen."""
    order = {**new_order(("SKU-0001", 1)), "customer_id": customer}
    check_refusal(shop.place(order), 422, "validation")
    refused, stored = shop.place_batch([order, new_order(("SKU-0001", 1))])
    check_problem(refused["error"], 422, "validation")
    assert stored["status"] == 201
    check_refusal(shop.http.get("/orders", params={"customer_id": customer}), 422, "validation")


@pytest.mark.parametrize("customer", [" c", "c\u200b", "日本", "\u0645\u200c\u0646", "é", "👩‍👩‍👧"])
def test_a_customer_that_is_seen_is_kept_as_it_is(shop: Shop, customer: str) -> None:
    order = {**new_order(("SKU-0001", 1)), "customer_id": customer}
    assert shop.place(order).json()["customer_id"] == customer
    found = shop.http.get("/orders", params={"customer_id": customer}).json()["items"]
    assert {item["customer_id"] for item in found} == {customer}


# --- /metrics ---------------------------------------------------------------------------------------------------

PLAIN, OPENMETRICS = "text/plain; version=0.0.4", "application/openmetrics-text; version=1.0.0"
ACCEPTED = {
    "": PLAIN,
    "text/plain;version=x": PLAIN,
    "text/plain;version=": PLAIN,
    "text/plain;version=99.0.0": PLAIN,
    'application/openmetrics-text; version="1.0.0"': OPENMETRICS,
    "application/openmetrics-text": OPENMETRICS,
    "Application/OpenMetrics-Text;VERSION=1.0.0": OPENMETRICS,
    "application/openmetrics-text;version=x": PLAIN,
    "application/openmetrics-text;version=7.0.0": PLAIN,
    "application/openmetrics-text;q=0": PLAIN,
    "application/openmetrics-text;q=0, text/plain;q=0": PLAIN,
    "application/openmetrics-text;q=0.1, text/plain;q=0.9": PLAIN,
    "text/plain;q=0.1, application/openmetrics-text;version=1.0.0;q=0.9": OPENMETRICS,
    "application/openmetrics-text;version=1.0.0;escaping=nonsense": OPENMETRICS,
    "text/plain;version=1.0.0;escaping=allow-utf-8": "text/plain; version=1.0.0",
    "image/png": PLAIN,
    ",;=,;;q=,*/*;q=x": PLAIN,
    "text/html,*/*;q=0.8": PLAIN,
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1": OPENMETRICS,
}


@pytest.mark.parametrize(("accept", "content_type"), ACCEPTED.items(), ids=lambda value: value[:50])
def test_metrics_are_served_whatever_is_accepted(shop: Shop, accept: str, content_type: str) -> None:
    """200 in the best format that is asked for and known, else in the plain one; and caches are told why."""
    answer = shop.http.get("/metrics", headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(content_type)
    assert answer.headers["vary"] == "Accept"
    assert answer.text.endswith("# EOF\n") == (content_type == OPENMETRICS)


def test_metrics_are_served_where_accept_stands_twice(shop: Shop) -> None:
    """Two lines are one list."""
    headers = [("Accept", "text/plain;q=0.1"), ("Accept", "application/openmetrics-text")]
    assert shop.http.get("/metrics", headers=headers).headers["content-type"].startswith(OPENMETRICS)


# --- defects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("POST", "/orders", "/orders"),
        ("POST", "/orders/batch", "/orders/batch"),
        ("POST", f"/orders/{uuid.UUID(int=1)}/cancel", "/orders/{order_id}/cancel"),
        ("GET", "/orders", "/orders"),
        ("GET", f"/orders/{uuid.UUID(int=1)}", "/orders/{order_id}"),
        ("GET", "/products", "/products"),
        ("GET", "/products/SKU-0001", "/products/{product_id}"),
        ("GET", "/readyz", "/readyz"),
        ("HEAD", "/readyz", "/readyz"),
    ],
)
async def test_a_defect_keeps_every_promise(method: str, path: str, route: str) -> None:
    """An exception that nobody foresaw is a problem with `X-Request-ID`, one access line, and one count."""
    app = create_app(Settings.load(database_url="postgresql:///unused"))
    labels = {"method": method, "route": route, "status": "500"}
    before = REGISTRY.get_sample_value("http_requests_total", labels) or 0
    with socket.create_server(("127.0.0.1", 0)) as listener, capture_logs() as lines:
        async with (
            _Server(app, [listener], Limits(), {}),  # without a state nothing works
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client,
        ):
            answer = await client.request(
                method, path, headers={**JSON, "X-Request-ID": "mine"}, content=b"{}"
            )
            await asyncio.sleep(0)
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "mine"
    if method != "HEAD":
        check_problem(answer.json(), 500, "internal", "unknown")
    access = [line for line in lines if line["event"] == "request"]
    assert [_seen(line) for line in access] == [(method, route, 500, "mine")]
    assert [line["request_id"] for line in lines if line["event"] == "request_failed"] == ["mine"]
    assert REGISTRY.get_sample_value("http_requests_total", labels) == before + 1


def _seen(line: Mapping[str, Any]) -> tuple[object, ...]:
    return line["method"], line["route"], line["status"], line["request_id"]
