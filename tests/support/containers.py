"""Images built and run on this machine without a registry: Debian's buildah and podman on a stand-in for the base."""

import contextlib
import ctypes
import functools
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
PROGRAMS = ("buildah", "podman", "runc", "mmdebstrap", "ip", "unshare")
BASE = "localhost/order-service-test-base:bookworm"
_PYTHON = "3.11"  # Debian 12's
_SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
_CLONE_NEWNET = 0x40000000
# Enough for the service, and no more than a container host may have to give.
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""

Result = TypeVar("Result")


def missing() -> str:
    """What this machine lacks to build and run images; empty where it lacks nothing."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: buildah podman runc mmdebstrap iproute2 util-linux)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    return "" if _SOURCES.exists() else "needs Debian 12 with its sources, to make a base image"


class Engine:
    """buildah and podman with a configuration of their own in *directory*."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        configuration = directory / "containers.conf"
        configuration.write_text(_CONTAINERS_CONF)
        self._environment = {**os.environ, "CONTAINERS_CONF": str(configuration)}

    def __call__(self, *command: str, check: bool = True) -> str:
        """Run a command line of buildah or podman; what it says on stdout.

        Raises:
            RuntimeError: it fails; with what it said.
        """
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False, cwd=ROOT
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-4000:]}")
        return done.stdout.strip()

    def make_base(self) -> str:
        """A Debian with Python in place of the image that the Dockerfile names; made once a machine."""
        if self("podman", "images", "--quiet", BASE):
            return BASE
        archive = self._directory / "base.tar"
        uris = [line.split()[1] for line in _SOURCES.read_text().splitlines() if line.startswith("URIs")]
        packages = "python3,python3-venv,python3-pip,python-is-python3,ca-certificates"
        without = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
        self(
            "mmdebstrap",
            "--variant=minbase",
            *without,
            f"--include={packages}",
            "bookworm",
            str(archive),
            uris[0],
        )
        self("podman", "import", "--quiet", str(archive), BASE)
        archive.unlink()
        return BASE

    def build(self, target: str, lock: str) -> str:
        """Build a *target* of the Dockerfile from wheels that were fetched before; the image's name."""
        wheels = self._directory / f"wheels-{target}"
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        fetch += ["--only-binary=:all:", "--python-version", _PYTHON, "--require-hashes", "-r", lock]
        self(*fetch, "--dest", str(wheels))
        configuration = self._directory / "pip.conf"
        configuration.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        image = f"localhost/order-service-test-{target}:latest"
        mounts = ["--volume", f"{wheels}:/wheels:ro", "--volume", f"{configuration}:/etc/pip.conf:ro"]
        base = ["--pull-never", "--build-arg", f"PYTHON_IMAGE={self.make_base()}"]
        self(
            "buildah", "bud", "--isolation", "chroot", *base, *mounts, "--target", target, "--tag", image, "."
        )
        return image


class Network:
    """A network of its own with loopback alone, in which containers run and the test's own threads can."""

    def __init__(self, holder: int) -> None:
        self.path = f"/proc/{holder}/ns/net"

    @classmethod
    @contextlib.contextmanager
    def made(cls) -> Iterator["Network"]:
        """One that lasts as long as the block."""
        script = "ip link set lo up && echo up && exec sleep 600"
        with subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"up\n"
            try:
                yield cls(holder.pid)
            finally:
                holder.kill()

    def run(self, work: Callable[[], Result]) -> Result:
        """Call *work* in a thread that is in this network."""
        with ThreadPoolExecutor(1, initializer=self._enter) as executor:
            return executor.submit(work).result()

    @contextlib.contextmanager
    def relay(self, port: int, socket_path: str) -> Iterator[None]:
        """Pass what connects to *port* on to the Unix socket at *socket_path*, while the block runs."""
        listener = self.run(functools.partial(socket.create_server, ("127.0.0.1", port), backlog=128))

        open_sockets = [listener]
        passing: list[threading.Thread] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    server = socket.socket(socket.AF_UNIX)
                    open_sockets.extend((client, server))
                    server.connect(socket_path)
                    for one, other in ((client, server), (server, client)):
                        passing.append(threading.Thread(target=_pass, args=(one, other)))
                        passing[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield
        finally:
            for one in open_sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *passing):
                thread.join()
            for one in open_sockets:
                one.close()

    def _enter(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(descriptor)


def container_options(pod: dict[str, object], container: dict[str, object]) -> Sequence[str]:
    """podman's options for a container of a rendered manifest: user, limits, capabilities, read-only root."""
    account, security, resources = (
        pod["securityContext"],
        container["securityContext"],
        container["resources"],
    )
    assert isinstance(account, dict)
    assert isinstance(security, dict)
    assert isinstance(resources, dict)
    limits = resources["limits"]
    options = ["--user", f"{account['runAsUser']}:{account['runAsGroup']}"]
    options += ["--memory", str(limits["memory"]).replace("Gi", "g").replace("Mi", "m")]
    options += ["--cpus", str(int(str(limits["cpu"]).removesuffix("m")) / 1000)]
    options += [f"--cap-drop={name}" for name in security["capabilities"]["drop"]]
    if security["readOnlyRootFilesystem"]:
        options += ["--read-only", "--read-only-tmpfs=false"]
    if not security["allowPrivilegeEscalation"]:
        options += ["--security-opt=no-new-privileges"]
    return options


def _pass(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
