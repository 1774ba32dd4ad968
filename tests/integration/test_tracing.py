"""FastAPI's native OpenTelemetry: a span for an order where it is switched on, nothing where it is not."""

import os
import subprocess
import sys

import pytest

_PLACE_AN_ORDER = """
import asyncio, sys
import httpx
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from app.main import create_app
from app.settings import Settings

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

class WithState:
    def __init__(self, app, state):
        self.app, self.state = app, state
    async def __call__(self, scope, receive, send):
        await self.app({**scope, "state": self.state}, receive, send)

async def main():
    app = create_app(Settings.load())
    async with app.router.lifespan_context(app) as state:
        transport = httpx.ASGITransport(app=WithState(app, state))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            order = {"customer_id": "c", "items": [{"product_id": "SKU-0001", "quantity": 1}]}
            assert (await client.post("/orders", json=order)).status_code == 201
    print(sorted({span.name for span in exporter.get_finished_spans()}))

asyncio.run(main())
"""


@pytest.mark.parametrize(("switch", "traced"), [("true", True), ("", False)], ids=["on", "off"])
def test_an_order_has_a_span_exactly_where_tracing_is_switched_on(
    database_url: str, switch: str, *, traced: bool
) -> None:
    """With FASTAPI_OTEL_AUTO_CONFIGURE=true `POST /orders` is a span; without it no span is made."""
    done = subprocess.run(
        [sys.executable, "-c", _PLACE_AN_ORDER],
        env={**os.environ, "DATABASE_URL": database_url, "FASTAPI_OTEL_AUTO_CONFIGURE": switch},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert ("POST /orders" in done.stdout.splitlines()[-1]) is traced
