"""The raw samples of a run: what became of every request, as the generator writes it down and others read it.

A line per request, a JSON array of the fields of `Sample` in their order, in `orders-<host>-<pid>.jsonl`; gzip once the
run is over. Other files of lines (`generator-*.jsonl`) are followed in the same way.
"""

import gzip
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import orjson

CUT_OFF = "cut_off"  # the run ended before the answer came: nobody's error
OUT_OF_STOCK, INVALID_STATE = "out_of_stock", "invalid_state"  # refusals of a shop that is right
WRONG_ANSWER = "wrong_answer"  # a success by its status, and not what was asked for

Operation = Literal["create", "cancel", "read"]
Outcome = Literal["acknowledged", "refused", "unknown"]


class Sample(NamedTuple):
    """The outcome of one request."""

    operation: Operation
    route: str  # as in Locust's statistics
    key: str  # the idempotency key of an order; empty for any other request
    order_id: str  # empty where it is not known, or there is none
    status: int  # 0: no answer
    # acknowledged: stored, or read. refused: not executed, and never will be. unknown: it may have been executed.
    outcome: Outcome
    # The service's, `http_502` where it gave none, or one of light_http's; CUT_OFF at the end.
    error_type: str
    started_at: float  # seconds since the epoch; an open model's intended start
    latency_seconds: float  # from the start to the whole answer, or to its loss
    late_seconds: float  # an open model's actual start, after the intended one; in the latency
    replayed: bool  # the answer says that an earlier request had stored it, though the key was new


def to_lines(samples: Iterable[Sample]) -> bytes:
    """The lines of a file of samples."""
    return b"".join(orjson.dumps(tuple(sample)) + b"\n" for sample in samples)


def compress(directory: Path) -> None:
    """Replace the samples in *directory* by their gzip: a line takes a third."""
    for path in directory.glob("*.jsonl"):
        with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb", compresslevel=1) as packed:
            shutil.copyfileobj(plain, packed, 1 << 20)
        path.unlink()


class JsonLines:
    """Follows files that others append whole lines to, also those that appear later."""

    def __init__(self, directory: Path, pattern: str) -> None:
        self._directory = directory
        self._pattern = pattern
        self._files: dict[Path, tuple[BinaryIO, bytes]] = {}

    def new(self) -> Iterator[tuple[str, Any]]:
        """The file name and value of every line that is new since the last call."""
        for path in sorted(self._directory.glob(self._pattern)):
            file, rest = self._files.get(path) or (path.open("rb"), b"")
            *lines, rest = (rest + file.read()).split(b"\n")
            self._files[path] = file, rest
            for line in lines:
                yield path.name, orjson.loads(line)

    def close(self) -> None:
        """Close all files."""
        for file, _ in self._files.values():
            file.close()


@dataclass(frozen=True)
class Window:
    """The measured time, in seconds since the epoch: what *starts* in it counts."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """The length of the window."""
        return self.end - self.start
