"""Peers of the service: the ways an order API is usually written, and the floor below them all.

Each starts as `python -m loadtests.bench.peers.NAME --port PORT [--dsn DSN]`, makes its own tables, and takes the
same `POST /orders` as the service.
"""
