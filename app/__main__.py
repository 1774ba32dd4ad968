"""`python -m app` serves; `python -m app migrate` and `python -m app new-key` do one thing and end."""

import argparse
import asyncio
import gc
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

import structlog

from app import logs, migrations, replicas
from app.auth import new_key
from app.embedded_postgres import EmbeddedPostgresError
from app.errors import ServiceError
from app.main import create_app, create_operations_app, database_url, open_database
from app.server.protocol import Limits
from app.server.serve import Operations, raise_open_files_limit, run, serve
from app.settings import PRINCIPAL, TERMINATION_GRACE_PERIOD_SECONDS, Settings, SettingsError
from app.state import Lifecycle

_MOST_REPLICAS = 100

_log = structlog.get_logger("app")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or 1 after one line that says what was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m app",
        description="The order service. Settings come from the environment; app/README.md lists them.",
    )
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    serving = commands.add_parser("serve", help="serve (the default)")
    serving.add_argument(
        "--replicas", type=_replicas, default=1, metavar="N", help="processes on one port (default: 1)"
    )
    replica = commands.add_parser(replicas.COMMAND, help="be one of them: `serve --replicas` starts it")
    replica.add_argument("descriptors", help="of its listening sockets, by commas")
    commands.add_parser("migrate", help="bring the database's schema up to date, and end")
    key = commands.add_parser("new-key", help="make an API key: prints the token and its entry for API_KEYS")
    key.add_argument("principal", nargs="?", default="client", help="whose key it is (default: client)")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (SettingsError, EmbeddedPostgresError) as exc:
        return _fail(str(exc))
    except ServiceError as exc:
        return _fail(exc.detail)
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    if options.command == "new-key":
        return _new_key(options.principal)
    settings = Settings.load()
    if options.command == "migrate":
        return asyncio.run(_migrate(settings))
    several = options.command == replicas.COMMAND or (options.command == "serve" and options.replicas > 1)
    logs.configure(settings.log_level, settings.log_format, shared=several)
    raise_open_files_limit()
    if options.command == replicas.COMMAND:
        return _serve(settings, replicas.Inheritance.of(options.descriptors))
    if several:
        return asyncio.run(replicas.serve_replicas(settings, options.replicas))
    return _serve(settings)


def _serve(settings: Settings, inheritance: replicas.Inheritance | None = None) -> int:
    if settings.longest_shutdown_seconds > TERMINATION_GRACE_PERIOD_SECONDS:
        _log.warning(
            "shutdown_may_be_cut_short",
            detail="DRAIN_DELAY_SECONDS, requests in progress, REQUEST_DEADLINE_SECONDS and "
            "DB_STATEMENT_TIMEOUT_SECONDS together: a cluster needs a longer terminationGracePeriodSeconds",
            longest_shutdown_seconds=settings.longest_shutdown_seconds,
            kubernetes_waits_seconds=TERMINATION_GRACE_PERIOD_SECONDS,
        )
    lifecycle = Lifecycle()
    app = create_app(settings, lifecycle)

    def started(url: str, operations_url: str | None = None) -> None:
        _settle_garbage_collector()
        if inheritance:
            inheritance.tell_started()
            return
        where = "DATABASE_URL" if settings.database_url else settings.embedded_postgres_dir.resolve()
        operations = f"   operations {operations_url}" if operations_url else ""
        sys.stderr.write(f"order service on {url}   docs {url}/docs   data in {where}{operations}\n")

    limits = Limits(
        keep_alive_seconds=settings.keep_alive_seconds, max_age_seconds=settings.connection_max_age_seconds
    )
    return run(
        serve(
            app,
            host=settings.host,
            port=settings.port,
            limits=limits,
            drain_delay_seconds=settings.drain_delay_seconds,
            on_drain=lifecycle.drain,
            on_started=started,
            grace_seconds=settings.shutdown_grace_seconds,
            operations=(
                None if settings.ops_port is None else Operations(create_operations_app(), settings.ops_port)
            ),
            inherited=inheritance.sockets if inheritance else (),
        )
    )


def _replicas(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_REPLICAS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {_MOST_REPLICAS}")
    return int(text)


def _settle_garbage_collector() -> None:
    """Leave alone what start-up made, and look for cycles less often: it took a tenth of an order's CPU."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


async def _migrate(settings: Settings) -> int:
    async with AsyncExitStack() as stack:
        db = await open_database(settings, await database_url(settings, stack), stack)
        version = await migrations.migrate(db)
        await migrations.seed_catalogue(db, size=settings.catalog_size, stock=settings.catalog_stock)
    sys.stdout.write(f"the schema is at version {version}\n")
    return 0


def _new_key(principal: str) -> int:
    if not PRINCIPAL.fullmatch(principal):
        raise SettingsError("new-key: a principal is 1 to 64 letters, digits, dots, dashes and underscores")
    token, entry = new_key(principal)
    sys.stdout.write(
        f"token (give it to the client; it is shown once): {token}\nentry (add it to API_KEYS): {entry}\n"
    )
    return 0


def _fail(reason: str) -> int:
    sys.stderr.write(f"order service: {reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
