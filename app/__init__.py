"""The order service: see README.md, and app/service.py for an order's life from top to bottom."""
