"""Fixtures of the unit tests."""

import asyncio
from collections.abc import Callable, Mapping

import pytest

from tests.support.virtual_time import VirtualTimeLoop


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "virtual_time: async tests run on an event loop with virtual time")


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run a test that has the marker or the fixture on virtual time, and any other on asyncio's own loop."""
    if item.get_closest_marker("virtual_time") or "virtual_time" in getattr(item, "fixturenames", ()):
        return {"virtual-time": VirtualTimeLoop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture
async def virtual_time() -> VirtualTimeLoop:
    """The loop this test runs on: `time()` is its clock, `stall(seconds)` blocks it."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop
