"""The report's page in a real browser: headless Chromium, driven by chromedriver over WebDriver's own protocol."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.reports.report import write
from loadtests.run_record import Check, RunRecord
from tests.support.run_records import START, outage, record_of, samples, store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("chromedriver"), reason="needs Debian's chromium and chromium-driver"
    ),
]

PHONE, DESKTOP = 375, 1280
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"

# Every curve in the page: whether anything of it is painted, and where.
CURVES = """
return [...document.querySelectorAll('path.curve')].map(path => {
  const box = path.getBoundingClientRect(), frame = path.ownerSVGElement.getBoundingClientRect();
  return {
    chart: path.closest('figure').id, length: path.getTotalLength(), stroke: getComputedStyle(path).stroke,
    inside: box.left >= frame.left - 2 && box.right <= frame.right + 2
      && box.top >= frame.top - 2 && box.bottom <= frame.bottom + 2,
    visible: frame.width > 100 && frame.height > 40, bad: /NaN|Infinity/.test(path.getAttribute('d')),
  };
});
"""
# Text that somebody cannot read: WCAG's contrast of every text against the ground it stands on.
POOR_CONTRAST = """
const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const rgba = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  return canvas.getImageData(0, 0, 1, 1).data; };
const light = color => { const [r, g, b] = [...rgba(color)].map(v => v / 255)
  .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
const ground = node => { for (let n = node; n; n = n.parentElement) {
  const color = getComputedStyle(n).backgroundColor; if (rgba(color)[3] > 250) return color; } return 'white'; };
return [...document.querySelectorAll('body *')]
  .filter(n => [...n.childNodes].some(c => c.nodeType === 3 && c.data.trim()) && n.getClientRects().length)
  .map(n => { const a = light(getComputedStyle(n).color), b = light(ground(n));
    return [n.textContent.slice(0, 40), (Math.max(a, b) + .05) / (Math.min(a, b) + .05)]; })
  .filter(([, contrast]) => contrast < 4.5);
"""


class Browser:
    """One headless Chromium."""

    def __init__(self, driver: httpx.Client) -> None:
        self._driver = driver
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]}
        capabilities = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._path = (
            f"/session/{self._post('/session', capabilities={'alwaysMatch': capabilities})['sessionId']}"
        )

    def _post(self, path: str, **body: Any) -> Any:
        answer = self._driver.post(path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def emulate(self, *, width: int, scheme: str) -> None:
        """Look through a window of that width, with that preference of colours."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self._command("Emulation.setDeviceMetricsOverride", **size)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", features=media)

    def _command(self, name: str, **parameters: Any) -> Any:
        return self._post(f"{self._path}/goog/cdp/execute", cmd=name, params=parameters)

    def open(self, page: Path) -> None:
        """Show a file."""
        self._post(f"{self._path}/url", url=page.as_uri())

    def run(self, script: str) -> Any:
        """What *script* returns."""
        return self._post(f"{self._path}/execute/sync", script=script, args=[])

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call."""
        entries: list[dict[str, Any]] = self._post(f"{self._path}/se/log", type=kind)
        return entries

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self._command("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def move(self, x: float, y: float) -> None:
        """Move the pointer there."""
        steps = [{"type": "pointerMove", "x": int(x), "y": int(y), "duration": 0}]
        actions = [
            {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        ]
        self._post(f"{self._path}/actions", actions=actions)

    def quit(self) -> None:
        """End it."""
        self._driver.delete(self._path)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = next(found[1] for line in process.stdout if (found := re.search(r"on port (\d+)\.", line)))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as driver:
            started = Browser(driver)
            yield started
            started.quit()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with errors of several types, beside a baseline; and with text that would like to be markup."""
    results = tmp_path_factory.mktemp("results")
    before = samples(seed=2, mean_ms=110)
    store(results / "peak-1", record_of(before, started_at=START - 1000))
    made = samples(mean_ms=130, trouble=outage)
    record = record_of(made, cpu_percent=98.0, reasons=(HOSTILE,))
    record = dataclasses.replace(
        record,
        errors={**record.errors, HOSTILE: tuple(1 for _ in record.seconds)},  # the server chooses these names
        checks=(Check("acknowledged_stored", "BREACH", HOSTILE, tuple(f"order-{n}" for n in range(700))),),
    )
    directory = store(results / "peak-2", record)
    write(record, directory)
    return directory / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_page_draws_all_its_marks(
    browser: Browser, failed: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    """Light and dark, on a phone and on a desk: every chart has its curves, in its frame, and all text is readable."""
    browser.emulate(width=width, scheme=scheme)
    browser.open(failed)
    curves = browser.run(CURVES)
    assert {curve["chart"].removeprefix("chart-") for curve in curves} == {
        "percentiles", "latency", "orders", "users", "errors", "cpu", "memory", "pool", "batch", "queue",
        "breaker", "lag",
    }  # fmt: skip
    assert sum(curve["chart"] == "chart-errors" for curve in curves) == 4
    for curve in curves:
        assert curve["length"] > 100, curve
        assert curve["inside"], curve
        assert curve["visible"], curve
        assert not curve["bad"], curve
        assert curve["stroke"] != "none", curve
    assert browser.run(POOR_CONTRAST) == []
    assert browser.run("return document.documentElement.scrollWidth") <= width
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")
    browser.picture(tmp_path / f"{scheme}-{width}.png")


def test_page_is_quiet_and_alone(browser: Browser, failed: Path) -> None:
    """Nothing is logged to the console and nothing is loaded but the file; text from the run stays text."""
    browser.log("browser")
    browser.log("performance")
    browser.emulate(width=DESKTOP, scheme="light")
    browser.open(failed)
    assert browser.run("return document.title").startswith("FAIL: peak load test")
    assert HOSTILE in browser.run("return document.querySelector('#verdict').textContent")
    assert browser.log("browser") == []
    requested = [
        message["params"]["request"]["url"]
        for entry in browser.log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert failed.as_uri() in requested
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []


def test_verdict_comes_first(browser: Browser, failed: Path) -> None:
    """On a phone the verdict and its reason are on the first screen."""
    browser.emulate(width=PHONE, scheme="light")
    browser.open(failed)
    box = browser.run("return document.querySelector('#verdict .lead').getBoundingClientRect().toJSON()")
    assert 0 < box["top"] < 300


def test_hovering_tells_the_figures_of_all_charts(browser: Browser, failed: Path) -> None:
    """A pointer over one chart shows time and figures in every other, those of the record."""
    record = RunRecord.from_json((failed.parent / "report.json").read_bytes())
    browser.emulate(width=DESKTOP, scheme="light")
    browser.open(failed)
    browser.run("document.querySelector('#chart-cpu').scrollIntoView({block: 'center'})")
    box = browser.run("return document.querySelector('#chart-cpu .plot').getBoundingClientRect().toJSON()")
    row = 25
    browser.move(box["left"] + (row + 0.5) / len(record.seconds) * box["width"], box["top"] + 20)
    said = "return document.querySelector('#chart-{} output[data-label=\"{}\"]').textContent"
    assert browser.run("return document.querySelector('#chart-users output.clock').textContent") == "0:15"
    assert browser.run(said.format("breaker", "state")) == "2"
    assert browser.run(said.format("latency", "p95")) == "-"
    assert browser.run(said.format("cpu", "service")) == f"{record.series['cpu_percent'][row]:.4g}"


def test_what_was_not_measured_says_so(browser: Browser, tmp_path: Path) -> None:
    """A run without a single figure of the server shows NOT MEASURED where charts and values would be."""
    record = record_of([], seconds=10)
    client = {name: record.series[name] for name in ("users", "orders_per_second")}
    record = dataclasses.replace(
        record, series=client, server=dataclasses.replace(record.server, source=None, replicas=())
    )
    directory = store(tmp_path / "peak-1", record)
    write(record, directory)
    browser.emulate(width=DESKTOP, scheme="light")
    browser.log("browser")
    browser.open(directory / "report.html")
    missing = browser.run(
        "return [...document.querySelectorAll('.missing-chart')].map(p => p.closest('figure').id)"
    )
    assert {"chart-cpu", "chart-pool", "chart-breaker", "chart-batch", "chart-percentiles"} <= set(missing)
    assert browser.log("browser") == []
