"""A standby of a test's Postgres, which streams from it and can take its place."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from psycopg2.extensions import make_dsn

from app.embedded_postgres import EmbeddedPostgres
from tests.support.order_api import execute

SYNCHRONOUS: Mapping[str, str] = {"synchronous_standby_names": "*"}
"""Settings of a primary whose commits wait for a standby: with it gone they wait for ever."""


def standby_of(
    primary: EmbeddedPostgres, directory: Path, *, bin_dir: Path | None, port: int | None = None
) -> EmbeddedPostgres:
    """A copy of *primary* in *directory*, not started yet, that will follow it and take reads only."""
    directory.mkdir(mode=0o700)
    for name in ("owner.lock", "password"):
        shutil.copy(primary.directory / name, directory)
    copying = [_pg_basebackup(primary), "--pgdata", str(directory / "data"), "--write-recovery-conf"]
    dsn = make_dsn(primary.dsn, application_name="standby")
    subprocess.run([*copying, "--checkpoint=fast", "--dbname", dsn], check=True, capture_output=True)
    return EmbeddedPostgres(directory, bin_dir=bin_dir, port=port)


def promote(standby: EmbeddedPostgres) -> None:
    """Make *standby* the primary; it takes writes when this returns."""
    assert execute(standby.dsn, "SELECT pg_promote()") == [(True,)]


def is_synchronous(primary: EmbeddedPostgres) -> bool:
    """True once a standby confirms the commits of *primary*."""
    return bool(
        execute(primary.dsn, "SELECT 1 FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')")
    )


def _pg_basebackup(server: EmbeddedPostgres) -> str:
    return str(Path(f"/proc/{server.pid}/exe").resolve().with_name("pg_basebackup"))
