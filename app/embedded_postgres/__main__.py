"""`python -m app.embedded_postgres DIR`: a server alone, its DSN on stdout."""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from app.embedded_postgres import EmbeddedPostgres, EmbeddedPostgresError

_PLAIN_RECORD = frozenset({*logging.makeLogRecord({}).__dict__, "message", "taskName"})


class _PlainFormatter(logging.Formatter):
    """An event and its fields as one line to be read: `postgres_restarting status=-9`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = (f"{name}={value}" for name, value in vars(record).items() if name not in _PLAIN_RECORD)
        return " ".join((record.getMessage(), *fields))


async def _serve(server: EmbeddedPostgres) -> None:
    """Tell where the server is, and keep it running until a signal."""
    asked_to_end = asyncio.Event()
    ending = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        ending.append(signal.SIGHUP)
    for signal_number in ending:
        asyncio.get_running_loop().add_signal_handler(signal_number, asked_to_end.set)
    dsns = [server.dsn] if server.port is None else [server.dsn, server.tcp_dsn]
    sys.stdout.write("\n".join(dsns) + "\n")  # who reads it may end us at once
    sys.stdout.flush()
    supervisor = asyncio.create_task(server.supervise())
    await asked_to_end.wait()
    supervisor.cancel()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a server alone until SIGINT, SIGTERM or SIGHUP; its DSN goes to stdout, one line of reason to stderr."""
    parser = argparse.ArgumentParser(prog="python -m app.embedded_postgres", description=main.__doc__)
    parser.add_argument("directory", type=Path, help="where its data is kept")
    parser.add_argument("--port", type=int, help="also listen there on 127.0.0.1 (a second DSN is printed)")
    parser.add_argument("--bin-dir", type=Path, help="of another PostgreSQL, 15 or later")
    parser.add_argument("--max-connections", type=int, help="for the pools of several services")
    options = parser.parse_args(arguments)
    stderr = logging.StreamHandler()
    stderr.setFormatter(_PlainFormatter())
    logging.basicConfig(handlers=[stderr])
    try:
        settings = {"max_connections": str(options.max_connections)} if options.max_connections else {}
        with EmbeddedPostgres(
            options.directory, bin_dir=options.bin_dir, settings=settings, port=options.port
        ) as server:
            asyncio.run(_serve(server))
    except EmbeddedPostgresError as exc:
        sys.stderr.write(f"{parser.prog}: {exc}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
