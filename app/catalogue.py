"""What is sold, and at what price: the product caches, what fills them, and the price of an order's lines."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from app import repository
from app.batching import batch_processor
from app.cache import Cached, cached
from app.db import Database
from app.domain import Line, Product
from app.errors import DeadlineExceeded, NotFound, UnknownProduct, Validation
from app.resilience import Guard

# In one query: all the lines that the largest batch of orders can have.
_MOST_IDS = 5000
_MAX_CENTS = 2**63 - 1  # bigint; no price is negative, so no line is more than the total


class Priced(NamedTuple):
    """The lines of an order at the catalogue's prices, and their sum in integer cents."""

    currency: str
    total_cents: int
    lines: list[Line]


class Catalogue:
    """The products, read through caches that serve what they know, marked stale, while the database is away."""

    def __init__(
        self,
        db: Database,
        guard: Guard,
        *,
        cache_ttl_seconds: float,
        cache_max_size: int,
        request_deadline_seconds: float,
    ) -> None:
        """Read products from *db*, under *guard*; nothing is opened here."""

        def deadline() -> float:
            return time.monotonic() + request_deadline_seconds

        @cached(ttl=cache_ttl_seconds, maxsize=cache_max_size, name="products")
        @batch_processor(max_size=_MOST_IDS, max_wait=request_deadline_seconds, writers=2)
        async def get_product_details(ids: list[str]) -> Sequence[Product | BaseException]:
            found = await guard.read(
                "get_products", lambda: repository.select_products_by_id(db, ids), deadline=deadline()
            )
            return [
                found.get(product_id) or NotFound(f"there is no product {product_id!r}") for product_id in ids
            ]

        @cached(ttl=cache_ttl_seconds, maxsize=1000, name="product_pages")
        async def get_product_page(key: tuple[str, int]) -> Sequence[Product]:
            after, limit = key
            return await guard.read(
                "list_products",
                lambda: repository.select_products(db, after=after, limit=limit),
                deadline=deadline(),
            )

        self._products = get_product_details
        self._pages = get_product_page

    async def product(self, product_id: str) -> Cached[Product]:
        """A product from the cache, stale while the database is away.

        Raises:
            NotFound: there is no such product.
        """
        return await self._products.lookup(product_id)

    async def page(self, *, after: str, limit: int) -> Cached[Sequence[Product]]:
        """Products by id behind *after*, from the cache, stale while the database is away."""
        return await self._pages.lookup((after, limit))

    def forget(self, product_ids: Iterable[str]) -> None:
        """Read *product_ids* anew when they are next asked for: the database says that they are gone."""
        for product_id in product_ids:
            self._products.discard(product_id)

    async def price(self, items: Sequence[tuple[str, int]], *, deadline: float) -> Priced:
        """Price *items* from the cache; what is missing there is read first.

        Args:
            items: (product_id, quantity), one a line.
            deadline: monotonic seconds; it bounds the reading.

        Raises:
            UnknownProduct: a line names a product that does not exist.
            Validation: the lines are in several currencies, or their sum is more than the database can hold.
            DeadlineExceeded: the missing products were not there in time.
        """
        priced = self.price_from_cache(items)
        if priced is None:
            priced = _price(await self._read([product_id for product_id, _ in items], deadline), items)
        return priced

    def price_from_cache(self, items: Sequence[tuple[str, int]]) -> Priced | None:
        """As `price`, at once; None where a product is not cached."""
        products: list[Product] = []
        for product_id, _ in items:
            product = self._products.peek(product_id)
            if product is None:
                return None
            products.append(product)
        return _price(products, items)

    async def _read(self, ids: Sequence[str], deadline: float) -> list[Product]:
        """Every product of *ids*, in their order."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                found = await self._products.get_all(ids)
        except TimeoutError as exc:
            raise DeadlineExceeded from exc
        products: list[Product] = []
        for product_id, product in zip(ids, found, strict=True):
            if isinstance(product, NotFound):
                raise UnknownProduct(f"there is no product {product_id!r}") from product
            if isinstance(product, BaseException):
                raise product
            products.append(product)
        return products


def _price(products: Sequence[Product], items: Sequence[tuple[str, int]]) -> Priced:
    """*items* at the prices of *products*, which are those of its lines."""
    lines = [
        (product.id, quantity, product.price_cents)
        for product, (_, quantity) in zip(products, items, strict=True)
    ]
    currency = products[0].currency
    for product in products:
        if product.currency != currency:
            raise Validation(f"items: all in one currency, not in {currency} and {product.currency}")
    total_cents = sum([quantity * price_cents for _, quantity, price_cents in lines])
    if total_cents > _MAX_CENTS:
        raise Validation(f"items: they cost more than {_MAX_CENTS} cents")
    return Priced(currency, total_cents, lines)
