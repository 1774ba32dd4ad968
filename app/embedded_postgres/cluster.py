"""The database cluster in `data/`: made complete by the first start, of the binaries' own major version."""

import os
import secrets
import shutil
import subprocess
from pathlib import Path

from app.embedded_postgres.accounts import Account
from app.embedded_postgres.binaries import reason
from app.embedded_postgres.directory import ServerDirectory
from app.embedded_postgres.refusals import WAY_OUT, EmbeddedPostgresError

DATABASE = "orders"
ROLE = "app"


def make_cluster(directory: ServerDirectory, postgres: Path, account: Account) -> None:
    """Make data/ at one stroke: it has another name until it is complete."""
    new = directory.path / f"initdb-{secrets.token_hex(4)}"
    new.mkdir(mode=0o700)
    directory.password.touch(mode=0o600)
    directory.password.write_text(secrets.token_urlsafe(24))
    account.own(new)
    account.own(directory.password)
    initdb = [
        *(str(postgres.with_name("initdb")), "--no-instructions"),
        *(f"--pgdata={new}", f"--username={ROLE}", "--no-locale", "--encoding=UTF8"),
        # Trust behind a 0700 directory. Never over TCP: there any account of this machine would be let in
        # as superuser, and a superuser runs programs as the account of the server.
        *("--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={directory.password}"),
        "--data-checksums",  # a rotten page is reported, not served; the default from PostgreSQL 18 on
    ]
    single = [str(postgres), "--single", "-D", str(new), "-j", "-c", "exit_on_error=on"]
    preload = "shared_preload_libraries=pg_stat_statements"
    create = f"CREATE DATABASE {DATABASE};\n\n"
    # Its view shows all databases from any one: `orders` itself is left to the migrations.
    create_and_extend = create + "CREATE EXTENSION pg_stat_statements;\n\n"
    try:
        _check(account.run(initdb, directory.path))
        if (
            account.run([*single, "-c", preload, "postgres"], directory.path, create_and_extend).returncode
            == 0
        ):
            with (new / "postgresql.auto.conf").open("a") as file:
                file.write("shared_preload_libraries = 'pg_stat_statements'\n")
                file.flush()
                os.fsync(file.fileno())
        else:
            _check(account.run([*single, "postgres"], directory.path, create))
        new.rename(directory.data)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    parent = os.open(directory.path, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def check_version(data: Path, major: str) -> None:
    """Refuse *data* that was made by another major version than *major*."""
    found = (data / "PG_VERSION").read_text().strip()
    if found != major:
        raise EmbeddedPostgresError(
            f"{data} was made by PostgreSQL {found}, the binaries are version {major}: "
            f"dump it with the old ones, choose another EMBEDDED_POSTGRES_DIR, or {WAY_OUT}"
        )


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        raise EmbeddedPostgresError(f"PostgreSQL's data directory cannot be made: {reason(done.stderr)}")
