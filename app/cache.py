"""An asynchronous cache: single flight, jittered expiry, stale answers while the source is away.

It stands on cachetools for storage and eviction only: `cachetools.cached` on an `async def` caches the
coroutine (the second hit awaits it again and fails), and its `condition=` blocks the thread, and so the loop.
"""

import asyncio
import functools
import random
import time
from collections.abc import Awaitable, Callable
from typing import Generic, Literal, NamedTuple, TypeVar

from cachetools import LRUCache

from app import errors
from app.metrics import CACHE_REQUESTS, CACHE_RESULTS

K = TypeVar("K")
V = TypeVar("V")

Result = Literal["hit", "miss", "stale", "coalesced"]


class Cached(NamedTuple, Generic[V]):
    """One look-up: the value, the seconds it stays fresh (negative: stale since), and how it was found."""

    value: V
    ttl_seconds: float
    result: Result


class _Entry(NamedTuple, Generic[V]):
    value: V
    fresh_until: float


class AsyncCache(Generic[K, V]):
    """What `load` answered, kept for about `ttl` seconds, and longer while `load` fails.

    Each process has its own: two replicas may differ by up to one ttl. Values must not be None.
    """

    def __init__(
        self,
        load: Callable[[K], Awaitable[V]],
        *,
        name: str,
        ttl: float = 300,
        maxsize: int = 10_000,
        stale_on: tuple[type[Exception], ...] = (errors.Unavailable,),
        timer: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Cache *load*.

        Args:
            load: the source; what it raises is never cached, so "not found" should be an exception.
            name: label of the metrics.
            ttl: seconds a value is fresh, give or take a tenth: keys loaded together do not expire together.
            maxsize: entries kept, stale ones too; the least recently used leave first.
            stale_on: exceptions of *load* on which an expired entry is served, however old.
            timer: a monotonic clock, in seconds.
            uniform: draws the jitter, as `random.uniform` does.
        """
        self._load = load
        self._ttl = ttl
        self._stale_on = stale_on
        self._timer = timer
        self._uniform = uniform
        self._entries: LRUCache[K, _Entry[V]] = LRUCache(maxsize)
        self._loads: dict[K, asyncio.Task[_Entry[V]]] = {}
        self._counters = {result: CACHE_REQUESTS.labels(name, result) for result in CACHE_RESULTS}
        self._count_hit = self._counters["hit"].inc

    def peek(self, key: K) -> V | None:
        """Return the fresh value of *key*, or None. Counts a hit; a miss is left to `get` to count."""
        try:
            value, fresh_until = self._entries[key]
        except KeyError:
            return None
        if fresh_until <= self._timer():
            return None
        self._count_hit()
        return value

    async def get(self, key: K) -> V:
        """Return the value of *key*: fresh, loaded, or stale where loading fails.

        Raises:
            Exception: what `load` raised, unless it is of `stale_on` and an older value is still here.
        """
        return (await self.lookup(key)).value

    __call__ = get

    async def lookup(self, key: K) -> Cached[V]:
        """As `get`, with the age of the value and how it was found.

        Callers for one key share one load (`coalesced`); one that is cancelled leaves it to the others. Every
        call counts once in `cache_requests_total`, by what it found or, if it fails, tried.
        """
        entry = self._entries.get(key)
        now = self._timer()
        if entry is not None and entry.fresh_until > now:
            self._count_hit()
            return Cached(entry.value, entry.fresh_until - now, "hit")
        result: Result = "coalesced"
        task = self._loads.get(key)
        if task is None:
            result = "miss"
            task = self._start_load(key)
        try:
            entry = await asyncio.shield(task)
        except self._stale_on:
            if entry is None:
                raise
            result = "stale"
        finally:
            self._counters[result].inc()
        return Cached(entry.value, entry.fresh_until - self._timer(), result)

    def _start_load(self, key: K) -> asyncio.Task[_Entry[V]]:
        task = asyncio.get_running_loop().create_task(self._load_entry(key))
        self._loads[key] = task
        task.add_done_callback(functools.partial(self._load_ended, key))
        return task

    async def _load_entry(self, key: K) -> _Entry[V]:
        """Load *key* in a task of its own."""
        try:
            value = await self._load(key)
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if this is None or this.cancelling():
                raise
            # Nobody cancelled this load: a driver leaked a CancelledError (aiopg: aio-libs/aiopg#537). Passed
            # on, it would look to every caller like a cancellation of its own.
            raise errors.InternalError("The load was cancelled.") from None
        return _Entry(value, self._timer() + self._ttl * self._uniform(0.9, 1.1))

    def _load_ended(self, key: K, task: asyncio.Task[_Entry[V]]) -> None:
        """Store what was loaded. A callback: a task cancelled before its first step runs no `finally`."""
        del self._loads[key]
        if not task.cancelled() and task.exception() is None:
            self._entries[key] = task.result()


def cached(
    *,
    ttl: float = 300,
    maxsize: int = 10_000,
    name: str | None = None,
    stale_on: tuple[type[Exception], ...] = (errors.Unavailable,),
) -> Callable[[Callable[[K], Awaitable[V]]], AsyncCache[K, V]]:
    """Turn `async def f(key)` into an `AsyncCache`: `await f(key)` is its `get`.

    Args: as of `AsyncCache`; *name* defaults to the function's own.
    """

    def decorate(load: Callable[[K], Awaitable[V]]) -> AsyncCache[K, V]:
        label = name or str(getattr(load, "__name__", type(load).__name__))
        cache = AsyncCache(load, name=label, ttl=ttl, maxsize=maxsize, stale_on=stale_on)
        functools.update_wrapper(cache, load, updated=())
        return cache

    return decorate
