"""From two looks at metrics to what a person sees: counters, resets, quantiles."""

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from typer.testing import CliRunner

from schemas.errors import TransientError
from schemas.exposition import Target
from tapeline.cli import app
from tapeline.metrics.scrape import Between, Sample, Scrape, scrape
from tapeline.metrics.server import metrics_server
from tapeline.metrics.snapshot import snapshot


def look(at_s: float, values: Mapping[tuple[str, str], float]) -> Scrape:
    """One worker's series, by name and lane."""
    samples = [
        Sample(name, {"part": "worker", "instance": "a:1", "lane": lane}, value)
        for (name, lane), value in values.items()
    ]
    return Scrape(at_s, samples, [Target("a:1", "worker")], [])


def test_a_counter_that_was_started_anew_counts_from_nothing() -> None:
    between = Between(
        look(0, {("n", "x"): 100, ("n", "y"): 7}), look(2, {("n", "x"): 30, ("n", "y"): 9})
    )
    assert between.grown("n", lane="x") == 30
    assert between.grown("n") == 32
    assert between.rate("n") == 16
    assert between.mean("n") is None


def buckets(at_s: float, **counts: float) -> Scrape:
    edges = {"a": "0.1", "b": "0.2", "c": "+Inf"}
    samples = [Sample("t_bucket", {"le": edges[name]}, value) for name, value in counts.items()]
    return Scrape(at_s, samples, [], [])


def test_quantiles_are_of_what_came_in_between() -> None:
    between = Between(buckets(0, a=100, b=100, c=100), buckets(1, a=100, b=140, c=150))
    assert between.quantile(0.4, "t") == pytest.approx(0.15)  # the 20th of 40 between 0.1 and 0.2
    assert between.quantile(0.99, "t") == pytest.approx(0.2)  # above the last edge
    assert between.quantile(0.5, "other") is None
    assert Between(buckets(0, a=5, b=5, c=5), buckets(1, a=5, b=5, c=5)).quantile(0.5, "t") is None


def test_a_lane_s_rates_and_lag() -> None:
    def at(at_s: float, num: float) -> Scrape:
        return look(
            at_s,
            {("tapeline_queued_records", "realtime"): 4, ("tapeline_lag_records", "realtime"): num},
        )

    now = snapshot(at(0, 10), at(5, 25))
    [lane] = now.lanes
    assert (lane.lane, lane.queued, lane.lag_records, lane.lag_s) == ("realtime", 4, 25, None)
    assert lane.p99_ms is None
    assert now.model.errors is None
    assert [one.instance for one in now.processes] == ["a:1"]


def test_one_address_leads_to_all_processes_and_names_those_that_are_down() -> None:
    near, far = CollectorRegistry(), CollectorRegistry()
    Counter("near", "Here.", registry=near).inc(3)
    Histogram("far", "There.", buckets=[1], registry=far).observe(0.5)
    with metrics_server(0, far, list, "model") as far_port:
        others = [Target(f"127.0.0.1:{far_port}", "model"), Target("127.0.0.1:1", "worker")]
        with metrics_server(0, near, lambda: others, "run") as port:
            found = scrape(f"http://127.0.0.1:{port}")
            values = {(one.name, one.labels["part"]): one.value for one in found.samples}
            assert values["near_total", "run"] == 3
            assert values["far_sum", "model"] == 0.5
            assert found.down == [others[1]]
            done = CliRunner().invoke(app, ["top", "--once", "--url", f"http://127.0.0.1:{port}"])
            assert done.exit_code == 0, done.output
            assert "no answer: worker 127.0.0.1:1" in done.output


def test_who_cannot_name_the_others_says_why() -> None:
    def others() -> list[Target]:
        raise TransientError("deployment worker does not answer")

    with (
        metrics_server(0, CollectorRegistry(), others, "run") as port,
        pytest.raises(TransientError, match="deployment worker does not answer"),
    ):
        scrape(f"http://127.0.0.1:{port}")


def test_top_without_a_port_says_how_to_get_one() -> None:
    done = CliRunner().invoke(app, ["top"])
    assert done.exit_code == 2
    assert "set TAPELINE_METRICS__PORT" in done.output
    done = CliRunner().invoke(app, ["top", "--url", "http://127.0.0.1:1"])
    assert done.exit_code == 2
    assert "no metrics at http://127.0.0.1:1" in done.output


def test_top_shows_the_alerts_that_fire() -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            labels = {"alertname": "TapelineLagging"}
            alert = {"labels": labels, "annotations": {"summary": "lane batch is 45s behind"}}
            alerts = [{**alert, "state": "firing"}, {**alert, "state": "pending"}]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": {"alerts": alerts}}).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Not a line for every request."""

    prometheus = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=prometheus.serve_forever, daemon=True).start()
    with metrics_server(0, CollectorRegistry(), list, "run") as port:
        command = ["top", "--once", "--url", f"http://127.0.0.1:{port}"]
        url = f"http://127.0.0.1:{prometheus.server_port}"
        done = CliRunner().invoke(app, command, env={"TAPELINE_METRICS__PROMETHEUS": url})
        assert done.output.count("TapelineLagging: lane batch is 45s behind") == 1, done.output
        prometheus.shutdown()
        prometheus.server_close()
        done = CliRunner().invoke(app, command, env={"TAPELINE_METRICS__PROMETHEUS": url})
        assert "alerts unknown" in done.output
