"""The generator: users who order, in Locust, and what it writes down of each order."""
