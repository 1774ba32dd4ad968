"""The start of a service, and the line that says why there is none."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import pytest

from app import migrations
from app.db import Database
from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import Shop, execute, new_customer, new_order
from tests.support.service_process import ServiceProcess

NEWEST = migrations.migrations()[-1][0]


def _run(directory: Path, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """`python -m app` to its end."""
    environment = {
        name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ
    }
    environment |= {"PORT": "0", "EMBEDDED_POSTGRES_DIR": str(directory / "postgres")}
    environment |= {name: str(value) for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _check_refused(ended: subprocess.CompletedProcess[str], name: str) -> None:
    """Check that it said why in one line that names the variable, and failed."""
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith(f"order service: {name}"), ended.stderr
    assert "Traceback" not in ended.stdout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("OPS_PORT", "8000"),  # PORT's default
        ("DB_POOL_MIN_SIZE", "51"),  # over DB_POOL_MAX_SIZE
        ("MIGRATE_ON_START", "perhaps"),
        ("API_KEYS", "alice:123"),
        ("DATABASE_URL", "not a DSN"),
        ("HOST", "no.such.host.invalid"),
    ],
)
def test_a_bad_setting_stops_the_start(tmp_path: Path, database_url: str, name: str, value: str) -> None:
    """One clear line that names the variable, exit code 1, no traceback."""
    settings = {"DATABASE_URL": database_url, "ALLOW_ANONYMOUS": "true", "PORT": "8000", name: value}
    _check_refused(_run(tmp_path, **settings), name)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])  # noqa: S104  # refused
def test_anonymous_is_for_loopback(tmp_path: Path, host: str) -> None:
    """A service without keys does not start on an address that others reach."""
    _check_refused(_run(tmp_path, HOST=host), "API_KEYS")


def test_a_port_that_is_taken_stops_the_start(tmp_path: Path, database_url: str) -> None:
    """One line that names PORT; and it is told before the database is touched."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _check_refused(_run(tmp_path, DATABASE_URL=database_url, PORT=port), "PORT")
    assert execute(database_url, "SELECT to_regclass('schema_migrations')") == [(None,)]


def test_an_operations_port_that_is_taken_stops_the_start(tmp_path: Path, database_url: str) -> None:
    """As the other port: one line that names OPS_PORT, before the database is touched."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _check_refused(_run(tmp_path, DATABASE_URL=database_url, OPS_PORT=port), f"OPS_PORT: {port} is taken")
    assert execute(database_url, "SELECT to_regclass('schema_migrations')") == [(None,)]


# --- the database ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tcp_postgres(
    tmp_path_factory: pytest.TempPathFactory, postgres_template: Path, postgres_bin_dir: Path | None
) -> Iterator[EmbeddedPostgres]:
    """A server that asks for a password."""
    directory = shutil.copytree(postgres_template, tmp_path_factory.mktemp("tcp") / "postgres")
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir, port=_free_port()) as server:
        yield server


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.mark.parametrize("wrong", ["password", "role", "database", "no password"])
def test_a_database_url_that_can_never_work_stops_the_start(
    tmp_path: Path, tcp_postgres: EmbeddedPostgres, wrong: str
) -> None:
    """At once, in one line that names DATABASE_URL and does not tell the password."""
    url = urlsplit(tcp_postgres.tcp_dsn)
    assert url.password
    host = f"{url.hostname}:{url.port}"
    dsn = {
        "password": urlunsplit(url._replace(netloc=f"{url.username}:secret-guess@{host}")),
        "role": urlunsplit(url._replace(netloc=f"stranger:secret-guess@{host}")),
        "database": urlunsplit(url._replace(path="/nowhere")),
        "no password": urlunsplit(url._replace(netloc=f"{url.username}@{host}")),
    }[wrong]
    ended = _run(tmp_path, DATABASE_URL=dsn, START_TIMEOUT_SECONDS=3600, PGPASSFILE=tmp_path / "none")
    _check_refused(ended, "DATABASE_URL")
    for secret in ("secret-guess", url.password):
        assert secret not in ended.stderr + ended.stdout
    assert "waiting_for_database" not in ended.stdout


def test_an_unreachable_database_is_waited_for_and_then_told(tmp_path: Path) -> None:
    """START_TIMEOUT_SECONDS long, with a line for each attempt; then one clear line."""
    dsn = f"postgresql://u:secret-guess@127.0.0.1:{_free_port()}/orders"
    ended = _run(tmp_path, DATABASE_URL=dsn, START_TIMEOUT_SECONDS=1)
    _check_refused(ended, "DATABASE_URL")
    assert "Connection refused" in ended.stderr
    assert "waiting_for_database" in ended.stdout
    assert "secret-guess" not in ended.stderr + ended.stdout


# --- the schema ------------------------------------------------------------------------------------------------


def test_two_replicas_start_at_once_on_an_empty_database(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """Both come up, the schema and the catalogue are made once, and both serve."""
    with ThreadPoolExecutor() as threads:
        services = list(threads.map(lambda _: start_service(CATALOG_SIZE=100), range(3)))
    assert execute(database_url, "SELECT max(version), count(*) FROM schema_migrations") == [(NEWEST, NEWEST)]
    assert execute(database_url, "SELECT count(*) FROM products") == [(100,)]
    for service in services:
        with service.client() as client:
            assert client.post("/orders", json=new_order(("SKU-0100", 1))).status_code == 201


_WAITING = """
    SELECT pid
      FROM pg_locks
     WHERE locktype = 'advisory' AND NOT granted
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def test_replicas_migrate_one_after_the_other(database_url: str) -> None:
    """A replica waits while another one migrates, and then finds the work done or does it."""
    db = await _connect(database_url)
    try:
        with contextlib.closing(psycopg2.connect(database_url)) as other, other.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [migrations._LOCK_ID])
            migrating = asyncio.create_task(migrations.migrate(db))
            while not execute(database_url, _WAITING):
                assert not migrating.done()
                await asyncio.sleep(0.01)
            assert execute(database_url, "SELECT to_regclass('orders')") == [(None,)]
        assert await migrating == NEWEST
    finally:
        await db.close(1)


async def _connect(database_url: str) -> Database:
    return await Database.connect(
        database_url,
        pool_min_size=1,
        pool_max_size=1,
        pool_timeout_seconds=5,
        acquire_timeout_seconds=5,
        connect_timeout_seconds=5,
        statement_timeout_seconds=5,
    )


def test_the_catalogue_is_seeded_once(
    start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """A second start touches no product that is there, and adds those that a larger catalogue lacks."""
    start_service(CATALOG_SIZE=10, CATALOG_STOCK=7).terminate()
    execute(database_url, "UPDATE products SET stock = 3, price_cents = 1 WHERE id = 'SKU-0005'")
    start_service(CATALOG_SIZE=12, CATALOG_STOCK=9)
    stock = dict(execute(database_url, "SELECT id, stock FROM products"))
    assert stock == {f"SKU-{n:04}": 9 if n > 10 else 7 for n in range(1, 13)} | {"SKU-0005": 3}
    assert execute(database_url, "SELECT price_cents FROM products WHERE id = 'SKU-0005'") == [(1,)]


def test_migrate_makes_the_schema_and_ends(
    tmp_path: Path, start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """`python -m app migrate` is repeatable, and a service with MIGRATE_ON_START=false then starts on it."""
    refused = _run(tmp_path, DATABASE_URL=database_url, MIGRATE_ON_START="false")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert "run `python -m app migrate`" in refused.stderr
    assert execute(database_url, "SELECT to_regclass('orders')") == [(None,)]

    for _ in range(2):
        migrated = _run(tmp_path, "migrate", DATABASE_URL=database_url, CATALOG_SIZE=20)
        assert (migrated.returncode, migrated.stderr) == (0, "")
        assert migrated.stdout.splitlines()[-1] == f"the schema is at version {NEWEST}"
    service = start_service(MIGRATE_ON_START="false")
    with service.client() as client:
        assert client.post("/orders", json=new_order(("SKU-0020", 1))).status_code == 201


def test_migrate_says_why_it_cannot(tmp_path: Path) -> None:
    """One clear line, as the service itself."""
    dsn = f"postgresql://u@127.0.0.1:{_free_port()}/orders"
    _check_refused(_run(tmp_path, "migrate", DATABASE_URL=dsn, START_TIMEOUT_SECONDS=0.1), "DATABASE_URL")


async def test_the_next_release_upgrades_in_place(
    tmp_path: Path, start_service: Callable[..., ServiceProcess], database_url: str
) -> None:
    """A later version's schema is put on under a running service; this one serves on, and starts anew, on it."""
    old = await asyncio.to_thread(start_service)
    shop = Shop(old, database_url)
    customer = new_customer()
    order = new_order(("SKU-0001", 1), customer_id=customer)
    before = shop.place(order, key="before")
    shop.http.close()

    directory = tmp_path / "migrations"
    directory.mkdir()
    for _, path in migrations.migrations():
        shutil.copy(path, directory)
    newer = NEWEST + 1
    (directory / f"{newer:04}_notes.sql").write_text(
        "ALTER TABLE orders ADD COLUMN note text NOT NULL DEFAULT '100%';"
        "CREATE TABLE notes (id bigint PRIMARY KEY);"
    )
    db = await _connect(database_url)
    try:
        for _ in range(2):
            assert await migrations.migrate(db, directory=directory) == newer
        assert await migrations.migrate(db) == newer  # an older release leaves it alone
    finally:
        await db.close(1)

    for service in (old, await asyncio.to_thread(start_service)):
        shop = Shop(service, database_url)
        assert shop.place(order, key="before").content == before.content
        assert shop.place(order).status_code == 201
        assert shop.http.get(before.headers["location"]).content == before.content
        shop.http.close()
    assert shop.orders_stored(customer) == 3
    assert execute(database_url, "SELECT DISTINCT note FROM orders") == [("100%",)]


async def test_a_migration_that_fails_leaves_nothing_behind(tmp_path: Path, database_url: str) -> None:
    """A migration is one transaction: neither half of it nor its version is there, and the next attempt starts anew."""
    directory = tmp_path / "migrations"
    directory.mkdir()
    broken = directory / "0001_half.sql"
    broken.write_text("CREATE TABLE half (id int); SELECT 1 / 0;")
    db = await _connect(database_url)
    try:
        with pytest.raises(Exception, match="division by zero"):
            await migrations.migrate(db, directory=directory)
        assert await migrations.schema_version(db) == 0
        assert execute(database_url, "SELECT to_regclass('half')") == [(None,)]
        broken.write_text("CREATE TABLE half (id int);")
        assert await migrations.migrate(db, directory=directory) == 1
    finally:
        await db.close(1)
