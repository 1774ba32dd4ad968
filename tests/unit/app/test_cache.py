"""AsyncCache: fresh, shared, jittered, stale, and counted once."""

import asyncio
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY

from app import errors
from app.batching import batch_processor
from app.cache import AsyncCache, Cached, cached
from tests.support.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.virtual_time


class Source:
    """Loads `key:n` in one second, n counting all loads; raises `failure` instead while there is one."""

    def __init__(self) -> None:
        self.loads = 0
        self.failure: BaseException | None = None

    async def load(self, key: str) -> str:
        self.loads += 1
        value = f"{key}:{self.loads}"
        await asyncio.sleep(1)
        if self.failure is not None:
            raise self.failure
        return value


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
async def cache(source: Source, virtual_time: VirtualTimeLoop) -> AsyncCache[str, str]:
    """A cache of ten entries, fresh for exactly 100 seconds."""
    return AsyncCache(
        source.load,
        name="products",
        ttl=100,
        maxsize=10,
        timer=virtual_time.time,
        uniform=lambda _low, _high: 1,
    )


def _read_counts() -> dict[str, float]:
    return {
        result: REGISTRY.get_sample_value("cache_requests_total", {"cache": "products", "result": result})
        or 0
        for result in ("hit", "miss", "stale", "coalesced")
    }


@pytest.fixture
def counted() -> Callable[[], dict[str, int]]:
    """What `cache_requests_total` has counted since the test began, without the zeros."""
    before = _read_counts()
    return lambda: {
        result: int(count - before[result])
        for result, count in _read_counts().items()
        if count != before[result]
    }


Counted = Callable[[], dict[str, int]]


async def test_a_value_is_loaded_once_while_it_is_fresh(
    cache: AsyncCache[str, str], source: Source, counted: Counted
) -> None:
    """Within its ttl a value is served from memory; after it, it is loaded again."""
    assert await cache.get("a") == "a:1"
    await asyncio.sleep(99.9)
    assert await cache.get("a") == "a:1"
    await asyncio.sleep(0.2)
    assert await cache.get("a") == "a:2"
    assert counted() == {"miss": 2, "hit": 1}


async def test_a_lookup_tells_age_and_result(cache: AsyncCache[str, str]) -> None:
    """A look-up says how long the value stays fresh and how it was found."""
    assert await cache.lookup("a") == ("a:1", 100, "miss")
    await asyncio.sleep(30)
    assert await cache.lookup("a") == ("a:1", 70, "hit")


async def test_peek_answers_only_what_is_fresh(cache: AsyncCache[str, str], counted: Counted) -> None:
    """Peek never loads; it counts a hit and leaves a miss to the `get` that follows."""
    assert cache.peek("a") is None
    assert counted() == {}
    await cache.get("a")
    assert cache.peek("a") == "a:1"
    await asyncio.sleep(100)
    assert cache.peek("a") is None
    assert counted() == {"miss": 1, "hit": 1}


async def test_concurrent_callers_share_one_load(
    cache: AsyncCache[str, str], source: Source, counted: Counted
) -> None:
    """Twenty callers of one key cause one load; another key does not wait for it."""
    found = await asyncio.gather(*(cache.lookup("a") for _ in range(20)), cache.lookup("b"))
    assert [each.value for each in found] == ["a:1"] * 20 + ["b:2"]
    assert [each.result for each in found] == ["miss"] + ["coalesced"] * 19 + ["miss"]
    assert source.loads == 2
    assert counted() == {"miss": 2, "coalesced": 19}


async def test_the_first_caller_may_leave(
    cache: AsyncCache[str, str], source: Source, counted: Counted
) -> None:
    """Cancelling the caller that began a load cancels it neither for those who joined nor for the cache."""
    callers = [asyncio.ensure_future(cache.get("a")) for _ in range(3)]
    await asyncio.sleep(0.5)
    callers[0].cancel()
    answers = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert answers[1:] == ["a:1", "a:1"]
    assert cache.peek("a") == "a:1"
    assert source.loads == 1
    assert counted() == {"miss": 1, "coalesced": 2, "hit": 1}


async def test_a_load_nobody_waits_for_is_stored(cache: AsyncCache[str, str]) -> None:
    """When every caller has left, the load goes on and its value is kept."""
    caller = asyncio.ensure_future(cache.get("a"))
    await asyncio.sleep(0.5)
    caller.cancel()
    await asyncio.sleep(1)
    assert cache.peek("a") == "a:1"


async def test_an_abandoned_failure_is_not_reported(
    cache: AsyncCache[str, str], source: Source, virtual_time: VirtualTimeLoop
) -> None:
    """A load that fails after every caller has left is no "exception was never retrieved"."""
    reports: list[object] = []
    virtual_time.set_exception_handler(lambda _, context: reports.append(context))
    source.failure = errors.NotFound()
    caller = asyncio.ensure_future(cache.get("a"))
    await asyncio.sleep(0.5)
    caller.cancel()
    await asyncio.sleep(1)
    assert reports == []


async def test_a_failed_load_is_told_to_all_and_not_kept(
    cache: AsyncCache[str, str], source: Source, counted: Counted
) -> None:
    """With nothing stored, every caller gets the exception, and the next one loads again."""
    source.failure = errors.NotFound()
    lost = await asyncio.gather(cache.get("a"), cache.get("a"), return_exceptions=True)
    assert list(lost) == [source.failure, source.failure]
    source.failure = None
    assert await cache.get("a") == "a:2"
    assert counted() == {"miss": 2, "coalesced": 1}


@pytest.mark.parametrize("pause", [0, 0.5], ids=["before-its-first-step", "in-flight"])
async def test_a_cancelled_load_leaves_no_poison(cache: AsyncCache[str, str], pause: float) -> None:
    """After the task of a load was cancelled, the next caller loads again."""
    caller = asyncio.ensure_future(cache.get("a"))
    await asyncio.sleep(0)  # the caller has begun the load
    if pause:
        await asyncio.sleep(pause)
    (load,) = cache._loads.values()
    load.cancel()
    with pytest.raises(errors.InternalError):
        await caller
    assert (await cache.get("a")).startswith("a:")
    assert not cache._loads


async def test_a_leaked_cancellation_cancels_no_caller(cache: AsyncCache[str, str], source: Source) -> None:
    """A load that raises CancelledError by itself is an error to its callers; a stale value stands in."""
    source.failure = asyncio.CancelledError()
    with pytest.raises(errors.InternalError):
        await cache.get("a")
    source.failure = None
    await cache.get("a")
    await asyncio.sleep(200)
    source.failure = asyncio.CancelledError()
    assert (await cache.lookup("a")).result == "stale"


async def test_a_stale_value_stands_in_for_a_failed_load(
    cache: AsyncCache[str, str], source: Source, counted: Counted
) -> None:
    """While the source is unavailable an expired value is served, however old, and says how stale it is."""
    await cache.get("a")
    source.failure = errors.CircuitOpen()
    await asyncio.sleep(1_000_000)
    found = await asyncio.gather(cache.lookup("a"), cache.lookup("a"))
    assert list(found) == [Cached("a:1", -999_901, "stale")] * 2
    assert counted() == {"miss": 1, "stale": 2}
    source.failure = None
    assert (await cache.lookup("a")).result == "miss"
    assert cache.peek("a") == "a:3"


async def test_other_failures_are_not_hidden_by_a_stale_value(
    cache: AsyncCache[str, str], source: Source
) -> None:
    """An exception that does not mean "unavailable" is raised, though an old value is stored."""
    await cache.get("a")
    await asyncio.sleep(100)
    source.failure = errors.NotFound()
    with pytest.raises(errors.NotFound):
        await cache.get("a")


async def test_faults_what_is_gone_is_not_served_stale(cache: AsyncCache[str, str], source: Source) -> None:
    """Once the source has said that there is no such value, no outage brings the old one back."""
    await cache.get("a")
    await asyncio.sleep(100)
    source.failure = errors.NotFound()
    with pytest.raises(errors.NotFound):
        await cache.get("a")
    source.failure = errors.CircuitOpen()
    with pytest.raises(errors.CircuitOpen):
        await cache.get("a")


async def test_many_keys_are_asked_for_at_once(cache: AsyncCache[str, str], counted: Counted) -> None:
    """One look-up of several keys: each has its own value, in order, after the time of one load."""
    await cache.get("a")
    before = asyncio.get_running_loop().time()
    assert await cache.get_all(["b", "a", "c"]) == ["b:2", "a:1", "c:3"]
    assert asyncio.get_running_loop().time() - before == pytest.approx(1)
    assert counted() == {"miss": 3, "hit": 1}


async def test_one_key_of_many_fails_alone(source: Source) -> None:
    """What a load raises is the result of its key."""

    async def load(key: str) -> str:
        if key == "b":
            raise errors.NotFound
        return await source.load(key)

    found = await AsyncCache(load, name="products").get_all(["a", "b", "c"])
    assert [found[0], type(found[1]), found[2]] == ["a:1", errors.NotFound, "c:2"]


async def test_the_least_recently_used_entry_leaves_first(cache: AsyncCache[str, str]) -> None:
    """Over maxsize the entry that was not used for longest is dropped."""
    for key in range(10):
        await cache.get(str(key))
    assert cache.peek("0")
    await cache.get("one too many")
    assert cache.peek("0")
    assert cache.peek("1") is None


@pytest.mark.parametrize("draw", [0, 0.25, 1])
async def test_expiry_is_jittered_by_a_tenth(
    source: Source, virtual_time: VirtualTimeLoop, draw: float
) -> None:
    """A value stays fresh for its ttl, give or take ten per cent."""
    cache = AsyncCache(
        source.load,
        name="products",
        ttl=100,
        timer=virtual_time.time,
        uniform=lambda low, high: low + draw * (high - low),
    )
    assert (await cache.lookup("a")).ttl_seconds == pytest.approx(90 + 20 * draw)


async def test_the_default_jitter_spreads_keys(source: Source, virtual_time: VirtualTimeLoop) -> None:
    """Keys loaded together expire at different times within the tenth."""
    cache = AsyncCache(source.load, name="products", ttl=100, timer=virtual_time.time)
    found = await asyncio.gather(*(cache.lookup(str(key)) for key in range(50)))
    assert len({each.ttl_seconds for each in found}) > 1
    assert all(90 <= each.ttl_seconds <= 110 for each in found)


async def test_the_decorated_function_is_the_cache() -> None:
    """`@cached(ttl=300)` makes of `async def f(key)` a cache, awaited as f and named after it."""
    loads = 0

    @cached(ttl=300)
    async def get_product_details(product_id: str) -> str:
        """Read a product."""
        nonlocal loads
        loads += 1
        return f"product {product_id}"

    assert await get_product_details("p-1") == "product p-1"
    assert await get_product_details("p-1") == "product p-1"
    assert (loads, get_product_details.peek("p-1")) == (1, "product p-1")
    assert get_product_details.__doc__ == "Read a product."
    sample = {"cache": "get_product_details", "result": "hit"}
    assert REGISTRY.get_sample_value("cache_requests_total", sample) == 2


async def test_a_batched_load_can_be_cached() -> None:
    """Both decorators stand on one function; neither object gets the other's attributes."""
    asked: list[list[str]] = []

    @cached(ttl=300, name="products")
    @batch_processor(max_size=100, max_wait=0.5)
    async def get_product_details(ids: list[str]) -> list[str | BaseException]:
        asked.append(ids)
        return [f"product {product_id}" for product_id in ids]

    assert list(await asyncio.gather(get_product_details("a"), get_product_details("b"))) == [
        "product a",
        "product b",
    ]
    assert await get_product_details("a") == "product a"
    assert asked == [["a", "b"]]
