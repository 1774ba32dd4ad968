"""The client's exact percentiles beside those of the service's histogram."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from loadtests.quantities import number, quantity
from loadtests.run_record import Latency, QuantileGap, ServiceFigures

_EXPLANATION = (
    "The client measures an order from sending it to its whole answer. The service's histogram begins when the order's "
    "head is read, knows a time only to its bucket, and also holds refused orders. Within neighbouring buckets the two "
    "agree; further apart, the difference is time before the order was read: it waited in the socket of a service that "
    "was busy with the orders before it."
)


def gaps(client: Latency, service: ServiceFigures) -> tuple[QuantileGap, ...]:
    """The 95th and the 99th percentile of both, as far as they are known."""
    return tuple(_gaps(client, service))


def _gaps(client: Latency, service: ServiceFigures) -> Iterator[QuantileGap]:
    edges = service.processing_edges_ms
    for percentile, exact, estimate in (
        (95, client.p95_ms, service.processing_p95_ms),
        (99, client.p99_ms, service.processing_p99_ms),
    ):
        if edges and exact is not None and estimate is not None:
            ours, theirs = bisect_left(edges, exact), bisect_left(edges, estimate)
            yield QuantileGap(
                percentile, exact, estimate, _bucket(edges, ours), _bucket(edges, theirs), abs(ours - theirs)
            )


def _bucket(edges: Sequence[float], place: int) -> tuple[float, float | None]:
    return (edges[place - 1] if place else 0.0, edges[place] if place < len(edges) else None)


def conclusion(gap: QuantileGap) -> str:
    """The distance of the two, in a sentence."""
    if gap.buckets_apart == 0:
        return f"the same bucket, {_edges(gap.client_bucket_ms)}"
    service, client = _edges(gap.service_bucket_ms), _edges(gap.client_bucket_ms)
    if gap.buckets_apart == 1:
        return f"neighbouring buckets, {service} and {client}"
    apart = f"{gap.buckets_apart} buckets apart, {service} and {client}"
    if gap.gap_ms < 0:
        return f"{apart}: refused orders took longer than acknowledged ones"
    return f"{apart}: {number(gap.gap_ms)} ms before the order was read"


def explanation(client: Latency, service: ServiceFigures) -> str:
    """The meaning of the two, the distance of their means, and where the service's figures come from."""
    parts = [_EXPLANATION]
    if client.mean_ms is not None and service.processing_mean_ms is not None:
        apart = quantity(client.mean_ms - service.processing_mean_ms, "ms")
        parts.append(f"The means, which are exact on both sides, are {apart} apart.")
    if service.processing_source:
        parts.append(f"Prometheus, at the end of the measured time: {service.processing_source}.")
    else:
        parts.append(
            "The service's: the rise of its buckets on /metrics, as histogram_quantile interpolates."
        )
    return " ".join(parts)


def _edges(bucket: tuple[float, float | None]) -> str:
    lower, upper = bucket
    return f"{number(lower)} to {number(upper)} ms" if upper is not None else f"above {number(lower)} ms"
