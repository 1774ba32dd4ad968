"""`make bench`, second part: what other requests cost beside an order.

One service takes one kind of request after the other, round after round, so that a machine that speeds up or slows
down does it to all of them. Ratios to the order of the same round are what to quote.
"""

import argparse
import json
import random
import statistics
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from loadtests import marked_block
from loadtests.bench import generator, measurement
from loadtests.bench.reporting import (
    Goal,
    Steps,
    command,
    machine_line,
    milliseconds_text,
    ratio_text,
    report_console,
    show_machine,
    show_targets,
    table,
)
from loadtests.machine import processes

_CONNECTIONS = 64
_ORDERS_IN_A_BATCH = 100
_STORED_SECONDS = 2.0  # of orders before anything is measured: there is something to read


@dataclass(frozen=True)
class Kind:
    """A kind of request: what it is called, and how much of an order it may cost (None: it is only shown)."""

    name: str
    limit: float | None = None
    orders: int = 1  # of one request, over which its cost is spread


ORDER = Kind("POST /orders")
GET_ORDER = Kind("GET /orders/{id}", 2.5)
GET_PRODUCT = Kind("GET /products/{id}", 1.5)
NEWEST = Kind("GET /orders?limit=50", 4.0)
OF_CUSTOMER = Kind("GET /orders?customer_id=&limit=50", 4.0)
MIXED = Kind("as the mixed load: 11 reads to 4 orders")
BATCH = Kind(f"POST /orders/batch of {_ORDERS_IN_A_BATCH}, an order", orders=_ORDERS_IN_A_BATCH)
KINDS = (ORDER, GET_ORDER, GET_PRODUCT, NEWEST, OF_CUSTOMER, MIXED, BATCH)

# Of fifteen requests of the mixed load, without its cancellations: products, a product, orders, an order, a page.
_MIX = (3, 4, 4, 2, 1)


class MixedRequests:
    """The requests of several sources, in the shares of the mixed load."""

    def __init__(self, sources: Sequence[generator.Requests], shares: Sequence[int], seed: int = 1) -> None:
        order = [source for source, share in zip(sources, shares, strict=True) for _ in range(share)]
        random.Random(seed).shuffle(order)  # noqa: S311 - repeatable, not secret
        self._order = order
        self._sent = 0

    def next(self) -> bytes:
        """The next request."""
        self._sent += 1
        return self._order[self._sent % len(self._order)].next()


class BatchRequests:
    """`POST /orders/batch` of a hundred orders of two lines, each with a key of its own."""

    def __init__(self, url: str, *, variants: int = 16, seed: int = 1) -> None:
        choose = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._host = urlsplit(url).netloc
        self._lines = [
            [
                {"product_id": product_id, "quantity": choose.randint(1, 3)}
                for product_id in choose.sample(generator.SHIPPED_PRODUCTS, 2)
            ]
            for _ in range(variants * _ORDERS_IN_A_BATCH)
        ]
        self._sent = 0

    def next(self) -> bytes:
        """The next batch."""
        run = uuid.uuid4().hex
        first = self._sent * _ORDERS_IN_A_BATCH % len(self._lines)
        self._sent += 1
        lines = self._lines[first : first + _ORDERS_IN_A_BATCH]
        body = orjson.dumps(
            {
                "orders": [
                    {"customer_id": "bench-batch", "items": items, "idempotency_key": f"{run}-{n}"}
                    for n, items in enumerate(lines)
                ]
            }
        )
        head = f"POST /orders/batch HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True)
class Round:
    """One kind of request under load for a few seconds; its figures are those of a request, a batch's of an order."""

    kind: str
    cost: measurement.Cost


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where it came to nothing."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench.request_cost", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half a minute: shorter rounds, fewer of them")
    parser.add_argument("--rounds", type=int, help="per kind of request (default 3; quick: 2)")
    parser.add_argument("--seconds", type=float, help="of a round (default 4; quick: 1)")
    parser.add_argument("--output", type=Path, default=processes.ROOT / "loadtests/results/bench-requests")
    options = parser.parse_args(arguments)
    console = report_console()
    rounds = _run(
        Steps(console, 1 + len(KINDS) * (options.rounds or (2 if options.quick else 3))),
        options.rounds or (2 if options.quick else 3),
        options.seconds or (1.0 if options.quick else 4.0),
    )
    summary = summarise(rounds)
    targets = reached(summary)
    console.print(table(_TITLE, _HEADINGS, _rows(summary)))
    show_machine(console)
    show_targets(console, targets)
    lines = [f"**{_TITLE}**", "", marked_block.markdown_table(_HEADINGS, _rows(summary)), ""]
    lines += [*(f"- {target.line}" for target in targets), "", machine_line("make bench")]
    text = "\n".join(lines) + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "requests.md").write_text(text)
    report = {"machine": processes.machine(), "summary": summary, "rounds": [asdict(each) for each in rounds]}
    (options.output / "requests.json").write_text(json.dumps(report, indent=1))
    if options == parser.parse_args([]):  # a full run
        marked_block.write("bench-requests", text)
    console.print(f"the table as Markdown and all rounds as JSON: {options.output}", soft_wrap=True)
    return 0


def _run(steps: Steps, rounds: int, seconds: float) -> list[Round]:
    results = []
    with steps, processes.scratch_directory() as folder:
        steps.next("starting the service, and storing orders to read")
        with (
            processes.steady_postgres(folder) as postgres,
            processes.service(postgres.create_database("bench_requests"), folder, name="service") as server,
        ):
            requests = _requests(server.url)
            for number in range(rounds):
                # Forwards and backwards by turns: none is always the one after the heaviest.
                for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                    steps.next(f"round {number + 1} of {rounds}: {kind.name}")
                    connections = _CONNECTIONS if kind.orders == 1 else 8
                    cost, _ = measurement.measure(
                        server, postgres, requests[kind], connections=connections, seconds=seconds
                    )
                    if cost.refused or cost.broken:
                        raise RuntimeError(
                            f"{kind.name}: {cost.refused} refused, {cost.broken} broken off; "
                            f"{processes.tail(server.log_path)}"
                        )
                    results.append(Round(kind.name, _of_one_order(cost, kind.orders)))
    return results


def _requests(url: str) -> dict[Kind, generator.Requests]:
    orders = generator.OrderRequests(url)
    stored = measurement.drive(url, orders, connections=_CONNECTIONS, seconds=_STORED_SECONDS)
    if not stored.acknowledged_ids:
        raise RuntimeError("no order was acknowledged")
    by_id = generator.ReadRequests(
        url, [f"/orders/{order_id}" for order_id in stored.acknowledged_ids[:5000]]
    )
    product = generator.ReadRequests(url, [f"/products/{name}" for name in generator.SHIPPED_PRODUCTS])
    products = generator.ReadRequests(url, ["/products"])
    of_customer = generator.ReadRequests(url, [f"/orders?customer_id={orders.customer_id}&limit=50"])
    page_of_customer = generator.ReadRequests(url, [f"/orders?customer_id={orders.customer_id}&limit=20"])
    return {
        ORDER: orders,
        GET_ORDER: by_id,
        GET_PRODUCT: product,
        NEWEST: generator.ReadRequests(url, ["/orders?limit=50"]),
        OF_CUSTOMER: of_customer,
        MIXED: MixedRequests([products, product, orders, by_id, page_of_customer], _MIX),
        BATCH: BatchRequests(url),
    }


def _of_one_order(cost: measurement.Cost, orders: int) -> measurement.Cost:
    figures = asdict(cost)
    for name in ("service_us", "postgres_us", "total_us", "generator_us"):
        figures[name] /= orders
    return measurement.Cost(
        **{**figures, "per_second": cost.per_second * orders, "answers": cost.answers * orders}
    )


def summarise(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One row per kind: medians over its rounds, and `ratio` to the same round's order as [least, median, most]."""
    summary = []
    for kind in dict.fromkeys(each.kind for each in rounds):
        its = [each.cost for each in rounds if each.kind == kind]
        row: dict[str, Any] = {"kind": kind}
        for figure in fields(measurement.Cost):
            row[figure.name] = statistics.median(getattr(cost, figure.name) for cost in its)
        orders = [each.cost.total_us for each in rounds if each.kind == ORDER.name]
        if all(orders):
            ratios = [cost.total_us / order for cost, order in zip(its, orders, strict=True)]
            row["ratio"] = [min(ratios), statistics.median(ratios), max(ratios)]
        summary.append(row)
    return summary


def reached(summary: Sequence[dict[str, Any]]) -> list[Goal]:
    """The targets that this run can tell about."""
    ratios = {row["kind"]: row.get("ratio") for row in summary}
    return [
        Goal(f"CPU of {kind.name} over that of an order", ratio, kind.limit, at_least=False)
        for kind in KINDS
        if kind.limit is not None and (ratio := ratios.get(kind.name))
    ]


_TITLE = f"{_CONNECTIONS} connections: CPU-µs per request (medians; ratios to an order of the same round)"
_HEADINGS = ("", "per s", "p50 ms", "p99 ms", "own µs", "Postgres", "both", "over an order")


def _rows(summary: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            row["kind"],
            f"{row['per_second']:,.0f}",
            milliseconds_text(row["p50_ms"]),
            milliseconds_text(row["p99_ms"]),
            f"{row['service_us']:,.0f}",
            f"{row['postgres_us']:,.0f}",
            f"{row['total_us']:,.0f}",
            ratio_text(row.get("ratio")),
        ]
        for row in summary
    ]


if __name__ == "__main__":
    sys.exit(main())
