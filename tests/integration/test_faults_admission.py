"""Places are for work: clients that neither send nor read hold none, and nobody holds all."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

from app.auth import new_key
from app.settings import Settings, SettingsError
from tests.support.http_server import GET, Client, Service, assert_refused, serving, until
from tests.support.occupation import PATIENT, occupied
from tests.support.order_api import Shop, check_problem, check_refusal, new_order
from tests.support.service_process import ServiceProcess

_ALICE, _ALICE_ENTRY = new_key("alice")
_BOB, _BOB_ENTRY = new_key("bob")
_KIB = 1024


def _head(path: str, length: int | str, token: str | None = None) -> bytes:
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\n{authorization}Content-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


@contextlib.contextmanager
def _connections(service: ServiceProcess, number: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have sent something, and read nothing."""
    address = urlsplit(service.url)
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(number):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((address.hostname, address.port))
            connection.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                connection.send(sent)
            opened.append(connection)
        yield opened


@pytest.mark.parametrize("path", ["/orders", "/orders/batch"])
def test_heads_without_a_body_hold_no_place(
    start_service: Callable[..., ServiceProcess], database_url: str, path: str
) -> None:
    """Three times as many as there are places, and an order is stored as ever."""
    shop = Shop(start_service(MAX_IN_FLIGHT=100), database_url)
    with _connections(shop.service, 300, _head(path, 60_000) + b"{"):
        for _ in range(20):
            assert shop.place(new_order(("SKU-0001", 1))).status_code == 201
            assert shop.http.get("/orders").status_code == 200
        assert shop.service.metric("requests_in_flight") == 0
    shop.http.close()


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", "/orders/batch", b'{"orders": [%b{}]}' % (b"{}, " * 89)),
        ("GET", "/orders?limit=100", b""),
    ],
    ids=["batches", "pages"],
)
def test_answers_that_nobody_reads_hold_no_place(
    start_service: Callable[..., ServiceProcess], database_url: str, method: str, target: str, body: bytes
) -> None:
    """Of batches and of reads: when nothing more can be sent to the clients that ask for them, no place is taken."""
    shop = Shop(start_service(MAX_IN_FLIGHT=100, LOG_LEVEL="warning"), database_url)
    large = new_order(*((f"SKU-{number:04}", 1) for number in range(1, 51)))
    assert len(shop.place_batch([large] * 100)) == 100
    request = _head(target, len(body)).replace(b"POST", method.encode()) + body

    def answered() -> float:
        return shop.service.metric(
            "http_requests_total", method=method, route=target.partition("?")[0], status="200"
        )

    with _connections(shop.service, 10, request * 200):
        before, now = -1.0, 0.0
        while now > before:
            time.sleep(1)
            before, now = now, answered()
        assert 10 < now < 1900, "no client was too slow"
        assert shop.service.metric("requests_in_flight") == 0
        for _ in range(10):
            assert shop.place(new_order(("SKU-0001", 1))).status_code == 201
    shop.http.close()


def test_a_principal_cannot_hold_all_places(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """Past its share it is refused, in orders, batches and reads; another is served, up to the bound of all."""
    service = start_service(**PATIENT, API_KEYS=f"{_ALICE_ENTRY},{_BOB_ENTRY}", MAX_IN_FLIGHT=200)
    alice, bob = Shop(service, database_url, _ALICE), Shop(service, database_url, _BOB)
    order = new_order(("SKU-0001", 1))
    with occupied(service, database_url, 100, token=_ALICE):
        check_refusal(alice.place(order), 503, "overloaded")
        check_refusal(alice.http.post("/orders/batch", json={"orders": [order]}), 503, "overloaded")
        check_refusal(alice.http.get("/orders"), 503, "overloaded")
        assert bob.http.get("/orders").status_code == 200
        check_refusal(bob.place(new_order(("SKU-none", 1))), 422, "unknown_product")
        assert service.metric("requests_in_flight") == 100
    assert alice.place(order).status_code == bob.place(order).status_code == 201
    assert service.metric("requests_in_flight") == 0
    assert service.metric("requests_shed_total", reason="admission") == 2
    alice.http.close()
    bob.http.close()


def test_everybody_may_hold_all_places_where_nobody_is_told_apart(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    service = start_service(**PATIENT, MAX_IN_FLIGHT=100)
    with occupied(service, database_url, 100):
        assert service.metric("requests_in_flight") == 100


def test_a_body_that_breaks_off_is_booked_as_its_orders_refusal(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """400, one order that was rejected, one request of its route: on the order path, too."""
    service = start_service()
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        head = _head("/orders", 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        connection.sendall(head + b"1\r\n{\r\n")
        time.sleep(0.2)
        connection.sendall(b"not hex\r\n")
        status, _, rest = connection.recv(65536).partition(b"\r\n")
        assert b" 400 " in status
        check_problem(json.loads(rest.partition(b"\r\n\r\n")[2]), 400, "validation")
    assert service.metric("orders_total", status="rejected", error_type="validation") == 1
    assert service.metric("http_requests_total", method="POST", route="/orders", status="400") == 1
    assert service.metric("http_requests_total", method="other", route="unmatched", status="400") == 0


# --- what unread and unsent bodies hold -------------------------------------------------------------------------


async def _post(service: Service, body: bytes) -> tuple[int, bytes, bytes]:
    client = await service.connect(
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    return await client.answer()


async def test_unfinished_bodies_are_bounded_together() -> None:
    """What is over the bound is refused, the largest first; others are served, and it is free again at the end."""
    async with serving(unserved_bytes=1024 * _KIB) as service:
        shared = service.server.connections
        slow = []
        for number in range(30):
            client = await service.connect(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n")
            client.writer.write(b"x" * (100 + number) * _KIB)
            slow.append(client)
            await asyncio.sleep(0)
        for _ in range(20):
            assert (await _post(service, b"small"))[0] == 200
            assert shared.unserved_bytes <= 1024 * _KIB
        assert_refused(await slow[-1].answer(), 503, "overloaded")
        assert b"retry-after: 1" in (await slow[-2].answer())[1]
        await until(lambda: sum(one._reading == 2 for one in service.server.open) <= 10)
        assert 0 < shared.unserved_bytes <= 1024 * _KIB
        for client in service.clients:
            client.writer.transport.abort()
        await until(lambda: not shared.unserved_bytes)


async def test_a_body_that_ends_holds_nothing() -> None:
    """However it came, whoever waits for it, and whether or not it was read."""
    async with serving() as service:
        shared = service.server.connections
        client = await service.connect()
        for path in (b"/", b"/early"):
            client = await service.connect(
                b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" % path + b"x" * 100_000
            )
            await asyncio.sleep(0.1)
            with contextlib.suppress(ConnectionError):
                client.writer.write(b"x" * 100_000 + GET)
                await client.writer.drain()
            assert (await client.answer())[0] in (200, 413)
        await until(lambda: not shared.unserved_bytes)


async def test_requests_sent_ahead_are_bounded_together() -> None:
    """Those that wait for their turn, with their bodies: the one being served is answered, the next one refused."""
    async with serving(unserved_bytes=500 * _KIB) as service:
        held = b"POST /held HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
        ahead = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000
        clients: list[Client] = []
        for _ in range(6):
            clients.append(await service.connect(held + ahead * 2 + GET))
            await asyncio.sleep(0.05)
        await until(lambda: any(one._refusal for one in service.server.open))
        assert service.server.connections.unserved_bytes <= 500 * _KIB
        service.echo.release.set()
        refused = 0
        for client in clients:
            assert (await client.answer())[2] == b"x"
            answer = await client.answer()
            refused += answer[0] == 503
            if answer[0] == 503:
                assert_refused(answer, 503, "overloaded")
                assert await client.reader.read() == b""
            else:
                assert [answer[0], *[(await client.answer())[0] for _ in range(2)]] == [200] * 3
        assert 1 <= refused < 6
        await until(lambda: not service.server.connections.unserved_bytes)


async def test_unread_answers_are_bounded_together() -> None:
    """The clients that have most to read are cut off; the others are not."""
    async with serving(unread_bytes=4_000_000) as service:
        service.echo.answer = b"x" * 9_000_000
        unread = []
        for _ in range(4):
            connection = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", service.port))
            connection.sendall(GET)
            unread.append(connection)
        await until(lambda: len(service.server.open) < 4)
        await service.sweeps(2)
        assert sum(one.unread_bytes for one in service.server.open) <= 4_000_000
        service.echo.answer = b"small"
        client = await service.connect(GET)
        assert (await client.answer())[2] == b"small"
        for connection in unread:
            connection.close()


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_in_flight": 1}, "MAX_IN_FLIGHT:"),
        ({"max_in_flight": 99}, "MAX_IN_FLIGHT:"),
        ({"max_in_flight": 100, "api_keys": _BOB_ENTRY}, "MAX_IN_FLIGHT_SHARE_PER_PRINCIPAL:"),
        (
            {"max_in_flight": 2000, "api_keys": _BOB_ENTRY, "max_in_flight_share_per_principal": 0.04},
            "MAX_IN_FLIGHT_SHARE_PER_PRINCIPAL:",
        ),
        ({"max_in_flight_share_per_principal": 0}, "MAX_IN_FLIGHT_SHARE_PER_PRINCIPAL:"),
        ({"max_in_flight_share_per_principal": 1.1}, "MAX_IN_FLIGHT_SHARE_PER_PRINCIPAL:"),
        ({"max_in_flight_share_per_principal": "nan"}, "MAX_IN_FLIGHT_SHARE_PER_PRINCIPAL:"),
    ],
)
def test_a_batch_that_could_never_be_served_stops_the_start(settings: dict[str, object], name: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.load(**settings)
    assert str(refused.value).startswith(name)
    assert "\n" not in str(refused.value)


def test_the_start_says_which_setting_is_too_small(start_service: Callable[..., ServiceProcess]) -> None:
    with pytest.raises(RuntimeError, match="MAX_IN_FLIGHT: 99 is less than a batch may hold"):
        start_service(MAX_IN_FLIGHT=99)


def test_the_largest_batch_is_served_by_the_smallest_setting(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    service = start_service(MAX_IN_FLIGHT=200, API_KEYS=_BOB_ENTRY)
    bob = Shop(service, database_url, _BOB)
    results = bob.place_batch([new_order(("SKU-0001", 1))] * 100)
    assert [result["status"] for result in results] == [201] * 100
    bob.http.close()
