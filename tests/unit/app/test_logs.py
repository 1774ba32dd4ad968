"""The log's sink and its shapes; what happens to stdout is shown on processes of their own."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.logs import JSON_LINE, LineWriter, console_line, render
from app.metrics import LOG_LINES_DROPPED

ROOT = Path(__file__).parents[3]
PRELUDE = """
import asyncio, json, logging, os, sys, warnings
import structlog
from app import logs
from app.metrics import LOG_LINES_DROPPED

log = structlog.get_logger("app.test")

def report(**values):
    dropped = int(LOG_LINES_DROPPED._value.get())
    print(json.dumps({"dropped": dropped, **values}), file=sys.stderr, flush=True)
"""
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def start(script: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PRELUDE + script], cwd=ROOT, **options)


def run(script: str) -> str:
    """The stdout, a pipe, of *script*; it must succeed and say nothing on stderr."""
    with start(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, b"")
    return stdout.decode()


def run_for_lines(script: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(script).splitlines()]


def run_on_terminal(script: str, **environment: str) -> str:
    """The text that *script* shows on its stdout, a terminal."""
    master, slave = pty.openpty()
    with start(script, stdout=slave, env={**os.environ, **environment}) as process:
        os.close(slave)
        shown = bytearray()
        with contextlib.suppress(OSError):  # Linux reports the end of a terminal as EIO
            while chunk := os.read(master, 65536):
                shown += chunk
    os.close(master)
    assert process.returncode == 0
    return shown.decode()


def dropped_lines() -> float:
    return float(LOG_LINES_DROPPED._value.get())


def test_nothing_is_lost_or_reordered() -> None:
    """A process that ends normally leaves every line, in order, the last ones without a flush of its own."""
    lines = run_for_lines("""
logs.configure()
for number in range(30_000):
    log.info("counted", number=number)
    if number % 9_000 == 0:
        assert logs.flush(30)
""")
    assert [line["number"] for line in lines] == list(range(30_000))


def test_line() -> None:
    """A line begins with the time in UTC to the microsecond, the level and the event; its fields follow in order."""
    before = datetime.now(UTC)
    (line,) = run_for_lines("""
logs.configure()
log.info("request", route="/orders", status=201)
""")
    assert list(line) == ["timestamp", "level", "event", "logger", "route", "status"]
    assert list(line.values())[1:] == ["info", "request", "app.test", "/orders", 201]
    assert TIMESTAMP.fullmatch(line["timestamp"])
    logged_at = datetime.fromisoformat(line["timestamp"])
    assert before - timedelta(milliseconds=1) <= logged_at <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("level", "reported"),
    [
        ("debug", ["debug", "info", "warning", "error", "critical"]),
        ("info", ["info", "warning", "error", "critical"]),
        ("critical", ["critical"]),
    ],
)
def test_level(level: str, reported: list[str]) -> None:
    """Lines below the level are not reported, whichever library they come through."""
    lines = run_for_lines(f"""
logs.configure({level!r})
for logger in (log, logging.getLogger("a.library")):
    for method in ("debug", "info", "warning", "error", "critical"):
        getattr(logger, method)("said")
""")
    assert [(line["logger"], line["level"]) for line in lines] == [
        (logger, each) for logger in ("app.test", "a.library") for each in reported
    ]


def test_loggers_are_lazy() -> None:
    """A logger made and used before `configure` follows it afterwards."""
    lines = run("""
log.info("early")
sys.stdout.flush()
logs.configure("warning")
log.info("quiet")
log.warning("late", number=1)
""").splitlines()
    assert len(lines) == 2
    assert "early" in lines[0]
    assert json.loads(lines[1])["event"] == "late"


def test_bound_fields() -> None:
    """Fields that were bound to a logger stand before those of the call."""
    (line,) = run_for_lines("""
logs.configure()
log.bind(batch=7).info("stored %d", 3, orders=3)
""")
    assert list(line)[4:] == ["batch", "orders"]
    assert line["event"] == "stored 3"


def test_standard_library() -> None:
    """Records of `logging` and warnings have the shape of all other lines, with `extra` as fields."""
    info, broken, warning = run_for_lines("""
logs.configure()
library = logging.getLogger("a.library")
library.info("started process [%d]", 42, extra={"port": 8000, "color_message": "x"})
library.error("%d", "not a number")
warnings.warn("old name", DeprecationWarning, stacklevel=1)
""")
    for line in (info, broken, warning):
        assert list(line)[:4] == ["timestamp", "level", "event", "logger"]
        assert TIMESTAMP.fullmatch(line["timestamp"])
    assert list(info.values())[1:] == ["info", "started process [42]", "a.library", 8000]
    assert (broken["level"], broken["event"], broken["args"]) == ("error", "%d", ["not a number"])
    assert (warning["level"], warning["logger"]) == ("warning", "py.warnings")
    assert "DeprecationWarning: old name" in warning["event"]


@pytest.mark.parametrize(
    "call",
    [
        'log.exception("failed")',
        'log.error("failed", exc_info=failure)',
        'log.error("failed", exc_info=sys.exc_info())',
        'logging.getLogger("app.test").exception("failed")',
    ],
)
def test_exception(call: str) -> None:
    """An exception is one field with its type, its message and its stack, causes included."""
    (line,) = run_for_lines(f"""
logs.configure()
try:
    try:
        1 / 0
    except ZeroDivisionError as cause:
        raise json.JSONDecodeError("no\\nJSON", "", 0) from cause
except json.JSONDecodeError as failure:
    {call}
""")
    assert list(line) == ["timestamp", "level", "event", "logger", "exception"]
    assert (line["level"], line["event"]) == ("error", "failed")
    assert line["exception"]["type"] == "json.decoder.JSONDecodeError"
    assert line["exception"]["message"] == "no\nJSON: line 1 column 1 (char 0)"
    assert "ZeroDivisionError: division by zero" in line["exception"]["stacktrace"]
    assert line["exception"]["stacktrace"].count("in <module>") == 2


def test_no_exception() -> None:
    """A line without an exception has no such field, whatever the call says."""
    (line,) = run_for_lines("""
logs.configure()
log.exception("failed")
""")
    assert list(line) == ["timestamp", "level", "event", "logger"]


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError


def _cycle() -> list[object]:
    cycle: list[object] = []
    cycle.append(cycle)
    return cycle


def _nested(depth: int) -> list[object]:
    nested: list[object] = []
    for _ in range(depth):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param({1}, "{1}", id="set"),
        pytest.param(b"\xff", r"b'\xff'", id="bytes"),
        pytest.param(2**70, str(2**70), id="big integer"),
        pytest.param(10**5000, "<int without a repr>", id="integer too long for a repr"),
        pytest.param("\ud800", r"'\ud800'", id="lone surrogate"),
        pytest.param({(1, 2): 3}, "{(1, 2): 3}", id="key that is no text"),
        pytest.param(_cycle(), "[[...]]", id="cycle"),
        pytest.param(_nested(100_000), "<list without a repr>", id="too deep"),
        pytest.param(Unprintable(), "<Unprintable without a repr>", id="failing repr"),
        pytest.param(float("nan"), None, id="not a number"),
        pytest.param(ValueError("no"), "ValueError('no')", id="exception"),
    ],
)
def test_value_beyond_json(value: object, shown: object) -> None:
    """A value that JSON does not know appears as text, and costs no other field its own form."""
    line = render(JSON_LINE, "app", "info", {"event": "said", "value": value, "neighbour": [1, "a"]})
    assert line.endswith(b"}\n")
    assert json.loads(line) | {"timestamp": ""} == {
        "timestamp": "",
        "level": "info",
        "event": "said",
        "logger": "app",
        "value": shown,
        "neighbour": [1, "a"],
    }


def test_names_beyond_json() -> None:
    """Neither an event nor a name that no encoding knows loses the line."""
    line = json.loads(render(JSON_LINE, "\ud800", "info", {"event": "\udfff", "\udc00": 1}))
    assert list(line.items())[2:] == [("event", r"'\udfff'"), ("logger", r"'\ud800'"), (r"'\udc00'", 1)]


def test_console_is_readable() -> None:
    """On a terminal a line reads in words and colours, and a traceback stands below its line."""
    script = """
logs.configure()
log.info("started", port=8000)
logging.getLogger("a.library").warning("slow")
try:
    secret = "local variable"
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""
    assert "\x1b[" in run_on_terminal(script, NO_COLOR="")
    started, slow, failed, *stack = run_on_terminal(script, NO_COLOR="1").splitlines()
    assert re.fullmatch(rf"{TIMESTAMP.pattern} \[info +\] started +\[app\.test\] port=8000", started)
    assert re.fullmatch(rf"{TIMESTAMP.pattern} \[warning +\] slow +\[a\.library\]", slow)
    assert re.fullmatch(rf"{TIMESTAMP.pattern} \[error +\] failed +\[app\.test\]", failed)
    assert stack[0] == "Traceback (most recent call last):"
    assert stack[-1] == "ZeroDivisionError: division by zero"
    assert "local variable" not in "".join(stack)


def test_format_can_be_chosen() -> None:
    """The format that was asked for is used, wherever stdout leads."""
    line = json.loads(run_on_terminal('logs.configure(log_format="json"); log.info("said")'))
    assert line["event"] == "said"
    text = run('logs.configure(log_format="console"); log.info("said")')
    assert re.fullmatch(rf"{TIMESTAMP.pattern} \[info +\] said +\[app\.test\]\n", text)


def test_console_takes_everything() -> None:
    """A line that the console cannot show appears as JSON, its own exception included, not the console's."""
    console = console_line(colors=False)
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        line = json.loads(
            render(console, "app", "info", {"event": "said", "value": Unprintable(), "exc_info": True})
        )
    assert line["value"] == "<Unprintable without a repr>"
    assert line["exception"]["message"] == "division by zero"


def test_blocked_reader() -> None:
    """The event loop goes on while nobody reads stdout, what does not fit is counted, and the process ends."""
    script = """
async def main():
    for number in range(30_000):
        log.info("counted", number=number)
        if number % 100 == 0:
            await asyncio.sleep(0)

logs.configure()
asyncio.run(main())
report(flushed=logs.flush(0.1))
"""
    with start(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        stderr = process.stderr.read()
        assert process.wait() == 0
        *lines, _torn = process.stdout.read().split(b"\n")
    report = json.loads(stderr)
    numbers = [json.loads(line)["number"] for line in lines]
    assert numbers == list(range(len(numbers)))
    assert report["flushed"] is False
    # All but the queue, one write under way, and what the pipe holds.
    assert 30_000 - 10_000 - 1_000 - len(numbers) <= report["dropped"] <= 30_000 - 10_000


def test_reader_that_went_away() -> None:
    """A stdout whose reader has gone costs the lines, counted, and nothing else."""
    reader, writer = os.pipe()
    os.close(reader)
    script = """
logs.configure()
for number in range(100):
    log.info("counted", number=number)
report(flushed=logs.flush())
log.info("last words")
"""
    with start(script, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        _, stderr = process.communicate()
    assert process.returncode == 0
    assert json.loads(stderr) == {"dropped": 100, "flushed": True}


def test_no_stdout_at_all(tmp_path: Path) -> None:
    """Started without a stdout, the service writes no log into the file that took its descriptor."""
    script = f"""
somebody_elses = os.open({str(tmp_path / "file")!r}, os.O_CREAT | os.O_WRONLY)
logs.configure()
log.info("lost")
report(flushed=logs.flush(), descriptor=somebody_elses)
"""
    command = [sys.executable, "-c", PRELUDE + script]
    shell = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *command]
    with subprocess.Popen(shell, cwd=ROOT, stderr=subprocess.PIPE) as process:
        _, stderr = process.communicate()
    assert process.returncode == 0
    assert json.loads(stderr) == {"dropped": 1, "flushed": True, "descriptor": 1}
    assert (tmp_path / "file").read_bytes() == b""


def test_non_blocking_stdout() -> None:
    """A stdout that somebody made non-blocking loses no line either."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    script = """
logs.configure()
for number in range(9_000):
    log.info("counted", number=number)
report(flushed=logs.flush(0))
logs.flush(60)
"""
    with start(script, stdout=writer, stderr=subprocess.PIPE) as process, os.fdopen(reader, "rb") as stdout:
        os.close(writer)
        assert process.stderr is not None
        report = json.loads(process.stderr.readline())
        lines = stdout.read().splitlines()
    assert report == {"dropped": 0, "flushed": False}
    assert [json.loads(line)["number"] for line in lines] == list(range(9_000))


def test_reader_that_comes_back() -> None:
    """Lines are dropped while there is no reader, not after there is one again."""
    reader, writer = os.pipe()
    lines = LineWriter(writer, max_queued_lines=10)
    lines.start()
    os.close(reader)
    before = dropped_lines()
    lines.put(b"lost\n")
    assert lines.flush(60)
    assert dropped_lines() - before == 1

    reader, new_writer = os.pipe()
    os.dup2(new_writer, writer)
    lines.put(b"kept\n")
    assert lines.flush(60)
    assert os.read(reader, 100) == b"kept\n"
    for fd in (reader, writer, new_writer):
        os.close(fd)


def test_full_queue() -> None:
    """A full queue drops the newest line and counts it."""
    lines = LineWriter(-1, max_queued_lines=2)
    before = dropped_lines()
    for number in range(5):
        lines.put(b"%d\n" % number)
    assert dropped_lines() - before == 3
    assert not lines.flush(0)


def test_processes_that_share_a_pipe() -> None:
    """A line of one is never torn by a line of another, however many each writes at once."""
    script = """
logs.configure("info", "json", shared=True)
for number in range(2000):
    log.info("a_line", number=number, text="x" * (number % 300))
logs.flush(60)
"""
    reader, writer = os.pipe()
    writing = [start(script, stdout=writer) for _ in range(3)]
    os.close(writer)
    with os.fdopen(reader, "rb") as read:
        lines = [json.loads(line) for line in read]
    assert [process.wait(60) for process in writing] == [0, 0, 0]
    assert Counter(line["number"] for line in lines) == dict.fromkeys(range(2000), 3)
