"""FastAPI, SQLAlchemy's async ORM and asyncpg, one session per request: what the official templates teach."""

import contextlib
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated

import psycopg2.extensions
from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from loadtests.bench.peers import serving


class Base(DeclarativeBase):
    """The tables."""


class ProductRow(Base):
    """A product."""

    __tablename__ = "products"
    __table_args__ = (CheckConstraint("stock >= 0"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    price_cents: Mapped[int] = mapped_column(BigInteger)
    stock: Mapped[int] = mapped_column(BigInteger)


class OrderRow(Base):
    """An order."""

    __tablename__ = "orders"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    customer_id: Mapped[str]
    status: Mapped[str] = mapped_column(default="confirmed")
    total_cents: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    items: Mapped[list["LineRow"]] = relationship(lazy="selectin")


class LineRow(Base):
    """A line of an order."""

    __tablename__ = "order_lines"
    order_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    product_id: Mapped[str] = mapped_column(ForeignKey("products.id"), primary_key=True)
    quantity: Mapped[int]
    unit_price_cents: Mapped[int] = mapped_column(BigInteger)


class Item(BaseModel):
    """A line of an order."""

    model_config = ConfigDict(from_attributes=True)
    product_id: str
    quantity: int = Field(ge=1, le=1000)


class NewOrder(BaseModel):
    """The order as it is sent."""

    customer_id: str
    items: list[Item]


class Order(BaseModel):
    """The order as it is answered."""

    model_config = ConfigDict(from_attributes=True)
    id: uuid.UUID
    customer_id: str
    status: str
    total_cents: int
    items: list[Item]


SEED = """
    INSERT INTO products (id, name, price_cents, stock)
    SELECT 'SKU-' || lpad(i::text, 4, '0'), 'Product ' || i, 199 + (i * 7919) % 9800, 1000000000
      FROM generate_series(1, 1000) AS i
        ON CONFLICT DO NOTHING
"""


def create_app(dsn: str) -> FastAPI:
    """The application over the database at *dsn*."""
    server = psycopg2.extensions.parse_dsn(dsn)
    engine = create_async_engine(
        "postgresql+asyncpg://",
        connect_args={"user": server["user"], "host": server["host"], "database": server["dbname"]},
        pool_size=20,
        max_overflow=30,  # fifty, as the others have
    )
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(text(SEED))
        yield
        await engine.dispose()

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with sessions() as session:
            yield session

    app = FastAPI(lifespan=lifespan)

    @app.post("/orders", status_code=201, response_model=Order)
    async def create_order(
        order: NewOrder, session: Annotated[AsyncSession, Depends(get_session)]
    ) -> OrderRow:
        ids = [item.product_id for item in order.items]
        found = await session.scalars(
            select(ProductRow).where(ProductRow.id.in_(ids)).order_by(ProductRow.id).with_for_update()
        )
        products = {product.id: product for product in found}
        lines = []
        for item in order.items:
            product = products.get(item.product_id)
            if product is None or product.stock < item.quantity:
                raise HTTPException(409, "out of stock")
            product.stock -= item.quantity
            lines.append(
                LineRow(
                    product_id=item.product_id, quantity=item.quantity, unit_price_cents=product.price_cents
                )
            )
        row = OrderRow(
            customer_id=order.customer_id,
            total_cents=sum(line.unit_price_cents * line.quantity for line in lines),
            items=lines,
        )
        session.add(row)
        await session.commit()
        return row

    return app


if __name__ == "__main__":
    options = serving.arguments()
    serving.serve(create_app(options.dsn), options.port)
