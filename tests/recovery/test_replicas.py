"""Several replicas on one port: whoever of them ends, no connection is refused and no order lost."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import replicas
from app.embedded_postgres import EmbeddedPostgres
from app.settings import Settings
from tests.support.ledger import Ledger
from tests.support.order_api import execute
from tests.support.order_client import Attempt, OrderClient, OrderRequest
from tests.support.replica_processes import ReplicaProcesses

COUNT = 3
Start = Callable[..., ReplicaProcesses]


@pytest.fixture
def start_replicas(tmp_path: Path, own_postgres: EmbeddedPostgres) -> Iterator[Start]:
    """Start replicas: `start_replicas(DRAIN_DELAY_SECONDS=1)`, on the test's own server."""
    started: list[ReplicaProcesses] = []

    def start(
        count: int = COUNT, *, dsn: str | None = own_postgres.dsn, **settings: object
    ) -> ReplicaProcesses:
        started.append(ReplicaProcesses(tmp_path / f"replicas-{len(started)}", dsn, count, settings))
        started[-1].start()
        return started[-1]

    yield start
    for service in started:
        service.kill()
        for replica in service.replicas.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(replica.pid, signal.SIGKILL)


class Customers:
    """Customers who order one after the other without a pause, half of them over connections they keep."""

    def __init__(self, url: str, count: int = 12) -> None:
        self.kept: list[Attempt] = []
        self.fresh: list[Attempt] = []
        self._url = url
        self._count = count
        self._leaving = False

    async def __aenter__(self) -> Self:
        self._customers = [
            asyncio.create_task(self._order(history, headers))
            for history, headers in ((self.kept, {}), (self.fresh, {"Connection": "close"}))
            for _ in range(self._count // 2)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving = True
        await asyncio.gather(*self._customers)

    @property
    def orders(self) -> Sequence[Attempt]:
        return [*self.kept, *self.fresh]

    async def _order(self, history: list[Attempt], headers: dict[str, str]) -> None:
        async with OrderClient(self._url, history=history, headers=headers, timeout_seconds=20) as client:
            while not self._leaving:
                await client.place(OrderRequest.keyed(("SKU-0001", 1)))
                await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # other processes
            await asyncio.sleep(0.02)


def successes(operations_url: str) -> float:
    text = httpx.get(f"{operations_url}/metrics", timeout=10).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "orders_total" and sample.labels["status"] == "success"
    )


async def test_one_port_and_metrics_of_each(start_replicas: Start) -> None:
    """One line for each replica; all take orders at the one port, and each tells of its own."""
    service = await asyncio.to_thread(start_replicas)
    each = service.replicas
    assert sorted(each) == [1, 2, 3]
    assert {replica.url for replica in each.values()} == {service.url}
    assert len({replica.operations_url for replica in each.values()}) == COUNT
    async with OrderClient(service.url, headers={"Connection": "close"}) as client:
        for _ in range(60):
            await client.place(OrderRequest.keyed(("SKU-0001", 1)))
        assert (await client.send("GET", "/metrics")).status == 404
    counted = [successes(replica.operations_url) for replica in each.values()]
    assert sum(counted) == 60
    assert min(counted) > 0
    assert service.terminate() == 0
    assert not any(alive(replica.pid) for replica in each.values())


async def test_a_postgres_of_their_own(start_replicas: Start) -> None:
    """One PostgreSQL for all of them, with room for their pools; it ends after the last of them."""
    service = await asyncio.to_thread(start_replicas, dsn=None, DB_POOL_MAX_SIZE=60)
    server = EmbeddedPostgres(service.stderr_path.parent / "postgres")
    assert execute(server.dsn, "SHOW max_connections") == [("240",)]  # 3 x 60 are three quarters
    assert "connection_budget_exceeded" not in service.log_path.read_text()
    async with Customers(service.url) as customers:
        await until(lambda: len(customers.orders) > 100)
        service.process.send_signal(signal.SIGINT)
        await until(lambda: service.process.poll() is not None)
    assert service.process.returncode == 0
    assert server.processes() == []
    assert "database system is shut down" in server.log_path.read_text().splitlines()[-1]


async def terminate_in_turns(service: ReplicaProcesses, ledger: Ledger, *, times: int) -> None:
    """End one replica after the other by SIGTERM under load, and check that nobody noticed."""
    async with Customers(service.url) as customers:
        await until(lambda: len(customers.orders) > 100)
        for turn in range(times):
            before = service.replicas
            number = turn % COUNT + 1
            successor = await asyncio.to_thread(service.end, number, signal.SIGTERM)
            assert successor.operations_url == before[number].operations_url
            assert {n: r.pid for n, r in service.replicas.items() if n != number} == {
                n: r.pid for n, r in before.items() if n != number
            }
    assert Counter((order.status, order.error_type) for order in customers.orders).keys() == {(201, "")}
    assert len(customers.fresh) > 20 * times
    assert len(customers.kept) > 20 * times
    ledger.assert_clean(customers.orders)
    restarts = [json.loads(line) for line in service.log_path.read_text().splitlines() if "replica_r" in line]
    assert [restart["status"] for restart in restarts] == [0] * times


async def test_a_replica_that_is_terminated_resets_nothing(
    own_postgres: EmbeddedPostgres, start_replicas: Start
) -> None:
    """Every order of kept and of new connections is acknowledged while each replica ends in its turn."""
    service = await asyncio.to_thread(start_replicas, DRAIN_DELAY_SECONDS=0.3)
    await terminate_in_turns(service, Ledger(own_postgres.dsn), times=COUNT)
    assert service.terminate() == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_twenty_terminations_reset_nothing(
    own_postgres: EmbeddedPostgres, start_replicas: Start
) -> None:
    """As above, twenty times in a row."""
    service = await asyncio.to_thread(start_replicas, DRAIN_DELAY_SECONDS=0.3)
    await terminate_in_turns(service, Ledger(own_postgres.dsn), times=20)
    assert service.terminate() == 0


async def test_a_replica_that_is_killed_loses_what_it_had_in_hand(
    own_postgres: EmbeddedPostgres, start_replicas: Start
) -> None:
    """Orders on their way in it are unknown, none is doubled; who connects meanwhile waits, and is refused nowhere."""
    service = await asyncio.to_thread(start_replicas)
    ledger = Ledger(own_postgres.dsn)
    killed: list[tuple[float, float]] = []
    async with Customers(service.url) as customers:
        await until(lambda: len(customers.orders) > 100)
        for turn in range(COUNT):
            killed_at = time.monotonic()
            await asyncio.to_thread(service.end, turn + 1, signal.SIGKILL)
            killed.append((killed_at, time.monotonic()))
            await asyncio.sleep(0.5)  # so that it is clear which of them an order was lost to
    ledger.assert_clean(customers.orders)
    lost = [order for order in customers.orders if not order.acknowledged]
    assert {(order.status, order.error_type) for order in lost} <= {(0, "no_answer")}
    assert len(lost) <= COUNT * 12  # each customer had one in hand
    for killed_at, succeeded_at in killed:
        assert not [order for order in lost if killed_at + 0.2 < order.started_at < succeeded_at]
        waited = [
            order
            for order in customers.fresh
            # The others are answered in a hundredth of it.
            if killed_at + 0.05 < order.started_at < succeeded_at and order.seconds > 0.2
        ]
        # Perhaps none came to it just then; the test of who waits makes sure of some.
        assert {order.status for order in waited} <= {201}
    async with OrderClient(service.url) as client:
        again = [await client.place(order.request) for order in lost]
    assert {attempt.status for attempt in again} <= {201}
    ledger.assert_clean([*customers.orders, *again])
    assert service.terminate() == 0


async def test_who_waits_at_a_replica_is_served_by_its_successor(
    own_postgres: EmbeddedPostgres, start_replicas: Start
) -> None:
    """Connections that the kernel took, and a replica did not before it was killed, are not reset: nothing is lost."""
    service = await asyncio.to_thread(start_replicas)
    ledger = Ledger(own_postgres.dsn)
    os.kill(service.replicas[1].pid, signal.SIGSTOP)
    async with OrderClient(service.url) as client:
        waiting = [asyncio.create_task(client.place(OrderRequest.keyed(("SKU-0001", 1)))) for _ in range(60)]
        await asyncio.sleep(1)
        assert any(task.done() for task in waiting)
        assert not all(task.done() for task in waiting)
        await asyncio.to_thread(service.end, 1, signal.SIGKILL)
        attempts = await asyncio.gather(*waiting)
    assert [attempt.status for attempt in attempts] == [201] * 60
    ledger.assert_clean(attempts)


async def test_ctrl_c_ends_all_and_loses_nothing(
    own_postgres: EmbeddedPostgres, start_replicas: Start
) -> None:
    """After the signal whoever was let in is answered, the others are refused: nobody is reset."""
    service = await asyncio.to_thread(start_replicas)
    ledger = Ledger(own_postgres.dsn)
    pids = [replica.pid for replica in service.replicas.values()]
    async with Customers(service.url) as customers:
        await until(lambda: len(customers.orders) > 100)
        service.process.send_signal(signal.SIGTERM)
        await until(lambda: service.process.poll() is not None)
    assert service.process.returncode == 0
    assert not any(map(alive, pids))
    fresh = {(order.status, order.error_type) for order in customers.fresh}
    assert fresh <= {(201, ""), (0, "unreachable")}
    ledger.assert_clean(customers.orders)


async def test_they_end_with_who_started_them(start_replicas: Start) -> None:
    """`kill -9` of the process that holds the sockets leaves no replica behind."""
    service = await asyncio.to_thread(start_replicas)
    pids = [replica.pid for replica in service.replicas.values()]
    service.kill()
    await until(lambda: not any(map(alive, pids)))


async def test_a_second_signal_ends_all_at_once(start_replicas: Start) -> None:
    """Whatever they still wait for."""
    service = await asyncio.to_thread(start_replicas, DRAIN_DELAY_SECONDS=60)
    pids = [replica.pid for replica in service.replicas.values()]
    service.process.send_signal(signal.SIGTERM)
    await until(lambda: httpx.get(f"{service.replicas[1].operations_url}/readyz").status_code == 503)
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.process.wait, 5) == 128 + signal.SIGTERM
    await until(lambda: not any(map(alive, pids)), 5)


@pytest.mark.slow
async def test_a_replica_that_cannot_start_is_tried_less_and_less_often(
    own_postgres: EmbeddedPostgres, start_replicas: Start
) -> None:
    """No hot loop; the others serve on, and it is back once it can start."""
    service = await asyncio.to_thread(start_replicas)
    rename = "ALTER TABLE {} RENAME TO {}"
    execute(own_postgres.dsn, rename.format("schema_migrations", "hidden"))
    first = service.replicas[1]
    os.kill(first.pid, signal.SIGKILL)

    def pauses() -> list[float]:
        lines = service.log_path.read_text().splitlines()
        return [json.loads(line)["pause_seconds"] for line in lines if "replica_restarting" in line]

    await until(lambda: len(pauses()) >= 3, 40)
    assert pauses()[1:3] == [2, 4]
    assert service.process.poll() is None
    async with OrderClient(service.replicas[2].operations_url) as client:
        assert (await client.send("GET", "/readyz")).status == 200
    execute(own_postgres.dsn, rename.format("hidden", "schema_migrations"))
    await until(lambda: service.replicas[1].pid != first.pid, 20)
    assert service.terminate() == 0


async def test_a_process_that_cannot_be_made_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps one replica from being started ends neither the others nor the trying."""
    settings, ending = Settings.load(port=0), asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        replica, _ = replicas._bind(settings, 2, stack)
        replica.came_up.set()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/no/such/program")
            keeper = asyncio.create_task(replicas._keep(replica, {}, settings, ending))
            await asyncio.sleep(0.2)
            assert not keeper.done()
        ending.set()
        assert await keeper == 1


def refused(arguments: Sequence[str], **settings: object) -> str:
    """The one line of `python -m app` that did not start."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    ended = subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        env={**environment, **{name: str(value) for name, value in settings.items()}},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 1, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("order service: ")
    return line.removeprefix("order service: ")


def test_a_port_that_replicas_share_is_taken(own_postgres: EmbeddedPostgres, start_replicas: Start) -> None:
    """Neither a service nor other replicas slip in beside those that share it."""
    service = start_replicas()
    port = service.url.rpartition(":")[2]
    for arguments in ([], ["serve", "--replicas", "2"]):
        assert refused(arguments, PORT=port, DATABASE_URL=own_postgres.dsn).startswith(
            f"PORT: {port} is taken"
        )
    taken = service.replicas[2].operations_url.rpartition(":")[2]
    other = refused(
        ["serve", "--replicas", "2"], PORT=0, OPS_PORT=int(taken) - 1, DATABASE_URL=own_postgres.dsn
    )
    assert "OPS_PORT" in other
    assert "is taken" in other


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"PORT": 18002, "OPS_PORT": 18001}, "OPS_PORT: 2 replicas use 18001"),
        ({"PORT": 18002, "OPS_PORT": 65535}, "OPS_PORT: 2 replicas use 65535"),
        ({"PORT": 0, "MIGRATE_ON_START": "false"}, "DATABASE_URL: "),
    ],
    ids=["port among them", "no such port", "no schema"],
)
def test_what_cannot_be_is_told_in_one_line(
    database_url: str, settings: dict[str, object], reason: str
) -> None:
    """As by a service alone."""
    line = refused(["serve", "--replicas", "2"], DATABASE_URL=database_url, **settings)
    assert line.startswith(reason) or "app migrate" in line


def test_a_replica_is_not_for_the_hand() -> None:
    """Without sockets it says who starts it."""
    assert "serve --replicas" in refused(["replica", "63"])


def test_free_ports_are_kept(start_replicas: Start) -> None:
    """A replica's operations port is its own also while nobody listens there."""
    service = start_replicas(2)
    port = int(service.replicas[1].operations_url.rpartition(":")[2])
    os.kill(service.replicas[1].pid, signal.SIGSTOP)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
