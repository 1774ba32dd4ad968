"""Event loops of the integration tests."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run on uvloop, as the service does; `pytest.mark.asyncio(loop_factories=[...])` names others."""
    loops = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    marker = item.get_closest_marker("asyncio")
    return loops if marker and "loop_factories" in marker.kwargs else {"uvloop": uvloop.new_event_loop}
