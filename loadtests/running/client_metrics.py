"""The client's own figures of a run under way, for a Prometheus to scrape beside the service's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from loadtests.samples import Sample

# Those of the service's order_processing_seconds, so that the two can be set side by side.
_EDGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0)


class ClientMetrics:
    """Requests by what became of them, their latencies, and the users that run."""

    def __init__(self, profile: str, run_id: str) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "loadtest_requests_total",
            "Requests whose outcome is known.",
            ("route", "outcome", "error_type"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "loadtest_request_seconds",
            "From the (intended) start of an acknowledged request to its whole answer.",
            ("route",),
            buckets=_EDGES,
            registry=self._registry,
        )
        self._users = Gauge("loadtest_users", "Simulated users running.", registry=self._registry)
        info = Gauge("loadtest_info", "The run.", ("profile", "run_id"), registry=self._registry)
        info.labels(profile, run_id).set(1)

    def add(self, sample: Sample) -> None:
        """Count one."""
        self._requests.labels(sample.route, sample.outcome, sample.error_type).inc()
        if sample.outcome == "acknowledged":
            self._seconds.labels(sample.route).observe(sample.latency_seconds)

    def page(self, users: int) -> bytes:
        """The page in the text format."""
        self._users.set(users)
        return generate_latest(self._registry)
