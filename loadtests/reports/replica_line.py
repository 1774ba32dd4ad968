"""A replica as the reports' lists show it."""

from loadtests.quantities import mebibytes, number, quantity
from loadtests.run_record import Replica


def replica_line(replica: Replica) -> str:
    """The figures that criteria are judged by."""
    cpu = f"CPU {quantity(replica.cpu_percent, '%')}"
    if replica.cpu_limit_cores < 1:
        cpu += f" of a core, of which it may have {number(replica.cpu_limit_cores)}"
    throttled = f", throttled for {replica.throttled_seconds:.1f} s" if replica.throttled_seconds else ""
    memory = f"{mebibytes(replica.rss_max_bytes)} of {mebibytes(replica.memory_limit_bytes)}"
    pool = f"{quantity(replica.pool_in_use_max)} of {quantity(replica.pool_max)} connections"
    waits = f", {number(replica.pool_waits)} waited for" if replica.pool_waits else ""
    lost = (", RESTARTED" if replica.restarted else "") + (", GONE" if replica.gone else "")
    return f"{cpu}{throttled}, {memory}, {pool}{waits}{lost}"
