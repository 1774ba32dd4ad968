"""`make k8s-validate`: every rendered object against the schemas of three Kubernetes versions and of its operator.

It runs in an environment of its own (k8s/requirements-validate.txt). A field that no schema knows is a failure.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml  # type: ignore[import-untyped]  # it has no annotations of its own
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

from k8s.rendering import COMBINATIONS, Manifest, render

KUBERNETES_VERSIONS = ("1.33", "1.35", "1.37")
_SCHEMAS = Path(__file__).parent / "schemas"
_MODELS = {
    "ScaledObject": keda.ScaledObject,
    "PodMonitor": prometheus_operator.PodMonitor,
    "PrometheusRule": prometheus_operator.PrometheusRule,
}
_BUILT_IN = {"v1", "apps/v1", "batch/v1", "autoscaling/v2", "policy/v1", "networking.k8s.io/v1"}

# checkov's findings that stand, each with its reason.
EXCEPTIONS = {
    "CKV_K8S_43": "images are pinned by version; whoever runs a registry pins its digests in `images:` of an overlay",
    "CKV_K8S_15": "a version's image does not change, and a local cluster has no registry to pull from",
    "CKV_K8S_35": "libpq and the service read their secrets from the environment",
    "CKV_K8S_40": "the numbers of postgres and nobody are those of their images",
    "CKV_K8S_8": "Jobs, and what only keeps a volume within reach, have nothing to ask whether they live",
    "CKV_K8S_9": "as CKV_K8S_8",
}


def main() -> int:
    """Validate all combinations; 0, or 1 after a line for each defect."""
    defects = []
    for combination in COMBINATIONS:
        manifests = render(combination)
        for manifest in manifests:
            name = f"{combination}: {manifest['kind']} {manifest['metadata']['name']}"
            defects += [f"{name}: {defect}" for defect in _defects(manifest)]
        sys.stdout.write(f"{combination}: {len(manifests)} objects\n")
    defects += _checkov(Path(sys.argv[1]))
    for defect in defects:
        sys.stderr.write(f"{defect}\n")
    return 1 if defects else 0


def _defects(manifest: Manifest) -> Iterator[str]:
    if manifest["apiVersion"] in _BUILT_IN:
        for version in KUBERNETES_VERSIONS:
            try:
                kubernetes_validate.validate(copy.deepcopy(manifest), version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as exc:
                yield f"Kubernetes {version}: {exc}"
    elif model := _MODELS.get(manifest["kind"]):
        try:
            understood = model.model_validate(manifest).model_dump(
                mode="json", by_alias=True, exclude_unset=True
            )
        except ValueError as exc:
            yield str(exc)
        else:
            if understood != manifest:  # the models ignore what they do not know
                yield f"has fields that its operator does not know: {_difference(manifest, understood)}"
    else:
        schema = _schemas().get(manifest["kind"])
        if schema is None:
            yield "there is no schema for it"
            return
        for error in jsonschema.Draft202012Validator(_strict(schema)).iter_errors(manifest):
            yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


def _schemas() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in _SCHEMAS.glob("*.json"):
        found |= json.loads(path.read_text())
    return found


def _strict(schema: Any) -> Any:
    """*schema* with unknown fields refused wherever it lists the known ones."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        made.setdefault("additionalProperties", False)
    return made


def _difference(given: Any, understood: Any, path: str = "") -> str:
    if isinstance(given, dict) and isinstance(understood, dict):
        for key in given:
            if key not in understood:
                return f"{path}.{key}"
            if given[key] != understood[key]:
                return _difference(given[key], understood[key], f"{path}.{key}")
    if isinstance(given, list) and isinstance(understood, list):
        for index, (one, other) in enumerate(zip(given, understood, strict=False)):
            if one != other:
                return _difference(one, other, f"{path}[{index}]")
    return f"{path}: {given!r} is read as {understood!r}"


def _checkov(directory: Path) -> Iterator[str]:
    """The findings of checkov, but for the exceptions; an exception that finds nothing is one too."""
    for number, combination in enumerate(COMBINATIONS):
        (directory / f"{number}.yaml").write_text(yaml.safe_dump_all(render(combination)))
    command = [
        sys.executable,
        "-m",
        "checkov.main",
        "--framework",
        "kubernetes",
        "--directory",
        str(directory),
    ]
    done = subprocess.run(  # noqa: S603 - our own files
        [*command, "--output", "json", "--quiet", "--compact"], capture_output=True, text=True, check=False
    )
    failed = json.loads(done.stdout)["results"]["failed_checks"]
    found: dict[str, list[Any]] = {}
    for check in failed:
        found.setdefault(check["check_id"], []).append(check)
    for check_id, checks in found.items():
        if check_id not in EXCEPTIONS:
            yield from sorted({f"{check_id} {one['check_name']}: {one['resource']}" for one in checks})
    for check_id in EXCEPTIONS.keys() - found.keys():
        yield f"{check_id} is an exception that nothing needs"
    sys.stdout.write(f"checkov: {len(failed)} findings, each of an exception that k8s/validate.py argues\n")


if __name__ == "__main__":
    sys.exit(main())
