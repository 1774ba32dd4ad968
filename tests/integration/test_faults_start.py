"""Starts that fail: each says in one line which variable is wrong, or what to do."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg2.extensions import make_dsn

from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import execute, new_database


def _run(directory: Path, *arguments: str, **settings: str | bytes) -> subprocess.CompletedProcess[str]:
    """`python -m app` to its end."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environment: dict[str, str | bytes] = {
        **kept,
        "PORT": "0",
        "EMBEDDED_POSTGRES_DIR": str(directory / "own"),
    }
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        env=environment | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _reason(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line it said."""
    assert ended.returncode == 1, ended.stderr
    [line] = ended.stderr.splitlines()
    assert "Traceback" not in ended.stdout
    assert line.startswith("order service: ")
    return line.removeprefix("order service: ")


@pytest.fixture(scope="module")
def migrated(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database with the schema, and a role `weak` that may do nothing there."""
    with new_database(postgres) as dsn:
        ended = _run(tmp_path_factory.mktemp("migrate"), "migrate", DATABASE_URL=dsn, CATALOG_SIZE="1")
        assert ended.returncode == 0, ended.stderr
        execute(dsn, "CREATE ROLE weak LOGIN")
        yield dsn
        execute(dsn, "DROP OWNED BY weak; DROP ROLE weak")


@pytest.mark.parametrize("command", ["serve", "migrate"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"options": "-c search_path=nowhere"}, "no schema has been selected to create in"),
        ({"user": "weak"}, "permission denied for schema public"),
        ({"options": "-c default_transaction_read_only=on"}, "read-only transaction"),
    ],
    ids=["search_path", "role", "read-only"],
)
def test_a_schema_that_cannot_be_made(
    tmp_path: Path, migrated: str, command: str, change: dict[str, str], told: str
) -> None:
    """DATABASE_URL, what the server said, and what to do: it was `A defect of the service.`"""
    reason = _reason(_run(tmp_path, command, DATABASE_URL=make_dsn(migrated, **change)))
    assert reason.startswith("DATABASE_URL: the schema cannot be brought up to date")
    assert told in reason
    assert "python -m app migrate" in reason


def test_a_search_path_that_leads_elsewhere(tmp_path: Path, migrated: str) -> None:
    """The line tells where the schema was looked for."""
    dsn = make_dsn(migrated, options="-c search_path=nowhere")
    reason = _reason(_run(tmp_path, DATABASE_URL=dsn, MIGRATE_ON_START="false"))
    assert reason.startswith("DATABASE_URL: the schema is at version 0 in the search_path nowhere")


def test_a_role_without_its_privileges(tmp_path: Path, migrated: str) -> None:
    """A service that could answer no order does not start; the line tells what the role lacks."""
    dsn = make_dsn(migrated, user="weak")
    reason = _reason(_run(tmp_path, DATABASE_URL=dsn, MIGRATE_ON_START="false"))
    assert reason.startswith("DATABASE_URL: the schema cannot be used")
    assert "permission denied for table schema_migrations" in reason
    execute(
        migrated,
        "GRANT SELECT ON schema_migrations, products, orders TO weak; GRANT INSERT ON orders TO weak",
    )
    execute(migrated, "GRANT UPDATE (stock) ON products TO weak")
    reason = _reason(_run(tmp_path, DATABASE_URL=dsn, MIGRATE_ON_START="false"))
    assert reason == "DATABASE_URL: the role lacks privileges: UPDATE on orders"
    execute(migrated, "GRANT UPDATE ON orders TO weak")
    execute(migrated, "REVOKE EXECUTE ON FUNCTION cancel_order_v1 FROM PUBLIC")
    reason = _reason(_run(tmp_path, DATABASE_URL=dsn, MIGRATE_ON_START="false"))
    assert reason == "DATABASE_URL: the role lacks privileges: EXECUTE on cancel_order_v1"


@pytest.mark.parametrize(
    "dsn",
    [
        "service=nope",
        "host=a,b,c port=1,2",
        b"postgresql:///\xff\xfe",
        "host=127.0.0.1 port=99999",
        "host=127.0.0.1 target_session_attrs=perhaps",
        "host=/" + "x" * 200,
    ],
    ids=lambda dsn: str(dsn)[:40],
)
def test_a_dsn_that_can_never_work(tmp_path: Path, dsn: str | bytes) -> None:
    """At once, by the variable's name."""
    assert _reason(_run(tmp_path, DATABASE_URL=dsn, START_TIMEOUT_SECONDS="3600")).startswith(
        "DATABASE_URL: "
    )


def test_a_server_that_refuses_the_session(tmp_path: Path, database_url: str) -> None:
    """It would refuse every other one, too: it is not waited for."""
    dsn = make_dsn(database_url, options="-c no.such=1 -c nonsense=1")
    reason = _reason(_run(tmp_path, DATABASE_URL=dsn, START_TIMEOUT_SECONDS="3600"))
    assert reason.startswith("DATABASE_URL: ")
    assert "unrecognized configuration parameter" in reason


@pytest.mark.parametrize(
    "kind", ["file", "below a file", "loop", "not ours", "long", "not writable", "bytes"]
)
def test_a_directory_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    """EMBEDDED_POSTGRES_DIR is to be another one: two of these were a traceback."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    directories: dict[str, str | bytes] = {
        "file": str(tmp_path / "file"),
        "below a file": str(tmp_path / "file" / "below"),
        "loop": str(tmp_path / "loop"),
        "not ours": str(tmp_path / "full"),
        "long": str(tmp_path / ("n" * 300)),
        "not writable": "/proc/none",
        "bytes": os.fsencode(tmp_path) + b"/\xff",
    }
    ended = _run(tmp_path, EMBEDDED_POSTGRES_DIR=directories[kind])
    assert "choose another EMBEDDED_POSTGRES_DIR" in _reason(ended)


def test_a_principal_that_no_entry_can_name(tmp_path: Path) -> None:
    """`new-key` makes no entry that API_KEYS would refuse."""
    for principal in ("a b", "a:b", "à", "", "a" * 65):
        assert "principal" in _reason(_run(tmp_path, "new-key", principal))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "LOCALHOST"])
def test_a_host_is_told_before_anything_else(tmp_path: Path, host: str) -> None:
    """HOST where it cannot be resolved; else the start goes on, to the DSN that cannot work."""
    reason = _reason(_run(tmp_path, HOST=host, DATABASE_URL="service=nope"))
    assert reason.startswith("HOST: " if "invalid" in host else "DATABASE_URL: ")
