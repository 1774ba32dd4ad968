"""Scale-out, rollout and scale-in under load, with real processes behind a balancer that follows readiness."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from app.embedded_postgres import EmbeddedPostgres
from tests.support.cluster_service import ClusterService
from tests.support.ledger import Ledger
from tests.support.order_client import Attempt, OrderClient, OrderRequest
from tests.support.service_process import ServiceProcess
from tests.support.traffic import PRODUCTS, Traffic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

FEWEST, MOST = 3, 10
SETTINGS_FILE = Path(__file__).parents[2] / "k8s" / "base" / "settings.env"
# Of the manifest's times a tenth, so that minutes are seconds; and a drain that a busy machine does not outlast.
SCALE = 10
CONNECTION_MAX_AGE_SECONDS = 60 / SCALE
SHARE_WITHIN_SECONDS = 120 / SCALE
DRAIN_DELAY_SECONDS, PROPAGATION_SECONDS = 2.0, 1.0
CUSTOMERS = 60

Start = Callable[[], ServiceProcess]


@pytest.fixture
def start(tmp_path: Path, own_postgres: EmbeddedPostgres) -> Iterator[Start]:
    """Start one more replica, with the manifest's settings."""
    lines = [line for line in SETTINGS_FILE.read_text().splitlines() if "=" in line and line[0] != "#"]
    settings: dict[str, object] = {name: value for name, _, value in (line.partition("=") for line in lines)}
    settings |= {"HOST": "127.0.0.1", "PORT": 0, "OPS_PORT": 0, "MIGRATE_ON_START": "true"}
    settings |= {"CONNECTION_MAX_AGE_SECONDS": CONNECTION_MAX_AGE_SECONDS}
    settings |= {"DRAIN_DELAY_SECONDS": DRAIN_DELAY_SECONDS}
    number = itertools.count()
    started: list[ServiceProcess] = []

    def one_more() -> ServiceProcess:
        started.append(ServiceProcess(tmp_path / f"replica-{next(number)}", own_postgres.dsn, settings))
        return started[-1].start()

    yield one_more
    for replica in started:
        replica.kill()


class Customers:
    """Clients that each keep one connection, and order over it twice a second."""

    def __init__(self, url: str, count: int) -> None:
        self.orders: list[Attempt] = []
        self._url = url
        self._tasks = [asyncio.create_task(self._order(number)) for number in range(count)]
        self._ending = False

    async def end(self) -> None:
        """Let each finish its order."""
        self._ending = True
        await asyncio.gather(*self._tasks)

    async def _order(self, number: int) -> None:
        await asyncio.sleep(number / len(PRODUCTS) % 0.5)
        async with OrderClient(self._url, history=self.orders) as client:
            while not self._ending:
                await client.place(OrderRequest.keyed((PRODUCTS[number % len(PRODUCTS)], 1)))
                await asyncio.sleep(0.5)


async def test_twenty_terminations_fail_no_request(own_postgres: EmbeddedPostgres, start: Start) -> None:
    """3 to 10, a rollout of all ten, back to 3, and a rollout of those: every request is answered, none is repeated.

    A replica that was added holds its share of the long-lived connections within the scaled two minutes.
    """
    exits: list[asyncio.Task[int]] = []
    async with ClusterService(propagation_seconds=PROPAGATION_SECONDS) as service:

        async def scale_out(count: int) -> list[ServiceProcess]:
            added = [await asyncio.to_thread(start) for _ in range(count)]
            for replica in added:
                await service.add(replica)
            return added

        def end(replica: ServiceProcess) -> None:
            exits.append(asyncio.create_task(service.remove(replica)))

        async def roll_out(replicas: Sequence[ServiceProcess]) -> list[ServiceProcess]:
            """One more, then one less, as maxSurge 1 and maxUnavailable 0 say."""
            successors = []
            for replica in replicas:
                successors += await scale_out(1)
                end(replica)
            return successors

        running = await scale_out(FEWEST)
        ledger = Ledger(own_postgres.dsn)
        async with Traffic(
            service.url, orders_per_second=30, reads_per_second=20, probes_per_second=0
        ) as traffic:
            customers = Customers(service.url, CUSTOMERS)
            running += await scale_out(MOST - FEWEST)
            since = time.monotonic()
            while min(service.connections[replica] for replica in running) < CUSTOMERS / MOST / 2:
                await asyncio.sleep(0.1)
                assert time.monotonic() - since < SHARE_WITHIN_SECONDS, service.connections.values()
            running = await roll_out(running)
            for replica in running[FEWEST:]:
                end(replica)
                await asyncio.sleep(0.3)
            await roll_out(running[:FEWEST])
            assert await asyncio.gather(*exits) == [0] * 20
            await customers.end()
    orders = [*traffic.orders, *customers.orders]
    assert len(orders) > 1000
    assert {(order.status, order.error_type) for order in orders} == {(201, "")}
    assert {read.answer.status if read.answer else 0 for read in traffic.reads} == {200}
    ledger.assert_clean(orders)
