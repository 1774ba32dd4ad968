"""FastAPI and an aiopg pool, one transaction per order: how the plan's reader would write it."""

import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiopg
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, Field

from loadtests.bench.peers import serving

SCHEMA = """
    CREATE TABLE IF NOT EXISTS products (
        id text PRIMARY KEY, name text NOT NULL, price_cents bigint NOT NULL, stock bigint NOT NULL CHECK (stock >= 0)
    );
    CREATE TABLE IF NOT EXISTS orders (
        id uuid PRIMARY KEY, customer_id text NOT NULL, status text NOT NULL, total_cents bigint NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE IF NOT EXISTS order_lines (
        order_id uuid NOT NULL REFERENCES orders, product_id text NOT NULL REFERENCES products, quantity int NOT NULL,
        unit_price_cents bigint NOT NULL, PRIMARY KEY (order_id, product_id)
    );
    INSERT INTO products
    SELECT 'SKU-' || lpad(i::text, 4, '0'), 'Product ' || i, 199 + (i * 7919) % 9800, 1000000000
      FROM generate_series(1, 1000) AS i
        ON CONFLICT DO NOTHING;
"""


class Item(BaseModel):
    """A line of an order."""

    product_id: str
    quantity: int = Field(ge=1, le=1000)


class NewOrder(BaseModel):
    """The order as it is sent."""

    customer_id: str
    items: list[Item]


class Order(BaseModel):
    """The order as it is answered."""

    id: uuid.UUID
    customer_id: str
    status: str
    total_cents: int
    items: list[Item]


def create_app(dsn: str) -> FastAPI:
    """The application over the database at *dsn*."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with aiopg.create_pool(
            dsn=dsn, minsize=10, maxsize=50, timeout=30, enable_hstore=False
        ) as pool:
            async with pool.acquire() as connection, connection.cursor() as cursor:
                await cursor.execute(SCHEMA)
            yield {"pool": pool}

    app = FastAPI(lifespan=lifespan)

    @app.post("/orders", status_code=201)
    async def create_order(order: NewOrder, request: Request) -> Order:
        order_id = uuid.uuid4()
        async with request.state.pool.acquire() as connection, connection.cursor() as cursor, cursor.begin():
            total_cents = 0
            prices = {}
            # By id, so that two orders never wait for each other in a circle.
            for item in sorted(order.items, key=lambda item: item.product_id):
                await cursor.execute(
                    "UPDATE products SET stock = stock - %s WHERE id = %s AND stock >= %s RETURNING price_cents",
                    (item.quantity, item.product_id, item.quantity),
                )
                row = await cursor.fetchone()
                if row is None:
                    raise HTTPException(409, "out of stock")
                prices[item.product_id] = row[0]
                total_cents += row[0] * item.quantity
            await cursor.execute(
                "INSERT INTO orders (id, customer_id, status, total_cents) VALUES (%s, %s, 'confirmed', %s)",
                (str(order_id), order.customer_id, total_cents),
            )
            for item in order.items:
                await cursor.execute(
                    "INSERT INTO order_lines (order_id, product_id, quantity, unit_price_cents)"
                    " VALUES (%s, %s, %s, %s)",
                    (str(order_id), item.product_id, item.quantity, prices[item.product_id]),
                )
        return Order(
            id=order_id,
            customer_id=order.customer_id,
            status="confirmed",
            total_cents=total_cents,
            items=order.items,
        )

    return app


if __name__ == "__main__":
    options = serving.arguments()
    serving.serve(create_app(options.dsn), options.port)
