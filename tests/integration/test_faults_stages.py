"""The stages of an order's path: only time that passed is counted, and only in stages that were passed."""

import contextlib
import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from tests.support.order_api import check_problem, new_order
from tests.support.service_process import ServiceProcess

_DEADLINE_SECONDS = 0.4


def _stages(service: ServiceProcess) -> dict[str, tuple[float, float]]:
    """Count and sum of each stage."""
    metrics = service.metrics()
    return {
        stage: (
            metrics["order_stage_seconds_count", (("stage", stage),)],
            metrics["order_stage_seconds_sum", (("stage", stage),)],
        )
        for stage in ("parse", "price", "queue", "store", "respond")
    }


def _post_slowly(service: ServiceProcess, path: str, body: bytes, pause_seconds: float) -> bytes:
    """Send the head, and the body after a pause; the answer's body."""
    address = urlsplit(service.url)
    assert address.hostname
    assert address.port
    with contextlib.closing(socket.create_connection((address.hostname, address.port), timeout=10)) as client:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        client.sendall(head.encode())
        time.sleep(pause_seconds)
        client.sendall(body)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    return answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("route", ["/orders", "/orders/batch"])
def test_a_late_body_takes_no_time_away(start_service: Callable[..., ServiceProcess], route: str) -> None:
    """An order that is refused for its deadline was neither stored nor answered for it: `store` fell by weeks."""
    service = start_service(REQUEST_DEADLINE_SECONDS=_DEADLINE_SECONDS)
    order = new_order(("SKU-0001", 1))
    with service.client() as client:
        assert client.post("/orders", json=order).status_code == 201
    before = _stages(service)
    assert {count for count, _ in before.values()} == {1}
    body = json.dumps(order if route == "/orders" else {"orders": [order]}).encode()
    answer = json.loads(_post_slowly(service, route, body, 1.5 * _DEADLINE_SECONDS))
    problem = answer if route == "/orders" else answer["results"][0]["error"]
    check_problem(problem, 504, "timeout")
    after = _stages(service)
    for stage, (count, seconds) in after.items():
        assert count == (1 if stage in ("store", "respond") else 2), stage
        assert seconds >= before[stage][1], stage
    assert after["parse"][1] - before["parse"][1] > _DEADLINE_SECONDS
