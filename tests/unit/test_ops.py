"""What runs Tapeline in containers, read as text: pinned, healthy, unprivileged, and one with code.

No container runs here. The files it shares with the native stack run for real in test_stack.
"""

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.settings import ENV_PREFIX, Settings, load_settings
from tapeline.services import KafkaService, RedisService, kafka_version, ops_folder
from tapeline.stack import KAFKA_PORT, REDIS_PORT
from tapeline.topics import MAX_RECORD_BYTES

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = {name for name, service in SERVICES.items() if service["restart"] == "no"}
OURS = {name for name, service in SERVICES.items() if "build" in service}
EVERY_SERVICE = pytest.mark.parametrize("name", sorted(SERVICES))


def mounts(name: str) -> list[tuple[str, str, str]]:
    """(source, target, mode) of every volume of a service."""
    parts = [entry.split(":") for entry in SERVICES[name].get("volumes", [])]
    return [(source, target, "".join(mode)) for source, target, *mode in parts]


def properties(text: str) -> dict[str, str]:
    """As java.util.Properties reads it: the last value of a key wins."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, value in pairs}


def listeners(text: str) -> dict[str, int]:
    """Name to port of a Kafka listener list."""
    return {entry.split("://")[0]: int(entry.rsplit(":", 1)[1]) for entry in text.split(",")}


def test_every_part_is_there() -> None:
    parts = {"kafka", "redis", "ray-head", "ray-worker", "app", "prometheus", "grafana"}
    assert parts <= set(SERVICES)
    assert {"topics"} == ONE_SHOT
    assert {"topics", "ray-head", "ray-worker", "app"} == OURS


@EVERY_SERVICE
def test_image_is_pinned_to_a_whole_version(name: str) -> None:
    image, _, tag = SERVICES[name]["image"].rpartition(":")
    assert image
    assert re.fullmatch(r"v?\d+\.\d+\.\d+(-[a-z]+)?", tag), tag


def test_dockerfile_is_pinned_and_checked() -> None:
    text = (ROOT / SERVICES["app"]["build"]["dockerfile"]).read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.M)
    assert bases
    assert all(re.search(r":\d+\.\d+\.\d+-slim-\w+$", base) for base in bases), bases
    assert "--require-hashes" in text
    assert "HEALTHCHECK" in text
    (user,) = re.findall(r"^USER (\S+)", text, re.M)
    assert {user} == {SERVICES[name]["user"] for name in OURS}


def test_build_context_holds_all_that_the_dockerfile_copies() -> None:
    """The ignore file lists what goes in; a COPY of anything else fails only at build time."""
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in ignore if line.startswith("!")}
    text = (ROOT / SERVICES["app"]["build"]["dockerfile"]).read_text()
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M)
    copied = {source for sources in copies for source in sources.split()}
    assert copied
    assert copied == admitted
    packaged = set(re.findall(r'^"(ops/\w+)"', (ROOT / "pyproject.toml").read_text(), re.M))
    assert packaged <= copied


@EVERY_SERVICE
def test_service_runs_as_an_ordinary_user_with_limits(name: str) -> None:
    service = SERVICES[name]
    assert int(service["user"].split(":")[0]) > 0
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "nothing of this is meant for the network"


@EVERY_SERVICE
def test_long_running_service_is_watched_and_restarted(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert service["healthcheck"] == {"disable": True}
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
        assert {"interval", "timeout", "retries"} <= set(service["healthcheck"])


@EVERY_SERVICE
def test_dependencies_wait_for_health(name: str) -> None:
    for other, entry in SERVICES[name].get("depends_on", {}).items():
        done = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
        assert entry["condition"] == done, other


@EVERY_SERVICE
def test_mounted_files_exist_and_volumes_are_named(name: str) -> None:
    for source, _, mode in mounts(name):
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert mode == "ro"
        else:
            assert source in COMPOSE["volumes"]


def test_containers_and_native_stack_read_the_same_files(tmp_path: Path) -> None:
    kafka_files = {(ROOT / source).resolve() for source, _, mode in mounts("kafka") if mode}
    assert kafka_files == {ops_folder() / "kafka" / "server.properties"}
    redis_files = {(ROOT / source).resolve() for source, _, mode in mounts("redis") if mode}
    assert redis_files == {ops_folder() / "redis" / "redis.conf"}
    settings = load_settings(state_dir=tmp_path)
    native = RedisService(settings, port=REDIS_PORT).command()
    assert Path(native[1]) in redis_files
    assert SERVICES["redis"]["command"][1] in {target for _, target, _ in mounts("redis")}


def test_native_overrides_leave_the_shared_file_whole(tmp_path: Path) -> None:
    shared = properties((ops_folder() / "kafka" / "server.properties").read_text())
    service = KafkaService(load_settings(state_dir=tmp_path), port=19092, controller_port=19093)
    service.folder.mkdir(parents=True)
    service.write_properties()
    effective = properties((service.folder / "server.properties").read_text())
    changed = {key for key in effective if effective[key] != shared.get(key)}
    places = {"listeners", "advertised.listeners", "controller.quorum.voters", "log.dirs"}
    assert changed == places
    assert listeners(effective["listeners"]) == {"PLAINTEXT": 19092, "CONTROLLER": 19093}


def test_kafka_is_one_version_and_one_set_of_ports() -> None:
    kafka = SERVICES["kafka"]
    assert kafka["image"] == f"apache/kafka:{kafka_version()}"
    shared = properties((ops_folder() / "kafka" / "server.properties").read_text())
    assert listeners(shared["listeners"])["PLAINTEXT"] == KAFKA_PORT
    environment = kafka["environment"]
    inside, outside = (
        listeners(environment[key]) for key in ("KAFKA_LISTENERS", "KAFKA_ADVERTISED_LISTENERS")
    )
    assert {name: inside[name] for name in outside} == outside
    assert inside["CONTROLLER"] == listeners(shared["listeners"])["CONTROLLER"]
    assert shared["controller.quorum.voters"].endswith(f":{inside['CONTROLLER']}")
    assert kafka["ports"] == [f"127.0.0.1:{KAFKA_PORT}:{inside['PLAINTEXT']}"]
    assert len(base64.urlsafe_b64decode(environment["CLUSTER_ID"] + "==")) == 16


def test_broker_keeps_the_contract_of_the_design() -> None:
    shared = properties((ops_folder() / "kafka" / "server.properties").read_text())
    assert shared["auto.create.topics.enable"] == "false"
    assert shared["log.message.timestamp.type"] == "LogAppendTime"
    assert int(shared["message.max.bytes"]) == MAX_RECORD_BYTES
    assert int(shared["replica.fetch.max.bytes"]) == MAX_RECORD_BYTES
    assert shared["group.initial.rebalance.delay.ms"] == "0"


def test_redis_ports_agree() -> None:
    conf = (ops_folder() / "redis" / "redis.conf").read_text()
    assert re.search(rf"^port {REDIS_PORT}$", conf, re.M)
    assert SERVICES["redis"]["ports"] == [f"127.0.0.1:{REDIS_PORT}:{REDIS_PORT}"]


@pytest.mark.parametrize("name", sorted(OURS))
def test_environment_is_settings_that_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = SERVICES[name]["environment"]
    assert any(key.startswith(ENV_PREFIX) for key in environment)
    for key in [key for key in os.environ if key.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(key)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    settings = load_settings()  # refuses a key it does not know
    host, _, port = settings.kafka.bootstrap_servers.partition(":")
    advertised = SERVICES[host]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"://{host}:{port}" in advertised
    assert settings.redis.url == f"redis://redis:{REDIS_PORT}/0"
    assert settings.serve.address == "auto"
    assert settings.serve.app_name == Settings().serve.app_name
    assert f'"{settings.serve.app_name}"' in SERVICES["app"]["healthcheck"]["test"][-1]


def test_prometheus_watches_services_on_the_ports_they_export() -> None:
    scrapes = yaml.safe_load((ROOT / "ops/prometheus/prometheus.yml").read_text())
    (ray,) = [job for job in scrapes["scrape_configs"] if job["job_name"] == "ray"]
    (source,) = ray["dns_sd_configs"]
    assert source["names"] == ["ray-head", "ray-worker", "app"]
    for name in source["names"]:
        assert f"--metrics-export-port={source['port']}" in " ".join(SERVICES[name]["command"])


def test_grafana_is_provisioned_from_this_repository() -> None:
    provisioning = ROOT / "ops/grafana/provisioning"
    (datasource,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert datasource["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/tapeline.yml").read_text())[
        "providers"
    ]
    targets = {target: source for source, target, _ in mounts("grafana")}
    assert (ROOT / targets[provider["options"]["path"]]).is_dir()
    assert ROOT / targets["/etc/grafana/provisioning"] == provisioning


def test_prometheus_asks_the_app_where_everybody_is() -> None:
    config = yaml.safe_load((ROOT / "ops/prometheus/prometheus.yml").read_text())
    (job,) = [one for one in config["scrape_configs"] if one["job_name"] == "tapeline"]
    port = SERVICES["app"]["environment"]["TAPELINE_METRICS__PORT"]
    assert [one["url"] for one in job["http_sd_configs"]] == [f"http://app:{port}/targets"]
    mounted = {Path(target).name for _, target, _ in mounts("prometheus")}
    assert {"prometheus.yml", *config["rule_files"]} <= mounted


def test_the_board_is_whole() -> None:
    board = json.loads((ROOT / "ops/grafana/dashboards/tapeline.json").read_text())
    sources = yaml.safe_load(
        (ROOT / "ops/grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    (uid,) = [one["uid"] for one in sources["datasources"]]
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in panels:
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert {one["datasource"]["uid"] for one in (panel, *panel["targets"])} == {uid}
    known = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", " ".join(t["expr"] for p in panels for t in p["targets"])))
    assert used - {"__rate_interval"} == known
