"""Builds the application: the one place that constructs things."""

import asyncio
import math
import os
import platform
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import structlog
from fastapi import FastAPI

from app import migrations
from app.admission import Admission
from app.auth import KeyRing
from app.background import keep_running
from app.cashier import Cashier
from app.catalogue import Catalogue
from app.db import Database, is_database_failure, wait_for_database
from app.embedded_postgres import SERVER_SETTINGS, EmbeddedPostgres
from app.errors import ServiceError
from app.fault_routes import fault_routes
from app.faults import Faults, FaultyRequests
from app.http_client import HttpClient
from app.intake import OrderIntake
from app.metrics import BUILD_INFO, EVENT_LOOP_LAG_SECONDS, ORDER_BATCH_QUEUE_DEPTH, export
from app.ops import add_documentation, ops
from app.payments import Payments, is_payments_failure
from app.problems import add_problem_handlers
from app.repository import prove_writes
from app.resilience import CircuitBreaker, Guard, RetryBudget
from app.routes import api, short
from app.service import OrderService
from app.settings import Settings
from app.short_way import Application
from app.state import Lifecycle, State

VERSION = "0.1.0"
_LAG_SAMPLE_SECONDS = 0.25
_LAG_WINDOW_SECONDS = 15  # a usual scrape interval: no peak falls between two scrapes
_HEAL_SECONDS = 0.25
_POOLS_SHARE = (
    0.75  # of the server's connections, at most: room for who replaces a replica, and who looks around
)

_log = structlog.get_logger("app")


def create_app(settings: Settings, lifecycle: Lifecycle | None = None) -> FastAPI:
    """The application; what it needs is opened when it starts and closed, in reverse, when it ends.

    Without a `database_url` it runs a PostgreSQL of its own.

    Args:
        settings: as the environment gives them.
        lifecycle: told by whoever serves the application that its end has begun; readiness follows it.

    Raises:
        SettingsError, EmbeddedPostgresError, ServiceError: from its start-up, where the database cannot be used.
    """
    lifecycle = lifecycle or Lifecycle()
    faults = (
        None
        if settings.faults_token is None
        else Faults(settings.faults_timeline, [*short.routes, *api.routes])
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            dsn = await database_url(settings, stack)
            db = await _open_database(settings, dsn, stack)
            writes, reads = (
                CircuitBreaker(
                    name,
                    fail_max=settings.breaker_fail_max,
                    reset_seconds=settings.breaker_reset_seconds,
                    is_failure=is_database_failure,
                )
                for name in ("postgres", "postgres_reads")
            )
            budget = RetryBudget(settings.retry_budget_ratio)
            guard_of_writes, guard_of_reads = (
                Guard(breaker, budget, max_attempts=settings.retry_max_attempts)
                for breaker in (writes, reads)
            )
            catalogue = Catalogue(
                db,
                guard_of_reads,
                cache_ttl_seconds=settings.cache_ttl_seconds,
                cache_max_size=max(10_000, settings.catalog_size),
                request_deadline_seconds=settings.request_deadline_seconds,
            )
            orders = OrderService(
                db,
                catalogue,
                writes=guard_of_writes,
                reads=guard_of_reads,
                batch_max_size=settings.batch_max_size,
                batch_max_wait_seconds=settings.batch_max_wait_seconds,
                request_deadline_seconds=settings.request_deadline_seconds,
                first_status="pending" if settings.payments_url else "confirmed",
            )
            export(payments=settings.payments_url is not None, faults=faults is not None)
            if faults is not None:
                await stack.enter_async_context(faults.possible(db))
            if settings.payments_url is not None:
                await _open_cashier(settings, db, guard_of_writes, faults, stack)
            stack.push_async_callback(_drain, orders, settings.request_deadline_seconds)
            ORDER_BATCH_QUEUE_DEPTH.set_function(lambda: orders.queue_depth)
            for breaker, proof in (writes, partial(prove_writes, db)), (reads, db.ping):
                await _run_in_background(stack, keep_running("heal", partial(_heal, breaker, proof)))
            lags: deque[float] = deque([0.0], maxlen=round(_LAG_WINDOW_SECONDS / _LAG_SAMPLE_SECONDS))
            EVENT_LOOP_LAG_SECONDS.set_function(lambda: max(lags))
            await _run_in_background(stack, keep_running("watch_loop", partial(_watch_event_loop, lags)))
            admission = Admission(settings.max_in_flight, settings.max_in_flight_per_principal)
            keys = KeyRing(settings.principals_by_key_hash)
            intake = OrderIntake(
                orders, admission, keys, request_deadline_seconds=settings.request_deadline_seconds
            )
            yield State(
                orders=orders,
                catalogue=catalogue,
                intake=intake,
                keys=keys,
                admission=admission,
                breakers=(writes, reads),
                lifecycle=lifecycle,
            )

    app = Application(
        title="Order service",
        version=VERSION,
        description="An instrumented reference e-commerce order service.",
        lifespan=lifespan,
        openapi_url=None,  # the documentation is served by `ops.py`
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    add_problem_handlers(app)
    for router in (short, api) if settings.ops_port is not None else (short, api, ops):
        app.add_routes(router.routes)
    add_documentation(app)
    if faults is not None:
        app.add_routes(fault_routes(faults, settings.faults_token or "").routes)
        app.wrap(partial(FaultyRequests, faults=faults))
    return app


def create_operations_app() -> FastAPI:
    """The application of OPS_PORT: probes and metrics, over the state of the application that it is served beside."""
    app = Application(
        title="Order service", version=VERSION, openapi_url=None, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    add_problem_handlers(app)
    app.add_routes(ops.routes)
    return app


async def database_url(settings: Settings, stack: AsyncExitStack) -> str:
    """The server to use: the one that was named, or one of our own."""
    if settings.database_url is not None:
        return settings.database_url
    # libpq's settings are for a server of the user's own; not all of them give way to a DSN (PGSERVICE, PGTZ).
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    connections = math.ceil(settings.max_replicas * settings.db_pool_max_size / _POOLS_SHARE)
    postgres = EmbeddedPostgres(
        settings.embedded_postgres_dir,
        settings={"max_connections": str(max(connections, int(SERVER_SETTINGS["max_connections"])))},
    )
    postgres.start()
    stack.callback(postgres.stop)
    await _run_in_background(stack, postgres.supervise())
    return postgres.dsn


async def open_database(settings: Settings, dsn: str, stack: AsyncExitStack) -> Database:
    """Wait for the server, and open the pool."""
    await wait_for_database(
        dsn,
        connect_timeout_seconds=settings.db_connect_timeout_seconds,
        start_timeout_seconds=settings.start_timeout_seconds,
        on_retry=lambda reason: _log.warning("waiting_for_database", reason=reason),
    )
    db = await Database.connect(
        dsn,
        pool_min_size=settings.db_pool_min_size,
        pool_max_size=settings.db_pool_max_size,
        pool_timeout_seconds=settings.db_pool_timeout_seconds,
        acquire_timeout_seconds=settings.db_acquire_timeout_seconds,
        connect_timeout_seconds=settings.db_connect_timeout_seconds,
        statement_timeout_seconds=settings.db_statement_timeout_seconds,
    )
    stack.push_async_callback(db.close, timeout_seconds=settings.db_statement_timeout_seconds)
    return db


async def _open_database(settings: Settings, dsn: str, stack: AsyncExitStack) -> Database:
    """The pool over a schema that is ready."""
    db = await open_database(settings, dsn, stack)
    await prepare_schema(db, settings)
    version, max_connections = (await db.run("SELECT version(), current_setting('max_connections')::int"))[0]
    BUILD_INFO.labels(VERSION, platform.python_version(), version.split()[1]).set(1)
    budget = settings.max_replicas * settings.db_pool_max_size
    if budget > _POOLS_SHARE * max_connections:
        _log.warning(
            "connection_budget_exceeded",
            detail="MAX_REPLICAS x DB_POOL_MAX_SIZE is more than three quarters of the server's max_connections",
            max_replicas=settings.max_replicas,
            db_pool_max_size=settings.db_pool_max_size,
            max_connections=max_connections,
        )
    return db


async def prepare_schema(db: Database, settings: Settings) -> None:
    """Migrate and seed, unless that is somebody else's task, and see that the schema is there."""
    if settings.migrate_on_start:
        await migrations.migrate(db)
        await migrations.seed_catalogue(db, size=settings.catalog_size, stock=settings.catalog_stock)
    await migrations.require_schema(db)


async def _open_cashier(
    settings: Settings, db: Database, writes: Guard, faults: Faults | None, stack: AsyncExitStack
) -> None:
    """Ask payments about the orders that are pending, until the application ends."""
    client = HttpClient(settings.payments_url or "")
    stack.callback(client.close)
    breaker = CircuitBreaker(
        "payments",
        fail_max=settings.breaker_fail_max,
        reset_seconds=settings.breaker_reset_seconds,
        is_failure=is_payments_failure,
    )
    cashier = Cashier(
        db,
        Payments(
            client,
            timeout_seconds=settings.payments_timeout_seconds,
            slowness=None if faults is None else faults.payment_seconds,
        ),
        writes=writes,
        asks=Guard(
            breaker, RetryBudget(settings.retry_budget_ratio), max_attempts=settings.retry_max_attempts
        ),
        max_in_flight=settings.payments_max_in_flight,
        deadline_seconds=settings.payments_deadline_seconds,
    )
    stack.push_async_callback(cashier.finish, settings.payments_timeout_seconds)
    for name, step in ("settle", cashier.work), ("watch_backlog", cashier.watch):
        await _run_in_background(stack, keep_running(name, step))


async def _drain(orders: OrderService, seconds: float) -> None:
    """Wait for the orders that were taken; none of them has more than *seconds* left."""
    try:
        async with asyncio.timeout(seconds):
            await orders.drain()
    except TimeoutError:
        _log.error("orders_given_up", queued=orders.queue_depth)


async def _run_in_background(stack: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
    """Run *work* until the application ends."""
    task = asyncio.create_task(work)

    async def stop() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    stack.push_async_callback(stop)


async def _heal(breaker: CircuitBreaker, proof: Callable[[], Awaitable[None]]) -> None:
    """While the breaker is open, be its trial call: no customer's order has to be.

    Args:
        breaker: opened by a kind of work.
        proof: fails for whatever fails that kind.
    """
    await asyncio.sleep(_HEAL_SECONDS)
    if breaker.state == "closed":
        return
    try:
        await breaker.call(proof)
    except ServiceError:
        return
    _log.info("database_is_back", breaker=breaker.name)


async def _watch_event_loop(recent: deque[float]) -> None:
    """Note how late a timer is."""
    due = time.monotonic() + _LAG_SAMPLE_SECONDS
    await asyncio.sleep(_LAG_SAMPLE_SECONDS)
    recent.append(max(0.0, time.monotonic() - due))
