"""Ctrl-C, SIGTERM and SIGHUP during a run."""

import contextlib
import signal
from collections.abc import Iterator

from loadtests.machine import processes


class Interruption:
    """Ctrl-C, SIGTERM or SIGHUP: the first asks for an end with a report, a second ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def note(self, *_: object) -> None:
        """Handle the signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Note these signals while the block runs."""
        previous = {number: signal.signal(number, self.note) for number in processes.ENDING_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
