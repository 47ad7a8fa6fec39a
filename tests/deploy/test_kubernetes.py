"""The Helm chart: rendered by a real helm, checked against the schemas of Kubernetes and the settings of pd-serve.

What a cluster alone can show (admission, kubelets' probes, device plugins) is not here: see docs/deployment.md.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pd_serve import cli, config, values
from pd_serve.node import app as node_app
from pd_serve.node import metrics as node_metrics
from pd_serve.router import app as router_app
from pd_serve.router.discovery import endpoints

CHART = Path(__file__).parents[2] / "deploy" / "kubernetes" / "pd-serve"
FILES = sorted(path.name for path in CHART.glob("values-*.yaml"))
VERSIONS = ("1.32", "1.37")
CRDS = {"ComputeDomain", "PodMonitor", "ScaledObject"}
ROLES = ("prefill", "decode")
TLS = "--set=tls.existingSecret=chat-tls"

_beside = Path(sys.executable).parent / "helm"
HELM = str(_beside) if _beside.exists() else shutil.which("helm")
pytestmark = pytest.mark.skipif(HELM is None, reason="needs helm: tests/deploy/helm.sh gets it")

Object = dict[str, Any]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    return subprocess.run([HELM, *words], capture_output=True, text=True, timeout=60, check=False)


@functools.cache
def render(file: str, *more: str) -> dict[tuple[str, str], Object]:
    """By kind and name, of the release ``chat`` in the namespace ``models``."""
    done = run("template", "chat", str(CHART), "--namespace=models", f"--values={CHART / file}", *more)
    assert done.returncode == 0, done.stderr
    found = [one for one in yaml.load_all(done.stdout, yaml.CSafeLoader) if one]
    named = {(one["kind"], one["metadata"]["name"]): one for one in found}
    assert len(named) == len(found)
    return named


def pods(objects: dict[tuple[str, str], Object]) -> Iterator[tuple[str, Object, Object]]:
    """Component, pod and its container."""
    for (kind, _), found in objects.items():
        if kind in ("Deployment", "StatefulSet"):
            pod = found["spec"]["template"]
            yield pod["metadata"]["labels"]["app.kubernetes.io/component"], pod["spec"], pod["spec"]["containers"][0]


def load(objects: dict[tuple[str, str], Object], container: Object, folder: Path) -> Any:
    """The container's settings, by pd-serve's own command line and loader."""
    command, *flags = container["args"]
    # What the command itself makes of its flags; items of a list may come a flag each.
    given = {
        name: (",".join(value) or None) if isinstance(value, list | tuple) else value
        for name, value in commands()[command].make_context(command, flags).params.items()
    }
    assert given.pop("config_file") == "/etc/pd-serve/settings.yaml"
    (folder / command).write_text(objects["ConfigMap", f"chat-pd-serve-{command}"]["data"]["settings.yaml"])
    known = {one.name for one in config.settings(command)}
    environ = {one["name"]: one["value"] for one in container.get("env", ())}
    flags_given = {name: value for name, value in given.items() if name in known}
    return config.load(command, flags_given, config_file=str(folder / command), environ=environ)


@functools.cache
def commands() -> dict[str, Any]:
    return typer.main.get_command(cli.app).commands  # type: ignore[attr-defined,no-any-return]


def ports(container: Object) -> dict[str, int]:
    return {one["name"]: one["containerPort"] for one in container["ports"]}


@pytest.mark.parametrize("file", FILES)
def test_helm_has_nothing_to_say(file: str) -> None:
    done = run("lint", "--strict", str(CHART), f"--values={CHART / file}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def schemas() -> Any:
    return pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the extra 'test'")


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_what_kubernetes_takes(version: str, schemas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Unread, each object would cost another reading of 2 MB of definitions.
    monkeypatch.setattr(schemas.utils, "schema_contents", functools.cache(schemas.utils.schema_contents))
    checked = set()
    scaled = render(FILES[0], "--set=router.autoscaling.enabled=true")
    scaler = {key: found for key, found in scaled.items() if key[0] == "HorizontalPodAutoscaler"}
    rendered = [(file, render(file)) for file in FILES]
    for file, objects in (*rendered, ("router.autoscaling", scaler), ("tls", render(FILES[0], TLS))):
        for (kind, name), found in objects.items():
            if kind in CRDS:
                continue
            try:
                schemas.validate(found, version, strict=True)
            except schemas.ValidationError as error:
                pytest.fail(f"{file}, {kind} {name}, {version}: {'.'.join(map(str, error.path))}: {error.message}")
            checked.add(kind)
    assert checked >= {"Deployment", "StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy", "Role", "Secret"}
    assert "HorizontalPodAutoscaler" in checked
    broken = json.loads(json.dumps(render(FILES[0])["Deployment", "chat-pd-serve-router"]))
    broken["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerport"] = 1
    with pytest.raises(schemas.ValidationError):
        schemas.validate(broken, version, strict=True)


@pytest.mark.parametrize("file", FILES)
def test_the_loader_takes_what_containers_are_given(file: str, tmp_path: Path) -> None:
    objects = render(file)
    found = dict.fromkeys(("router", *ROLES))
    for component, pod, container in pods(objects):
        settings = found[component] = load(objects, container, tmp_path)
        assert settings.host == "0.0.0.0" and settings.port == ports(container)["http"]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        files = [settings.secret_file, *([settings.api_key_file] if component == "router" else [])]
        assert all(str(Path(path).parent) in mounts for path in files if path)
        delay_s = settings.drain_delay_s if component == "router" else 0
        assert pod["terminationGracePeriodSeconds"] == delay_s + settings.drain_timeout_s + 15
        assert "lifecycle" not in container
        # A Service of a release called pd-serve would give variables PD_SERVE_..., which are refused.
        assert pod["enableServiceLinks"] is False
        if component in ROLES:
            gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
            assert settings.tp == max(1, gpus)
            assert settings.nvlink_socket_dir in {"", *mounts}
            assert not settings.model.startswith("/") or str(Path(settings.model).parent) in mounts
            assert {"/dev/shm", "/var/cache/pd-serve"} <= mounts
    assert all(found.values())
    assert found["router"].drain_delay_s > 0
    assert found["router"].admin_address() == ("0.0.0.0", 8001)


@pytest.mark.parametrize("file", FILES)
def test_probes_ask_what_answers(file: str) -> None:
    class State:
        pass

    router = router_app.create_app(config.RouterConfig())
    routes = {
        "router": {getattr(route, "path", "") for route in router.routes},
        "node": {getattr(route, "path", "") for route in node_app.build(State()).routes},  # type: ignore[arg-type]
    }
    wanted = {"router": ("/health", "/ready", "/health"), "node": ("/ready", "/ready", "/health")}
    for component, _, container in pods(render(file)):
        process = "node" if component in ROLES else component
        asked = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
        assert tuple(one["path"] for one in asked) == wanted[process]
        assert {one["port"] for one in asked} == {"http"}
        assert {one["path"] for one in asked} <= routes[process]


@pytest.mark.parametrize("file", FILES)
def test_routers_find_every_node(file: str, tmp_path: Path) -> None:
    objects = render(file)
    containers = {component: (pod, container) for component, pod, container in pods(objects)}
    pod, container = containers["router"]
    lists = load(objects, container, tmp_path).discover
    assert len(lists) == 2
    for where, role in zip(lists, ROLES, strict=True):
        service = objects["Service", f"chat-pd-serve-{role}"]
        # Kubernetes puts this label on the slices of a service, and gives them the names of its ports.
        assert where == f"k8s://models/kubernetes.io/service-name={service['metadata']['name']}"
        assert values.NODE_LISTS.parse(where) == (where,)
        assert service["spec"]["clusterIP"] == "None"
        stateful = objects["StatefulSet", f"chat-pd-serve-{role}"]
        assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
        labels = stateful["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        port = ports(containers[role][1])[service["spec"]["ports"][0]["targetPort"]]
        slice = {
            "ports": [{"name": service["spec"]["ports"][0]["name"], "port": port}],
            "endpoints": [{"addresses": ["10.0.0.7"]}],
        }
        assert endpoints(slice) == [(f"http://10.0.0.7:{port}", True, False)]
    account = pod["serviceAccountName"]
    assert ("ServiceAccount", account) in objects
    rules = objects["Role", "chat-pd-serve-discovery"]["rules"]
    assert rules == [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}]
    assert objects["RoleBinding", "chat-pd-serve-discovery"]["subjects"][0]["name"] == account
    assert all(containers[role][0]["automountServiceAccountToken"] is False for role in ROLES)


@pytest.mark.parametrize("file", FILES)
def test_selectors_select_pods_of_their_own(file: str) -> None:
    objects = render(file)
    labels = {
        name: found["spec"]["template"]["metadata"]["labels"]
        for (kind, name), found in objects.items()
        if kind in ("Deployment", "StatefulSet")
    }
    for (kind, name), found in objects.items():
        selector = found.get("spec", {}).get("selector")
        if selector:
            wanted = selector.get("matchLabels", selector)
            assert [one for one, have in labels.items() if wanted.items() <= have.items()] == [name], (kind, name)
    assert objects["Deployment", "chat-pd-serve-router"]["spec"]["replicas"] == 2
    assert objects["PodDisruptionBudget", "chat-pd-serve-router"]["spec"]["maxUnavailable"] == 1
    nodes = objects["NetworkPolicy", "chat-pd-serve-nodes"]["spec"]
    assert nodes["podSelector"]["matchExpressions"][0]["values"] == list(ROLES)
    assert all(rule["from"] for rule in nodes["ingress"])


def test_with_tls_all_that_speaks_and_asks_does(tmp_path: Path) -> None:
    objects = render("values-nvidia-rdma.yaml", TLS)
    for component, pod, container in pods(objects):
        settings = load(objects, container, tmp_path)
        (mount,) = (one for one in container["volumeMounts"] if one["name"] == "tls")
        (volume,) = (one for one in pod["volumes"] if one["name"] == "tls")
        assert volume["secret"] == {"secretName": "chat-tls", "defaultMode": 0o400}
        given = [settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca]
        assert given == [f"{mount['mountPath']}/{key}" for key in ("tls.crt", "tls.key", "ca.crt")]  # kubernetes.io/tls
        assert {container[f"{kind}Probe"]["httpGet"]["scheme"] for kind in ("startup", "readiness", "liveness")} == {
            "HTTPS"
        }
        monitor = objects["PodMonitor", f"chat-pd-serve-{component}"]["spec"]["podMetricsEndpoints"][0]
        assert monitor["scheme"] == "https" and monitor["tlsConfig"]["ca"]["secret"]["name"] == "chat-tls"
        # What a Service says of its port its slices say too, and so routers dial a name that the certificate can have.
        (port,) = objects["Service", f"chat-pd-serve-{component}"]["spec"]["ports"]
        labels = {"kubernetes.io/service-name": f"chat-pd-serve-{component}"}
        slice = {
            "metadata": {"namespace": "models", "labels": labels},
            "ports": [{"name": port["name"], "port": 1, "appProtocol": port["appProtocol"]}],
            "endpoints": [{"addresses": ["10.0.0.7"], "hostname": f"chat-pd-serve-{component}-0"}],
        }
        name = f"chat-pd-serve-{component}-0.chat-pd-serve-{component}.models.svc"
        assert endpoints(slice) == [(f"https://{name}:1", True, False)]
    assert monitor["tlsConfig"]["serverName"] == "chat-pd-serve-decode-0.chat-pd-serve-decode.models.svc"
    assert not re.search("tls|HTTPS", json.dumps([*render("values-nvidia-rdma.yaml").values()]))


def test_accelerators_and_memory_are_asked_for() -> None:
    rdma = {component: (pod, container) for component, pod, container in pods(render("values-nvidia-rdma.yaml"))}
    for role in ROLES:
        pod, container = rdma[role]
        assert container["resources"]["limits"] == {
            "memory": "256Gi",
            "nvidia.com/gpu": 4,
            "rdma/rdma_shared_device_a": 1,
        }
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK", "SYS_RESOURCE"]}
        assert pod["securityContext"]["runAsUser"] == 0, "a capability that is added is in effect for root alone"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
        assert volumes["nvlink-sockets"]["hostPath"]["path"] == "/var/run/pd-serve/models-chat-pd-serve"
    assert rdma["prefill"][0]["volumes"][-1] == rdma["decode"][0]["volumes"][-1], "one directory for both roles"
    assert rdma["router"][0]["securityContext"]["runAsUser"] != 0
    # What raises the limit starts what it is given, with its flags.
    *_, script, limit = rdma["decode"][1]["command"]
    said = subprocess.run(
        [
            "/bin/sh",
            "-c",
            script.replace("exec pd-serve", "exec echo").replace("ulimit -l", "echo"),
            limit,
            "decode",
            "a b",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "unlimited\ndecode a b\n"


def test_a_compute_domain_is_claimed_by_all_nodes() -> None:
    objects = render("values-gb200.yaml")
    domain = objects["ComputeDomain", "chat-pd-serve"]
    assert domain["apiVersion"] == "resource.nvidia.com/v1beta1" and domain["spec"]["numNodes"] == 0
    template = domain["spec"]["channel"]["resourceClaimTemplate"]["name"]
    for component, pod, container in pods(objects):
        claims = [one["resourceClaimTemplateName"] for one in pod.get("resourceClaims", ())]
        assert claims == ([template] if component in ROLES else [])
        if component in ROLES:
            assert container["resources"]["claims"] == [{"name": pod["resourceClaims"][0]["name"]}]
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
            term = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]
            assert term["topologyKey"] == "nvidia.com/gpu.clique"
    assert not [kind for kind, _ in render("values-cpu.yaml") if kind in CRDS]


def test_monitors_and_scalers_name_what_there_is() -> None:
    objects = render("values-nvidia-rdma.yaml", "--set=decode.autoscaling.enabled=true")
    containers = {component: container for component, _, container in pods(objects)}
    for component, container in containers.items():
        monitor = objects["PodMonitor", f"chat-pd-serve-{component}"]["spec"]["podMetricsEndpoints"][0]
        assert monitor["port"] in ports(container) and monitor["path"] == "/metrics"
    scaled = objects["ScaledObject", "chat-pd-serve-decode"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == "chat-pd-serve-decode"
    assert "replicas" not in objects["StatefulSet", "chat-pd-serve-decode"]["spec"], "it would undo each scaling"
    routers = render(FILES[0], "--set=router.autoscaling.enabled=true")
    target = routers["HorizontalPodAutoscaler", "chat-pd-serve-router"]["spec"]["scaleTargetRef"]
    assert "replicas" not in routers[target["kind"], target["name"]]["spec"]
    series = re.findall(r"\bpd_serve_\w+", scaled["triggers"][0]["metadata"]["query"])
    assert series and set(series) <= {node_metrics.PREFIX + name for name in node_metrics._LOAD}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("decode.replica=2", "replica"),
        ("router.settings.port=9", "settings.port is the chart's to set"),
        ("settings.ssl_ca=/ca", "settings.ssl_ca is the chart's to set"),
        ("decode.settings.tp=2", "settings.tp is the chart's to set"),
        ("rdma.memlock=much", "memlock"),
    ],
)
def test_wrong_values_are_refused(given: str, said: str) -> None:
    done = run("template", "chat", str(CHART), f"--set={given}")
    assert done.returncode != 0 and said in done.stderr


def test_large_numbers_stay_numbers(tmp_path: Path) -> None:
    objects = render(
        "values-cpu.yaml", "--set=router.settings.max_body_bytes=8388608", "--set=settings.kv_cache_memory=12345678901"
    )
    found = {component: load(objects, container, tmp_path) for component, _, container in pods(objects)}
    assert found["router"].max_body_bytes == 8388608
    assert found["decode"].kv_cache_memory == 12345678901
