"""One event, one line on stdout: JSON, or readable on a terminal; whoever logs never waits for the reader.

A line is made where it is logged, because its values may change later, and appended to a bounded queue. One daemon
thread writes the queue out. A reader that falls behind costs lines, which `log_lines_dropped_total` counts, never a
request. structlog's loggers and those of the standard library share the queue and the shape:

    {"timestamp": "2026-01-31T12:00:00.123456Z", "level": "info", "event": "request", "logger": "app.access", ...}
"""

import atexit
import logging
import os
import select
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import orjson
import structlog

from app.metrics import LOG_LINES_DROPPED
from app.timestamp import timestamp

MAX_QUEUED_LINES = 10_000
_LINES_PER_WRITE = 1_000
_WRITE_INTERVAL_SECONDS = 0.05  # the writer takes the GIL from the event loop once per interval, not per line
_FLUSH_TIMEOUT_SECONDS = 1.0
# Started without a stdout, Python has none either, and descriptor 1 is whatever was opened next: a socket, perhaps.
_STDOUT = 1 if sys.__stdout__ is not None else -1
Renderer = Callable[[str, str, object, dict[str, Any]], bytes]
"""Level, name of the logger, event and fields of a line to the bytes of the line."""


def configure(level: str = "info", log_format: Literal["auto", "console", "json"] = "auto") -> None:
    """Send what structlog, `logging` and `warnings` report to stdout, from now on and until the process ends.

    Loggers made before pick it up, unless they were used after an earlier call: call it once, at the start.

    Args:
        level: the least level that is reported, in lower case.
        log_format: `auto` is `console` where stdout is a terminal, `json` elsewhere.
    """
    on_terminal = os.isatty(_STDOUT)
    render: Renderer = render_json
    if log_format == "console" or (log_format == "auto" and on_terminal):
        render = console_renderer(colors=on_terminal and not os.environ.get("NO_COLOR"))
    filtering: Any = structlog.make_filtering_bound_logger(level)
    structlog.configure(
        wrapper_class=type("BoundLogger", (filtering,), {"_proxy_to_logger": _write}),
        logger_factory=partial(_Output, render),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_StandardHandler(render)], level=level.upper(), force=True)
    logging.captureWarnings(True)  # noqa: FBT003 -- the library's signature
    _stdout.start()


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

    def start(self) -> None:
        """Start writing; the second call does nothing."""
        if self._thread is None:
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
                count = min(len(self._lines), _LINES_PER_WRITE)
                self._write([self._lines.popleft() for _ in range(count)])
            for done in waiting:
                done.set()

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


def render_json(level: str, logger: str, event: object, fields: dict[str, Any]) -> bytes:
    """An event as one line of JSON.

    A value that JSON does not know appears as its `repr`. `exc_info` becomes `exception`, an object with the
    attributes OpenTelemetry defines: `type`, `message` and `stacktrace`.
    """
    line = {"timestamp": timestamp(), "level": level, "event": event, "logger": logger, **fields}
    if "exc_info" in fields and (exception := _exception(line.pop("exc_info"))):
        details = traceback.TracebackException.from_exception(exception)
        kind = type(exception)
        line["exception"] = {
            "type": f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."),
            "message": str(details),
            "stacktrace": "".join(details.format()),
        }
    try:
        return orjson.dumps(line, default=_repr, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # an integer beyond 64 bits, a lone surrogate, a cycle, a key that is not text
        line = {_encodable(key): _encodable(value) for key, value in line.items()}
        return orjson.dumps(line, default=_repr, option=orjson.OPT_APPEND_NEWLINE)


def console_renderer(*, colors: bool) -> Renderer:
    """Renders an event as a line to be read, with an exception's traceback below it."""
    render_text = structlog.dev.ConsoleRenderer(colors=colors, sort_keys=False)

    def render(level: str, logger: str, event: object, fields: dict[str, Any]) -> bytes:
        line = {"timestamp": timestamp(), "level": level, "event": event, "logger": logger, **fields}
        if exception := _exception(line.pop("exc_info", None)):
            line["exception"] = "".join(traceback.format_exception(exception)).rstrip()
        try:
            return f"{render_text(None, level, line)}\n".encode(errors="backslashreplace")
        except Exception:  # noqa: BLE001 -- a failing `repr`, a level without a colour: JSON takes everything
            return render_json(level, logger, event, {**fields, "exc_info": exception})

    return render


class _Output:
    """What the loggers of one name write to."""

    def __init__(self, render: Renderer, name: str = "root") -> None:
        self._render = render
        self._name = name

    def write(self, level: str, event: object, fields: dict[str, Any]) -> None:
        _stdout.put(self._render(level, self._name, event, fields))


def _write(bound_logger: Any, level: str, event: object = None, /, **fields: Any) -> None:
    """Stands in for structlog's chain of processors, which would add a third to the cost of a line."""
    if context := bound_logger._context:  # noqa: SLF001 -- this is a method of the class
        fields = {**context, **fields}
    bound_logger._logger.write(level, event, fields)  # noqa: SLF001


class _StandardHandler(logging.Handler):
    """Gives a record of the standard library the shape of all other lines; what came as `extra` are its fields."""

    _own_attributes = frozenset(
        {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName", "color_message"}
    )

    def __init__(self, render: Renderer) -> None:
        super().__init__()
        self._render = render

    def emit(self, record: logging.LogRecord) -> None:
        """Queue *record*, also where its arguments do not fit its message."""
        fields = {str(key): value for key, value in vars(record).items() if key not in self._own_attributes}
        try:
            event = record.getMessage().rstrip()
        except Exception:  # noqa: BLE001 -- a `%d` given text: the line still tells
            event = str(record.msg)
            fields["args"] = record.args
        if record.stack_info:
            fields["stack"] = record.stack_info
        fields["exc_info"] = record.exc_info
        _Output(self._render, record.name).write(record.levelname.lower(), event, fields)


def _exception(exc_info: object) -> BaseException | None:
    """What *exc_info* stands for: an exception, the one in its triple, or, where it is true, the current one."""
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1]
    if isinstance(exc_info, BaseException):
        return exc_info
    return sys.exception() if exc_info else None


def _repr(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 -- the line is worth more than this value
        text = f"<{type(value).__name__} without a repr>"
    return text.encode(errors="backslashreplace").decode()


def _encodable(value: Any) -> Any:
    """*value* where JSON takes it, else its `repr`."""
    try:
        orjson.dumps(value, default=_repr)
    except TypeError:
        return _repr(value)
    return value


_stdout = LineWriter(_STDOUT, MAX_QUEUED_LINES)
