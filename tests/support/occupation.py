"""Places among what is in flight, held by orders that wait for a lock."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import httpx

from tests.support import locks
from tests.support.order_api import new_order
from tests.support.service_process import ServiceProcess

# Of the service, where orders are to wait for as long as a test needs.
PATIENT = {"DB_STATEMENT_TIMEOUT_SECONDS": 40, "REQUEST_DEADLINE_SECONDS": 40, "BATCH_MAX_WAIT_SECONDS": 40}


class Notes(Protocol):
    """What keeps account of the results."""

    def note_results(self, results: Sequence[dict[str, Any]]) -> None:
        """Take the results of a batch."""


@contextlib.contextmanager
def occupied(
    service: ServiceProcess, dsn: str, places: int, notes: Notes | None = None, token: str | None = None
) -> Iterator[None]:
    """Hold *places* (at most 100) with one batch whose commit does not end, until the block ends; then it is stored.

    The service must be as patient as `PATIENT`.
    """
    answers: list[httpx.Response] = []
    batch = {"orders": [new_order(("SKU-0001", 1))] * places}
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def send() -> None:
        answers.append(httpx.post(f"{service.url}/orders/batch", json=batch, headers=headers, timeout=60))

    sending = threading.Thread(target=send)
    before = service.metric("requests_in_flight")
    with locks.holding_commits(dsn):
        sending.start()
        give_up_at = time.monotonic() + 10
        while service.metric("requests_in_flight") < before + places:
            assert time.monotonic() < give_up_at, "the batch holds no places"
        yield
    sending.join()
    results = answers[0].json()["results"]
    assert [result["status"] for result in results] == [201] * places
    if notes is not None:
        notes.note_results(results)
