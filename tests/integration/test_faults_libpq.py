"""libpq's environment is for a server of the user's own: the embedded one is reached in spite of it."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from psycopg2.extensions import parse_dsn

from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import new_order
from tests.support.service_process import ServiceProcess

_HOSTILE = {
    "PGPORT": "1",
    "PGHOST": "no.such.host.invalid",
    "PGHOSTADDR": "127.0.0.9",
    "PGOPTIONS": "-c search_path=nowhere",
    "PGTARGETSESSIONATTRS": "standby",
    "PGCLIENTENCODING": "LATIN1",
    "PGSSLMODE": "verify-full",
    "PGCHANNELBINDING": "require",
    "PGREQUIREPEER": "nobody-else",
    "PGGSSENCMODE": "require",
    "PGUSER": "stranger",
    "PGDATABASE": "nowhere",
    "PGPASSWORD": "guess",
    "PGPASSFILE": "/nonexistent",
}
# What libpq lets no DSN overrule: it must be taken out of the environment.
_STUBBORN = {
    "PGSERVICE": "no-such-service",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGTZ": "No/Where",
    "PGSSLMINPROTOCOLVERSION": "none",
}
_PLAIN = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}


def test_a_service_with_its_own_postgres(tmp_path: Path) -> None:
    """It starts, and stores an order."""
    service = ServiceProcess(tmp_path, None, _HOSTILE | _STUBBORN).start()
    try:
        with service.client() as client:
            placed = client.post("/orders", json=new_order(("SKU-0001", 1)))
            assert placed.status_code == 201
            assert client.get(placed.headers["location"]).json() == placed.json()
        assert service.terminate() == 0
    finally:
        service.kill()


@pytest.mark.parametrize("hostile", [{}, *({name: value} for name, value in _HOSTILE.items())], ids=str)
def test_psql_on_the_printed_dsn(own_postgres: EmbeddedPostgres, hostile: dict[str, str]) -> None:
    """What is printed can be given to psql as it is, whatever is set."""
    _psql(own_postgres.dsn, hostile)


def _psql(dsn: str, environment: dict[str, str]) -> None:
    psql = shutil.which("psql")
    if psql is None:
        pytest.skip("psql is not installed here (Debian: postgresql-client)")
    shown = "SELECT current_database(), current_user, current_setting('client_encoding'), current_schema()"
    ended = subprocess.run(
        [psql, "-w", "-AtXc", shown, dsn],
        env=_PLAIN | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "orders|app|UTF8|public\n", ended.stderr


def test_psql_over_tcp(tmp_path: Path, postgres_template: Path, postgres_bin_dir: Path | None) -> None:
    """The second DSN that `python -m app.embedded_postgres` prints stands alone, too."""
    directory = shutil.copytree(postgres_template, tmp_path / "postgres")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir, port=port) as server:
        for dsn in (server.dsn, server.tcp_dsn):
            _psql(dsn, _HOSTILE)


def test_the_printed_dsn_is_complete(tmp_path: Path) -> None:
    """Where the server is, who asks and for what: all of it."""
    dsn = EmbeddedPostgres(tmp_path).dsn
    assert {"user", "dbname", "host", "port"} <= set(parse_dsn(dsn))
    assert parse_qs(urlsplit(dsn).query)["port"] == ["5432"]


def test_the_tests_themselves(tmp_path: Path) -> None:
    """They pass with it all set."""
    ended = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                f"--basetemp={tmp_path / 'tests'}",
            ),
            "tests/integration/test_db.py::test_rows_of_the_last_statement",
        ],
        env=_PLAIN | _HOSTILE | _STUBBORN,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout


def test_the_load_tests_postgres(tmp_path: Path) -> None:
    """A load test that brings its own database reaches that one."""
    script = (
        "import sys, psycopg2\n"
        "from pathlib import Path\n"
        "from loadtests.machine.processes import embedded_postgres\n"
        "with embedded_postgres(Path(sys.argv[1])) as postgres:\n"
        "    with psycopg2.connect(postgres.create_database('own')) as connection, connection.cursor() as cursor:\n"
        "        cursor.execute('SELECT current_database(), current_schema()')\n"
        "        print(*cursor.fetchone())\n"
        "    connection.close()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=_PLAIN | _HOSTILE | _STUBBORN,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "own public\n", ended.stderr


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_server_of_the_users_own_is_found_by_its_variables(
    start_service: Callable[..., ServiceProcess],
    tmp_path: Path,
    postgres_template: Path,
    postgres_bin_dir: Path | None,
    host: str,
) -> None:
    """With a DATABASE_URL libpq's environment fills in what it leaves out, as for every client of PostgreSQL."""
    directory = shutil.copytree(postgres_template, tmp_path / "postgres")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir, port=port) as server:
        url = urlsplit(server.tcp_dsn)
        service = start_service(
            dsn=f"host={host} dbname=orders",
            PGPORT=port,
            PGUSER=url.username,
            PGPASSWORD=url.password,
            PGOPTIONS="-c application_name=from-the-environment",
        )
        with service.client() as client:
            assert client.post("/orders", json=new_order(("SKU-0001", 1))).status_code == 201
        assert service.terminate() == 0
