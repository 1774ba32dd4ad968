"""`make monitor`: Prometheus and Alertmanager on this machine, without containers, until Ctrl-C.

It needs their binaries (Debian: `apt install prometheus prometheus-alertmanager`) and runs the same configuration,
rules and routes as compose.yaml does. Data and logs stay in .data/monitor.

    TARGETS            the replicas to scrape, host:port,...                     localhost:8000
    REPLICAS           of `make run REPLICAS=3`, where TARGETS names none        1
    POSTGRES_EXPORTER  a prometheus-postgres-exporter to scrape, host:port       none
    NODE_EXPORTER      a prometheus-node-exporter to scrape, host:port           none
    PROMETHEUS_PORT    where Prometheus listens, on loopback                     9090
    ALERTMANAGER_PORT  where Alertmanager listens, on loopback                   9093
    ALERT_WEBHOOK      a URL that is told of every alert that fires or resolves  none
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml  # type: ignore[import-untyped]  # it has no annotations of its own

from monitoring.rules import expect_replicas

CONFIGURATION = Path(__file__).parent
_SERVICE_PORT = 8000
LOAD_TEST = "127.0.0.1:9646"  # where a load test tells that it runs; silent when none does
_READY_SECONDS = 30
_END_SECONDS = 10
_LOG_LINES = 5


class MonitorError(Exception):
    """It cannot run; the message is one line that says why, and what to do."""


class Monitor:
    """A Prometheus and an Alertmanager of our own: started by `with`, ended, by their process ids, on leaving it.

    Their configuration stands in *directory* before they start, as a copy of this folder's, and may be changed there.
    """

    def __init__(
        self,
        directory: Path,
        targets: Sequence[str],
        *,
        prometheus_port: int = 9090,
        alertmanager_port: int = 9093,
        webhook: str | None = None,
    ) -> None:
        """Write the configuration.

        Args:
            directory: for configuration, data and logs; kept.
            targets: host:port of each replica.
            webhook: a URL for every receiver.

        Raises:
            MonitorError: a program is missing.
        """
        self.directory = directory
        self.url = f"http://127.0.0.1:{prometheus_port}"
        self.alertmanager_url = f"http://127.0.0.1:{alertmanager_port}"
        self._ports = {"PROMETHEUS_PORT": prometheus_port, "ALERTMANAGER_PORT": alertmanager_port}
        self._programs = {
            "prometheus": _program("prometheus"),
            "alertmanager": _program("prometheus-alertmanager", "alertmanager"),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

        shutil.copytree(
            CONFIGURATION / "prometheus",
            directory,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("targets"),
        )
        (directory / "targets").mkdir(exist_ok=True)
        path = directory / "prometheus.yml"
        configuration = yaml.safe_load(path.read_text())
        for job in configuration["scrape_configs"]:
            job.pop("dns_sd_configs", None)
        path.write_text(yaml.safe_dump(configuration, sort_keys=False))
        expect_replicas(directory / "rules", len(targets))
        self.scrape("order-service", targets)
        self.scrape("prometheus", [f"127.0.0.1:{prometheus_port}"])
        self.scrape("alertmanager", [f"127.0.0.1:{alertmanager_port}"])
        self.scrape("loadtest", [LOAD_TEST])
        for exporter in ("postgres", "node"):
            self.scrape(exporter, [])
        routes = yaml.safe_load((CONFIGURATION / "alertmanager" / "alertmanager.yml").read_text())
        if webhook:
            for receiver in routes["receivers"]:
                receiver["webhook_configs"] = [{"url": webhook}]
        (directory / "alertmanager.yml").write_text(yaml.safe_dump(routes, sort_keys=False))

    def scrape(self, file: str, targets: Sequence[str], **labels: str) -> None:
        """Scrape *targets* in place of those in targets/*file*.yml; Prometheus sees the change by itself."""
        path = self.directory / "targets" / f"{file}.yml"
        new = path.with_suffix(".new")
        new.write_text(yaml.safe_dump([{"targets": list(targets), "labels": labels}]))
        new.rename(path)

    def __enter__(self) -> Self:
        for setting, port in self._ports.items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as exc:
                    raise MonitorError(f"port {port} is in use; {setting}=... chooses another") from exc
        prometheus, alertmanager = self._ports.values()
        try:
            self._start(
                "alertmanager",
                f"--config.file={self.directory / 'alertmanager.yml'}",
                f"--storage.path={self.directory / 'alertmanager'}",
                f"--web.listen-address=127.0.0.1:{alertmanager}",
                "--cluster.listen-address=",
            )
            self._start(
                "prometheus",
                f"--config.file={self.directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={self.directory / 'tsdb'}",
                "--storage.tsdb.retention.time=15d",
                f"--web.listen-address=127.0.0.1:{prometheus}",
                "--web.enable-lifecycle",  # POST /-/reload, the plan's first step before a test
            )
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def wait(self) -> None:
        """Return never, unless one of the two ends: then raise MonitorError."""
        while True:
            self._require_alive()
            time.sleep(0.5)

    def _start(self, name: str, *arguments: str) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603 - the installed program, our own arguments
                [self._programs[name], *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; they are ended one by one
            )

    def _wait_until_ready(self) -> None:
        give_up_at = time.monotonic() + _READY_SECONDS
        for url in (self.alertmanager_url, self.url):
            while not _is_ready(url):
                self._require_alive()
                if time.monotonic() > give_up_at:
                    raise MonitorError(
                        f"{url} is not ready after {_READY_SECONDS} s; logs in {self.directory}"
                    )
                time.sleep(0.05)

    def _require_alive(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                log = self.directory / f"{name}.log"
                last = " / ".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
                raise MonitorError(f"{name} has ended (status {process.returncode}); {log}: {last}")

    def _end(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


def _program(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    raise MonitorError(
        f"{names[0]} is not installed (Debian: apt install prometheus prometheus-alertmanager); "
        "where there is a container engine, `make stack` needs none of it"
    )


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2):  # noqa: S310 - our own
            return True
    except (urllib.error.URLError, OSError):
        return False


def _port(environment: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(environment.get(name) or default)
    except ValueError as exc:
        raise MonitorError(f"{name}: {environment[name]!r} is not a port") from exc


def targets_of(environment: Mapping[str, str]) -> Sequence[str]:
    """The replicas to scrape: those that are named, or the ports that `make run` gives to so many."""
    if named := environment.get("TARGETS"):
        return [target.strip() for target in named.split(",")]
    count = environment.get("REPLICAS") or "1"
    if not count.isdecimal() or int(count) < 1:
        raise MonitorError(f"REPLICAS: {count!r} is not a number of at least 1")
    first = _SERVICE_PORT + 1  # of the operations ports
    return (
        [f"localhost:{first + n}" for n in range(int(count))]
        if int(count) > 1
        else [f"localhost:{_SERVICE_PORT}"]
    )


def main(environment: Mapping[str, str]) -> int:
    """Run both until SIGINT, SIGTERM or SIGHUP; 0, or 1 after one line that says what was wrong."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        targets = targets_of(environment)
        with Monitor(
            Path(".data/monitor").resolve(),
            targets,
            prometheus_port=_port(environment, "PROMETHEUS_PORT", 9090),
            alertmanager_port=_port(environment, "ALERTMANAGER_PORT", 9093),
            webhook=environment.get("ALERT_WEBHOOK") or None,
        ) as monitor:
            for exporter in ("postgres", "node"):
                if target := environment.get(f"{exporter.upper()}_EXPORTER"):
                    monitor.scrape(exporter, [target])
            sys.stderr.write(
                f"Prometheus on {monitor.url}   Alertmanager on {monitor.alertmanager_url}   "
                f"scraping {', '.join(targets)}   data in {monitor.directory}   Ctrl-C ends both\n"
            )
            monitor.wait()
    except MonitorError as exc:
        sys.stderr.write(f"monitor: {exc}\n")
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
