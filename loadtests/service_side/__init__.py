"""The run as the service tells it: its metrics pages, or a Prometheus that reads them."""
