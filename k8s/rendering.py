"""The manifests as `kubectl apply -k` sends them."""

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # it has no annotations of its own

K8S = Path(__file__).parent
OWN_KUBECTL = K8S.parent / ".cache" / "k8s-tools" / "bin" / "kubectl"

Manifest = Mapping[str, Any]

OVERLAYS = ("local", "production", "loadtest/normal", "loadtest/peak", "loadtest/stress")
# By the overlay that each of them can be added to.
COMPONENTS = {
    "faults": "local",
    "gateway": "local",
    "keda": "local",
    "monitoring": "local",
    "payments": "local",
    "pgbouncer": "local",
}
# Each overlay, each component on its overlay, and a load test beside what it tests.
COMBINATIONS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    **{overlay: ([overlay], []) for overlay in OVERLAYS},
    **{f"{overlay}+{component}": ([overlay], [component]) for component, overlay in COMPONENTS.items()},
    "local+loadtest": (["local", "loadtest/stress"], []),
    "all": (["local", "loadtest/stress"], ["payments", "pgbouncer", "monitoring", "faults"]),
}


class KubectlMissingError(RuntimeError):
    """There is no kubectl, which renders."""


def kubectl() -> str:
    """The kubectl to render with: one on the PATH, or else what `make k8s-validate` has fetched.

    Raises:
        KubectlMissingError: there is neither.
    """
    found = shutil.which("kubectl") or (str(OWN_KUBECTL) if OWN_KUBECTL.exists() else None)
    if found is None:
        raise KubectlMissingError("kubectl is not installed; `make k8s-validate` fetches one")
    return found


@functools.cache
def render(combination: str) -> Sequence[Manifest]:
    """The objects of a combination, in the order in which they are applied."""
    overlays, components = COMBINATIONS[combination]
    with tempfile.TemporaryDirectory() as directory:
        # Kustomize takes no absolute paths, and resolves the link that a temporary directory may be.
        here = Path(directory).resolve()
        kustomization = {
            "resources": [os.path.relpath(K8S / "overlays" / name, here) for name in overlays],
            "components": [os.path.relpath(K8S / "components" / name, here) for name in components],
        }
        if components:
            kustomization["namespace"] = "order-service"  # type: ignore[assignment]
        (here / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = subprocess.run(  # noqa: S603 - our own files
            [kubectl(), "kustomize", str(here)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{combination}: {done.stderr.strip()}")
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    """Those of *kinds*."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def named(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """The one object of that kind and name; a ConfigMap's hash does not count."""
    (found,) = [
        manifest
        for manifest in of_kind(manifests, kind)
        if manifest["metadata"]["name"] == name
        or (kind == "ConfigMap" and manifest["metadata"]["name"].rpartition("-")[0] == name)
    ]
    return found


def workloads(manifests: Sequence[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Each object that makes pods, and the template of its pods."""
    for manifest in of_kind(manifests, "Deployment", "StatefulSet", "Job"):
        yield manifest, manifest["spec"]["template"]


def environment(manifests: Sequence[Manifest], container: Manifest) -> dict[str, str]:
    """The variables of *container* that are no secrets, as the kubelet sets them."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        name = source["configMapRef"]["name"]
        (data,) = [one["data"] for one in of_kind(manifests, "ConfigMap") if one["metadata"]["name"] == name]
        found |= data
    return found | {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}
