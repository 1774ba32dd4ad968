"""The manifests, rendered: what they say of the service is true, they fit together, and they let through no more."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml  # type: ignore[import-untyped]  # it has no annotations of its own
from fastapi.routing import APIRoute

from app.ops import ops
from app.settings import Settings
from k8s import rendering
from k8s.rendering import COMBINATIONS, OVERLAYS, Manifest, environment, named, of_kind, render, workloads
from loadtests.options import parser
from loadtests.users.profiles import PROFILES
from monitoring import generate
from tests.support import performance_test_plan

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
SERVICES = [name for name in COMBINATIONS if name.split("+")[0] in {"local", "production", "all"}]
KEDA = [name for name in COMBINATIONS if name.endswith("+keda")]
# The last of a drain: the operations port is closed.
OPERATIONS_GRACE_SECONDS = 1

try:
    rendering.kubectl()
except rendering.KubectlMissingError as exc:
    pytest.skip(str(exc), allow_module_level=True)


def service_of(manifests: Sequence[Manifest]) -> tuple[Manifest, Manifest]:
    """The Deployment of the service, and its container."""
    deployment = named(manifests, "Deployment", "order-service")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return deployment, container


def settings_of(manifests: Sequence[Manifest]) -> Settings:
    """The settings as a replica reads them."""
    _, container = service_of(manifests)
    found = environment(manifests, container)
    return Settings.load(
        **{
            "allow_anonymous": True,
            "host": "0.0.0.0",  # noqa: S104 - nothing listens
            **{name.lower(): value for name, value in found.items()},
        }
    )


def containers_of(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Every container with its name, and the pod it is in."""
    for workload, template in workloads(manifests):
        spec = template["spec"]
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            yield f"{workload['metadata']['name']}/{container['name']}", spec, container


# --- the plan ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", SERVICES)
def test_the_plans_numbers(combination: str) -> None:
    """Requests and limits are the plan's, and so are the fewest and the most replicas and the CPU they aim at."""
    plan = yaml.safe_load(performance_test_plan.INFRASTRUCTURE)
    manifests = render(combination)
    deployment, container = service_of(manifests)
    assert container["resources"] == plan["resources"]
    assert "replicas" not in deployment["spec"]
    scaling = plan["autoscaling"]
    assert scaling["enabled"]
    assert replicas(manifests) == (scaling["minReplicas"], scaling["maxReplicas"])
    assert cpu_target(manifests) == scaling["targetCPUUtilizationPercentage"]


def autoscaler(manifests: Sequence[Manifest]) -> Manifest:
    """The one object that scales the service."""
    (found,) = of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")
    return found


def replicas(manifests: Sequence[Manifest]) -> tuple[int, int]:
    """The fewest and the most replicas."""
    spec = autoscaler(manifests)["spec"]
    if "minReplicas" in spec:
        return spec["minReplicas"], spec["maxReplicas"]
    return spec["minReplicaCount"], spec["maxReplicaCount"]


def cpu_target(manifests: Sequence[Manifest]) -> int:
    """The percentage of the CPU request that the autoscaler aims at."""
    spec = autoscaler(manifests)["spec"]
    if "metrics" in spec:
        (metric,) = spec["metrics"]
        assert metric["resource"]["name"] == "cpu"
        assert metric["resource"]["target"]["type"] == "Utilization"
        return int(metric["resource"]["target"]["averageUtilization"])
    (trigger,) = [one for one in spec["triggers"] if one["type"] == "cpu"]
    assert trigger["metricType"] == "Utilization"
    return int(trigger["metadata"]["value"])


# --- the service ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", SERVICES)
def test_settings(combination: str) -> None:
    """Every key of the ConfigMaps is a setting, and together they are settings that the service starts with."""
    manifests = render(combination)
    _, container = service_of(manifests)
    known = {name.upper() for name in Settings.model_fields}
    sources = [source["configMapRef"]["name"] for source in container["envFrom"]]
    assert len(sources) == 2
    for name in sources:
        (data,) = [one["data"] for one in of_kind(manifests, "ConfigMap") if one["metadata"]["name"] == name]
        assert set(data) <= known
        # A change of its content is a new name, and so a rollout.
        assert re.search(r"-[a-z0-9]{10}$", name)
    assert {one["name"] for one in container["env"]} <= known | {"PGPASSWORD"}
    settings = settings_of(manifests)
    assert not settings.migrate_on_start
    assert settings.ops_port not in {None, settings.port}


@pytest.mark.parametrize("combination", SERVICES)
def test_ports(combination: str) -> None:
    """The container's named ports are the settings', and Services and monitors name ports that there are."""
    manifests = render(combination)
    _, container = service_of(manifests)
    settings = settings_of(manifests)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.port, "operations": settings.ops_port}
    for service in of_kind(manifests, "Service"):
        targets = pods_selected(manifests, service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in named_ports(targets[0]["spec"]), service["metadata"]["name"]
    for monitor in of_kind(manifests, "PodMonitor"):
        assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["operations"]


@pytest.mark.parametrize("combination", SERVICES)
def test_probes(combination: str) -> None:
    """They ask routes of the operations port, and give a start the time that it may take."""
    _, container = service_of(render(combination))
    settings = settings_of(render(combination))
    routes = {route.path for route in ops.routes if isinstance(route, APIRoute)}
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    asked = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    assert asked == {"startup": "/livez", "readiness": "/readyz", "liveness": "/livez"}
    assert set(asked.values()) <= routes
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"operations"}
    patience = probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"]
    assert patience >= 1.5 * settings.start_timeout_seconds


@pytest.mark.parametrize("combination", SERVICES)
def test_drain_fits_into_the_grace_period(combination: str) -> None:
    """SIGTERM's longest way to exit 0 is shorter than the kubelet waits; there is no second delay before it."""
    deployment, container = service_of(render(combination))
    settings = settings_of(render(combination))
    assert settings.drain_delay_seconds >= 5
    assert "lifecycle" not in container
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert settings.longest_shutdown_seconds + OPERATIONS_GRACE_SECONDS < grace


@pytest.mark.parametrize("combination", SERVICES)
def test_rollouts_lose_no_capacity(combination: str) -> None:
    """No replica ends before its successor is ready, and evictions take one at a time, but an unhealthy one always."""
    manifests = render(combination)
    deployment, _ = service_of(manifests)
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert deployment["spec"]["minReadySeconds"] > 0
    budget = named(manifests, "PodDisruptionBudget", "order-service")["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")
    for spread in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]:
        assert spread["matchLabelKeys"] == ["pod-template-hash"]
        assert spread["labelSelector"] == deployment["spec"]["selector"]


# --- connections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", SERVICES)
def test_connection_budget(combination: str) -> None:
    """All replicas' pools, and that of one more in a rollout, fit into what the database allows, a quarter to spare.

    Behind a PgBouncer they fit into one of its processes, for the others may be away, and those fit into the server.
    """
    manifests = render(combination)
    deployment, _ = service_of(manifests)
    settings = settings_of(manifests)
    surge = deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    assert settings.max_replicas == replicas(manifests)[1] + surge
    clients = settings.max_replicas * settings.db_pool_max_size
    if poolers := [*of_kind(manifests, "Pooler"), *_pgbouncers(manifests)]:
        (pooler,) = poolers
        processes, parameters = _pooler(manifests, pooler)
        assert clients <= int(parameters["max_client_conn"])
        assert int(parameters["default_pool_size"]) <= int(parameters["max_db_connections"])
        clients = processes * int(parameters["max_db_connections"])
    assert clients <= 0.75 * _max_connections(manifests)


def _pgbouncers(manifests: Sequence[Manifest]) -> list[Manifest]:
    return [
        one
        for one in of_kind(manifests, "Deployment")
        if one["metadata"]["name"] == "order-service-pgbouncer"
    ]


def _pooler(manifests: Sequence[Manifest], pooler: Manifest) -> tuple[int, Mapping[str, str]]:
    """The most processes of a PgBouncer at once, and what it is configured with."""
    if pooler["kind"] == "Pooler":
        assert pooler["spec"]["pgbouncer"]["poolMode"] == "transaction"
        return pooler["spec"]["instances"], pooler["spec"]["pgbouncer"]["parameters"]
    ini = named(manifests, "ConfigMap", "order-service-pgbouncer")["data"]["pgbouncer.ini"]
    parameters = dict(re.findall(r"^(\w+) = (.*)$", ini, re.MULTILINE))
    assert parameters["pool_mode"] == "transaction"
    return pooler["spec"]["replicas"] + pooler["spec"]["strategy"]["rollingUpdate"]["maxSurge"], parameters


def _max_connections(manifests: Sequence[Manifest]) -> int:
    for cluster in of_kind(manifests, "Cluster"):
        return int(cluster["spec"]["postgresql"]["parameters"]["max_connections"])
    (container,) = named(manifests, "StatefulSet", "order-service-database")["spec"]["template"]["spec"][
        "containers"
    ]
    (found,) = re.findall(r"max_connections=(\d+)", " ".join(container["args"]))
    return int(found)


# --- every object --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_restricted(combination: str) -> None:
    """Every pod keeps to the Pod Security Standard `restricted`, writes to volumes alone, and has no API token."""
    for name, pod, container in containers_of(render(combination)):
        context = container["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert not [port for port in container.get("ports", ()) if "hostPort" in port], name
        kinds = {kind for volume in pod.get("volumes", ()) for kind in volume.keys() - {"name"}}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim"}, name
        assert pod["automountServiceAccountToken"] is False, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_namespaces_enforce_it(overlay: str) -> None:
    """Whoever puts another pod beside it is held to the same."""
    namespaces = of_kind(render(overlay), "Namespace")
    assert len(namespaces) == (0 if overlay.startswith("loadtest") else 1)
    for namespace in namespaces:
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_resources(combination: str) -> None:
    """Every container asks for CPU and memory, and is limited in both: a quota refuses those that do not."""
    for name, _, container in containers_of(render(combination)):
        resources = container["resources"]
        for kind in ("cpu", "memory"):
            assert quantity(resources["requests"][kind]) <= quantity(resources["limits"][kind]), name


@pytest.mark.parametrize("combination", ["local+loadtest", "all"])
def test_quota(combination: str) -> None:
    """The namespace's quota has room for all of it at its largest: ten replicas, one more, three that still drain."""
    manifests = render(combination)
    hard = named(manifests, "ResourceQuota", "order-service")["spec"]["hard"]
    used = dict.fromkeys(("requests.cpu", "requests.memory", "limits.cpu", "limits.memory"), 0.0)
    pods = 0
    for workload, template in workloads(manifests):
        spec = workload["spec"]
        count = spec.get("replicas", spec.get("parallelism", 1))
        if workload["metadata"]["name"] == "order-service":
            count = replicas(manifests)[1] + spec["strategy"]["rollingUpdate"]["maxSurge"] + 3
        pods += count
        for container in template["spec"]["containers"]:
            for bound, kind in itertools.product(("requests", "limits"), ("cpu", "memory")):
                used[f"{bound}.{kind}"] += count * quantity(container["resources"][bound][kind])
    assert pods <= int(hard["pods"])
    assert {name: value for name, value in used.items() if value > quantity(hard[name])} == {}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_images_are_pinned(combination: str) -> None:
    """Each is of a version, and what is ours is of this one."""
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for name, _, container in containers_of(render(combination)):
        image, _, tag = container["image"].rpartition(":")
        assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-\w+)?", tag), name
        if image.rpartition("/")[2].startswith("order-service"):
            assert tag == version


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_selectors(combination: str) -> None:
    """Every selector finds exactly one kind of pod, its own, and every scaler its target."""
    manifests = render(combination)
    for service in of_kind(manifests, "Service"):
        assert len(pods_selected(manifests, service["spec"]["selector"])) == 1, service["metadata"]["name"]
    for kind in ("PodDisruptionBudget", "PodMonitor", "Deployment", "StatefulSet"):
        for one in of_kind(manifests, kind):
            if kind == "PodMonitor" and not of_kind(manifests, "Deployment"):
                continue
            selected = pods_selected(manifests, one["spec"]["selector"]["matchLabels"])
            assert len(selected) == 1, one["metadata"]["name"]
            if kind in {"Deployment", "StatefulSet"}:
                assert selected == [one["spec"]["template"]]
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject"):
        assert named(manifests, "Deployment", scaler["spec"]["scaleTargetRef"]["name"])
    services = {one["metadata"]["name"] for one in of_kind(manifests, "Service")}
    for route in of_kind(manifests, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            assert {backend["name"] for backend in rule.get("backendRefs", ())} <= services


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_no_secret_is_in_the_repository(combination: str) -> None:
    """Secrets are named, never held."""
    manifests = render(combination)
    assert of_kind(manifests, "Secret") == []
    for config in of_kind(manifests, "ConfigMap"):
        urls = [value for value in config["data"].values() if value.startswith("postgresql://")]
        assert not [url for url in urls if ":" in url.split("://")[1].split("@")[0]]


def test_one_object_a_file() -> None:
    """Every file holds one object, and some kustomization names it."""
    named_files = set()
    for kustomization in K8S.rglob("kustomization.yaml"):
        document = yaml.safe_load(kustomization.read_text())
        entries = [
            *document.get("resources", ()),
            *(one.get("path", "") for one in document.get("patches", ())),
        ]
        entries += [name for one in document.get("configMapGenerator", ()) for name in one.get("files", ())]
        entries += [name for one in document.get("configMapGenerator", ()) for name in one.get("envs", ())]
        named_files |= {(kustomization.parent / entry).resolve() for entry in entries if entry}
    files = {
        path
        for path in K8S.rglob("*")
        if path.suffix in {".yaml", ".yml", ".env", ".ini"}
        and path.name != "kustomization.yaml"
        and path.parent.name != "scripts"
    }
    assert len(files) > 30
    assert files <= named_files
    for path in files:
        if path.suffix == ".yaml":
            assert len(list(yaml.safe_load_all(path.read_text()))) == 1, path


# --- metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", KEDA)
def test_scaled_object(combination: str) -> None:
    """It asks for metrics that the service exports, takes the HPA's place, and behaves as the HPA did."""
    manifests = render(combination)
    spec = named(manifests, "ScaledObject", "order-service")["spec"]
    exported = {name for name, *_ in generate.described()}
    queries = [one["metadata"]["query"] for one in spec["triggers"] if one["type"] == "prometheus"]
    asked = [generate.family_names(query) for query in queries]
    assert asked == [{"orders_total"}, {"requests_in_flight"}, {"order_processing_seconds"}]
    assert set().union(*asked) <= exported
    hpa = autoscaler(render("local"))["spec"]
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert replicas(manifests)[0] <= spec["fallback"]["replicas"] <= replicas(manifests)[1]
    # KEDA accepts a fallback only where a trigger is an average over the replicas.
    assert "AverageValue" in {one["metricType"] for one in spec["triggers"]}


def test_prometheus_scrapes_as_elsewhere() -> None:
    """The local overlay's Prometheus is monitoring's but for its targets, which are every replica's operations port."""
    manifests = render("local")
    data = named(manifests, "ConfigMap", "prometheus-configuration")["data"]
    own = yaml.safe_load(data["prometheus.yml"])
    other = yaml.safe_load((ROOT / "monitoring" / "prometheus" / "prometheus.yml").read_text())
    assert own["global"] == other["global"]
    (job,) = own["scrape_configs"]
    assert job["job_name"] == other["scrape_configs"][0]["job_name"]
    (discovery,) = job["dns_sd_configs"]
    (service,) = discovery["names"]
    targets = named(manifests, "Service", service)["spec"]
    assert targets["clusterIP"] == "None"
    assert targets["publishNotReadyAddresses"]
    assert discovery["port"] == settings_of(manifests).ops_port
    rules = named(manifests, "ConfigMap", "prometheus-rules")["data"]
    assert set(rules) == {path.name for path in (ROOT / "monitoring/prometheus/rules").glob("*.yml")}
    assert f"max1d * 0 + {replicas(manifests)[0]}\n" in rules["expected.yml"]


def test_dashboards_are_all_there() -> None:
    """Each dashboard of monitoring is a ConfigMap with the label of Grafana's sidecar."""
    boards = [
        one
        for one in of_kind(render("production"), "ConfigMap")
        if one["metadata"].get("labels", {}).get("grafana_dashboard") == "1"
    ]
    files = {name for board in boards for name in board["data"]}
    assert files == {path.name for path in generate.DASHBOARD_FILES.glob("*.json")}


def test_pod_monitor_names_the_job_of_the_alerts() -> None:
    """The label that becomes `job` says order-service, as the alerts expect."""
    monitor = named(render("production"), "PodMonitor", "order-service")
    deployment, _ = service_of(render("production"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels[monitor["spec"]["jobLabel"]] == "order-service"
    assert monitor["spec"]["podMetricsEndpoints"][0]["path"] in {
        route.path for route in ops.routes if isinstance(route, APIRoute)
    }


# --- the load test -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["normal", "peak", "stress"])
def test_load_test(profile: str) -> None:
    """The master runs the profile it is named after, with as many workers as there are, and repeats no verdict."""
    manifests = render(f"loadtest/{profile}")
    master = named(manifests, "Job", "loadtest-master")["spec"]
    workers = named(manifests, "Job", "loadtest-workers")["spec"]
    (container,) = master["template"]["spec"]["containers"]
    variables = environment(manifests, container)
    assert container["args"] == ["$(LOADTEST_PROFILE)"]
    assert variables["LOADTEST_PROFILE"] == profile
    assert PROFILES[profile].orders_per_second
    assert int(variables["WORKERS"]) == workers["parallelism"] == workers["completions"]
    assert workers["completionMode"] == "Indexed"
    assert master["backoffLimit"] == workers["backoffLimit"] == 0
    options = {action.env_var for action in parser()._actions if getattr(action, "env_var", None)}
    assert variables.keys() - {"LOADTEST_PROFILE"} <= options
    planned = PROFILES[profile].run_time_seconds
    assert planned + 600 <= min(master["activeDeadlineSeconds"], workers["activeDeadlineSeconds"])


def test_load_test_finds_what_it_tests() -> None:
    """Its addresses are Services of the local overlay, and everything of it mounts the same volume on one node."""
    manifests = render("local+loadtest")
    (container,) = named(manifests, "Job", "loadtest-master")["spec"]["template"]["spec"]["containers"]
    variables = environment(manifests, container)
    for name in ("HOST", "PROMETHEUS_URL"):
        host, _, port = variables[name].removeprefix("http://").partition(":")
        service = named(manifests, "Service", host)
        assert int(port) in {one["port"] for one in service["spec"]["ports"]}
    for kind, name in (("Job", "loadtest-workers"), ("Deployment", "loadtest-report")):
        pod = named(manifests, kind, name)["spec"]["template"]["spec"]
        (near,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (found,) = pods_selected(manifests, near["labelSelector"]["matchLabels"])
        assert found == named(manifests, "Job", "loadtest-master")["spec"]["template"]


# --- the network ---------------------------------------------------------------------------------------------


class Pod(NamedTuple):
    """A pod, of this namespace or of another."""

    labels: Mapping[str, str]
    namespace: Mapping[str, str]
    ports: Mapping[str, int]  # TCP, by name


HERE = {"kubernetes.io/metadata.name": "order-service"}
OUTSIDERS = {
    "stranger": Pod({"app": "other"}, {"kubernetes.io/metadata.name": "default"}, {"http": 80}),
    "gateway": Pod({}, {"kubernetes.io/metadata.name": "gateway", "order-service/client": "true"}, {}),
    "monitoring": Pod(
        {"app.kubernetes.io/name": "prometheus"},
        {"kubernetes.io/metadata.name": "monitoring"},
        {"http": 9090},
    ),
    "dns": Pod({"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"}, {"dns": 53}),
}
SERVICE_FLOWS = {
    ("gateway", "order-service", 8000),
    ("prometheus", "order-service", 8001),
    ("order-service", "order-service-database", 5432),
    ("order-service-migration", "order-service-database", 5432),
}
LOAD_FLOWS = {
    ("loadtest-master", "order-service", 8000),
    ("loadtest-workers", "order-service", 8000),
    ("loadtest-master", "prometheus", 9090),
    ("loadtest-workers", "loadtest-master", 5557),
    ("loadtest-master", "loadtest-master", 5557),
}
PAYMENTS_FLOWS = {("order-service", "order-service-payments", 8080)}
PGBOUNCER_FLOWS = {
    ("order-service", "order-service-pgbouncer", 5432),
    ("order-service-migration", "order-service-pgbouncer", 5432),
    ("order-service-pgbouncer", "order-service-database", 5432),
}
MONITORING_FLOWS = {("monitoring", "order-service", 8001)}
FLOWS = {
    "local": SERVICE_FLOWS,
    "local+faults": SERVICE_FLOWS,
    "local+keda": SERVICE_FLOWS,
    "local+gateway": SERVICE_FLOWS,
    "local+monitoring": SERVICE_FLOWS | MONITORING_FLOWS,
    "local+payments": SERVICE_FLOWS | PAYMENTS_FLOWS,
    "local+pgbouncer": SERVICE_FLOWS | PGBOUNCER_FLOWS,
    "local+loadtest": SERVICE_FLOWS | LOAD_FLOWS,
    "all": SERVICE_FLOWS | LOAD_FLOWS | PAYMENTS_FLOWS | PGBOUNCER_FLOWS | MONITORING_FLOWS,
}


@pytest.mark.parametrize("combination", FLOWS)
def test_network(combination: str) -> None:
    """Between any two pods exactly the flows of the list are let through, and to DNS from everywhere."""
    manifests = render(combination)
    policies = [one["spec"] for one in of_kind(manifests, "NetworkPolicy")]
    pods = dict(OUTSIDERS)
    for workload, template in workloads(manifests):
        pods[workload["metadata"]["name"]] = Pod(
            template["metadata"]["labels"], HERE, named_ports(template["spec"])
        )
    open_flows = {
        (source, target, port)
        for (source, one), (target, other) in itertools.product(pods.items(), repeat=2)
        if HERE in (one.namespace, other.namespace)
        for port in other.ports.values()
        if let_through(policies, one, other, port)
    }
    to_dns = {(name, "dns", 53) for name, pod in pods.items() if pod.namespace == HERE}
    assert open_flows == FLOWS[combination] | to_dns


def test_production_network() -> None:
    """There the database is pods that the operator makes, with the label of a database; strangers reach nothing."""
    policies = [one["spec"] for one in of_kind(render("production"), "NetworkPolicy")]
    api = Pod({"order-service/role": "api"}, HERE, {"http": 8000, "operations": 8001})
    database = Pod({"order-service/role": "database"}, HERE, {"postgres": 5432, "status": 8000})
    operator = Pod({}, {"kubernetes.io/metadata.name": "cnpg-system"}, {})
    allowed = {
        (source, target, port)
        for (source, one), (target, other) in itertools.product(
            {"api": api, "database": database, "operator": operator, **OUTSIDERS}.items(),
            {"api": api, "database": database}.items(),
        )
        for port in other.ports.values()
        if let_through(policies, one, other, port)
    }
    assert allowed == {
        ("api", "database", 5432),
        ("database", "database", 5432),
        ("database", "database", 8000),
        ("operator", "database", 8000),
        ("gateway", "api", 8000),
        ("monitoring", "api", 8001),
    }


def let_through(policies: Sequence[Manifest], source: Pod, target: Pod, port: int) -> bool:
    """Whether NetworkPolicies, which only ever add, allow TCP from *source* to a *port* of *target*."""
    return _allowed(policies, "Egress", source, target, target.ports, port) and _allowed(
        policies, "Ingress", target, source, target.ports, port
    )


def _allowed(
    policies: Sequence[Manifest], way: str, subject: Pod, peer: Pod, ports: Mapping[str, int], port: int
) -> bool:
    applying = [
        policy
        for policy in policies
        if subject.namespace == HERE
        and way in policy["policyTypes"]
        and matches(policy["podSelector"], subject.labels)
    ]
    if not applying:
        return True
    side = "to" if way == "Egress" else "from"
    for rule in (rule for policy in applying for rule in policy.get(way.lower(), ())):
        entries = [one for one in rule.get("ports", ()) if one.get("protocol", "TCP") == "TCP"]
        numbers = {ports.get(one["port"]) if isinstance(one["port"], str) else one["port"] for one in entries}
        if ("ports" not in rule or port in numbers) and (
            side not in rule or any(_is_peer(one, peer) for one in rule[side])
        ):
            return True
    return False


def _is_peer(entry: Manifest, peer: Pod) -> bool:
    assert "ipBlock" not in entry
    if "namespaceSelector" in entry:
        if not matches(entry["namespaceSelector"], peer.namespace):
            return False
    elif peer.namespace != HERE:
        return False
    return "podSelector" not in entry or matches(entry["podSelector"], peer.labels)


def matches(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects *labels*."""
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def pods_selected(manifests: Sequence[Manifest], labels: Mapping[str, str]) -> list[Manifest]:
    """The pod templates that carry *labels*."""
    return [
        template
        for _, template in workloads(manifests)
        if labels.items() <= template["metadata"]["labels"].items()
    ]


def named_ports(pod: Manifest) -> dict[str, int]:
    """The ports of a pod's containers."""
    return {
        port["name"]: port["containerPort"]
        for container in pod["containers"]
        for port in container.get("ports", ())
    }


def quantity(text: Any) -> float:
    """A quantity of Kubernetes as a number."""
    units = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30, "": 1}
    found = re.fullmatch(r"([\d.]+)(m|Mi|Gi|)", str(text))
    assert found, text
    return float(found[1]) * units[found[2]]
