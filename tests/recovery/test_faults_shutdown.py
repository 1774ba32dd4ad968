"""A shutdown ends before Kubernetes ends it, whatever is still in progress."""

import contextlib
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from app.settings import TERMINATION_GRACE_PERIOD_SECONDS, Settings
from tests.support import locks
from tests.support.order_api import new_order
from tests.support.service_process import ServiceProcess

_IN_A_CLUSTER = 5  # DRAIN_DELAY_SECONDS there
_INTERPRETER_SECONDS = (
    2  # of what no step counts: the last turns of the loop, the log, the interpreter's own end
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_the_sum_of_a_shutdown_fits_into_kubernetes_default() -> None:
    """Drain, requests in progress, queue and pool, each at its longest: at most 30 s (it was 42)."""
    settings = Settings.load(drain_delay_seconds=_IN_A_CLUSTER)
    steps = (
        settings.drain_delay_seconds,
        settings.shutdown_grace_seconds,
        settings.request_deadline_seconds,
        settings.db_statement_timeout_seconds,
    )
    assert settings.longest_shutdown_seconds == sum(steps) == 27
    assert settings.longest_shutdown_seconds + _INTERPRETER_SECONDS <= TERMINATION_GRACE_PERIOD_SECONDS == 30


@pytest.mark.parametrize("seconds", [1, 5, 20])
def test_no_order_is_cut_off_before_its_deadline(seconds: int) -> None:
    """Requests in progress get at least REQUEST_DEADLINE_SECONDS."""
    assert Settings.load(request_deadline_seconds=seconds).shutdown_grace_seconds >= seconds


@pytest.mark.parametrize(("seconds", "is_warned"), [(5, False), (9, True)])
def test_a_longer_sum_is_warned_of(
    start_service: Callable[..., ServiceProcess], seconds: int, *, is_warned: bool
) -> None:
    """The log of the start says what a cluster must be told."""
    service = start_service(DRAIN_DELAY_SECONDS=seconds)
    with service.client() as client:  # its access line comes after everything the start had to say
        client.get("/livez")
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(30) == 0
    log = service.log_path.read_text()
    assert "/livez" in log
    assert ("shutdown_may_be_cut_short" in log) == is_warned


@pytest.mark.slow
def test_a_shutdown_at_its_worst(start_service: Callable[..., ServiceProcess], database_url: str) -> None:
    """An order that waits for a lock and a client that never sends its body: the end comes within the sum."""
    service = start_service(DRAIN_DELAY_SECONDS=_IN_A_CLUSTER)
    address = urlsplit(service.url)
    assert address.hostname
    assert address.port
    longest = Settings.load(drain_delay_seconds=_IN_A_CLUSTER).longest_shutdown_seconds
    with (
        ThreadPoolExecutor() as threads,
        service.client() as client,
        locks.holding_commits(database_url),
        contextlib.closing(socket.create_connection((address.hostname, address.port))) as unfinished,
    ):
        assert client.get("/products/SKU-0001").status_code == 200
        asked_at = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        time.sleep(_IN_A_CLUSTER - 0.5)
        head = (
            "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        )
        unfinished.sendall(head.encode())
        waiting = threads.submit(client.post, "/orders", json=new_order(("SKU-0001", 1)))
        code = service.process.wait(60)
        took = time.monotonic() - asked_at
        assert waiting.result().status_code in (503, 504)
    assert took <= longest + _INTERPRETER_SECONDS
    assert code == 1  # a request was given up
