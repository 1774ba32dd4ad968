"""Breaker, budget and guard: what is booked, what is refused, what is repeated, and what an error promises.

pybreaker and tenacity have traps under asyncio. Each trap is a scenario below; it must hold with our adapter
and fail with the naive use of the library, so that a regression to the naive use cannot pass unseen.
"""

import asyncio
import contextlib
import datetime as dt
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Protocol, TypeVar

import pybreaker
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import REGISTRY
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_none

from app import errors
from app.metrics import BREAKER_STATES
from app.resilience import CircuitBreaker, Guard, RetryBudget
from tests.support.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.virtual_time

R = TypeVar("R")


class DownError(Exception):
    """The dependency is away."""


class RefusedError(Exception):
    """The dependency answered, and said no."""


def is_failure(exc: BaseException) -> bool:
    """As in production code: everything but what is known to be harmless."""
    return not isinstance(exc, RefusedError)


async def succeed() -> str:
    return "ok"


async def fail() -> str:
    raise DownError


async def refuse() -> str:
    raise RefusedError


def sample(metric: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(metric, labels)
    assert value is not None, f"{metric}{labels} does not exist"
    return value


# --- the traps of pybreaker -----------------------------------------------------------------------


class Breaker(Protocol):
    async def call(self, attempt: Callable[[], Awaitable[R]]) -> R: ...


class NaiveDecorator:
    """pybreaker as its README shows it for functions."""

    def __init__(self) -> None:
        self.pybreaker = pybreaker.CircuitBreaker(fail_max=3, reset_timeout=0)

    async def call(self, attempt: Callable[[], Awaitable[R]]) -> R:
        @self.pybreaker
        async def decorated() -> R:
            return await attempt()

        result: R = await decorated()
        return result


class NaiveContext:
    """pybreaker around an await, with business exceptions excluded."""

    def __init__(self) -> None:
        self.pybreaker = pybreaker.CircuitBreaker(fail_max=3, reset_timeout=0, exclude=[RefusedError])

    async def call(self, attempt: Callable[[], Awaitable[R]]) -> R:
        with self.pybreaker.calling():
            return await attempt()


def adapter() -> CircuitBreaker:
    """Our own, without a pause between open and the first trial."""
    return CircuitBreaker("trap", fail_max=3, reset_seconds=0, is_failure=is_failure)


def state_of(breaker: Breaker) -> str:
    if isinstance(breaker, CircuitBreaker):
        return breaker.state
    assert isinstance(breaker, NaiveDecorator | NaiveContext)
    return breaker.pybreaker.current_state.replace("-", "_")


async def call(breaker: Breaker, attempt: Callable[[], Awaitable[str]]) -> str | BaseException:
    try:
        return await breaker.call(attempt)
    except Exception as exc:  # noqa: BLE001 - the outcome is the result here
        return exc


async def opened(breaker: Breaker) -> None:
    for _ in range(3):
        await call(breaker, fail)
    assert state_of(breaker) == "open"


async def failures_of_async_calls_open_it(breaker: Breaker) -> None:
    await opened(breaker)


async def the_tripping_call_raises_its_own_exception(breaker: Breaker) -> None:
    answers = [await call(breaker, fail) for _ in range(3)]
    assert [type(answer) for answer in answers] == [DownError] * 3


async def half_open_admits_one_trial(breaker: Breaker) -> None:
    await opened(breaker)
    entered = 0
    release = asyncio.Event()

    async def trial() -> str:
        nonlocal entered
        entered += 1
        await release.wait()
        return "ok"

    calls = [asyncio.ensure_future(call(breaker, trial)) for _ in range(20)]
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(*calls)
    assert entered == 1
    assert state_of(breaker) == "closed"


async def cancellations_are_no_failures(breaker: Breaker) -> None:
    for _ in range(5):
        task = asyncio.ensure_future(breaker.call(asyncio.Event().wait))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert state_of(breaker) == "closed"


async def refusals_are_no_successes(breaker: Breaker) -> None:
    for attempt in (fail, fail, refuse, fail):
        await call(breaker, attempt)
    assert state_of(breaker) == "open"
    await call(breaker, refuse)
    assert state_of(breaker) == "half_open"


async def a_late_failure_changes_nothing(breaker: Breaker) -> None:
    release = asyncio.Event()

    async def slow() -> str:
        await release.wait()
        raise DownError

    late = [asyncio.ensure_future(call(breaker, slow)) for _ in range(5)]
    await asyncio.sleep(0)
    await opened(breaker)
    await call(breaker, succeed)
    assert state_of(breaker) == "closed"
    release.set()
    await asyncio.gather(*late)
    assert state_of(breaker) == "closed"


TRAPS: list[tuple[Callable[[Breaker], Coroutine[Any, Any, None]], Callable[[], Breaker]]] = [
    (failures_of_async_calls_open_it, NaiveDecorator),
    (the_tripping_call_raises_its_own_exception, NaiveContext),
    (half_open_admits_one_trial, NaiveContext),
    (cancellations_are_no_failures, NaiveContext),
    (refusals_are_no_successes, NaiveContext),
    (a_late_failure_changes_nothing, NaiveContext),
]


@pytest.mark.parametrize(("scenario", "naive"), TRAPS, ids=lambda part: part.__name__)
async def test_the_adapter_avoids_the_trap(
    scenario: Callable[[Breaker], Coroutine[Any, Any, None]], naive: Callable[[], Breaker]
) -> None:
    """The scenario holds with our breaker, and does not with the naive use of pybreaker."""
    await scenario(adapter())
    with pytest.raises((AssertionError, pybreaker.CircuitBreakerError, pytest.fail.Exception)):
        await scenario(naive())


async def test_steps_of_the_wall_clock_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the monotonic timer opens the way for a trial, wherever the wall clock jumps."""
    wall = dt.datetime(2026, 11, 22, tzinfo=dt.UTC)

    class SteppedClock(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
            return wall

    monkeypatch.setattr(pybreaker, "datetime", SteppedClock)
    now = 0.0
    breaker = CircuitBreaker("wall", fail_max=1, reset_seconds=2, is_failure=is_failure, timer=lambda: now)
    await call(breaker, fail)
    wall += dt.timedelta(days=365)
    assert isinstance(await call(breaker, succeed), errors.CircuitOpen)
    wall -= dt.timedelta(days=3650)
    now = 2.0
    assert await call(breaker, succeed) == "ok"


# --- the breaker against a model ------------------------------------------------------------------


class _Suspended:
    """Awaited, it hands control to whoever drives the coroutine."""

    def __await__(self) -> Generator[None]:
        yield


async def _suspend() -> str:
    await _Suspended()
    return "ok"


class BreakerAgainstModel(RuleBasedStateMachine):
    """Calls begin, end and are abandoned in any order while time passes; the model says what is seen."""

    FAIL_MAX = 3
    RESET_SECONDS = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.breaker = CircuitBreaker(
            "model",
            fail_max=self.FAIL_MAX,
            reset_seconds=self.RESET_SECONDS,
            is_failure=is_failure,
            timer=lambda: self.now,
        )
        self.state = "closed"
        self.failures = 0
        self.opened_at = 0.0
        self.era = 0  # one more with every change of state
        self.trial: Coroutine[Any, Any, str] | None = None
        self.calls: list[tuple[Coroutine[Any, Any, str], int]] = []  # (call in flight, era it began in)
        self.transitions = {
            to: sample("circuit_breaker_transitions_total", breaker="model", to=to) for to in BREAKER_STATES
        }

    def enter(self, state: str) -> None:
        self.state = state
        self.era += 1
        self.transitions[state] += 1
        self.failures = 0
        if state == "open":
            self.opened_at = self.now

    @property
    def refused_for(self) -> float | None:
        """Seconds a call begun now is sent away for, or None where it is let through."""
        left = self.opened_at + self.RESET_SECONDS - self.now
        if self.state == "open" and left > 0:
            return left
        return self.RESET_SECONDS if self.trial is not None else None

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def a_call_begins(self) -> None:
        refused_for = self.refused_for
        begun = self.breaker.call(_suspend)
        if refused_for is not None:
            with pytest.raises(errors.CircuitOpen) as refused:
                begun.send(None)
            assert refused.value.retry_after_seconds == refused_for
            return
        begun.send(None)
        if self.state == "open":
            self.enter("half_open")
        if self.state == "half_open":
            self.trial = begun
        self.calls.append((begun, self.era))

    @precondition(lambda self: self.calls)
    @rule(
        data=st.data(),
        how=st.sampled_from([None, DownError(), RefusedError(), asyncio.CancelledError(), GeneratorExit()]),
    )
    def a_call_ends(self, data: st.DataObject, how: BaseException | None) -> None:
        ended, era = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        if how is None:
            with pytest.raises(StopIteration):
                ended.send(None)
        elif isinstance(how, GeneratorExit):
            ended.close()
        else:
            with pytest.raises(type(how)):
                ended.throw(how)
        if self.trial is ended:
            self.trial = None
        if era != self.era:
            return
        if how is None:
            self.failures = 0
            if self.state == "half_open":
                self.enter("closed")
        elif isinstance(how, DownError):
            self.failures += 1
            if self.state == "half_open" or self.failures == self.FAIL_MAX:
                self.enter("open")

    @invariant()
    def it_agrees_with_the_model(self) -> None:
        assert self.breaker.state == self.state
        assert self.breaker.retry_after_seconds == (self.refused_for or 0)
        with pytest.raises(errors.CircuitOpen) if self.refused_for is not None else contextlib.nullcontext():
            self.breaker.check()

    def teardown(self) -> None:
        assert sample("circuit_breaker_state", breaker="model") == BREAKER_STATES.index(self.state)
        for to, count in self.transitions.items():
            assert sample("circuit_breaker_transitions_total", breaker="model", to=to) == count
        for begun, _ in self.calls:
            begun.close()


TestBreakerAgainstModel = BreakerAgainstModel.TestCase
TestBreakerAgainstModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_the_series_of_a_breaker_exist_from_the_start() -> None:
    """A breaker that never moved reports itself closed, with a zero for every transition."""
    CircuitBreaker("untouched", fail_max=1, reset_seconds=1, is_failure=is_failure)
    assert sample("circuit_breaker_state", breaker="untouched") == 0
    for to in BREAKER_STATES:
        assert sample("circuit_breaker_transitions_total", breaker="untouched", to=to) == 0


# --- the budget -----------------------------------------------------------------------------------


def test_the_budget_bounds_retries_to_its_ratio() -> None:
    """After the burst, ten first attempts pay for one retry."""
    budget = RetryBudget(0.1, burst=10)
    assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False]
    for _ in range(5):
        for _ in range(9):
            budget.deposit()
            assert not budget.withdraw()
        budget.deposit()
        assert budget.withdraw()


def test_the_budget_keeps_no_more_than_its_burst() -> None:
    """Quiet hours do not save up for a retry storm."""
    budget = RetryBudget(0.1, burst=10)
    for _ in range(10_000):
        budget.deposit()
    assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False]


# --- the guard ------------------------------------------------------------------------------------


class Script:
    """An attempt that takes `seconds` and ends, one call after the other, as the script says."""

    def __init__(self, *ends: str | BaseException, seconds: float = 0.0) -> None:
        self.ends = list(ends)
        self.seconds = seconds
        self.remaining: list[float] = []
        self.started_at: list[float] = []

    async def __call__(self, remaining_seconds: float) -> str:
        self.remaining.append(remaining_seconds)
        self.started_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.seconds)
        end = self.ends.pop(0)
        if isinstance(end, BaseException):
            raise end
        return end


def lost(outcome: errors.Outcome = "not_executed") -> errors.ConnectionLost:
    return errors.ConnectionLost(outcome=outcome)


def make_guard(
    loop: VirtualTimeLoop,
    *,
    max_attempts: int = 3,
    fail_max: int = 100,
    budget: RetryBudget | None = None,
) -> Guard:
    breaker = CircuitBreaker(
        "guard",
        fail_max=fail_max,
        reset_seconds=2,
        is_failure=lambda exc: isinstance(exc, errors.ConnectionLost),
        timer=loop.time,
    )
    return Guard(breaker, budget or RetryBudget(), max_attempts=max_attempts, clock=loop.time)


@pytest.fixture
def counted() -> Callable[[str], dict[str, float]]:
    """What `retries_total` holds for an operation, without the zeros."""

    def read(operation: str) -> dict[str, float]:
        counts = {
            outcome: sample("retries_total", operation=operation, outcome=outcome)
            for outcome in ("success", "failure", "budget_exhausted")
        }
        return {outcome: count for outcome, count in counts.items() if count}

    return read


Counted = Callable[[str], dict[str, float]]


async def test_a_success_is_attempted_once(virtual_time: VirtualTimeLoop, counted: Counted) -> None:
    """A first success is returned at once, told what time is left, and counts no retry."""
    attempt = Script("stored")
    await asyncio.sleep(1)
    assert await make_guard(virtual_time).run("once", attempt, deadline=5) == "stored"
    assert attempt.remaining == [4]
    assert virtual_time.time() == 1
    assert counted("once") == {}


async def test_a_retryable_failure_is_repeated(virtual_time: VirtualTimeLoop, counted: Counted) -> None:
    """A lost connection is attempted again, after a jittered pause, with the time that is left then."""
    attempt = Script(lost(), errors.TransactionConflict(), "stored")
    assert await make_guard(virtual_time).run("repeated", attempt, deadline=5) == "stored"
    assert attempt.remaining == [5 - started_at for started_at in attempt.started_at]
    pauses = [
        later - earlier for earlier, later in zip(attempt.started_at, attempt.started_at[1:], strict=False)
    ]
    assert 0 <= pauses[0] <= 0.02
    assert 0 <= pauses[1] <= 0.04
    assert counted("repeated") == {"failure": 1, "success": 1}


async def test_pauses_are_jittered_and_bounded(virtual_time: VirtualTimeLoop) -> None:
    """Pauses are drawn from the whole range between 0 and 0.25 s, so that callers do not come back together."""
    attempt = Script(*[lost() for _ in range(200)])
    guard = make_guard(virtual_time, max_attempts=200, fail_max=1000, budget=RetryBudget(burst=1000))
    with pytest.raises(errors.ConnectionLost):
        await guard.run("pauses", attempt, deadline=1000)
    pauses = [
        later - earlier
        for earlier, later in zip(attempt.started_at[10:], attempt.started_at[11:], strict=False)
    ]
    assert max(pauses) <= 0.25
    assert min(pauses) < 0.05
    assert max(pauses) > 0.2


async def test_attempts_end_at_max_attempts(virtual_time: VirtualTimeLoop, counted: Counted) -> None:
    """The last failure is raised itself, after max_attempts in all."""
    failures = [lost() for _ in range(4)]
    attempt = Script(*failures)
    with pytest.raises(errors.ConnectionLost) as raised:
        await make_guard(virtual_time).run("max-attempts", attempt, deadline=5)
    assert raised.value is failures[2]
    assert len(attempt.ends) == 1
    assert counted("max-attempts") == {"failure": 2}


@pytest.mark.parametrize(
    "failure", [errors.OutOfStock(), errors.DatabaseError(), ValueError()], ids=lambda exc: type(exc).__name__
)
async def test_other_failures_are_not_repeated(virtual_time: VirtualTimeLoop, failure: Exception) -> None:
    """What is not marked retryable is raised as it is after one attempt."""
    attempt = Script(failure, "stored")
    with pytest.raises(type(failure)) as raised:
        await make_guard(virtual_time).run("not-repeated", attempt, deadline=5)
    assert raised.value is failure
    assert len(attempt.ends) == 1


async def test_no_retry_starts_after_the_deadline(virtual_time: VirtualTimeLoop) -> None:
    """When the pause would end after the deadline, the failure is raised at once, before the deadline."""
    attempt = Script(*[lost() for _ in range(1000)])
    guard = make_guard(virtual_time, max_attempts=1000, fail_max=1000, budget=RetryBudget(burst=1000))
    with pytest.raises(errors.ConnectionLost):
        await guard.run("deadline", attempt, deadline=3)
    assert virtual_time.time() < 3
    assert 2 < len(attempt.started_at) < 1000


async def test_a_pause_that_overran_ends_in_deadline_exceeded(virtual_time: VirtualTimeLoop) -> None:
    """If the loop stood still during the pause and the deadline has passed, nothing more is attempted."""
    guard = make_guard(virtual_time)

    async def sleep_through(_seconds: float) -> None:
        virtual_time.stall(10)

    guard._sleep = sleep_through
    attempt = Script(lost("unknown"), "stored")
    with pytest.raises(errors.DeadlineExceeded) as raised:
        await guard.run("overrun", attempt, deadline=5)
    assert raised.value.outcome == "unknown"
    assert attempt.ends == ["stored"]


async def test_a_passed_deadline_attempts_nothing(virtual_time: VirtualTimeLoop) -> None:
    """A deadline that passed before the first attempt is DeadlineExceeded, not executed."""
    attempt = Script("stored")
    await asyncio.sleep(5)
    with pytest.raises(errors.DeadlineExceeded) as raised:
        await make_guard(virtual_time).run("too-late", attempt, deadline=5)
    assert raised.value.outcome == "not_executed"
    assert attempt.ends == ["stored"]


async def test_an_open_breaker_is_not_retried(virtual_time: VirtualTimeLoop, counted: Counted) -> None:
    """CircuitOpen comes at once, tells when to come back, attempts nothing and pays for nothing."""
    guard = make_guard(virtual_time, fail_max=1, max_attempts=1)
    with pytest.raises(errors.ConnectionLost):
        await guard.run("open", Script(lost()), deadline=5)
    await asyncio.sleep(0.5)
    attempt = Script("stored")
    with pytest.raises(errors.CircuitOpen) as raised:
        await guard.run("open", attempt, deadline=5)
    assert (raised.value.outcome, raised.value.retry_after_seconds) == ("not_executed", 1.5)
    assert attempt.ends == ["stored"]
    assert counted("open") == {}


@pytest.mark.parametrize(
    ("ends", "fail_max", "expected"),
    [
        ((lost("unknown"), lost()), 2, errors.ConnectionLost),
        ((lost("unknown"),), 1, errors.CircuitOpen),
        ((lost("unknown"), lost()), 100, errors.ConnectionLost),
        ((lost(), lost("unknown")), 100, errors.ConnectionLost),
        ((lost("unknown"), errors.OutOfStock()), 100, errors.OutOfStock),
        ((lost("unknown"), ValueError()), 100, errors.InternalError),
    ],
    ids=["lost", "circuit-open", "max-attempts", "unknown-later", "refusal", "defect"],
)
async def test_unknown_is_sticky(
    virtual_time: VirtualTimeLoop,
    ends: tuple[Exception, ...],
    fail_max: int,
    expected: type[errors.ServiceError],
) -> None:
    """Once an attempt was sent and not answered, no later error claims that nothing was executed."""
    guard = make_guard(virtual_time, fail_max=fail_max, max_attempts=2)
    with pytest.raises(expected) as raised:
        await guard.run("sticky", Script(*ends), deadline=5)
    assert raised.value.outcome == "unknown"


async def test_a_later_success_is_a_success(virtual_time: VirtualTimeLoop) -> None:
    """After an unknown outcome, a retry that succeeds is the answer."""
    attempt = Script(lost("unknown"), "stored")
    assert await make_guard(virtual_time).run("recovered", attempt, deadline=5) == "stored"


async def test_retries_end_with_the_budget(virtual_time: VirtualTimeLoop, counted: Counted) -> None:
    """While everything fails, retries stay within the burst plus the ratio of first attempts."""
    guard = make_guard(virtual_time, fail_max=10_000, budget=RetryBudget(0.1, burst=10))
    attempts = 0

    async def attempt(_remaining_seconds: float) -> str:
        nonlocal attempts
        attempts += 1
        raise lost()

    for _ in range(1000):
        with pytest.raises(errors.ConnectionLost):
            await guard.run("storm", attempt, deadline=1e9)
    assert attempts - 1000 == 10 + 99  # the first deposit finds the bucket full; the last token is 0.9 so far
    assert counted("storm")["failure"] == attempts - 1000
    assert counted("storm")["budget_exhausted"] > 900


async def test_refused_calls_pay_nothing_in(virtual_time: VirtualTimeLoop) -> None:
    """A call the breaker refuses is no first attempt, and earns no retries."""
    budget = RetryBudget(0.5, burst=2)
    guard = make_guard(virtual_time, fail_max=1, max_attempts=1, budget=budget)
    with pytest.raises(errors.ConnectionLost):
        await guard.run("refused", Script(lost()), deadline=5)
    while budget.withdraw():
        pass
    for _ in range(10):
        with pytest.raises(errors.CircuitOpen):
            await guard.run("refused", Script(), deadline=5)
    assert not budget.withdraw()


async def test_a_cancelled_call_is_not_repeated(virtual_time: VirtualTimeLoop) -> None:
    """Cancelling a call ends it, in a pause or in an attempt, and books nothing on the breaker."""
    guard = make_guard(virtual_time, fail_max=2)
    attempt = Script(lost(), "never", seconds=1)
    task = asyncio.ensure_future(guard.run("cancelled", attempt, deadline=50))
    await asyncio.sleep(1.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert attempt.ends == ["never"]
    assert guard.breaker.state == "closed"


async def test_the_series_of_an_operation_exist_from_its_first_run(virtual_time: VirtualTimeLoop) -> None:
    """Before the first failure every outcome of the operation is there, at zero."""
    await make_guard(virtual_time).run("fresh", Script("stored"), deadline=5)
    for outcome in ("success", "failure", "budget_exhausted"):
        assert sample("retries_total", operation="fresh", outcome=outcome) == 0


# --- the trap of tenacity -------------------------------------------------------------------------


class SharedRetrying:
    """tenacity's `async for` on one AsyncRetrying for all calls."""

    def __init__(self) -> None:
        self.retrying = AsyncRetrying(
            stop=stop_after_attempt(3),
            wait=wait_none(),
            retry=retry_if_exception_type(errors.ConnectionLost),
            reraise=True,
        )

    async def run(
        self, _operation: str, attempt: Callable[[float], Awaitable[str]], *, deadline: float
    ) -> str:
        async for one in self.retrying:
            with one:
                return await attempt(deadline)
        raise AssertionError("unreachable")


class Runner(Protocol):
    async def run(
        self, operation: str, attempt: Callable[[float], Awaitable[str]], *, deadline: float
    ) -> str: ...


async def concurrent_calls_do_not_share_attempts(runner: Runner) -> None:
    scripts = [
        Script(*[errors.ConnectionLost(f"call {call}") for _ in range(3)], seconds=0.1) for call in range(4)
    ]
    raised = await asyncio.gather(
        *(runner.run("concurrent", script, deadline=50) for script in scripts), return_exceptions=True
    )
    assert [len(script.started_at) for script in scripts] == [3] * 4
    assert [str(exc) for exc in raised] == [f"call {call}" for call in range(4)]


async def test_concurrent_calls_keep_to_themselves(virtual_time: VirtualTimeLoop) -> None:
    """Concurrent calls make their own attempts and get their own failures; with a shared AsyncRetrying not."""
    await concurrent_calls_do_not_share_attempts(make_guard(virtual_time))
    with pytest.raises(AssertionError):
        await concurrent_calls_do_not_share_attempts(SharedRetrying())
