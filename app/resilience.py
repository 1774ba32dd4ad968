"""Circuit breaker, retry budget, and the one place where they are composed around a call.

The order of protection, from the outside in: deadline, retry, breaker, one attempt with its own timeout.
The breaker stands inside the retry, so that every attempt is checked and booked, and an open breaker ends the
call at once instead of holding it for the whole back-off.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Literal, NoReturn, TypeVar

import pybreaker
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from app import errors
from app.metrics import BREAKER_STATE, BREAKER_STATES, BREAKER_TRANSITIONS, RETRIES, RETRY_OUTCOMES

R = TypeVar("R")

BreakerState = Literal["closed", "half_open", "open"]

_STATES: dict[str, BreakerState] = {
    pybreaker.STATE_CLOSED: "closed",
    pybreaker.STATE_HALF_OPEN: "half_open",
    pybreaker.STATE_OPEN: "open",
}


class CircuitBreaker:
    """Refuses calls to a dependency that keeps failing, and lets one through from time to time to see.

    Closed, it opens after `fail_max` failures in a row. Open, it refuses. Once `reset_seconds` have passed,
    the next call is a trial (half-open) and the only one: success closes the breaker, failure opens it again.
    Cancellations, and exceptions for which `is_failure` is False, are neither: they say nothing of the
    dependency.

    pybreaker keeps the states; this adapter is what it lacks for asyncio. It awaits outside pybreaker and
    books the outcome afterwards, because
    - its decorator on an `async def` books the making of the coroutine, a success (danielfm/pybreaker#7);
    - `with breaker.calling()` lets every caller into half-open, and books a cancellation as a failure;
    - `exclude=` books an excluded exception as a success, which closes a half-open breaker;
    - the late result of a call that began before a change of state would move the new state;
    - it times the reset by the wall clock, which is stepped now and then.

    One process, one breaker, and one event loop: its state is not shared.
    """

    def __init__(
        self,
        name: str,
        *,
        fail_max: int,
        reset_seconds: float,
        is_failure: Callable[[BaseException], bool],
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start closed.

        Args:
            name: label of the metrics.
            fail_max: failures in a row that open it.
            reset_seconds: how long it refuses before it lets a trial call through.
            is_failure: whether an exception of a call means that the dependency is away.
            timer: a monotonic clock, in seconds.
        """
        self.name = name
        self._reset_seconds = reset_seconds
        self._is_failure = is_failure
        self._timer = timer
        self._opened_at = 0.0
        self._trial_in_flight = False
        self._gauge = BREAKER_STATE.labels(name)
        self._transitions = {state: BREAKER_TRANSITIONS.labels(name, state) for state in BREAKER_STATES}
        self._gauge.set(0)
        # Its own reset timeout is never asked: no call is made through it while it is open.
        self._pybreaker = pybreaker.CircuitBreaker(
            fail_max=fail_max, listeners=[_OnChange(self._entered)], name=name, throw_new_error_on_trip=False
        )

    @property
    def state(self) -> BreakerState:
        """`open` until the first call after `reset_seconds`; only that call makes it `half_open`."""
        return _STATES[self._pybreaker.current_state]

    @property
    def retry_after_seconds(self) -> float:
        """Seconds until a call may pass; 0 where one may pass now.

        While a trial is in flight its end is not known; then `reset_seconds`, the wait after it fails.
        """
        if self.state == "open":
            return max(0.0, self._opened_at + self._reset_seconds - self._timer())
        return self._reset_seconds if self._trial_in_flight else 0.0

    def check(self) -> None:
        """Raise `CircuitOpen` if a call would be refused now. Reserves nothing and changes no state."""
        if self._pybreaker.current_state == pybreaker.STATE_CLOSED:
            return
        retry_after_seconds = self.retry_after_seconds
        if retry_after_seconds > 0 or self._trial_in_flight:
            raise errors.CircuitOpen(retry_after_seconds=retry_after_seconds)

    async def call(self, attempt: Callable[[], Awaitable[R]]) -> R:
        """Await `attempt()` if the breaker lets it pass, and book how it ended.

        Args:
            attempt: must bound its own time; a trial that hangs keeps every other call out.

        Raises:
            CircuitOpen: refused, nothing was attempted; `retry_after_seconds` says when to come back.
            Exception: whatever *attempt* raised, untouched.
        """
        self.check()
        is_trial = self._pybreaker.current_state != pybreaker.STATE_CLOSED
        if is_trial:
            if self.state == "open":
                self._pybreaker.half_open()
            self._trial_in_flight = True
        entered = self._pybreaker.state  # a new object after every change: identity tells a late result
        try:
            result = await attempt()
        except Exception as exc:  # a cancellation is not an Exception, and books nothing
            if self._pybreaker.state is entered and self._is_failure(exc):
                self._book_failure()
            raise
        else:
            # Booking costs 2 us; it changes nothing for a closed breaker without failures.
            if (is_trial or self._pybreaker.fail_counter) and self._pybreaker.state is entered:
                self._pybreaker.call(_succeed)
            return result
        finally:
            if is_trial:
                self._trial_in_flight = False

    def _book_failure(self) -> None:
        with contextlib.suppress(_FailureBooked):
            self._pybreaker.call(_fail)

    def _entered(self, state: BreakerState) -> None:
        """Note and publish a change of state."""
        if state == "open":
            self._opened_at = self._timer()
        self._gauge.set(BREAKER_STATES.index(state))
        self._transitions[state].inc()


class _OnChange(pybreaker.CircuitBreakerListener):
    """Passes on pybreaker's changes of state.

    pybreaker also reports changes to the same state, but only on late results, and those are never booked.
    """

    def __init__(self, entered: Callable[[BreakerState], None]) -> None:
        self._entered = entered

    def state_change(
        self,
        cb: pybreaker.CircuitBreaker,  # noqa: ARG002 - pybreaker's signature
        old_state: pybreaker.CircuitBreakerState | None,  # noqa: ARG002
        new_state: pybreaker.CircuitBreakerState,
    ) -> None:
        self._entered(_STATES[new_state.name])


class _FailureBooked(Exception):
    """Stands for the real exception, which pybreaker would raise once more and so lengthen its traceback."""


def _succeed() -> None:
    pass


def _fail() -> NoReturn:
    raise _FailureBooked


class RetryBudget:
    """Bounds retries to a share of the calls, so that they cannot multiply the load on what is failing.

    Every first attempt deposits `ratio` tokens, every retry costs one: over time at most `ratio` retries a
    call, and `burst` more at once.

    Source: Marc Brooker, "Fixing retries with token buckets and circuit breakers" (2022).
    """

    def __init__(self, ratio: float = 0.1, *, burst: float = 10) -> None:
        """Start full: *ratio* tokens come with a call, at most *burst* are kept."""
        self._ratio = ratio
        self._burst = burst
        self._tokens = float(burst)

    def deposit(self) -> None:
        """Pay in for one first attempt."""
        self._tokens = min(self._burst, self._tokens + self._ratio)

    def withdraw(self) -> bool:
        """Pay for one retry; False, and nothing is taken, where it cannot be afforded."""
        if self._tokens < 1 - 1e-9:  # ten deposits of 0.1 are one token; as floats they are a little less
            return False
        self._tokens -= 1
        return True


class Guard:
    """Retry around breaker around attempt, inside a deadline: the order of protection, composed once.

    What runs under it must be safe to repeat: a retry follows even where an attempt may have succeeded.
    """

    def __init__(
        self,
        breaker: CircuitBreaker,
        budget: RetryBudget,
        *,
        max_attempts: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Compose *breaker* and *budget*.

        Args:
            breaker: checked before, and told after, every attempt.
            budget: pays for retries; may be shared by several guards.
            max_attempts: the first one included.
            clock: monotonic seconds; deadlines are points on it.
            sleep: how a retry waits, in seconds.
        """
        self.breaker = breaker
        self._budget = budget
        self._max_attempts = max_attempts
        self._clock = clock
        self._sleep = sleep
        self._counters: dict[str, dict[str, Callable[[], None]]] = {}

    def require_closed(self) -> None:
        """Raise `CircuitOpen` while the breaker is not closed: a customer's request is not its trial."""
        if self.breaker.state != "closed":
            raise errors.CircuitOpen(retry_after_seconds=self.breaker.retry_after_seconds)

    async def read(self, operation: str, query: Callable[[], Awaitable[R]], *, deadline: float) -> R:
        """Await `query()` as `run` does its attempt, and only while the breaker is closed."""
        self.require_closed()
        return await self.run(operation, lambda _: query(), deadline=deadline)

    async def run(self, operation: str, attempt: Callable[[float], Awaitable[R]], *, deadline: float) -> R:
        """Await `attempt(remaining_seconds)`, again where its failure is retryable and the deadline allows.

        Args:
            operation: label of `retries_total`; a closed set.
            attempt: must end within the seconds it is given, and be safe to repeat.
            deadline: on `clock`; no attempt starts after it.

        Raises:
            DeadlineExceeded: it passed before the attempt could start.
            CircuitOpen: the breaker refused; never retried.
            Exception: what the last attempt raised. Once an attempt failed with outcome `unknown`, all that
                follow carry it too: what was sent and not answered may have been executed.
        """
        if operation not in self._counters:  # so that every series exists before the first failure
            self._counters[operation] = {
                outcome: RETRIES.labels(operation, outcome).inc for outcome in RETRY_OUTCOMES
            }
        attempts = 0
        may_be_executed = False

        async def attempt_once() -> R:
            nonlocal attempts, may_be_executed
            attempts += 1
            try:
                return await self._attempt(operation, attempts, attempt, deadline)
            except errors.ServiceError as exc:
                may_be_executed = may_be_executed or exc.outcome == "unknown"
                exc.outcome = "unknown" if may_be_executed else "not_executed"
                raise
            except Exception as exc:
                if may_be_executed:
                    raise errors.InternalError(outcome="unknown") from exc
                raise

        # A fresh one for every call: it keeps the state of a call on itself, and concurrent calls through a
        # shared one take each other's attempts and exceptions.
        retrying = AsyncRetrying(
            retry=retry_if_exception(_is_retryable),
            wait=wait_random_exponential(multiplier=0.02, max=0.25),
            stop=functools.partial(self._is_last, operation, deadline),
            sleep=self._sleep,
            reraise=True,
        )
        result: R = await retrying(attempt_once)
        return result

    async def _attempt(
        self, operation: str, number: int, attempt: Callable[[float], Awaitable[R]], deadline: float
    ) -> R:
        """Make attempt *number* of a call, through the breaker, and count it."""

        def start() -> Awaitable[R]:
            if number == 1:
                self._budget.deposit()
            return attempt(remaining_seconds)

        outcome = "failure"
        try:
            remaining_seconds = deadline - self._clock()
            if remaining_seconds <= 0:
                raise errors.DeadlineExceeded
            result = await self.breaker.call(start)
            outcome = "success"
            return result
        finally:
            if number > 1:
                self._counters[operation][outcome]()

    def _is_last(self, operation: str, deadline: float, state: RetryCallState) -> bool:
        """Whether the failure in *state* ends the call; where it does not, the next retry is paid for."""
        if state.attempt_number >= self._max_attempts:
            return True
        if self._clock() + state.upcoming_sleep >= deadline:
            return True
        if self._budget.withdraw():
            return False
        self._counters[operation]["budget_exhausted"]()
        return True


def _is_retryable(exc: BaseException) -> bool:
    return isinstance(exc, errors.ServiceError) and exc.retryable
