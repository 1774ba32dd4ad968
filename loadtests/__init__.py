"""Load tests and benchmarks for any deployment of the order service that keeps its contract."""
