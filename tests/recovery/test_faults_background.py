"""Work beside the requests survives whatever goes wrong in it: an exception, put into each, ends one round only."""

import asyncio
import errno
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest
from fastapi import FastAPI

from app import main
from app.background import keep_running
from app.db import Database
from app.embedded_postgres import EmbeddedPostgres
from app.errors import ConnectionLost
from app.server import serve as server_module
from app.server.protocol import Connections, Limits
from app.settings import Settings


class Injected(Exception):
    """A failure that no code expects."""


def failing_once(work: Callable[..., Any], failure: BaseException) -> tuple[Callable[..., Any], list[float]]:
    """*work*, whose first call raises *failure*; and when it was called."""
    calls: list[float] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise failure
        return work(*args, **kwargs)

    return wrapped, calls


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # nobody announces it
            await asyncio.sleep(0.01)


def failures(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The failures that were logged: the work, and the exception's text."""
    return [
        (vars(record)["work"], str(record.exc_info and record.exc_info[1]))
        for record in caplog.records
        if record.message == "background_work_failed"
    ]


# The mechanism


@pytest.mark.parametrize("failure", [Injected("broken"), asyncio.CancelledError("broken")], ids=repr)
async def test_work_goes_on_after_a_pause(failure: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """An exception, a leaked cancellation too, is logged and the next round comes after the pause, not at once."""
    rounds: list[float] = []

    async def step() -> None:
        rounds.append(time.monotonic())
        await asyncio.sleep(0)
        raise failure

    work = asyncio.create_task(keep_running("work", step, pause_seconds=0.1))
    await until(lambda: len(failures(caplog)) == 3)
    work.cancel()
    await asyncio.wait([work])
    assert work.cancelled()
    assert rounds[2] - rounds[0] >= 0.2
    assert failures(caplog) == [("work", "broken")] * 3


async def test_work_ends_when_it_is_cancelled_or_wanted_no_more(caplog: pytest.LogCaptureFixture) -> None:
    """A cancellation of the work itself ends it, in the middle of a round; so does `wanted`, before the next one."""
    work = asyncio.create_task(keep_running("work", lambda: asyncio.sleep(60)))
    await asyncio.sleep(0)
    work.cancel()
    await asyncio.wait([work])
    assert work.cancelled()
    wanted = iter((True, True, False))
    async with asyncio.timeout(5):
        await keep_running("work", lambda: asyncio.sleep(0), wanted=lambda: next(wanted))
    assert failures(caplog) == []


# Each of its users


async def test_healing_goes_on(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A trial that fails in an unknown way does not leave the breakers open for ever."""
    app = main.create_app(Settings.load(database_url=database_url, breaker_reset_seconds=0.05))
    async with app.router.lifespan_context(app) as state:
        run = Database.run
        failed: set[str] = set()

        async def run_or_fail(self: Database, sql: str, *args: Any, **kwargs: Any) -> Any:
            if sql not in failed:
                failed.add(sql)
                raise Injected("broken")
            return await run(self, sql, *args, **kwargs)

        async def lose() -> None:
            raise ConnectionLost

        monkeypatch.setattr(Database, "run", run_or_fail)
        assert state is not None
        breakers = state["breakers"]
        for breaker in breakers:
            while breaker.state == "closed":
                with pytest.raises(ConnectionLost):
                    await breaker.call(lose)
        await until(lambda: all(breaker.state == "closed" for breaker in breakers))
        assert len(failed) == len(breakers) == 2
    assert failures(caplog) == [("heal", "broken")] * 2


async def test_watch_of_the_loop_goes_on(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The lag of the event loop is measured also after an exception."""

    class Lags(deque[float]):
        append, calls = failing_once(deque.append, Injected("broken"))

    monkeypatch.setattr(main, "deque", Lags)
    app = main.create_app(Settings.load(database_url=database_url))
    async with app.router.lifespan_context(app):
        await until(lambda: len(Lags.calls) >= 3)
    assert failures(caplog) == [("watch_loop", "broken")]


async def test_tick_of_the_server_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Overdue connections are swept, and the date moves on, also after an exception."""
    sweep, swept = failing_once(Connections.sweep, Injected("broken"))
    monkeypatch.setattr(Connections, "sweep", sweep)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        limits = Limits(sweep_seconds=0.05)
        async with server_module._Server(FastAPI(), [listener], limits, {}):
            await until(lambda: len(swept) >= 3)
    assert swept[1] - swept[0] >= 1
    assert failures(caplog) == [("server_tick", "broken")]


async def test_supervision_of_postgres_goes_on(
    own_postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A log that cannot be put aside, for want of disk, does not keep a dead server from being restarted."""
    files = own_postgres._files
    rotate, rotated = failing_once(files.rotate_log, OSError(errno.ENOSPC, "no space left on device"))
    monkeypatch.setattr(files, "log_is_full", lambda: not rotated)
    monkeypatch.setattr(files, "rotate_log", rotate)
    supervisor = asyncio.create_task(own_postgres.supervise())
    await until(lambda: bool(rotated))
    killed = own_postgres.pid
    os.kill(killed, signal.SIGKILL)
    await until(lambda: own_postgres.pid != killed and answers(own_postgres.dsn))
    supervisor.cancel()
    await asyncio.wait([supervisor])
    assert [work for work, _ in failures(caplog)] == ["embedded_postgres"]


@pytest.mark.parametrize("failure", [Injected("broken"), OSError(errno.EAGAIN, "no process")], ids=repr)
async def test_restart_that_fails_is_tried_again(
    own_postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """Whatever keeps the dead server from being restarted, it is tried again, after a pause."""
    spawn, spawned = failing_once(own_postgres._spawn, failure)
    monkeypatch.setattr(own_postgres, "_spawn", spawn)
    supervisor = asyncio.create_task(own_postgres.supervise())
    os.kill(own_postgres.pid, signal.SIGKILL)
    await until(lambda: len(spawned) >= 2 and answers(own_postgres.dsn))
    supervisor.cancel()
    await asyncio.wait([supervisor])
    assert spawned[1] - spawned[0] > 0.9


def answers(dsn: str) -> bool:
    try:
        psycopg2.connect(dsn).close()
    except psycopg2.OperationalError:
        return False
    return True
