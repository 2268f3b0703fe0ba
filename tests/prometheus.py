"""A real Prometheus on the repository's own configuration, as tests ask it."""

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from waiting import wait_until

from tapeline.processes import find_program, free_ports

FOLDER = Path(__file__).parents[1] / "ops" / "prometheus"
_START_S = 30.0


class Prometheus:
    """Asked over its HTTP API."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series now."""
        found = self.get("query", query=expression)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def total(self, expression: str) -> float:
        return sum(value for _, value in self.query(expression))

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def prometheus(folder: Path, metrics_port: int) -> Iterator[Prometheus]:
    """Runs it as ops/prometheus says, but for where the processor is and how often it looks.

    Raises ConfigError that names the Debian package if it is missing.
    """
    program = find_program("prometheus", package="prometheus", wanted_for="testing the metrics")
    text = (FOLDER / "prometheus.yml").read_text()
    config = yaml.safe_load(text.replace("app:9464", f"127.0.0.1:{metrics_port}"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / "alerts.yml")]
    config["scrape_configs"] = [
        one for one in config["scrape_configs"] if one["job_name"] == "tapeline"
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, f"--config.file={folder / 'prometheus.yml'}",
             f"--storage.tsdb.path={folder / 'series'}", f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        server = Prometheus(port)
        wait_until(server.is_ready, _START_S, "Prometheus to answer")
        yield server
    finally:
        process.terminate()
        process.wait(30)
