"""Ctrl-C and SIGTERM during a run."""

import contextlib
import signal
from collections.abc import Iterator


class Interruption:
    """Ctrl-C or SIGTERM: the first asks for an end with a report, a second ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def note(self, *_: object) -> None:
        """Handle the signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Note both signals while the block runs."""
        previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
