"""Hostile requests: each gets a clear refusal or a closed connection, and the others are served."""

import contextlib
import gc
import json
import select
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from app import intake
from app.embedded_postgres import EmbeddedPostgres
from app.main import create_app
from app.settings import Settings
from tests.support.order_api import Shop, check_problem, check_refusal, new_customer, new_order, open_shop

_JSON = {"Content-Type": "application/json"}
_MIB = 1024 * 1024


@pytest.fixture(scope="module")
def shop(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with open_shop(postgres, tmp_path_factory.mktemp("service")) as shop:
        yield shop


@pytest.fixture(autouse=True)
def _serves_the_others(shop: Shop) -> Iterator[None]:
    """After each test an order is stored as before."""
    yield
    assert shop.place(new_order(("SKU-0001", 1))).status_code == 201


def _connect(shop: Shop) -> socket.socket:
    address = urlsplit(shop.service.url)
    return socket.create_connection((address.hostname, address.port), timeout=20)


def _exchange(shop: Shop, request: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to raw bytes; (0, b"") where the connection was only closed."""
    with _connect(shop) as connection:
        with contextlib.suppress(OSError):  # refused while it is still being sent
            connection.sendall(request)
        return _answer(connection)


def _answer(connection: socket.socket) -> tuple[int, bytes]:
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
            head, separator, body = received.partition(b"\r\n\r\n")
            if separator:
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                if len(body) >= length:
                    return int(head.split()[1]), body
    assert received == b"", "half an answer"
    return 0, b""


def _post(route: str, body: bytes) -> bytes:
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _check(exchanged: tuple[int, bytes], status: int, error_type: str) -> None:
    assert exchanged[0] == status, exchanged
    check_problem(json.loads(exchanged[1]), status, error_type)


@pytest.mark.parametrize("route", ["/orders", "/orders/batch"])
def test_an_endless_body_is_refused(shop: Shop, route: str) -> None:
    """413 soon after the limit; the rest is not read."""
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with _connect(shop) as connection:
        connection.sendall(head.encode())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not select.select([connection], [], [], 0)[0]:
                connection.sendall(chunk)
                sent += len(chunk)
                assert sent < 64 * _MIB, "it reads on and on"
        _check(_answer(connection), 413, "too_large")


@pytest.mark.parametrize("route", ["/orders", "/orders/batch"])
@pytest.mark.parametrize("length", [10**9, 10**18])
def test_a_huge_content_length_is_refused_at_once(shop: Shop, route: str, length: int) -> None:
    """413 before a byte of the body is there."""
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    _check(_exchange(shop, head.encode()), 413, "too_large")


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 5000, "1, 2", ""])
def test_a_content_length_that_is_no_number_is_refused(shop: Shop, length: str) -> None:
    """400 `validation`."""
    head = f"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    _check(_exchange(shop, head.encode()), 400, "validation")


def _order_with(quantity: bytes) -> bytes:
    return b'{"customer_id": "c", "items": [{"product_id": "SKU-0001", "quantity": %b}]}' % quantity


NOT_JSON = {
    "100,000 deep list": b"[" * 100_000,
    "100,000 deep object": b'{"a":' * 100_000,
    "deep and closed": b"[" * 20_000 + b"]" * 20_000,
    "deep in a field": _order_with(b"[" * 20_000 + b"]" * 20_000),
    "integer of 10^5 digits": _order_with(b"1" * 100_000),
    "integer of 5,000 digits": _order_with(b"1" * 5_000),
    "invalid UTF-8": b'{"customer_id": "\xc3\x28"}',
    "UTF-16": '{"customer_id": "c"}'.encode("utf-16"),
    "lone surrogate": b'{"customer_id": "\\ud800"}',
    "control character": b'{"customer_id": "\x01"}',
    "truncated": _order_with(b"1")[:-1],
    "comment": b"{} // an order",
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_refused_on_both_routes(shop: Shop, body: bytes) -> None:
    """400 `validation` alone and in a batch; 413 where it is over the limit."""
    batch = b'{"orders": [%b]}' % body
    if len(body) > 64 * 1024:
        check_refusal(shop.http.post("/orders", content=body, headers=_JSON), 413, "too_large")
    else:
        check_refusal(shop.http.post("/orders", content=body, headers=_JSON), 400, "validation")
    check_refusal(shop.http.post("/orders/batch", content=batch, headers=_JSON), 400, "validation")


@pytest.mark.parametrize("quantity", [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-0.0", b"1" * 4000])
def test_no_strange_number_is_a_quantity(shop: Shop, quantity: bytes) -> None:
    """422 `validation` alone and in a batch."""
    body = _order_with(quantity)
    check_refusal(shop.http.post("/orders", content=body, headers=_JSON), 422, "validation")
    answer = shop.http.post("/orders/batch", content=b'{"orders": [%b]}' % body, headers=_JSON)
    assert answer.status_code == 200
    check_problem(answer.json()["results"][0]["error"], 422, "validation")


@pytest.mark.parametrize(
    "twice",
    [
        '{"customer_id": "first", "customer_id": %s, "items": %i}',
        '{"customer_id": %s, "items": [], "items": %i}',
        '{"customer_id": 1, "customer_id": %s, "items": %i}',
        '{"items": %i, "customer_id": %s, "items": %i}',
    ],
)
def test_a_field_that_stands_twice_has_one_reading(shop: Shop, twice: str) -> None:
    """A field that stands twice makes the same order, or none, alone, in a batch, and beside a bad neighbour."""
    customer, product = new_customer(), shop.new_product()
    items = json.dumps([{"product_id": product, "quantity": 1}])
    text = twice.replace("%s", json.dumps(customer)).replace("%i", items)

    alone = shop.http.post("/orders", content=text, headers=_JSON)
    batched = shop.http.post("/orders/batch", content=f'{{"orders": [{text}]}}', headers=_JSON).json()[
        "results"
    ]
    mixed = shop.http.post("/orders/batch", content=f'{{"orders": [0, {text}]}}', headers=_JSON).json()[
        "results"
    ]

    def reading(status: int, order: dict[str, object]) -> tuple[object, ...]:
        return (status, order.get("customer_id"), order.get("items"))

    expected = reading(alone.status_code, alone.json())
    assert reading(batched[0]["status"], batched[0].get("order", {})) == expected
    assert reading(mixed[1]["status"], mixed[1].get("order", {})) == expected


def test_a_batch_of_many_defects_gets_a_short_answer(shop: Shop) -> None:
    """1 MiB of defects is not answered with ten times as much."""
    defects = json.dumps({str(n): 0 for n in range(900)})
    body = f'{{"orders": [{", ".join([defects] * 100)}]}}'
    assert 0.8 * _MIB < len(body) < _MIB
    answer = shop.http.post("/orders/batch", content=body, headers=_JSON)
    assert answer.status_code == 200
    assert len(answer.json()["results"]) == 100
    assert len(answer.content) < 64 * 1024
    single = shop.http.post("/orders", content=defects * 1, headers=_JSON)
    check_refusal(single, 422, "validation")
    assert len(single.content) < 1024


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Large": "x" * 64 * 1024},
        {f"X-{n}": "x" * 1000 for n in range(64)},
        {"Idempotency-Key": "k" * _MIB},
        {"Authorization": "Bearer " + "t" * 64 * 1024},
    ],
    ids=["one header of 64 KiB", "64 headers of 1 KiB", "a key of 1 MiB", "a token of 64 KiB"],
)
def test_huge_headers_are_refused(shop: Shop, headers: dict[str, str]) -> None:
    """431, and the connection is closed."""
    body = json.dumps(new_order(("SKU-0001", 1)))
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**headers, **_JSON}.items())
    request = f"POST /orders HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(body)}\r\n\r\n{body}"
    _check(_exchange(shop, request.encode()), 431, "validation")


@pytest.mark.parametrize(
    ("target", "status", "error_type"),
    [
        ("/%00", 404, "not_found"),
        ("/orders/%00", 404, "not_found"),
        ("/products/%00", 422, "validation"),
        ("/docs/assets/%00", 404, "not_found"),
        ("/docs/assets/..%2f..%2fpyproject.toml", 404, "not_found"),
        ("/docs/assets/../../../../etc/passwd", 404, "not_found"),
        ("/docs/assets/" + "x" * 1000, 404, "not_found"),
        ("/" + "x" * 20_000, 404, "not_found"),
        ("/" + "/" * 20_000, 404, "not_found"),
        ("/" + "%ff" * 5_000, 404, "not_found"),
        ("/" + "x" * 64 * 1024, 431, "validation"),
        ("/orders?cursor=" + "%00" * 5_000, 422, "validation"),
        ("/orders?limit=" + "9" * 20_000, 422, "validation"),
        ("/products?" + "a=b&" * 5_000 + "limit=0", 422, "validation"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_hostile_path_is_refused(shop: Shop, target: str, status: int, error_type: str) -> None:
    """4xx with a problem."""
    _check(_exchange(shop, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()), status, error_type)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS handshake
        b"GET / HTTP/9.9\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nIdempotency-Key: a\x00b\r\n\r\n",
    ],
    ids=["TLS", "HTTP/9.9", "nonsense", "HTTP/2", "two lengths", "bad chunk", "NUL in a header"],
)
def test_what_is_not_http_is_refused(shop: Shop, request_bytes: bytes) -> None:
    """A 4xx with a problem."""
    status, body = _exchange(shop, request_bytes)
    assert 400 <= status < 500
    check_problem(json.loads(body), status, "validation")


def test_memory_stays_flat_under_large_and_deep_bodies(shop: Shop) -> None:
    """Hundreds of the worst bodies leave the service's memory where a few of them had brought it."""
    bodies = [
        _post("/orders/batch", b"[" * (_MIB - 1)),
        _post("/orders/batch", b'{"orders": [' + b"0," * 500_000 + b"0]}"),
        _post("/orders/batch", json.dumps({str(n): n for n in range(60_000)}).encode()),
        _post("/orders/batch", b'{"orders": [' + b"[" * 500_000),
        _post("/orders", _order_with(b"1" * 60_000)),
        _post("/orders", b'{"customer_id": "' + b"c" * 65_000 + b'"}'),
        b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 65536\r\n\r\n{",
    ]

    def attack(rounds: int) -> float:
        for _ in range(rounds):
            for body in bodies[:-1]:
                status, _ = _exchange(shop, body)
                assert 400 <= status < 500
            with _connect(shop) as connection:  # goes away in the middle of its body
                connection.sendall(bodies[-1])
        return shop.service.metric("process_resident_memory_bytes")

    before = attack(3)
    assert attack(12) - before < 48 * _MIB


async def test_a_refused_order_leaves_nothing_to_the_collector(database_url: str) -> None:
    """No refusal ties its request's body into a cycle: the collector, made rare for speed, would find it late."""
    app = create_app(Settings.load(database_url=database_url, db_pool_min_size=1, catalog_size=1))
    refused = [
        ("/orders", {}),
        ("/orders", new_order(("SKU-none", 1))),
        ("/orders/batch", {}),
        ("/orders/batch", {"orders": [{}, new_order(("SKU-none", 1)), new_order(("SKU-0001", 0))]}),
    ]
    async with app.router.lifespan_context(app) as state:
        transport = httpx.ASGITransport(_with_state(app, state))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:

            async def refuse(times: int) -> int:
                """The frames of its requests that are still there."""
                gc.collect()
                gc.disable()
                try:
                    for _ in range(times):
                        for route, body in refused:
                            assert (await client.post(route, json=body)).status_code in (200, 422)
                    frames = [found for found in gc.get_objects() if isinstance(found, FrameType)]
                    return sum(frame.f_code.co_filename == intake.__file__ for frame in frames)
                finally:
                    gc.enable()

            assert await refuse(10) == 0


def _with_state(app: ASGIApp, state: Any) -> ASGIApp:
    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    return serve


def test_slow_clients_do_not_keep_the_others_waiting(shop: Shop) -> None:
    """With 500 connections that send a header byte by byte, orders are stored as before."""
    with contextlib.ExitStack() as stack:
        slow = _slow_clients(shop, stack)
        for connection in slow:
            assert shop.place(new_order(("SKU-0001", 1))).status_code == 201
            connection.sendall(b"x")


@pytest.mark.slow
def test_slow_clients_are_let_go(shop: Shop) -> None:
    """A request whose head does not end is answered with 408, however steadily its bytes come."""
    with contextlib.ExitStack() as stack:
        slow = _slow_clients(shop, stack)
        give_up_at = time.monotonic() + 60
        while not select.select(slow, [], [], 0.2)[0]:
            assert time.monotonic() < give_up_at
            for connection in slow:
                connection.sendall(b"x")
        for connection in slow:
            _check(_answer(connection), 408, "timeout")


def _slow_clients(shop: Shop, stack: contextlib.ExitStack) -> list[socket.socket]:
    slow = [stack.enter_context(_connect(shop)) for _ in range(500)]
    for connection in slow:
        connection.sendall(b"POST /orders HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    return slow
