"""MicroBatcher: who shares a batch, who waits how long, and who learns of what."""

import asyncio
import contextvars
import gc
import traceback
from collections.abc import Sequence
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from app import errors
from app.batching import MicroBatcher, batch_processor
from tests.support.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.virtual_time


class Sink:
    """A flush that takes `seconds`, remembers its batches, and answers item i with `answers[i]` if set."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[list[int]] = []
        self.started_at: list[float] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.answers: dict[int, BaseException] = {}

    async def flush(self, items: list[int]) -> Sequence[str | BaseException]:
        self.batches.append(list(items))
        self.started_at.append(asyncio.get_running_loop().time())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.in_flight -= 1
        return [self.answers.get(item, f"stored {item}") for item in items]

    def batcher(
        self, *, max_size: int = 100, max_wait: float = 0.5, writers: int = 1
    ) -> MicroBatcher[int, str]:
        return MicroBatcher(self.flush, max_size=max_size, max_wait=max_wait, writers=writers)


async def turns(count: int = 3) -> None:
    """Let the event loop run all that is ready, without letting time pass."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_lone_item_waits_for_nothing(virtual_time: VirtualTimeLoop) -> None:
    """The first item on an idle batcher is flushed at once, not after a window."""
    sink = Sink()
    assert await sink.batcher().submit(7) == "stored 7"
    assert virtual_time.time() == 0
    assert sink.batches == [[7]]


async def test_an_idle_batcher_starts_within_one_turn() -> None:
    """One turn of the event loop after the first item its batch has started, also when one has just ended."""
    sink = Sink()
    batcher = sink.batcher()
    for item in range(3):
        future = batcher.submit(item)
        await asyncio.sleep(0)
        assert len(sink.batches) == item + 1
        await future  # the writer of this item has just ended


async def test_items_of_one_turn_share_a_batch() -> None:
    """Items submitted in the same turn of the event loop are stored by one batch, in arrival order."""
    sink = Sink()
    batcher = sink.batcher(writers=2)
    answers = await asyncio.gather(*(batcher.submit(item) for item in range(5)))
    assert sink.batches == [[0, 1, 2, 3, 4]]
    assert answers == [f"stored {item}" for item in range(5)]


async def test_batches_grow_while_the_writer_is_busy() -> None:
    """What arrives during a batch is taken by the next one, at most max_size, the oldest first."""
    sink = Sink(seconds=0.01)
    batcher = sink.batcher(max_size=3)
    first = batcher.submit(0)
    await turns()
    rest = [batcher.submit(item) for item in range(1, 6)]
    assert len(batcher) == 5
    await asyncio.gather(first, *rest)
    assert sink.batches == [[0], [1, 2, 3], [4, 5]]
    assert len(batcher) == 0


@pytest.mark.parametrize("writers", [1, 2, 3])
async def test_no_more_batches_in_flight_than_writers(writers: int) -> None:
    """A burst over max_size occupies every writer at once, and never more than there are."""
    sink = Sink(seconds=0.01)
    batcher = sink.batcher(max_size=2, writers=writers)
    await asyncio.gather(*(batcher.submit(item) for item in range(20)))
    assert sink.most_in_flight == writers
    assert sorted(item for batch in sink.batches for item in batch) == list(range(20))


async def test_an_item_that_waited_max_wait_is_refused(virtual_time: VirtualTimeLoop) -> None:
    """Past max_wait an item leaves the queue as Overloaded, not executed; it is never flushed."""
    sink = Sink(seconds=2.0)
    batcher = sink.batcher(max_wait=0.5)
    busy = batcher.submit(0)
    await asyncio.sleep(0.1)
    early = batcher.submit(1)
    await asyncio.sleep(0.2)
    late = batcher.submit(2)
    with pytest.raises(errors.Overloaded) as refused:
        await early
    assert virtual_time.time() == pytest.approx(0.6)
    assert (refused.value.reason, refused.value.outcome) == ("queue", "not_executed")
    assert not late.done()
    with pytest.raises(errors.Overloaded):
        await late
    assert virtual_time.time() == pytest.approx(0.8)
    await busy
    assert sink.batches == [[0]]


async def test_a_stalled_event_loop_starts_nothing_overdue(virtual_time: VirtualTimeLoop) -> None:
    """After a pause of the process, what waited too long is refused instead of executed late."""
    sink = Sink()
    overdue = sink.batcher(max_wait=0.5).submit(1)
    virtual_time.stall(5)
    with pytest.raises(errors.Overloaded):
        await overdue
    assert sink.batches == []


async def test_one_timer_serves_the_whole_queue(
    virtual_time: VirtualTimeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many items wait, there is one timer for the head of the queue."""
    batcher = Sink(seconds=10).batcher()
    scheduled: list[float] = []
    call_at = virtual_time.call_at

    def counting_call_at(when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        scheduled.append(when)
        return call_at(when, *args, **kwargs)

    monkeypatch.setattr(virtual_time, "call_at", counting_call_at)
    batcher.submit(0)
    waiting = [batcher.submit(item) for item in range(1, 1000)]
    assert scheduled == [0.5]
    for future in waiting:
        future.cancel()


async def test_a_bad_item_fails_alone() -> None:
    """An exception among the results is raised to its own caller; its neighbours get theirs."""
    sink = Sink()
    sink.answers[1] = errors.OutOfStock()
    batcher = sink.batcher()
    answers = await asyncio.gather(*(batcher.submit(item) for item in range(3)), return_exceptions=True)
    assert answers == ["stored 0", sink.answers[1], "stored 2"]


async def test_a_failed_batch_is_told_to_every_caller() -> None:
    """If flush raises, each caller gets the exception with its attributes, and the next batch is unharmed."""
    fail = True

    async def flush(items: list[int]) -> list[int]:
        if fail:
            raise errors.ConnectionLost("gone", outcome="unknown", retry_after_seconds=3)
        return items

    batcher: MicroBatcher[int, int] = MicroBatcher(flush, max_size=10, max_wait=1)
    lost = await asyncio.gather(*(batcher.submit(item) for item in range(3)), return_exceptions=True)
    for exc in lost:
        assert isinstance(exc, errors.ConnectionLost)
        assert (str(exc), exc.outcome, exc.retry_after_seconds) == ("gone", "unknown", 3)
    fail = False
    assert await batcher.submit(1) == 1


async def test_callers_do_not_share_one_exception() -> None:
    """A hundred callers of a failed batch get a hundred exceptions of one cause, with short tracebacks."""

    class FormattedError(Exception):
        def __init__(self, number: int) -> None:
            super().__init__(f"number {number}")

    async def flush(items: list[int]) -> list[int]:
        raise FormattedError(5)

    batcher: MicroBatcher[int, int] = MicroBatcher(flush, max_size=100, max_wait=1)
    lost = await asyncio.gather(*(batcher.submit(item) for item in range(100)), return_exceptions=True)
    assert len({id(exc) for exc in lost}) == 100
    assert len({id(exc.__cause__) for exc in lost if isinstance(exc, FormattedError)}) == 1
    for exc in lost:
        assert isinstance(exc, FormattedError)
        assert str(exc) == "number 5"
        assert len(traceback.extract_tb(exc.__traceback__)) <= 2


async def test_an_exception_that_cannot_be_copied_is_still_told() -> None:
    """An exception whose constructor does not take its own args reaches every caller all the same."""

    class AwkwardError(Exception):
        def __init__(self, *, code: int) -> None:
            super().__init__("awkward", code)

    async def flush(items: list[int]) -> list[int]:
        raise AwkwardError(code=1)

    batcher: MicroBatcher[int, int] = MicroBatcher(flush, max_size=100, max_wait=1)
    lost = await asyncio.gather(*(batcher.submit(item) for item in range(2)), return_exceptions=True)
    assert [type(exc) for exc in lost] == [AwkwardError, AwkwardError]


@pytest.mark.parametrize("surplus", [-1, 1])
async def test_a_wrong_number_of_results_is_an_error_to_all(surplus: int) -> None:
    """A flush that answers too few or too many is a defect, told to every caller as outcome unknown."""

    async def flush(items: list[int]) -> list[int]:
        return [0] * (len(items) + surplus)

    batcher: MicroBatcher[int, int] = MicroBatcher(flush, max_size=10, max_wait=1)
    lost = await asyncio.gather(*(batcher.submit(item) for item in range(2)), return_exceptions=True)
    for exc in lost:
        assert isinstance(exc, errors.InternalError)
        assert exc.outcome == "unknown"
        assert exc.detail == f"The batch of 2 was answered with {2 + surplus} results."


async def test_a_caller_that_goes_away_cancels_nothing() -> None:
    """Cancelling one caller of a batch in flight leaves the batch and its neighbours alone."""
    sink = Sink(seconds=1)
    batcher = sink.batcher()
    callers = [asyncio.ensure_future(batcher.submit(item)) for item in range(3)]
    await turns()
    callers[1].cancel()
    answers = await asyncio.gather(*callers, return_exceptions=True)
    assert answers[0] == "stored 0"
    assert isinstance(answers[1], asyncio.CancelledError)
    assert answers[2] == "stored 2"
    assert sink.batches == [[0, 1, 2]]


async def test_a_caller_that_goes_away_in_the_queue_is_dropped() -> None:
    """An item whose caller is gone before its batch starts is never executed, and takes nobody's place."""
    sink = Sink(seconds=0.1)
    batcher = sink.batcher(max_size=2)
    busy = batcher.submit(0)
    await turns()
    callers = [asyncio.ensure_future(batcher.submit(item)) for item in range(1, 4)]
    await turns()
    callers[0].cancel()
    await asyncio.gather(busy, *callers, return_exceptions=True)
    assert sink.batches == [[0], [2, 3]]


async def test_a_leaked_cancellation_is_an_error_and_ends_no_writer() -> None:
    """A flush that raises CancelledError by itself fails its batch, cancels no caller, and the next runs."""
    leak = True

    async def flush(items: list[int]) -> list[int]:
        await asyncio.sleep(0.1)
        if leak:
            raise asyncio.CancelledError
        return items

    batcher: MicroBatcher[int, int] = MicroBatcher(flush, max_size=1, max_wait=1)
    first, second = batcher.submit(1), batcher.submit(2)
    with pytest.raises(errors.InternalError) as lost:
        await first
    assert lost.value.outcome == "unknown"
    leak = False
    assert await second == 2


@pytest.mark.parametrize("steps", [0, 2], ids=["before-its-first-step", "in-flight"])
async def test_a_cancelled_writer_leaves_the_batcher_usable(steps: int) -> None:
    """Cancelling the writer task fails at most its batch, as unknown; drain has the rest stored."""
    sink = Sink(seconds=0.1)
    batcher = sink.batcher(max_size=1)
    first, second = batcher.submit(1), batcher.submit(2)
    await turns(steps)
    (writer,) = batcher._writers
    writer.cancel()
    await turns()
    assert writer.cancelled()
    await batcher.drain()
    assert await second == "stored 2"
    if steps:
        with pytest.raises(errors.InternalError) as lost:
            await first
        assert lost.value.outcome == "unknown"
    else:
        assert await first == "stored 1"


async def test_an_abandoned_failure_is_not_reported(virtual_time: VirtualTimeLoop) -> None:
    """No "exception was never retrieved", whoever stopped waiting: for a batch, an item or the queue."""
    reports: list[dict[str, Any]] = []
    virtual_time.set_exception_handler(lambda _, context: reports.append(context))
    sink = Sink(seconds=1)
    sink.answers[0] = errors.OutOfStock()
    batcher = sink.batcher(max_size=1)
    batcher.submit(0)  # fails alone
    batcher.submit(1)  # refused in the queue

    async def flush(items: list[int]) -> list[int]:
        raise errors.ConnectionLost

    failing: MicroBatcher[int, int] = MicroBatcher(flush, max_size=1, max_wait=1)
    failing.submit(0)
    await batcher.drain()
    await failing.drain()
    gc.collect()
    assert reports == []


async def test_drain_waits_for_queue_and_writers() -> None:
    """Drain returns when nothing is queued and no batch is in flight, and at once when idle."""
    sink = Sink(seconds=0.1)
    batcher = sink.batcher(max_size=2, writers=2)
    await batcher.drain()
    futures = [batcher.submit(item) for item in range(7)]
    await batcher.drain()
    assert all(future.done() for future in futures)
    assert (len(batcher), sink.in_flight) == (0, 0)


async def test_drain_that_is_cancelled_cancels_no_batch() -> None:
    """Giving up on drain leaves the batches in flight alone."""
    sink = Sink(seconds=1)
    future = (batcher := sink.batcher()).submit(1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await batcher.drain()
    assert await future == "stored 1"


async def test_a_batch_does_not_run_in_the_context_of_a_request() -> None:
    """Context variables of the caller that happened to start a batch are not seen by flush."""
    request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")

    async def flush(items: list[int]) -> list[str]:
        return [request_id.get() for _ in items]

    batcher: MicroBatcher[int, str] = MicroBatcher(flush, max_size=10, max_wait=1)
    request_id.set("r-1")
    assert await batcher.submit(1) == "none"


async def test_the_decorated_function_is_awaited_with_one_item() -> None:
    """`@batch_processor` makes of `async def f(items)` what is awaited for one item, named as f."""
    sizes: list[int] = []

    @batch_processor(max_size=100, max_wait=0.5)
    async def process_orders(orders: list[int]) -> list[str]:
        """Store orders."""
        sizes.append(len(orders))
        return [f"stored {order}" for order in orders]

    assert list(await asyncio.gather(process_orders(1), process_orders(2))) == ["stored 1", "stored 2"]
    assert sizes == [2]
    assert (getattr(process_orders, "__name__", ""), process_orders.__doc__) == (
        "process_orders",
        "Store orders.",
    )


def test_sizes_below_one_are_refused() -> None:
    """A batcher that could never start a batch cannot be made."""
    with pytest.raises(ValueError, match="at least 1"):
        Sink().batcher(max_size=0)
    with pytest.raises(ValueError, match="at least 1"):
        Sink().batcher(writers=0)


def test_it_runs_on_uvloop() -> None:
    """The loop the service runs on gives the same: one batch a turn, an overdue item refused."""

    async def scenario() -> None:
        release = asyncio.Event()
        sizes: list[int] = []

        async def flush(items: list[int]) -> list[int]:
            sizes.append(len(items))
            await release.wait()
            return items

        batcher: MicroBatcher[int, int] = MicroBatcher(flush, max_size=10, max_wait=0.02)
        first = [batcher.submit(item) for item in range(3)]
        await turns()
        with pytest.raises(errors.Overloaded):
            await batcher.submit(9)
        release.set()
        assert await asyncio.gather(*first) == [0, 1, 2]
        assert sizes == [3]

    uvloop.run(scenario())


@settings(max_examples=200, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.3]), st.booleans()), max_size=40),
    max_size=st.integers(1, 5),
    writers=st.integers(1, 3),
    seconds=st.sampled_from([0.0, 0.05, 0.4]),
)
def test_every_item_ends_exactly_once(
    arrivals: list[tuple[float, bool]], max_size: int, writers: int, seconds: float
) -> None:
    """Under any arrivals and cancellations each item is executed at most once, starts within max_wait, and is
    answered for what became of it; batches keep arrival order and both limits.
    """

    async def scenario() -> None:
        sink = Sink(seconds)
        batcher = sink.batcher(max_size=max_size, writers=writers)
        futures: list[asyncio.Future[str]] = []
        arrived_at: list[float] = []
        for item, (pause, is_cancelled) in enumerate(arrivals):
            if pause:
                await asyncio.sleep(pause)
            arrived_at.append(asyncio.get_running_loop().time())
            futures.append(batcher.submit(item))
            if is_cancelled:
                futures[item // 2].cancel()
        await batcher.drain()
        executed = [item for batch in sink.batches for item in batch]
        assert len(executed) == len(set(executed))
        assert executed == sorted(executed)
        assert sink.most_in_flight <= writers
        assert all(len(batch) <= max_size for batch in sink.batches)
        for batch, started_at in zip(sink.batches, sink.started_at, strict=True):
            assert all(started_at - arrived_at[item] <= 0.5 + 1e-9 for item in batch)
        for item, future in enumerate(futures):
            assert future.done()
            if future.cancelled():
                continue
            if future.exception() is None:
                assert future.result() == f"stored {item}"
                assert item in executed
            else:
                assert isinstance(future.exception(), errors.Overloaded)
                assert item not in executed

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario())
