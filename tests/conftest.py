"""Real PostgreSQL servers for the tests; TEST_POSTGRES_BIN_DIR chooses another version's binaries."""

import contextlib
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from app.embedded_postgres import EmbeddedPostgres
from app.server.serve import raise_open_files_limit
from tests.support.payments_process import PaymentsProcess
from tests.support.service_process import ServiceProcess

# The tests have servers of their own, to which libpq's settings of the user's do not apply.
for _name in [name for name in os.environ if name.startswith("PG")]:
    del os.environ[_name]

raise_open_files_limit()  # some tests are a thousand clients

# Only for data that no test outlives; `own_postgres` keeps the real settings.
_WITHOUT_DURABILITY = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


@pytest.fixture(scope="session")
def postgres_bin_dir() -> Path | None:
    """Where the PostgreSQL under test is; None: in the wheel."""
    bin_dir = os.environ.get("TEST_POSTGRES_BIN_DIR")
    return Path(bin_dir) if bin_dir else None


@pytest.fixture(scope="session")
def postgres_template(tmp_path_factory: pytest.TempPathFactory, postgres_bin_dir: Path | None) -> Path:
    """A directory with a cleanly stopped server's data, to be copied."""
    directory = tmp_path_factory.mktemp("postgres-template")
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir):
        pass
    return directory


@pytest.fixture(scope="session")
def postgres(
    tmp_path_factory: pytest.TempPathFactory, postgres_template: Path, postgres_bin_dir: Path | None
) -> Iterator[EmbeddedPostgres]:
    """One server for the whole run; not to be harmed."""
    directory = shutil.copytree(postgres_template, tmp_path_factory.mktemp("postgres") / "shared")
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir, settings=_WITHOUT_DURABILITY) as server:
        yield server


@pytest.fixture
def database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The DSN of an empty database of the test's own."""
    name = f"test_{uuid.uuid4().hex}"
    with contextlib.closing(psycopg2.connect(postgres.dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
            yield make_dsn(postgres.dsn, dbname=name)
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def own_postgres(
    tmp_path: Path, postgres_template: Path, postgres_bin_dir: Path | None
) -> Iterator[EmbeddedPostgres]:
    """A started server of the test's own, with the shipped settings, to be killed or frozen at will."""
    directory = shutil.copytree(postgres_template, tmp_path / "postgres")
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir) as server:
        yield server
        for pid in server.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@pytest.fixture
def start_service(tmp_path: Path, database_url: str) -> Iterator[Callable[..., ServiceProcess]]:
    """Start a service: `start_service(BATCH_MAX_SIZE=1)`; on the test's database unless `dsn=` names another."""
    started: list[ServiceProcess] = []

    def start(*, dsn: str | None = None, **settings: object) -> ServiceProcess:
        directory = tmp_path / f"service-{len(started)}"
        started.append(ServiceProcess(directory, dsn or database_url, settings))
        return started[-1].start()

    yield start
    for service in started:
        service.kill()


@pytest.fixture
def service(start_service: Callable[..., ServiceProcess]) -> ServiceProcess:
    """A service with the shipped settings on a database of its own."""
    return start_service()


@pytest.fixture
def payments(tmp_path: Path) -> Iterator[PaymentsProcess]:
    """A payments service that is fast and well, until it is told otherwise."""
    process = PaymentsProcess(tmp_path).start()
    yield process
    process.kill()
