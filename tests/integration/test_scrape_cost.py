"""`make bench-scrape`: what it reports is what happened."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtests.bench import scrape_cost
from loadtests.bench.scraper import scraping
from tests.support.scripted_server import Peer, ScriptedServer

SLOW_SECONDS = 0.1


def test_orders_are_told_apart_by_the_last_scrape() -> None:
    """Half a second from a scrape on, the half-second after it, and neither before the first or long after the last."""
    answers = [(0.9, 1.0), (1.0, 2.0), (1.4, 3.0), (1.6, 4.0), (2.1, 5.0), (2.7, 6.0), (3.2, 7.0)]
    assert scrape_cost.split(answers, [1.0, 2.0]) == ([2.0, 3.0, 5.0], [4.0, 6.0])


def test_scraper() -> None:
    """It keeps its connection, asks for what Prometheus asks for, and notes how long each page took, and its size."""
    with ScriptedServer(slow_page) as server, scraping(f"{server.url}/metrics", 0.05) as scrapes:
        wait_until(lambda: len(server.requests) >= 4)
    assert server.connections == 1
    assert b"\r\nAccept: application/openmetrics-text" in server.requests[0]
    assert len(scrapes.done) >= 3
    assert {scrape.size_bytes for scrape in scrapes.done} == {5}
    assert all(scrape.seconds >= SLOW_SECONDS for scrape in scrapes.done)


def test_scraper_that_gets_nothing() -> None:
    """A page that cannot be read is no scrape of no time."""
    with (
        ScriptedServer(refuse) as server,
        pytest.raises(RuntimeError, match="could not be scraped"),
        scraping(f"{server.url}/metrics", 0.05),
    ):
        wait_until(lambda: len(server.requests) >= 1)


def slow_page(peer: Peer) -> None:
    while True:
        peer.read()
        time.sleep(SLOW_SECONDS)
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nup 1\n")


def refuse(peer: Peer) -> None:
    peer.read()
    peer.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_benchmark(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both kinds of phase ran, scrapes were timed, and every acknowledged order is in the database."""
    arguments = ["--rounds", "1", "--seconds", "4", "--connections", "4", "--output", str(tmp_path)]
    assert scrape_cost.main(arguments) == 0
    report = json.loads((tmp_path / "scrape.json").read_text())
    assert [phase["scraped"] for phase in report["phases"]] == [False, True]
    assert [phase["missing"] for phase in report["phases"]] == [0, 0]
    alone, scraped = report["phases"]
    assert alone["scrapes_ms"] == []
    assert 1 <= len(scraped["scrapes_ms"]) <= 4
    assert report["page_bytes"] > 5000
    [row] = report["summary"]
    assert 0 < row["scrape_mean_ms"] <= row["scrape_p99_ms"] <= row["scrape_max_ms"]
    said = capfd.readouterr().out
    assert said.count("wanted at most") == len(report["targets"]) == 3
