"""The schema, as numbered SQL files: `0001_orders.sql` brings an empty database to version 1, and so on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.db import Database
from app.errors import ServiceError

_DIRECTORY = Path(__file__).parent
_LOCK_ID = 7_305_804_402  # any constant: replicas that start together migrate one after the other

_STATEMENT_TIMEOUT_SECONDS = 300  # an index on a large table takes its time

CREATE_VERSIONS = """
    CREATE TABLE IF NOT EXISTS schema_migrations (
        version    int         PRIMARY KEY,
        name       text        NOT NULL,
        applied_at timestamptz NOT NULL DEFAULT now()
    )
"""

SELECT_VERSION = "SELECT coalesce(max(version), 0) FROM schema_migrations"

INSERT_VERSION = "INSERT INTO schema_migrations (version, name) VALUES (%(version)s, %(name)s)"

INSERT_PRODUCTS = """
    INSERT INTO products (id, name, price_cents, currency, stock)
    SELECT sku.id, 'Product ' || i, 199 + (i * 7919) %% 9800, 'EUR', %(stock)s
      FROM generate_series(1::bigint, %(size)s) AS i
     CROSS JOIN LATERAL (SELECT 'SKU-' || lpad(i::text, greatest(4, length(i::text)), '0') AS id) AS sku
     WHERE NOT EXISTS (SELECT FROM products WHERE id = %(last)s)
     ORDER BY 1
        ON CONFLICT DO NOTHING
"""


SELECT_MISSING_PRIVILEGES = """
    SELECT coalesce(string_agg(privilege, ', '), '')
      FROM (VALUES ('SELECT on products', has_table_privilege('products', 'SELECT')),
                   ('UPDATE on products', has_any_column_privilege('products', 'UPDATE')),
                   ('SELECT on orders', has_table_privilege('orders', 'SELECT')),
                   ('INSERT on orders', has_any_column_privilege('orders', 'INSERT')),
                   ('UPDATE on orders', has_any_column_privilege('orders', 'UPDATE')),
                   ('EXECUTE on store_orders_v1',
                    has_function_privilege('store_orders_v1(jsonb, jsonb, boolean, boolean)', 'EXECUTE')),
                   ('EXECUTE on cancel_order_v1',
                    has_function_privilege('cancel_order_v1(text, uuid, text[])', 'EXECUTE')),
                   ('EXECUTE on claim_payments_v1',
                    has_function_privilege('claim_payments_v1(int, interval)', 'EXECUTE')),
                   ('EXECUTE on book_payments_v1',
                    has_function_privilege('book_payments_v1(jsonb)', 'EXECUTE')))
           AS needed (privilege, granted)
     WHERE NOT granted
"""


class SchemaError(ServiceError):
    """The database's schema is not one this service can work on, as the role and the search_path it has."""

    status = 503
    error_type = "database"


def migrations(directory: Path = _DIRECTORY) -> list[tuple[int, Path]]:
    """The numbered SQL files of *directory*, oldest first."""
    found = ((re.match(r"(\d{4})_\w+\.sql$", path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


async def migrate(db: Database, *, directory: Path = _DIRECTORY) -> int:
    """Bring the schema up to the newest file of *directory*, each in its own transaction; safe from many replicas.

    Returns:
        The schema's version now. A version newer than this service knows is left alone: the next release's schema
        still serves this one.
    """
    with _told("the schema cannot be brought up to date"):
        return await _migrate(db, directory)


async def _migrate(db: Database, directory: Path) -> int:
    for version, path in migrations(directory):
        async with db.transaction(statement_timeout_seconds=_STATEMENT_TIMEOUT_SECONDS) as transaction:
            await transaction.run("SELECT pg_advisory_xact_lock(%(id)s)", {"id": _LOCK_ID})
            await transaction.run(CREATE_VERSIONS)
            if (await transaction.run(SELECT_VERSION))[0][0] < version:
                await transaction.run(path.read_text())
                await transaction.run(INSERT_VERSION, {"version": version, "name": path.stem})
    return await schema_version(db)


async def schema_version(db: Database) -> int:
    """The version of the schema; 0 for an empty database."""
    exists = await db.run("SELECT to_regclass('schema_migrations') IS NOT NULL")
    return int((await db.run(SELECT_VERSION))[0][0]) if exists[0][0] else 0


async def require_schema(db: Database) -> None:
    """Check that the schema is one this service can work on.

    Raises:
        SchemaError: it is too old, which `python -m app migrate` mends, or not this role's to use.
    """
    with _told("the schema cannot be used"):
        needed, found = migrations()[-1][0], await schema_version(db)
        if found < needed:
            search_path = (await db.run("SHOW search_path"))[0][0]
            raise SchemaError(
                f"DATABASE_URL: the schema is at version {found} in the search_path {search_path}, this service needs "
                f"{needed}: run `python -m app migrate`"
            )
        missing = (await db.run(SELECT_MISSING_PRIVILEGES))[0][0]
        if missing:
            raise SchemaError(f"DATABASE_URL: the role lacks privileges: {missing}")


async def seed_catalogue(db: Database, *, size: int, stock: int) -> None:
    """Insert the deterministic products `SKU-0001` ... that are missing; never touches one that is there."""
    with _told("the products cannot be made"):
        await _seed_catalogue(db, size, stock)


async def _seed_catalogue(db: Database, size: int, stock: int) -> None:
    async with db.transaction(statement_timeout_seconds=_STATEMENT_TIMEOUT_SECONDS) as transaction:
        parameters = {"size": size, "stock": stock, "last": f"SKU-{size:04}"}
        await transaction.run(INSERT_PRODUCTS, parameters)


@contextmanager
def _told(failure: str) -> Iterator[None]:
    """Say what the database said, in one line: `InternalError` alone would help nobody at the start."""
    try:
        yield
    except SchemaError:
        raise
    except ServiceError as exc:
        reason = str(exc.__cause__ or "").partition("\n")[0].strip() or exc.detail
        raise SchemaError(
            f"DATABASE_URL: {failure} with its role and search_path: {reason} (the schema's owner runs `python -m app "
            "migrate`; the service can then start with MIGRATE_ON_START=false)"
        ) from exc
