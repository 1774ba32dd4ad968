"""The schema, as numbered SQL files: `0001_orders.sql` brings an empty database to version 1, and so on."""

import re
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


class SchemaError(ServiceError):
    """The database's schema is older than this service needs."""

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
        SchemaError: it is too old; `python -m app migrate` upgrades it.
    """
    needed, found = migrations()[-1][0], await schema_version(db)
    if found < needed:
        raise SchemaError(
            f"the schema is at version {found}, this service needs {needed}: run `python -m app migrate`"
        )


async def seed_catalogue(db: Database, *, size: int, stock: int) -> None:
    """Insert the deterministic products `SKU-0001` ... that are missing; never touches one that is there."""
    async with db.transaction(statement_timeout_seconds=_STATEMENT_TIMEOUT_SECONDS) as transaction:
        parameters = {"size": size, "stock": stock, "last": f"SKU-{size:04}"}
        await transaction.run(INSERT_PRODUCTS, parameters)
