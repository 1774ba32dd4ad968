"""Micro-batching: many callers, one flush, and to each caller its own result.

A batch starts as soon as a writer is free: a lone item waits for nothing, and under load batches grow by
themselves while the writers are busy. There is no window to tune.
"""

import asyncio
import contextvars
import copy
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from app import errors

T = TypeVar("T")
R = TypeVar("R")


class MicroBatcher(Generic[T, R]):
    """Queues single items and flushes them in batches, oldest first.

    One per event loop; it needs no start and no close (`drain` waits for its work).
    """

    def __init__(
        self,
        flush: Callable[[list[T]], Awaitable[Sequence[R | BaseException]]],
        *,
        max_size: int,
        max_wait: float,
        writers: int = 1,
    ) -> None:
        """Batch calls of *flush*.

        Args:
            flush: n items in, n results out (1 <= n <= max_size), result i for item i; an exception among the
                results is raised to that caller alone. It must end by itself: nothing here bounds its time.
            max_size: items in one batch, at most.
            max_wait: seconds an item may wait for its batch to start.
            writers: batches in flight at once, at most.
        """
        if max_size < 1 or writers < 1:
            raise ValueError("max_size and writers must be at least 1")
        self._flush = flush
        self._max_size = max_size
        self._max_wait = max_wait
        self._max_writers = writers
        self._queue: deque[tuple[float, T, asyncio.Future[R]]] = deque()  # (start by, item, answer)
        self._writers: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Items waiting for their batch to start; one whose caller is gone counts until its turn."""
        return len(self._queue)

    def submit(self, item: T) -> asyncio.Future[R]:
        """Queue *item*, without a task or a timer of its own, and return the future of its result.

        Args:
            item: one unit of work; a batch keeps arrival order.

        Returns:
            Element i of `flush(batch)` for item i, at most `max_wait` plus one flush later. Cancelling the future
            takes a waiting item out; it stops no batch that has started. A future nobody awaits is never reported as
            an exception that was not retrieved.

        Raises:
            Overloaded: it waited `max_wait` and its batch could not start; nothing was sent.
            InternalError: flush was cancelled or broke its contract; outcome unknown.
            Exception: whatever `flush` raised; each caller of the batch gets a copy of its own. All of them on await.

        Source: flush rule after merino-py's AsyncBatchQueue, answers after Synapse's BatchingQueue.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        start_by = loop.time() + self._max_wait
        self._queue.append((start_by, item, future))
        if self._timer is None:
            self._timer = loop.call_at(start_by, self._refuse_overdue)
        self._start_writer_if_free()
        return future

    __call__ = submit

    async def drain(self) -> None:
        """Wait until nothing is queued and no batch is in flight. It refuses no new items meanwhile."""
        while self._queue or self._writers:
            self._start_writer_if_free()
            await asyncio.wait(set(self._writers))

    def _start_writer_if_free(self) -> None:
        """Start one more writer: it runs in the next turn of the event loop, and takes what came in this one."""
        if len(self._writers) < self._max_writers:
            # An empty context: a batch must not log or trace as the one request that happened to start it.
            writer = asyncio.get_running_loop().create_task(self._write(), context=contextvars.Context())
            self._writers.add(writer)
            # One that is cancelled before its first step runs no `finally`.
            writer.add_done_callback(self._writers.discard)

    async def _write(self) -> None:
        """One writer: takes batches until the queue is empty."""
        try:
            while self._queue:
                items, futures = self._take()
                if items:
                    await self._flush_batch(items, futures)
        finally:
            # Now: the callback comes a turn later, and an idle batcher starts at once.
            self._writers -= {asyncio.current_task()}

    def _take(self) -> tuple[list[T], list[asyncio.Future[R]]]:
        """Take the oldest items that are still wanted and not overdue."""
        items: list[T] = []
        futures: list[asyncio.Future[R]] = []
        now = asyncio.get_running_loop().time()
        while self._queue and len(items) < self._max_size:
            start_by, item, future = self._queue.popleft()
            if future.done():
                continue
            if start_by < now:  # the event loop itself stood still; the timer has not had its turn yet
                _refuse(future)
            else:
                items.append(item)
                futures.append(future)
        return items, futures

    async def _flush_batch(self, items: list[T], futures: list[asyncio.Future[R]]) -> None:
        """Flush one batch and answer every caller that is still there."""
        try:
            results = await self._flush(items)
            if len(results) != len(futures):
                raise errors.InternalError(  # noqa: TRY301 - handled as any failure of the batch
                    f"The batch of {len(futures)} was answered with {len(results)} results.",
                    outcome="unknown",
                )
        except asyncio.CancelledError:
            _fail(futures, errors.InternalError("The batch was cancelled.", outcome="unknown"))
            this = asyncio.current_task()
            if this is None or this.cancelling():
                raise
            # Nobody cancelled this writer: a driver leaked a CancelledError (aiopg: aio-libs/aiopg#537).
        except Exception as exc:  # noqa: BLE001 - whatever it is, the callers get it
            _fail(futures, exc)
        else:
            for future, result in zip(futures, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, BaseException):
                    _raise_to(future, result)
                else:
                    future.set_result(result)

    def _refuse_overdue(self) -> None:
        """Refuse what may wait no longer, and set the one timer for the new head.

        The timer is never cancelled when its item leaves: it fires no later than the head is due.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._queue and (self._queue[0][0] <= now or self._queue[0][2].done()):
            _, _, future = self._queue.popleft()
            if not future.done():
                _refuse(future)
        self._timer = loop.call_at(self._queue[0][0], self._refuse_overdue) if self._queue else None


def batch_processor(
    *, max_size: int = 100, max_wait: float = 0.5, writers: int = 1
) -> Callable[[Callable[[list[T]], Awaitable[Sequence[R | BaseException]]]], MicroBatcher[T, R]]:
    """Turn `async def f(items)` into a `MicroBatcher`, awaited with one item: `await f(item)`.

    Args: as of `MicroBatcher`; max_wait in seconds.
    """

    def decorate(flush: Callable[[list[T]], Awaitable[Sequence[R | BaseException]]]) -> MicroBatcher[T, R]:
        batcher = MicroBatcher(flush, max_size=max_size, max_wait=max_wait, writers=writers)
        functools.update_wrapper(batcher, flush, updated=())
        return batcher

    return decorate


def _refuse(future: asyncio.Future[R]) -> None:
    _raise_to(future, errors.Overloaded("It waited too long for its turn.", reason="queue"))


def _fail(futures: list[asyncio.Future[R]], exc: Exception) -> None:
    """Raise *exc* to every caller still there."""
    for future in futures:
        if not future.done():
            _raise_to(future, _copy_of(exc))


def _raise_to(future: asyncio.Future[R], exc: BaseException) -> None:
    future.set_exception(exc)
    future.exception()  # marks it as retrieved: a caller that went away is no error


def _copy_of(exc: Exception) -> Exception:
    """Copy *exc* for one caller, and name it as the cause.

    Callers that share one instance write into each other's traceback, context and attributes.
    """
    try:
        fresh = copy.copy(exc)
    except Exception:  # noqa: BLE001 - a constructor that does not take its own args; then they share
        return exc
    fresh.args = exc.args  # a constructor that formats its message has just formatted it twice
    fresh.__cause__ = exc
    return fresh
