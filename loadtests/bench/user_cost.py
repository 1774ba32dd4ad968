"""The cost of an order in the generator: Locust's two HTTP users and ours, on one target, taking turns.

`python -m loadtests.bench.user_cost [--rounds 5] [--seconds 3]` prints CPU microseconds per order (medians of the
rounds), and ratios, which are what to quote: speeds drift, and do so for all three.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from typing import Any

_USERS = 50
# Short, so that each of them keeps its core busy, but with a timer, as in a real test.
_WAIT_SECONDS = (0.0005, 0.001)
_WARM_UP_SECONDS = 0.5

_PRODUCTS = {"items": [{"id": "SKU-0001", "price_cents": 8118, "currency": "EUR"}], "next_cursor": None}
_ORDER = {
    "id": "01931a2b-3c4d-7e5f-8091-a2b3c4d5e6f7",
    "customer_id": "loadtest-1",
    "status": "confirmed",
    "currency": "EUR",
    "total_cents": 8118,
    "items": [{"product_id": "SKU-0001", "quantity": 1, "unit_price_cents": 8118}],
    "created_at": "2026-01-01T00:00:00.000000Z",
}


def _answer(status: str, document: object, extra: str = "") -> bytes:
    body = json.dumps(document)
    return (
        f"HTTP/1.1 {status}\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\ncontent-type: application/json\r\n"
        f"x-request-id: 0123456789abcdef\r\n{extra}content-length: {len(body)}\r\n\r\n{body}"
    ).encode()


class _Target(asyncio.Protocol):
    """Answers without reading: the generator must be the only one that is busy."""

    _products = _answer("200 OK", _PRODUCTS)
    _created = _answer("201 Created", _ORDER, f"location: /orders/{_ORDER['id']}\r\n")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._received.startswith(b"GET"):
            self._received = b""
            self._transport.write(self._products)
        elif self._received.endswith(b"}"):  # Locust's users send head and body apart
            self._received = b""
            self._transport.write(self._created)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Target, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201 - for the parent
    await server.serve_forever()


def _drive(kind: str, url: str, seconds: float) -> None:
    """Run one kind of user in this process, and print its CPU microseconds per order."""
    os.environ["LOADTEST_RUN_ID"] = "1"  # all get the same answer, and ours looks at it
    import gevent  # noqa: PLC0415 - importing Locust patches the process: only here
    import locust  # noqa: PLC0415
    from locust.env import Environment  # noqa: PLC0415

    from loadtests.samples import Sample  # noqa: PLC0415
    from loadtests.users import order_user, orders  # noqa: PLC0415

    orders.MOST_PIECES = 1
    body = {"customer_id": "loadtest-1", "items": [{"product_id": "SKU-0001", "quantity": 1}]}

    def post(user: Any) -> None:
        user.client.post("/orders", json=body, headers={"Idempotency-Key": uuid.uuid4().hex})

    def place(user: Any) -> None:
        user.place_order()

    base, order = {
        "HttpUser": (locust.HttpUser, post),
        "FastHttpUser": (locust.FastHttpUser, post),
        "OrderUser": (order_user.OrderUser, place),
    }[kind]
    records: list[Sample] = []
    order_user.order_sinks.append(records.append)  # the ledger's cost is a part of it
    members = {"host": url, "wait_time": locust.between(*_WAIT_SECONDS), "tasks": [order], "abstract": False}
    environment = Environment(user_classes=[type(kind, (base,), members)], events=locust.events)
    runner = environment.create_local_runner()
    runner.start(_USERS, spawn_rate=_USERS)
    gevent.sleep(_WARM_UP_SECONDS)
    requests, cpu_seconds = environment.stats.num_requests, time.process_time()
    gevent.sleep(seconds)
    requests, cpu_seconds = environment.stats.num_requests - requests, time.process_time() - cpu_seconds
    failures = environment.stats.num_failures
    runner.quit()
    if failures:
        raise SystemExit(f"{kind}: {failures} failures")
    print(cpu_seconds / requests * 1e6)  # noqa: T201 - for the parent


_KINDS = ("HttpUser", "FastHttpUser", "OrderUser")


def measure(rounds: int, seconds: float) -> dict[str, float]:
    """CPU microseconds per order of each kind of user, the median of *rounds* interleaved runs."""
    command = [sys.executable, "-m", "loadtests.bench.user_cost"]
    figures: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    with subprocess.Popen([*command, "--serve"], stdout=subprocess.PIPE, text=True) as target:  # noqa: S603
        try:
            assert target.stdout is not None  # noqa: S101 - it is a pipe
            url = f"http://127.0.0.1:{int(target.stdout.readline())}"
            for _ in range(rounds):
                for kind in _KINDS:
                    drive = [*command, "--drive", kind, "--url", url, "--seconds", str(seconds)]
                    output = subprocess.run(drive, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603
                    figures[kind].append(float(output))
        finally:
            target.kill()
    return {kind: statistics.median(values) for kind, values in figures.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--drive", choices=_KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve())
    elif options.drive:
        _drive(options.drive, options.url, options.seconds)
    else:
        microseconds = measure(options.rounds, options.seconds)
        for kind, value in microseconds.items():
            ratio = value / microseconds["OrderUser"]
            print(f"{kind:14}{value:7.0f} µs of CPU per order{ratio:8.2f} x ours")  # noqa: T201 - the result


if __name__ == "__main__":
    main()
