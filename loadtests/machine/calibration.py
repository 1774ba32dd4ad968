"""Changes of the machine during a run: of one fixed piece of work, and of what its host gave to others."""

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

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


class CpuTimes(NamedTuple):
    """Clock ticks of all cores since the machine started."""

    stolen: int  # a virtual machine was ready to run, and its host ran another one
    total: int

    def stolen_percent_since(self, before: "CpuTimes") -> float | None:
        """The share that was stolen; None where no tick has passed."""
        total = self.total - before.total
        return 100 * (self.stolen - before.stolen) / total if total else None


def cpu_times() -> CpuTimes | None:
    """The ticks so far, from the first line of /proc/stat (proc_stat(5)); None where there is none."""
    try:
        first, _, _ = Path("/proc/stat").read_text().partition("\n")
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are in user already
    ticks = [int(field) for field in first.split()[1:9]]
    return CpuTimes(ticks[7], sum(ticks))
