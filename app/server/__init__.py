"""HTTP/1.1 for the application: skip it unless HTTP is your subject.

`serve.py` opens the port, serves, and ends without losing a request; `protocol.py` reads one connection within
its limits; `exchange.py` is one request and its answer.
"""
