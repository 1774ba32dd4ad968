"""The service behind PgBouncer in transaction mode: every transaction may meet another server connection."""

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from app.embedded_postgres import EmbeddedPostgres
from tests.support.ledger import Ledger
from tests.support.order_api import execute
from tests.support.order_client import OrderClient, OrderRequest
from tests.support.service_process import ServiceProcess

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SERVER_CONNECTIONS = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed here (Debian: pgbouncer)"),
]

CONFIGURATION = """
    [databases]
    orders = host=127.0.0.1 port={server_port} user=app password={password}

    [pgbouncer]
    listen_addr = 127.0.0.1
    listen_port = {port}
    unix_socket_dir =
    auth_type = any
    pool_mode = transaction
    default_pool_size = {server_connections}
    max_client_conn = 200
    server_round_robin = 1
    server_reset_query =
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(
    tmp_path: Path, postgres_template: Path, postgres_bin_dir: Path | None
) -> Iterator[EmbeddedPostgres]:
    directory = shutil.copytree(postgres_template, tmp_path / "postgres")
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir, port=free_port()) as server:
        yield server


@pytest.fixture
def bouncer_dsn(tmp_path: Path, server: EmbeddedPostgres) -> Iterator[str]:
    """The DSN of *server* through PgBouncer, which shares a few server connections out by the transaction."""
    port = free_port()
    configuration = tmp_path / "pgbouncer.ini"
    configuration.write_text(
        CONFIGURATION.format(
            port=port,
            server_port=server.port,
            password=(server.directory / "password").read_text(),
            server_connections=SERVER_CONNECTIONS,
        ).replace("\n    ", "\n")
    )
    account = ["-u", "nobody"] if os.geteuid() == 0 else []  # it refuses to run as root
    log = tmp_path / "pgbouncer.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(PGBOUNCER), *account, str(configuration)], stdout=output, stderr=output
        )
    dsn = f"postgresql://app@127.0.0.1:{port}/orders"
    give_up_at = time.monotonic() + 10
    while True:
        try:
            execute(dsn, "SELECT 1")
            break
        except psycopg2.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up_at, log.read_text()
            time.sleep(0.05)
    yield dsn
    process.terminate()
    process.wait(10)


async def test_orders_go_through_transaction_pooling(
    server: EmbeddedPostgres, bouncer_dsn: str, start_service: Callable[..., ServiceProcess]
) -> None:
    """The service starts and takes orders over fewer server connections than its pool has, and leaves no setting."""
    # Two at once: the migrations' lock must hold between them, too.
    first, second = await asyncio.gather(
        *(asyncio.to_thread(start_service, dsn=bouncer_dsn, DB_POOL_MIN_SIZE=10) for _ in range(2))
    )
    ledger = Ledger(server.dsn)
    async with OrderClient(first.url) as client, OrderClient(second.url, history=client.history) as other:
        requests = [
            OrderRequest.keyed((f"SKU-{n % 7 + 1:04}", 1 + n % 3), (f"SKU-{n % 5 + 8:04}", 1))
            for n in range(400)
        ]

        async def buy(share: list[OrderRequest]) -> None:
            for request in share:
                attempts = await asyncio.gather(client.place(request), other.place(request))
                assert [attempt.status for attempt in attempts] == [201, 201]
                assert sorted(attempt.replayed for attempt in attempts) == [False, True]
                order_id = attempts[0].order_id
                assert (await other.send("GET", f"/orders/{order_id}")).status == 200
                assert (await client.cancel(order_id)).json()["status"] == "cancelled"

        await asyncio.gather(*(buy(requests[n::20]) for n in range(20)))
        batch = await client.place_batch([OrderRequest.keyed(("SKU-0001", 1)) for _ in range(100)])
        assert {attempt.status for attempt in batch} == {201}
        assert (await client.send("GET", "/orders?limit=100")).status == 200
        assert (await client.send("GET", "/products?limit=100")).status == 200
    ledger.assert_clean(client.history)

    backends = execute(
        server.dsn,
        "SELECT pid FROM pg_stat_activity WHERE datname = 'orders' AND pid <> pg_backend_pid()",
    )
    assert 1 <= len(backends) <= SERVER_CONNECTIONS
    # What was set for one transaction must not meet the next client of the connection.
    names = ("statement_timeout", "lock_timeout", "enable_seqscan", "plan_cache_mode")
    current = ", ".join(f"current_setting('{name}')" for name in names)
    for _ in range(2 * SERVER_CONNECTIONS):
        assert execute(bouncer_dsn, f"SELECT {current}") == [("0", "0", "on", "auto")]  # constants
    assert first.terminate() == second.terminate() == 0
