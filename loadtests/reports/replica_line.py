"""A replica as the reports' lists show it."""

from loadtests.quantities import mebibytes, quantity
from loadtests.run_record import Replica


def replica_line(replica: Replica) -> str:
    """The figures that criteria are judged by."""
    memory = f"{mebibytes(replica.rss_max_bytes)} of {mebibytes(replica.memory_limit_bytes)}"
    pool = f"{quantity(replica.pool_in_use_max)} of {quantity(replica.pool_max)} connections"
    restarted = ", RESTARTED" if replica.restarted else ""
    return f"CPU {quantity(replica.cpu_percent, '%')}, {memory}, {pool}{restarted}"
