"""SIGTERM under load: not ready first, nothing that was accepted is lost, and nothing is left behind."""

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.embedded_postgres import EmbeddedPostgres
from tests.support import locks
from tests.support.ledger import Ledger
from tests.support.order_client import OrderClient, OrderRequest, Unreachable
from tests.support.service_process import ServiceProcess
from tests.support.traffic import Traffic, acknowledged

StartService = Callable[..., ServiceProcess]


def processes_of(group: int) -> list[int]:
    """The live processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture
def start_embedded(tmp_path: Path, postgres_template: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Start a service with a Postgres of its own in `tmp_path/alone/postgres`; again, to find its data."""
    directory = tmp_path / "alone"
    shutil.copytree(postgres_template, directory / "postgres")
    started: list[ServiceProcess] = []

    def start(**settings: object) -> ServiceProcess:
        started.append(ServiceProcess(directory, None, settings))
        return started[-1].start()

    yield start
    for service in started:
        service.kill()


async def drain_under_load(service: ServiceProcess, *, drain_delay_seconds: float) -> Traffic:
    """End *service* by SIGTERM while customers go on ordering, and check what each of them saw."""
    async with Traffic(service.url, orders_per_second=100) as traffic:
        await traffic.until(lambda: len(acknowledged(traffic.orders)) >= 50, 30)
        signalled_at = time.monotonic()
        service.process.terminate()
        await traffic.until(lambda: service.process.poll() is not None, 30)
        ended_at = time.monotonic()
        await traffic.until(lambda: traffic.orders[-1].started_at > ended_at, 5)
    assert service.process.returncode == 0
    assert processes_of(service.process.pid) == []

    # Whoever was let in got an answer, and it was an acknowledgement; the others could not even connect.
    assert {(order.status, order.error_type) for order in traffic.orders} == {(201, ""), (0, "unreachable")}
    answered = [order for order in traffic.orders if order.acknowledged]
    refused = [order for order in traffic.orders if not order.acknowledged]
    assert max(order.started_at for order in answered) < ended_at
    assert min(order.ended_at for order in refused) >= signalled_at + drain_delay_seconds
    late = [order for order in answered if order.started_at > signalled_at]
    assert len(late) >= 50 * drain_delay_seconds  # half of those that came while it said that it is not ready

    # Not ready first; from then on alive, and every answer is the last of its connection.
    probes = [
        probe for probe in traffic.probes if probe.answer is not None and probe.started_at > signalled_at
    ]
    unready = [probe for probe in probes if probe.answer and probe.answer.status == 503]
    assert {probe.path for probe in unready} == {"/readyz"}
    assert unready[0].ended_at < signalled_at + drain_delay_seconds
    later = [
        one
        for one in [*probes, *traffic.reads]
        if one.answer is not None and one.started_at > unready[0].ended_at
    ]
    assert {(one.path, one.answer.status) for one in later if one.answer and one in probes} == {
        ("/livez", 200),
        ("/readyz", 503),
    }
    assert {one.answer.headers.get("connection") for one in later if one.answer} == {"close"}
    return traffic


async def test_sigterm_under_load_loses_nothing(
    own_postgres: EmbeddedPostgres, start_service: StartService
) -> None:
    """It is unready at once, serves on for DRAIN_DELAY_SECONDS, answers what it let in, and exits with 0."""
    service = start_service(dsn=own_postgres.dsn, DRAIN_DELAY_SECONDS=1)
    ledger = Ledger(own_postgres.dsn)
    traffic = await drain_under_load(service, drain_delay_seconds=1)
    ledger.assert_clean(traffic.orders)


async def test_database_of_its_own_ends_after_the_service(
    start_embedded: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    """The embedded Postgres stores all that was let in, is shut down in order, and has it all at the next start."""
    directory = tmp_path / "alone" / "postgres"
    server = EmbeddedPostgres(directory)
    service = start_embedded(DRAIN_DELAY_SECONDS=1)
    before = Ledger(server.dsn)
    traffic = await drain_under_load(service, drain_delay_seconds=1)
    assert server.processes() == []
    assert "database system is shut down" in server.log_path.read_text().splitlines()[-1]
    again = start_embedded()
    before.assert_clean(traffic.orders)
    assert again.terminate() == 0
    assert server.processes() == []


async def test_orders_that_wait_are_stored_before_the_end(
    own_postgres: EmbeddedPostgres, start_service: StartService
) -> None:
    """Orders in the queue and on their way when SIGTERM comes are stored and acknowledged before the service ends."""
    service = start_service(
        dsn=own_postgres.dsn,
        BATCH_MAX_SIZE=1,  # so that they wait for each other
        **dict.fromkeys(
            ("BATCH_MAX_WAIT_SECONDS", "DB_STATEMENT_TIMEOUT_SECONDS", "REQUEST_DEADLINE_SECONDS"), 30
        ),
    )
    ledger = Ledger(own_postgres.dsn)
    async with OrderClient(service.url) as client:
        with locks.holding_commits(own_postgres.dsn):
            waiting = [
                asyncio.create_task(client.place(OrderRequest.keyed(("SKU-0001", 1)))) for _ in range(50)
            ]
            while service.metric("order_batch_queue_depth") < 49:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            service.process.terminate()
            await until_closed(client)
            assert service.process.poll() is None
        attempts = await asyncio.gather(*waiting)
    assert [attempt.status for attempt in attempts] == [201] * 50
    assert await asyncio.to_thread(service.process.wait, 30) == 0
    ledger.assert_clean(client.history)


async def until_closed(client: OrderClient) -> None:
    """Return once the service takes no more connections."""
    with contextlib.suppress(Unreachable):
        while True:
            await client.send("GET", "/livez")
