"""The cost of an order, a read, a scrape and a user: measured beside peers, in rounds that take turns.

`make bench`, `bench-growth`, `bench-scrape` and `profile` run `order_cost`, `growth`, `scrape_cost` and `profiler`.
"""
