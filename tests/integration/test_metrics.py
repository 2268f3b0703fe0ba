"""One run of the real processor, seen through a real Prometheus: every metric, every panel."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Producer
from pipeline import LONG_S
from prometheus import FOLDER, Prometheus, prometheus
from replica_process import replica_process
from typer.testing import CliRunner
from waiting import wait_until

from consumers.metrics import LaneCounts
from inference.artifact import save_artifact
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.settings import Settings, as_environment
from schemas.timing import STAGES
from tapeline.app import ServeApplication, total_counts
from tapeline.bench.loops import Outcome, arrivals, open_loop
from tapeline.bench.report import BenchReport, summary
from tapeline.bench.targets import PipelineTarget
from tapeline.cli import app
from tapeline.metrics.scrape import firing
from tapeline.processes import find_program, free_ports, program_output
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
LANE, CACHED_LANE = "realtime", "historical"
SMALL = ModelConfig(conv_channels=(8,), lstm_hidden=16, lstm_layers=1, num_features=8)
NUM_EVENTS = 600
SYMBOLS = symbol_names(4)
LOAD_S, STALL_S = 6.0, 1.5
PARTS = {"run", "worker", "model"}
BOARD = FOLDER.parent / "grafana" / "dashboards" / "tapeline.json"
# What needs a GPU, or something to go wrong.
MAY_BE_EMPTY = re.compile(r"_gpu_|tapeline_stalled_seconds")


@dataclass(frozen=True, slots=True)
class Run:
    """A run at rest: its counts, and the Prometheus that watched it."""

    server: Prometheus
    counts: dict[str, LaneCounts]
    settings: Settings
    port: int


@pytest.fixture(scope="module")
def run(
    make_module_settings: MakeSettings,
    ray_runtime: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Run]:
    """Events with duplicates and a poison record, twice through the cache."""
    folder = tmp_path_factory.mktemp("prometheus")
    save_artifact(seeded_artifact(config=SMALL), folder / "model")
    settings = make_module_settings(
        model={"artifact": folder / "model", "max_batch": 32},
        lanes={CACHED_LANE: {"cache": True}},
        redis={"across_lanes": False},  # or the other lane's were duplicates of whichever is first
        serve={"app_name": "metrics", "worker_num_cpus": 0.2, "model_num_cpus": 0.2},
        autoscale={"enabled": True, "max_workers": 1, "max_replicas": 1, "period_s": 1},
        metrics={"port": free_ports(1)[0]},
    )
    ensure_topics(settings)
    application = ServeApplication(settings)
    application.deploy()
    try:
        with application.metrics() as port, prometheus(folder, port or 0) as server:
            wait_until(
                lambda: {one["part"] for one, up in server.query("up") if up} == PARTS,
                LONG_S,
                "Prometheus to find every process",
            )
            produce(settings)
            yield Run(server, counts_at_rest(application), settings, port or 0)
    finally:
        application.delete()


def produce(settings: Settings) -> None:
    """The same events twice, through another lane each time; and what is no event."""
    events = list(simulate(symbols=SYMBOLS, seed=3, num_events=NUM_EVENTS, start_time_us=10**15))
    with MarketEventProducer(settings) as producer:
        for event in [*events, *events[:7]]:
            producer.produce(event, lane=LANE)
        for event in events:
            producer.produce(event, lane=CACHED_LANE)
    poison = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    poison.produce(settings.lane(LANE).topic, b"no event")
    assert poison.flush(LONG_S) == 0


def counts_at_rest(application: ServeApplication) -> dict[str, LaneCounts]:
    def ended() -> dict[str, LaneCounts] | None:
        counts = total_counts(application.statistics())
        num_records = counts[LANE].records + counts[CACHED_LANE].records
        at_rest = not any(one.in_flight for one in counts.values())
        return counts if at_rest and num_records == 2 * NUM_EVENTS + 8 else None

    return wait_until(ended, LONG_S, "every record to have its end")


def wait_for_total(run: Run, expression: str, expected: float) -> None:
    wait_until(
        lambda: run.server.total(expression) == expected, LONG_S, f"{expression} to be {expected}"
    )


def test_counts_are_the_ledger_s(run: Run) -> None:
    counts = run.counts[LANE]
    assert counts.duplicates == 7
    assert counts.dead_letters == 1
    assert counts.features == NUM_EVENTS - 59 * len(SYMBOLS)
    for lane, one in run.counts.items():
        for outcome in ("records", "features", "warm_up", "duplicates", "dead_letters"):
            expression = f'tapeline_records_total{{lane="{lane}",outcome="{outcome}"}}'
            wait_for_total(run, expression, getattr(one, outcome))
    num_features = sum(one.features for one in run.counts.values())
    for expression in (
        "cnn_lstm_prediction_requests_total",
        "cnn_lstm_prediction_latency_seconds_count",
        "tapeline_latency_seconds_count",
        'tapeline_stage_seconds_count{stage="model"}',
        "cnn_lstm_batch_size_sum + on() sum(cnn_lstm_cache_hits_total)",
    ):
        wait_for_total(run, expression, num_features)
    wait_for_total(run, "cnn_lstm_prediction_errors_total", 0)
    assert run.counts[CACHED_LANE].features == counts.features
    hits_and_misses = "sum(cnn_lstm_cache_hits_total) + sum(cnn_lstm_cache_misses_total)"
    wait_for_total(run, hits_and_misses, run.counts[CACHED_LANE].features)
    wait_for_total(run, f'tapeline_dead_letters_total{{lane="{LANE}"}}', 1)
    assert run.server.total("cnn_lstm_batch_size_count") == run.server.total(
        "cnn_lstm_batch_processing_time_seconds_count"
    )


def test_what_is_in_use_and_how_many_there_are(run: Run) -> None:
    for what in ("cpu", "memory"):
        found = run.server.query(f"cnn_lstm_{what}_utilization_percent")
        assert {labels["part"] for labels, _ in found} == {"worker", "model"}
        assert all(0 <= percent <= 100 for _, percent in found)
    wait_until(  # it is looked at every few seconds, by a thread of its own
        lambda: (
            {labels["lane"] for labels, _ in run.server.query("tapeline_lag_records")}
            == set(run.counts)
        ),
        LONG_S,
        "the lag of every lane",
    )
    wait_for_total(run, "tapeline_lag_records", 0)
    wait_for_total(run, "tapeline_lag_seconds", 0)
    wait_for_total(run, 'tapeline_replicas{state="RUNNING"}', 2)
    wait_for_total(run, "tapeline_autoscale_target", 2)
    assert run.server.total('tapeline_rebalanced_partitions_total{how="assigned"}') == 20
    for what in ("count", "sum"):
        expression = f"tapeline_commit_seconds_{what}"
        wait_until(lambda name=expression: run.server.total(name) > 0, LONG_S, expression)  # type: ignore[misc]


def test_every_panel_of_the_board_has_data(run: Run) -> None:
    panels = json.loads(BOARD.read_text())["panels"]
    targets = [target for panel in panels for target in panel.get("targets", [])]
    assert len(targets) > 40
    for target in targets:
        expression = target["expr"].replace("$__rate_interval", "5m").replace("$lane", ".*")
        found = run.server.query(expression)
        assert found or MAY_BE_EMPTY.search(expression), expression
        for name in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert all(name in labels for labels, _ in found), (name, expression)


def test_rules_are_evaluated_and_none_is_in_trouble(run: Run) -> None:
    [group] = run.server.get("rules")["groups"]
    assert len(group["rules"]) == len(re.findall(r"- alert:", (FOLDER / "alerts.yml").read_text()))
    for rule in group["rules"]:
        assert rule["health"] == "ok", rule
    states = {rule["name"]: rule["state"] for rule in group["rules"]}
    assert {name for name, state in states.items() if state == "firing"} <= {"TapelineDeadLetters"}
    assert {one.partition(":")[0] for one in firing(run.server.url) or ()} <= {
        "TapelineDeadLetters"
    }
    assert firing("http://127.0.0.1:1") is None


def test_every_alert_fires_and_clears_and_has_a_page() -> None:
    promtool = find_program("promtool", package="prometheus", wanted_for="testing the alerts")
    program_output([promtool, "check", "config", str(FOLDER / "prometheus.yml")], timeout_s=60)
    tests = FOLDER / "alerts_test.yml"
    program_output([promtool, "test", "rules", str(tests)], timeout_s=60)
    names = re.findall(r"- alert: (\w+)", (FOLDER / "alerts.yml").read_text())
    assert names == re.findall(r"- name: (\w+)", tests.read_text())
    runbook = (Path(__file__).parents[2] / "docs" / "runbook.md").read_text()
    assert re.findall(r"^## (\w+)$", runbook, re.M) == names


def test_the_page_shows_it_in_a_browser(run: Run, tmp_path: Path) -> None:
    browser = find_program("chromium", package="chromium", wanted_for="testing the page")
    page = program_output(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000",
         f"--user-data-dir={tmp_path}", "--dump-dom", f"http://127.0.0.1:{run.port}/"],
        timeout_s=LONG_S,
    )  # fmt: skip
    assert 'class="bad"' not in page
    for shown in ("cnn-lstm-seeded@", "1 running", LANE, "polyline"):
        assert shown in page, page
    cells = re.findall(r"<td>([^<]*)</td>", page)
    lane = cells.index(LANE)
    assert cells[lane + 10 : lane + 12] == ["7", "1"]  # duplicates, dead letters


def test_a_stall_of_the_model_is_in_the_percentiles(run: Run) -> None:
    """The load goes on while the replica stands still, and so does the clock of each request."""
    replica = replica_process(run.settings.serve.app_name)
    stall = threading.Thread(target=stand_still, args=(replica,))

    def progress(due_s: float) -> None:
        if due_s > LOAD_S / 3 and not stall.ident:
            stall.start()

    async def ask() -> list[Outcome]:
        async with PipelineTarget(run.settings, LANE, 2, seed=0) as target:
            return await open_loop(target, arrivals(60, LOAD_S, 0), LONG_S, progress)

    told = summary(asyncio.run(ask()))
    stall.join()
    assert told["answered"] == told["asked"]
    assert told["latency_ms"]["p90"] > 1000 * STALL_S / 3


def stand_still(process: psutil.Process) -> None:
    process.suspend()
    threading.Event().wait(STALL_S)
    process.resume()


def test_bench_and_sla_by_their_commands(run: Run, tmp_path: Path) -> None:
    environment = as_environment(run.settings)
    path = tmp_path / "report.json"
    words = ["bench", "latency", "--seconds", "1", "--warm-up", "0", "--symbols", "2"]
    done = CliRunner().invoke(app, [*words, "--out", str(path)], env=environment)
    assert done.exit_code == 0, done.output
    report = BenchReport.read(path)
    assert report.asked == report.answered > 0
    assert set(report.stages_ms) == set(STAGES)
    assert report.windows_a_call == 1
    done = CliRunner().invoke(app, ["sla", str(path), "--json"], env=environment)
    checks = {one["name"]: one for one in json.loads(done.output)["checks"]}
    assert checks["errors"]["verdict"] == "kept"
    assert checks["features/s, peak"]["verdict"] == "unknown"
    url = run.server.url
    words = ["sla", "--prometheus", url, "--over", "5m", "--lane", LANE, "--json"]
    found = json.loads(CliRunner().invoke(app, words, env=environment).output)
    checks = {one["name"]: one for one in found["checks"]}
    assert checks["latency p99, ms"]["value"] > 0
    assert checks["errors"]["value"] == 0
    assert checks["latency max, ms"]["verdict"] == "unknown"
