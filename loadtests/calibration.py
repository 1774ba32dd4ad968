"""One fixed piece of work: how long it takes tells whether the machine changed between two runs."""

import hashlib
import json
import time

_ROUNDS = 5
_DOCUMENT = {
    "customer_id": "c-1",
    "items": [{"product_id": f"SKU-{n:04d}", "quantity": n} for n in range(50)],
}


def calibrate() -> float:
    """Seconds of the fastest of a few rounds of JSON and hashing on one core; a tenth of a second in all."""
    fastest = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        digest = hashlib.sha256()
        for _ in range(150):
            digest.update(json.dumps(json.loads(json.dumps(_DOCUMENT))).encode())
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
