"""The trial of an open breaker: it fails for whatever fails an order, and leaves nothing behind."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from psycopg2.extensions import make_dsn, parse_dsn

from app import migrations
from app.db import Database
from app.embedded_postgres import EmbeddedPostgres
from app.errors import ConnectionLost
from app.repository import prove_writes
from tests.support.order_api import execute


async def connect(dsn: str) -> Database:
    return await Database.connect(
        dsn,
        pool_min_size=1,
        pool_max_size=2,
        pool_timeout_seconds=30,
        acquire_timeout_seconds=5,
        connect_timeout_seconds=5,
        statement_timeout_seconds=10,
    )


@pytest.fixture
async def migrated(database_url: str) -> str:
    database = await connect(database_url)
    await migrations.migrate(database)
    await database.close(timeout_seconds=5)
    return database_url


@pytest.fixture
def as_service(postgres: EmbeddedPostgres, migrated: str) -> Iterator[str]:
    """The DSN of a role with the rights that storing and reading orders takes, and no other."""
    role = f"service_{uuid.uuid4().hex}"
    execute(migrated, f"CREATE ROLE {role} LOGIN")
    execute(migrated, f"GRANT SELECT, INSERT, UPDATE ON orders TO {role}")
    execute(migrated, f"GRANT SELECT, UPDATE ON products TO {role}")
    database = parse_dsn(migrated)["dbname"]
    execute(migrated, f"REVOKE TEMPORARY ON DATABASE {database} FROM public")
    yield make_dsn(migrated, user=role)
    execute(migrated, f"DROP OWNED BY {role}")
    execute(migrated, f"DROP ROLE {role}")


def one(dsn: str, sql: str) -> Any:
    return execute(dsn, sql)[0][0]


async def test_trial_commits_and_leaves_nothing_behind(as_service: str, migrated: str) -> None:
    """With the service's own rights it writes WAL and flushes it; no table grows, no row is written or dies."""
    sizes = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r'"
    written = """
        SELECT n_tup_ins + n_tup_upd + n_tup_del + n_dead_tup FROM pg_stat_user_tables WHERE relname = 'orders'
    """
    before = one(migrated, sizes), one(migrated, written)
    inserted = one(migrated, "SELECT pg_current_wal_insert_lsn()")
    database = await connect(make_dsn(as_service, options="-c synchronous_commit=on"))
    for _ in range(20):
        await prove_writes(database)
    await database.close(timeout_seconds=5)
    assert one(migrated, f"SELECT pg_current_wal_flush_lsn() > '{inserted}'")
    execute(migrated, "SELECT pg_stat_force_next_flush()")
    assert (one(migrated, sizes), one(migrated, written)) == before


async def test_trial_is_refused_where_orders_are(as_service: str) -> None:
    """A server that takes only reads refuses the trial, as it refuses an order, and answers a ping."""
    database = await connect(make_dsn(as_service, options="-c default_transaction_read_only=on"))
    await database.ping()
    with pytest.raises(ConnectionLost):
        await prove_writes(database)
    await database.close(timeout_seconds=5)
