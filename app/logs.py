"""One event, one line on stdout: JSON, or readable on a terminal; whoever logs never waits for the reader.

A line is made where it is logged, because its values may change later, and appended to a bounded queue. One daemon
thread writes the queue out. A reader that falls behind costs lines, which `log_lines_dropped_total` counts, never a
request. structlog's loggers and those of the standard library share the queue, structlog's processors and the shape:

    {"timestamp": "2026-01-31T12:00:00.123456Z", "level": "info", "event": "request", "logger": "app.access", ...}
"""

import atexit
import contextlib
import logging
import os
import select
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

import orjson
import structlog
from structlog.typing import EventDict, ExcInfo, Processor

from app.metrics import LOG_LINES_DROPPED
from app.timestamp import timestamp

MAX_QUEUED_LINES = 10_000
_LINES_PER_WRITE = 1_000
_WRITE_INTERVAL_SECONDS = 0.05  # the writer takes the GIL from the event loop once per interval, not per line
_FLUSH_TIMEOUT_SECONDS = 1.0
# Started without a stdout, Python has none either, and descriptor 1 is whatever was opened next: a socket, perhaps.
_STDOUT = 1 if sys.__stdout__ is not None else -1


def configure(
    level: str = "info", log_format: Literal["auto", "console", "json"] = "auto", *, shared: bool = False
) -> None:
    """Send what structlog, `logging` and `warnings` report to stdout, from now on and until the process ends.

    Loggers made before pick it up, unless they were used after an earlier call: call it once, at the start.

    Args:
        level: the least level that is reported, in lower case.
        log_format: `auto` is `console` where stdout is a terminal, `json` elsewhere.
        shared: other processes write to the same stdout, so that a pipe must get whole lines.
    """
    on_terminal = os.isatty(_STDOUT)
    processors = JSON_LINE
    if log_format == "console" or (log_format == "auto" and on_terminal):
        processors = console_line(colors=on_terminal and not os.environ.get("NO_COLOR"))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_Output,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_StandardHandler(processors)], level=level.upper(), force=True)
    logging.captureWarnings(True)  # noqa: FBT003 -- the library's signature
    _stdout.start(max_bytes=select.PIPE_BUF if shared else None)


def flush(timeout_seconds: float = _FLUSH_TIMEOUT_SECONDS) -> bool:
    """Wait until every line logged so far is written or dropped; False: it took longer than *timeout_seconds*."""
    return _stdout.flush(timeout_seconds)


class LineWriter:
    """A bounded queue of lines and the thread that writes them to a file descriptor."""

    def __init__(self, fd: int, max_queued_lines: int) -> None:
        self._fd = fd
        self._max_queued_lines = max_queued_lines
        self._lines: deque[bytes] = deque()
        self._flushes: deque[threading.Event] = deque()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._max_bytes: int | None = None

    def start(self, *, max_bytes: int | None = None) -> None:
        """Start writing; the second call does nothing.

        Args:
            max_bytes: of one write, unless a single line is longer: a pipe keeps what is within PIPE_BUF together.
        """
        if self._thread is None:
            self._max_bytes = max_bytes
            self._thread = threading.Thread(target=self._write_forever, name="log-writer", daemon=True)
            self._thread.start()
            atexit.register(self.flush, _FLUSH_TIMEOUT_SECONDS)

    def put(self, line: bytes) -> None:
        """Queue one line, its newline included, or count it as dropped; never blocks."""
        if len(self._lines) >= self._max_queued_lines:
            LOG_LINES_DROPPED.inc()
        else:
            self._lines.append(line)  # wakes nobody: that would cost more than the line

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until every line queued so far is written or dropped; False: *timeout_seconds* passed before."""
        if self._thread is None:
            return not self._lines
        done = threading.Event()
        self._flushes.append(done)
        self._wake.set()
        return done.wait(timeout_seconds)

    def _write_forever(self) -> None:
        while True:
            self._wake.wait(_WRITE_INTERVAL_SECONDS)
            self._wake.clear()
            waiting = [self._flushes.popleft() for _ in range(len(self._flushes))]
            while self._lines:
                self._write(self._next_lines())
            for done in waiting:
                done.set()

    def _next_lines(self) -> list[bytes]:
        """Take the lines of the next write from the queue."""
        if self._max_bytes is None:
            return [self._lines.popleft() for _ in range(min(len(self._lines), _LINES_PER_WRITE))]
        taken = [self._lines.popleft()]
        size = len(taken[0])
        while self._lines and size + len(self._lines[0]) <= self._max_bytes:
            taken.append(self._lines.popleft())
            size += len(taken[-1])
        return taken

    def _write(self, lines: list[bytes]) -> None:
        """Write *lines*, waiting for a slow reader; without a reader, or on a full disk, count them as dropped."""
        rest = memoryview(b"".join(lines))
        size, written = len(rest), 0
        while written < size:
            try:
                written += os.write(self._fd, rest[written:])
            except BlockingIOError:  # whoever gave us the descriptor made it non-blocking
                select.select((), (self._fd,), ())
            except OSError:  # for these lines only: a FIFO may get a reader again, and a disk space
                LOG_LINES_DROPPED.inc(sum(end > written for end in accumulate(map(len, lines))))
                return


def render(processors: Sequence[Processor], logger: str, level: str, line: EventDict) -> bytes:
    """The bytes of one line, as structlog's own loggers make them of their events."""
    rendered: Any = line
    for processor in processors:
        rendered = processor(_Output(logger), level, rendered)
    return bytes(rendered)


def console_line(*, colors: bool) -> Sequence[Processor]:
    """The processors of a line to be read, with an exception's traceback below it."""
    show = structlog.dev.ConsoleRenderer(
        colors=colors, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
    )

    def show_or_dump(logger: Any, level: str, line: EventDict) -> bytes:
        # A failing `repr`, a level without a colour: JSON takes everything. It is asked after the failure was handled,
        # so that `exc_info=True` does not mean the console's.
        with contextlib.suppress(Exception):
            return _encode(f"{show(logger, level, dict(line))}\n")
        return render(JSON_LINE, logger.name, level, line)

    return (_shape, show_or_dump)


class _Output:
    """The end of structlog's chain, for the loggers of one name."""

    def __init__(self, name: str = "root") -> None:
        self.name = name

    def msg(self, line: bytes) -> None:
        _stdout.put(line)

    debug = info = warning = error = critical = msg


class _StandardHandler(logging.Handler):
    """Records of the standard library in the shape of all other lines; what came as `extra` are their fields."""

    _add_extra = structlog.stdlib.ExtraAdder()

    def __init__(self, processors: Sequence[Processor]) -> None:
        super().__init__()
        self._processors = processors

    def emit(self, record: logging.LogRecord) -> None:
        """Queue *record*, also where its arguments do not fit its message."""
        line: EventDict = {"_record": record, "event": "", "exc_info": record.exc_info}
        self._add_extra(logging.root, record.levelname, line)
        del line["_record"]
        line.pop("color_message", None)  # uvicorn's: the message once more
        try:
            line["event"] = record.getMessage().rstrip()
        except Exception:  # noqa: BLE001 -- a `%d` given text: the line still tells
            line.update(event=str(record.msg), args=record.args)
        if record.stack_info:
            line["stack"] = record.stack_info
        _stdout.put(render(self._processors, record.name, record.levelname.lower(), line))


def _shape(logger: Any, level: str, line: EventDict) -> EventDict:
    """The fields that every line has, before its own."""
    event = line.get("event")
    return {"timestamp": timestamp(), "level": level, "event": event, "logger": logger.name, **line}


def _exception(exc_info: ExcInfo) -> dict[str, str]:
    """An exception in the attributes that OpenTelemetry defines."""
    kind, exception, _ = exc_info
    details = traceback.TracebackException.from_exception(exception)
    return {
        "type": f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."),
        "message": str(details),
        "stacktrace": "".join(details.format()),
    }


def _dumps(line: EventDict, default: Callable[[Any], Any]) -> bytes:
    """*line* as JSON and a newline; a value that JSON does not know appears as its `repr`."""
    try:
        return orjson.dumps(line, default, orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # an integer beyond 64 bits, a lone surrogate, a cycle, a key that is not text
        line = {_encodable(key): _encodable(value) for key, value in line.items()}
        return orjson.dumps(line, default, orjson.OPT_APPEND_NEWLINE)


def _repr(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 -- the line is worth more than this value
        text = f"<{type(value).__name__} without a repr>"
    return _encode(text).decode()


def _encodable(value: Any) -> Any:
    """*value* where JSON takes it, else its `repr`."""
    try:
        orjson.dumps(value, default=_repr)
    except TypeError:
        return _repr(value)
    return value


def _encode(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


JSON_LINE: Sequence[Processor] = (
    _shape,
    structlog.processors.ExceptionRenderer(_exception),
    structlog.processors.JSONRenderer(_dumps, default=_repr),
)
_stdout = LineWriter(_STDOUT, MAX_QUEUED_LINES)
