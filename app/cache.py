"""An asynchronous cache: single flight, jittered expiry, stale answers while the source is away.

It stands on cachetools for storage and eviction only: `cachetools.cached` on an `async def` caches the
coroutine (the second hit awaits it again and fails), and its `condition=` blocks the thread, and so the loop.
"""

import asyncio
import functools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
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
            load: the source; what it raises is never cached, so "not found" should be an exception. One that returns
                a future instead of a coroutine, as a `MicroBatcher` does, spares a task a key.
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
        self._loads: dict[K, asyncio.Future[V]] = {}
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
        return self._fresh(key) or await self._loaded(key, *self._begin(key))

    async def get_all(self, keys: Sequence[K]) -> list[V | Exception]:
        """As `get` for each of *keys*; all that is missing is asked for before the first answer is waited for.

        Returns:
            n keys in, n results out, in their order; an exception is what `get` would raise for its key.
        """
        begun = [(key, self._fresh(key) or self._begin(key)) for key in keys]
        results: list[V | Exception] = []
        for key, found in begun:
            try:
                cached = found if isinstance(found, Cached) else await self._loaded(key, *found)
                results.append(cached.value)
            except Exception as exc:  # noqa: BLE001 - it is this key's result
                results.append(exc)
        return results

    def discard(self, key: K) -> None:
        """Forget the value of *key*. A load under way is kept: it is newer."""
        self._entries.pop(key, None)

    def _fresh(self, key: K) -> Cached[V] | None:
        entry = self._entries.get(key)
        now = self._timer()
        if entry is None or entry.fresh_until <= now:
            return None
        self._count_hit()
        return Cached(entry.value, entry.fresh_until - now, "hit")

    def _begin(self, key: K) -> tuple[Result, asyncio.Future[V]]:
        """Join the load of *key* that is under way, or start one."""
        load = self._loads.get(key)
        if load is not None:
            return "coalesced", load
        load = asyncio.ensure_future(self._load(key))
        self._loads[key] = load
        load.add_done_callback(functools.partial(self._load_ended, key))
        return "miss", load

    async def _loaded(self, key: K, result: Result, load: asyncio.Future[V]) -> Cached[V]:
        """Wait for *load*; where it fails, the old value serves."""
        try:
            value = await self._shielded(load)
        except self._stale_on:
            stale = self._entries.get(key)
            if stale is None:
                raise
            result = "stale"
            return Cached(stale.value, stale.fresh_until - self._timer(), result)
        finally:
            self._counters[result].inc()
        entry = self._entries.get(key)
        return Cached(value, entry.fresh_until - self._timer() if entry else 0.0, result)

    @staticmethod
    async def _shielded(load: asyncio.Future[V]) -> V:
        try:
            return await asyncio.shield(load)
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if not load.cancelled() or (this is not None and this.cancelling()):
                raise
            # Nobody cancelled this caller: a driver leaked a CancelledError into the load (aiopg:
            # aio-libs/aiopg#537). Passed on, it would look like a cancellation of the caller.
            raise errors.InternalError("The load was cancelled.") from None

    def _load_ended(self, key: K, load: asyncio.Future[V]) -> None:
        """Keep what was loaded. A callback: a task cancelled before its first step runs no `finally`."""
        del self._loads[key]
        if load.cancelled():
            return
        failure = load.exception()
        if failure is None:
            fresh_until = self._timer() + self._ttl * self._uniform(0.9, 1.1)
            self._entries[key] = _Entry(load.result(), fresh_until)
        elif not isinstance(failure, self._stale_on):
            # The source has answered: what it said before is not true any more.
            self._entries.pop(key, None)


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
