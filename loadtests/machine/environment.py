"""The environment of a run, to run it again in: versions, machine, database settings, dataset."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psycopg2

from loadtests.machine import processes

_PACKAGES = (
    "locust", "gevent", "hdrhistogram", "fastapi", "uvicorn", "uvloop", "aiopg", "psycopg2-binary", "pydantic",
)  # fmt: skip
_DATABASE_SETTINGS = (
    "server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_connections",
    "max_wal_size", "commit_delay", "wal_level",
)  # fmt: skip


def commit() -> str:
    """The commit that is checked out; "+changes" where files differ from it; "unknown" outside of a checkout."""
    revision = _git("rev-parse", "HEAD")
    if not revision:
        return "unknown"
    return f"{revision}+changes" if _git("status", "--porcelain", "--untracked-files=no") else revision


def versions() -> Mapping[str, str]:
    """Python's, and those of the packages that matter here and are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine() -> Mapping[str, str | int | float | None]:
    """The machine of the generator, and without HOST of everything else."""
    memory = None
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    load = None
    with contextlib.suppress(OSError):
        load = os.getloadavg()[0]
    governor = None
    with contextlib.suppress(OSError):
        governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    return {**processes.machine(), "memory_bytes": memory, "load_1m_before": load, "governor": governor}


def database_settings(dsn: str | None) -> Mapping[str, str]:
    """The settings that decide what a commit costs; empty without a DSN."""
    if dsn is None:
        return {}
    query = "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY (%s)"
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(query, (list(_DATABASE_SETTINGS),))
        return dict(cursor.fetchall())


def dataset(dsn: str | None) -> Mapping[str, str | int | None]:
    """Rows that were there before the run; empty without a DSN."""
    if dsn is None:
        return {}
    query = "SELECT (SELECT count(*) FROM products), (SELECT count(*) FROM orders)"
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        products, orders = cursor.fetchone() or (None, None)
    return {"products": products, "orders_before": orders}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607 - the one on the PATH
            cwd=processes.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()
