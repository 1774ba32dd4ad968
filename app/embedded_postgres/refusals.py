"""Reasons why the embedded PostgreSQL does not run, each one line that names the way out."""

from pathlib import Path

WAY_OUT = "set DATABASE_URL to use a PostgreSQL server of your own"


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot run; the message is one line and names the way out."""


class AlreadyRunningError(EmbeddedPostgresError):
    """A live process owns the directory; the message and `dsn` tell how to join its server."""

    def __init__(self, directory: Path, dsn: str) -> None:
        super().__init__(f"PostgreSQL already runs in {directory}; to join it, set DATABASE_URL='{dsn}'")
        self.dsn = dsn
