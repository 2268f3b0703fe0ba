"""The Kubernetes manifests, read as text and held against settings, image and code.

No cluster runs here. What Serve reads of them is validated by Serve's own schema.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import tapeline.serving
from schemas.settings import ENV_PREFIX, Settings, load_settings
from tapeline.serving import build_application

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ops" / "k8s"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def documents() -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name, as the kustomization lists them."""
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    found = [one for name in listed for one in yaml.safe_load_all((FOLDER / name).read_text())]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


DOCUMENTS = documents()
SERVICE = DOCUMENTS["RayService", "tapeline"]["spec"]
CLUSTER = SERVICE["rayClusterConfig"]
ENVIRONMENT = DOCUMENTS["ConfigMap", "tapeline-settings"]["data"]
GROUPS = {"head": CLUSTER["headGroupSpec"]} | {
    group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]
}
every_group = pytest.mark.parametrize("group", GROUPS)


def pods() -> dict[str, dict[str, Any]]:
    made = {name: group["template"]["spec"] for name, group in GROUPS.items()}
    return made | {"topics": DOCUMENTS["Job", "tapeline-topics"]["spec"]["template"]["spec"]}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """As a pod sees them."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_every_file_is_listed() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in FOLDER.iterdir()}


def test_every_variable_is_a_setting_and_a_string(settings: Settings) -> None:
    """An unknown key would have been refused."""
    assert all(name.startswith(ENV_PREFIX) for name in ENVIRONMENT)
    assert all(isinstance(value, str) for value in ENVIRONMENT.values())
    assert settings.autoscale.enabled
    assert settings.autoscale.max_workers <= settings.kafka.num_partitions
    assert settings.autoscale.min_workers >= 2, "a node may go, and its lanes go on"


def test_serve_reads_its_config_and_finds_what_it_names(settings: Settings) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["serveConfigV2"]))
    builders = {one.name: one.import_path for one in config.applications}
    assert builders == {
        settings.serve.app_name: "tapeline.serving:application",
        f"{settings.serve.app_name}-http": "tapeline.serving:http",
    }
    for path in builders.values():
        assert callable(getattr(tapeline.serving, path.partition(":")[2]))
    assert config.http_options.port == settings.http.port
    assert config.http_options.host == settings.http.host
    application = build_application(settings)
    worker = application._bound_deployment
    assert worker.name == "worker"
    scaling = worker._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 24)
    assert scaling.upscale_delay_s == scaling.downscale_delay_s == 0


def test_one_release_everywhere() -> None:
    image = COMPOSE["services"]["app"]["image"]
    assert {one["image"] for pod in pods().values() for one in pod["containers"]} == {image}
    locked = (ROOT / "requirements.lock").read_text()
    assert re.search(rf"^ray(\[\w+\])?=={CLUSTER['rayVersion']} ", locked, re.MULTILINE)


@pytest.mark.parametrize("name", pods())
def test_pods_are_unprivileged_limited_and_told_the_settings(name: str) -> None:
    pod = pods()[name]
    assert pod["securityContext"]["runAsNonRoot"]
    user = int(COMPOSE["services"]["app"]["user"].partition(":")[0])
    assert pod["securityContext"]["runAsUser"] == user
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]) == {"requests", "limits"}
        sources = [one for entry in container["envFrom"] for one in entry.values()]
        assert {one["name"] for one in sources} == {"tapeline-settings"}


@every_group
def test_a_pod_has_time_to_drain(group: str, settings: Settings) -> None:
    drain_s = settings.worker.drain_timeout_s + 2 * settings.kafka.timeout_s + 10
    assert GROUPS[group]["template"]["spec"]["terminationGracePeriodSeconds"] > drain_s


@every_group
def test_ports_and_probes(group: str, settings: Settings) -> None:
    (container,) = GROUPS[group]["template"]["spec"]["containers"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports["serve"] == settings.http.port
    assert str(ports["metrics"]) == GROUPS[group]["rayStartParams"]["metrics-export-port"]
    compose = COMPOSE["services"]["ray-worker"]
    assert f"--metrics-export-port={ports['metrics']}" in compose["command"]
    # As in compose: a node is ready when its raylet is, whether or not it has a Serve proxy.
    probe = container["readinessProbe"]["exec"]["command"]
    assert probe == compose["healthcheck"]["test"][1:]


@every_group
def test_folders_that_settings_name_are_mounted(group: str, settings: Settings) -> None:
    pod = GROUPS[group]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert {one["name"] for one in pod["volumes"]} == set(mounts)
    assert settings.model.store is not None
    assert settings.model.store.is_relative_to(mounts["models"])
    assert settings.state_dir == Path(mounts["state"])


def test_budgets_select_what_kuberay_makes() -> None:
    for name, kind in (("tapeline-nodes", "worker"), ("tapeline-head", "head")):
        budget = DOCUMENTS["PodDisruptionBudget", name]["spec"]
        labels = budget["selector"]["matchLabels"]
        assert labels.pop("ray.io/node-type") == kind  # KubeRay's own label
        for group in GROUPS.values():
            assert labels.items() <= group["template"]["metadata"]["labels"].items()
    assert DOCUMENTS["PodDisruptionBudget", "tapeline-nodes"]["spec"]["maxUnavailable"] == 1


def test_no_second_cluster_joins_the_groups_unaware() -> None:
    assert SERVICE["upgradeStrategy"] == {"type": "None"}
    assert "upgradeStrategy" in (ROOT / "docs" / "operations.md").read_text()
