"""`python -m app.payments_simulator`: a payments service to test against, as slow, broken or stubborn as it is told.

It charges once per `Idempotency-Key`, not once per order: whoever changes the key charges twice, and an audit shows it.
A void is by order id, and closes the order: what is asked for later is answered `voided`, and not charged. What it
answered is in its journal first, so that `kill -9` loses nothing; it is read again at the next start.

    POST  /authorisations   {"order_id", "amount_cents", "currency"}, Idempotency-Key -> {"order_id", "status"}
    POST  /voids            {"order_id"} -> {"order_id", "status": "voided"}
    GET   /authorisations   the book: for each order its charges that stand, and how often payments was asked
    GET   /authorisations/{order_id}
    GET   /attempts         how many requests came for authorisations and voids, whatever became of them
    GET   /behaviour        how it behaves
    PATCH /behaviour        change that from now on: a JSON object of the fields of GET
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import socket
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

_MAX_BODY_BYTES = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    422: "Unprocessable Content",
    503: "Service Unavailable",
}
_SHARES = ("error_rate", "decline_rate", "hang_rate", "reset_rate", "lost_answer_rate", "flap_share")
_TIMES = ("latency_ms", "latency_spread", "flap_seconds")


@dataclass(frozen=True)
class Behaviour:
    """How payments behaves; all rates are shares of the requests, from 0 to 1."""

    latency_ms: float = field(default=20.0, metadata={"help": "median time to answer"})
    latency_spread: float = field(
        default=0.3, metadata={"help": "sigma of its lognormal distribution; 0: always the median"}
    )
    error_rate: float = field(default=0.0, metadata={"help": "answered 503, and nothing is done"})
    decline_rate: float = field(
        default=0.0, metadata={"help": "orders declined; of an order, always the same"}
    )
    decline_above_cents: int = field(default=0, metadata={"help": "orders above this are declined; 0: none"})
    hang_rate: float = field(default=0.0, metadata={"help": "never answered, and nothing is done"})
    reset_rate: float = field(default=0.0, metadata={"help": "connection reset, and nothing is done"})
    lost_answer_rate: float = field(
        default=0.0, metadata={"help": "done, and the connection reset in place of the answer"}
    )
    flap_seconds: float = field(default=0.0, metadata={"help": "period of being up and down; 0: always up"})
    flap_share: float = field(default=0.5, metadata={"help": "of the period it is down, answering 503"})

    def __post_init__(self) -> None:
        """Refuse what is no share or no time."""
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}: must be a number")
            if name in _SHARES and not 0 <= value <= 1:
                raise ValueError(f"{name}: must be from 0 to 1")
            if name in _TIMES and not 0 <= value <= 3_600_000:  # noqa: PLR2004 - an hour in ms
                raise ValueError(f"{name}: must be from 0 to 3600000")

    def is_down(self, now: float) -> bool:
        """Whether it flaps, and is in the half that is down."""
        return bool(self.flap_seconds) and now % self.flap_seconds < self.flap_share * self.flap_seconds

    def declines(self, order_id: str, amount_cents: int) -> bool:
        """Whether it declines this order, however often it is asked."""
        if self.decline_above_cents and amount_cents > self.decline_above_cents:
            return True
        return zlib.crc32(order_id.encode()) < self.decline_rate * 2**32


class Book:
    """Answers that were given, by idempotency key, and orders that were voided."""

    def __init__(self, journal: Path | None = None) -> None:
        """Read *journal* where it is there, and append to it from now on."""
        self._keys: dict[str, dict[str, Any]] = {}
        self._orders: dict[str, list[dict[str, Any]]] = {}
        self._voided: set[str] = set()
        self.asked: Counter[str] = Counter()
        self._file: IO[str] | None = None
        if journal is not None:
            if journal.exists():
                complete, _, torn = journal.read_text().rpartition("\n")
                for line in complete.splitlines():
                    self._apply(json.loads(line))
                if torn:  # the line that a kill cut off: nobody was answered
                    journal.write_text(f"{complete}\n" if complete else "")
            self._file = journal.open("a")

    def authorise(self, key: str, order_id: str, amount_cents: int, currency: str, *, declined: bool) -> str:
        """The first answer to *key*, unless its order was voided."""
        if order_id in self._voided:
            return "voided"
        if key not in self._keys:
            status = "declined" if declined else "authorised"
            self._write(
                {
                    "key": key,
                    "order_id": order_id,
                    "amount_cents": amount_cents,
                    "currency": currency,
                    "status": status,
                }
            )
        return str(self._keys[key]["status"])

    def void(self, order_id: str) -> str:
        """Undo every charge of an order, and refuse later ones."""
        if order_id not in self._voided:
            self._write({"order_id": order_id, "status": "voided"})
        return "voided"

    def entry(self, order_id: str) -> dict[str, Any]:
        """What an auditor wants to know of one order."""
        made = self._orders.get(order_id, [])
        is_voided = order_id in self._voided
        authorised = [each for each in made if each["status"] == "authorised"]
        return {
            "order_id": order_id,
            "status": "voided" if is_voided else made[0]["status"] if made else "unknown",
            "charges": 0 if is_voided else len(authorised),
            "charged_cents": 0 if is_voided else sum(each["amount_cents"] for each in authorised),
            "authorised": len(authorised),
            "asked": self.asked[order_id],
        }

    def entries(self) -> list[dict[str, Any]]:
        """The whole book."""
        return [self.entry(order_id) for order_id in sorted({*self._orders, *self._voided})]

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"at": time.time(), **line}) + "\n")
            self._file.flush()
            os.fdatasync(self._file.fileno())
        self._apply(line)

    def _apply(self, line: dict[str, Any]) -> None:
        if line["status"] == "voided":
            self._voided.add(line["order_id"])
        else:
            self._keys[line["key"]] = line
            self._orders.setdefault(line["order_id"], []).append(line)


class _Refused(Exception):
    """The request is none that payments knows; its status and why."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class PaymentsSimulator:
    """The server: HTTP/1.1 over kept connections, on the event loop it is started on."""

    def __init__(self, behaviour: Behaviour, book: Book, seed: int | None = None) -> None:
        """*seed*: of what happens to which request, so that a run can be repeated."""
        self.behaviour = behaviour
        self._book = book
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._attempts: Counter[str] = Counter()
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen; the port."""
        self._server = await asyncio.start_server(self._serve, host, port, backlog=1024)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close, and cut off who is connected."""
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - start_server makes one
        self._connections.add(task)
        # A client that goes away, or sends what is no HTTP, ends its connection; so does the end of the server.
        with contextlib.suppress(
            OSError, EOFError, ValueError, asyncio.LimitOverrunError, asyncio.CancelledError
        ):
            while await self._exchange(reader, writer):
                pass
        writer.transport.abort()
        self._connections.discard(task)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False where the connection is to end."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:-2])
        }
        length = int(headers.get("content-length", 0))
        if length > _MAX_BODY_BYTES:
            return False
        body = await reader.readexactly(length)
        path = target.partition("?")[0]
        try:
            status, document = await self._answer(method, path, headers, body)
        except _Refused as refusal:
            status, document = refusal.status, {"detail": str(refusal)}
        except ConnectionResetError:
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            return False
        text = json.dumps(document).encode()
        writer.write(
            b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, _REASONS[status].encode(), len(text), text)
        )
        await writer.drain()
        return headers.get("connection", "").lower() != "close"

    async def _answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, object]:
        match method, path.strip("/").split("/"):
            case "POST", ["authorisations" | "voids" as what]:
                return await self._payment(what, headers.get("idempotency-key", ""), _object(body))
            case "GET", ["authorisations"]:
                return 200, self._book.entries()
            case "GET", ["authorisations", order_id]:
                return 200, self._book.entry(order_id)
            case "GET", ["attempts"]:
                return 200, {
                    "authorisations": self._attempts["authorisations"],
                    "voids": self._attempts["voids"],
                }
            case "GET", ["behaviour"]:
                return 200, asdict(self.behaviour)
            case "PATCH", ["behaviour"]:
                try:
                    self.behaviour = replace(self.behaviour, **_object(body))
                except (TypeError, ValueError) as exc:
                    raise _Refused(422, str(exc)) from exc
                return 200, asdict(self.behaviour)
        raise _Refused(404, f"there is no {method} {path}")

    async def _payment(self, what: str, key: str, document: dict[str, Any]) -> tuple[int, object]:
        """Do what was asked, or misbehave."""
        self._attempts[what] += 1
        order_id = document.get("order_id")
        amount_cents, currency = document.get("amount_cents"), document.get("currency")
        if not isinstance(order_id, str) or not order_id:
            raise _Refused(422, "order_id: must be text")
        if what == "authorisations" and not (
            key and isinstance(amount_cents, int) and amount_cents >= 0 and isinstance(currency, str)
        ):
            raise _Refused(422, "an authorisation needs an Idempotency-Key, amount_cents and currency")
        self._book.asked[order_id] += 1
        behaviour, chance = self.behaviour, self._random.random
        hangs, resets, fails, loses = (
            chance() < rate
            for rate in (
                behaviour.hang_rate,
                behaviour.reset_rate,
                behaviour.error_rate,
                behaviour.lost_answer_rate,
            )
        )
        seconds = behaviour.latency_ms / 1000
        if behaviour.latency_spread:
            seconds *= self._random.lognormvariate(0, behaviour.latency_spread)
        if hangs:
            await asyncio.Event().wait()
        if resets:
            raise ConnectionResetError
        if behaviour.is_down(time.monotonic()):
            raise _Refused(503, "payments is down")
        # Half before and half after: what is in flight when the other side dies may be done or not.
        await asyncio.sleep(seconds / 2)
        if fails:
            raise _Refused(503, "payments failed")
        if what == "voids":
            status = self._book.void(order_id)
        else:
            declined = behaviour.declines(order_id, int(amount_cents or 0))
            status = self._book.authorise(
                key, order_id, int(amount_cents or 0), str(currency), declined=declined
            )
        await asyncio.sleep(seconds / 2)
        if loses:
            raise ConnectionResetError
        return 200, {"order_id": order_id, "status": status}


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        raise _Refused(400, "the body is not JSON") from None
    if not isinstance(document, dict):
        raise _Refused(422, "the body is no JSON object")
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="python -m app.payments_simulator",
        description="A payments service to test against. Every flag of its behaviour can be changed while it runs: "
        "curl -X PATCH localhost:8100/behaviour -d '{\"error_rate\": 0.3}'",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8100, help="port; 0 for any free one, which is printed")
    parser.add_argument("--journal", type=Path, help="file that keeps the book over kill -9 and restart")
    parser.add_argument("--seed", type=int, help="repeats what happens to which request")
    group = parser.add_argument_group("behaviour")
    for each in fields(Behaviour):
        flag = f"--{each.name.replace('_', '-')}"
        group.add_argument(flag, type=type(each.default), default=each.default, help=each.metadata["help"])
    options = parser.parse_args(arguments)
    try:
        behaviour = Behaviour(**{each.name: getattr(options, each.name) for each in fields(Behaviour)})
    except ValueError as exc:
        parser.error(str(exc))
    simulator = PaymentsSimulator(behaviour, Book(options.journal), options.seed)
    try:
        asyncio.run(_run(simulator, options.host, options.port))
    except OSError as exc:
        sys.stderr.write(f"payments simulator: {exc}\n")
        return 1
    return 0


async def _run(simulator: PaymentsSimulator, host: str, port: int) -> None:
    port = await simulator.start(host, port)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    sys.stderr.write(f"payments simulator on http://{host}:{port}   the book {host}:{port}/authorisations\n")
    await ended.wait()
    await simulator.stop()


if __name__ == "__main__":
    sys.exit(main())
