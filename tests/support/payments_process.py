"""The payments simulator as its users run it: a process of its own; and an auditor that reads its book."""

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx

from tests.support.ledger import StoredOrder
from tests.support.order_api import execute

_STARTED = re.compile(r"payments simulator on (\S+)")
_START_SECONDS = 20


def due(dsn: str) -> int:
    """The orders about which payments is still to be asked."""
    return int(execute(dsn, "SELECT count(*) FROM orders WHERE payment_due < 'infinity'")[0][0])


async def until_settled(dsn: str, seconds: float = 30) -> None:
    """Return once nothing is due."""
    async with asyncio.timeout(seconds):
        while due(dsn):  # noqa: ASYNC110  # another process works on it
            await asyncio.sleep(0.05)


class BookEntry(NamedTuple):
    """What payments knows of one order."""

    order_id: str
    status: str
    charges: int  # that stand now
    charged_cents: int
    authorised: int  # ever
    asked: int


class PaymentsProcess:
    """A running `python -m app.payments_simulator`; `kill` and `start` keep its port and its book."""

    def __init__(self, directory: Path, **behaviour: object) -> None:
        self._stderr_path = directory / "payments.log"
        self._journal = directory / "payments.jsonl"
        self._flags = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in {"latency_ms": 1, "seed": 1, **behaviour}.items()
        ]
        self.url = "http://127.0.0.1:0"

    def start(self) -> Self:
        """Start it and wait until it listens."""
        port = self.url.rpartition(":")[2]
        with self._stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "app.payments_simulator",
                    f"--port={port}",
                    f"--journal={self._journal}",
                    *self._flags,
                ],
                stderr=stderr,
                start_new_session=True,
            )
        give_up_at = time.monotonic() + _START_SECONDS
        while (started := _STARTED.search(self._stderr_path.read_text())) is None:
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.kill()
                raise RuntimeError(f"payments did not start: {self._stderr_path.read_text()}")
            time.sleep(0.02)
        self.url = started[1]
        return self

    def kill(self) -> None:
        """SIGKILL; repeatable."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP: connections are accepted by the system, and nobody answers."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def behave(self, **behaviour: object) -> None:
        """Change its behaviour from now on."""
        httpx.patch(f"{self.url}/behaviour", json=behaviour).raise_for_status()

    def attempts(self) -> int:
        """The requests that came to it, since it started."""
        return sum(httpx.get(f"{self.url}/attempts").raise_for_status().json().values())

    def book(self) -> dict[str, BookEntry]:
        """Its book, by order."""
        entries = httpx.get(f"{self.url}/authorisations", timeout=30).raise_for_status().json()
        return {entry["order_id"]: BookEntry(**entry) for entry in entries}

    def entry(self, order_id: str) -> BookEntry:
        """Its book, of one order."""
        return BookEntry(**httpx.get(f"{self.url}/authorisations/{order_id}").raise_for_status().json())


def audit(orders: Iterable[StoredOrder], book: Mapping[str, BookEntry]) -> list[str]:
    """What does not agree between the settled orders and payments' book, one sentence each."""
    found = []
    known = set()
    for order in orders:
        known.add(order.id)
        entry = book.get(order.id)
        charges, cents = (entry.charges, entry.charged_cents) if entry else (0, 0)
        wanted: Any = (1, order.total_cents) if order.status == "confirmed" else (0, 0)
        if order.status == "pending":
            found.append(f"{order.id} was never settled")
        elif (charges, cents) != wanted:
            found.append(f"{order.id} is {order.status}, and was charged {charges} times, {cents} cents")
        if entry and entry.authorised > 1:
            found.append(f"{order.id} was authorised {entry.authorised} times")
        if order.status == "cancelled" and entry and entry.authorised and entry.status != "voided":
            found.append(f"{order.id} is cancelled, and was not voided")
    found += [f"{order_id} was charged, and there is no such order" for order_id in set(book) - known]
    return found
