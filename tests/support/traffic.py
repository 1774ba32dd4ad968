"""A steady open load, as many customers make it: what starts next does not wait for what started before."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.support.order_client import Answer, Attempt, OrderClient, OrderRequest

PRODUCTS = tuple(f"SKU-{n:04}" for n in range(1, 21))


@dataclass(frozen=True, slots=True)
class Exchange:
    """A GET and its answer; None where none came. Times are monotonic seconds."""

    path: str
    answer: Answer | None
    started_at: float
    ended_at: float

    @property
    def seconds(self) -> float:
        """How long the answer took."""
        return self.ended_at - self.started_at


class Traffic:
    """Orders, product reads and probes on a fixed schedule, from entering it to leaving it.

    `orders`, `reads` and `probes` hold what has ended, in that order; leaving waits for all that was started.
    """

    def __init__(
        self,
        url: str,
        *,
        orders_per_second: float = 40,
        reads_per_second: float = 20,
        probes_per_second: float = 20,
    ) -> None:
        self.orders: list[Attempt] = []
        self.reads: list[Exchange] = []
        self.probes: list[Exchange] = []
        self._client = OrderClient(url, history=self.orders)
        self._rates = {
            self._order: orders_per_second,
            self._read: reads_per_second,
            self._probe: probes_per_second,
        }
        self._products = itertools.cycle(PRODUCTS)
        self._probed = itertools.cycle(("/livez", "/readyz"))
        self._started: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._schedules = [
            asyncio.create_task(self._repeat(step, 1 / rate)) for step, rate in self._rates.items() if rate
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for schedule in self._schedules:
            schedule.cancel()
        await asyncio.gather(*self._schedules, return_exceptions=True)
        while self._started:
            await asyncio.wait(self._started)
        await self._client.__aexit__(kind, exc, trace)

    async def until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait, with the load on, until *condition* holds; raises TimeoutError after *seconds*."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110  # the service is another process
                await asyncio.sleep(0.02)

    async def _repeat(self, step: Callable[[], Awaitable[None]], interval_seconds: float) -> None:
        first = time.monotonic()
        for n in itertools.count():
            await asyncio.sleep(first + n * interval_seconds - time.monotonic())
            task: asyncio.Task[None] = asyncio.ensure_future(step())
            self._started.add(task)
            task.add_done_callback(self._started.discard)

    async def _order(self) -> None:
        await self._client.place(OrderRequest.keyed((next(self._products), 1)))

    async def _read(self) -> None:
        await self._exchange(f"/products/{next(self._products)}", self.reads)

    async def _probe(self) -> None:
        await self._exchange(next(self._probed), self.probes)

    async def _exchange(self, path: str, ended: list[Exchange]) -> None:
        started_at = time.monotonic()
        answer: Answer | None = None
        with contextlib.suppress(OSError, EOFError):
            answer = await self._client.send("GET", path)
        ended.append(Exchange(path, answer, started_at, time.monotonic()))


def acknowledged(attempts: list[Attempt]) -> list[Attempt]:
    """Those that were told that their order is stored."""
    return [attempt for attempt in attempts if attempt.acknowledged]
