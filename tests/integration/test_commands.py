"""The commands on a real broker, through the app that the console script runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from typer.testing import CliRunner

from schemas.codec import Codec
from schemas.messages import FeatureVector
from schemas.settings import Settings
from tapeline.cli import app
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]


class Cli:
    """Runs commands with one test's settings in a file."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self._config = folder / "settings.toml"
        lines = [
            f'state_dir = "{settings.state_dir}"',
            "[kafka]",
            f'bootstrap_servers = "{settings.kafka.bootstrap_servers}"',
        ]
        for lane in settings.active_lanes:
            lines += [
                f'[lanes."{lane.name}"]',
                f'topic = "{lane.topic}"',
                f'output_topic = "{lane.output_topic}"',
                f'group = "{lane.group}"',
            ]
        self._config.write_text("\n".join(lines))

    def run(self, *arguments: str, exit_code: int = 0) -> Any:
        """The command's result; fails unless it ends with that exit code."""
        result = CliRunner().invoke(app, ["--config", str(self._config), *arguments])
        assert result.exit_code == exit_code, (result.output, result.exception)
        return result

    def json(self, *arguments: str, exit_code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", exit_code=exit_code).stdout)


@pytest.fixture
def cli(settings: Settings, tmp_path: Path) -> Cli:
    return Cli(settings, tmp_path)


@pytest.fixture
def tape(tmp_path: Path) -> Path:
    """Five trades of two symbols, and one row that is none."""
    rows = ["symbol,venue,event_time_us,price,size"]
    rows += [f"{'AB'[n % 2]},V,{1_700_000_000_000_000 + n},{1.5 + n},2" for n in range(5)]
    path = tmp_path / "tape.csv"
    path.write_text("\n".join([*rows, "A,V,1700000000000009,-1,2", ""]))
    return path


def publish_features(settings: Settings, num_features: int) -> list[FeatureVector]:
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    codec = Codec(settings.schema_registry)
    features = []
    for number in range(num_features):
        values = np.arange(4, dtype=np.float32) + number / 3
        feature = FeatureVector(
            *(f"e{number}", "AAA", "V", 1_700_000_000_000_000 + number, "realtime", "m1", "c1"),
            *("events", 0, number, values),
            scores={"up": 0.5},
            source_appended_us=1_700_000_000_000_000,
        )
        topic = settings.lane("realtime").output_topic
        producer.produce(topic, codec.encode_feature(feature), b"AAA")
        features.append(feature)
    assert producer.flush(20) == 0
    return features


def test_topics_shows_then_creates_then_is_content(cli: Cli) -> None:
    missing = cli.json("topics", exit_code=1)
    assert {topic["state"] for topic in missing} == {"missing"}
    assert {topic["state"] for topic in cli.json("topics", "--create")} == {"created"}
    assert "exists" in cli.run("topics").stdout


@pytest.mark.parametrize(
    "command", ["lag", "subscribe --limit 1", "simulate --events 1", "produce {tape}"]
)
def test_a_missing_topic_names_the_command_that_makes_it(
    cli: Cli, tape: Path, command: str
) -> None:
    result = cli.run(*command.format(tape=tape).split(), exit_code=2)
    assert "tapeline topics --create" in result.stderr
    assert result.stdout == ""


def test_produce_accounts_for_every_row(cli: Cli, tape: Path) -> None:
    ensure_topics(cli.settings)
    summary = cli.json("produce", str(tape))
    assert (summary["rows"], summary["events"], summary["produced"]) == (6, 5, 5)
    assert sum(summary["rejected"].values()) == 1
    assert "tape.csv:7" in summary["first_rejects"][0]
    assert cli.json("lag", "--lane", "realtime")["lag"] == 5
    cli.json("produce", str(tape), "--limit", "2", "--lane", "batch")
    assert cli.json("lag", "--lane", "batch")["lag"] == 2
    cli.json("produce", str(tape), "--max-rejected", "0", exit_code=1)


def test_simulate_fills_the_lanes_of_a_mix(cli: Cli) -> None:
    ensure_topics(cli.settings)
    mix = ["--mix", "realtime=0.5,batch=0.5"]
    summary = cli.json("simulate", "--events", "400", "--rate", "0", *mix)
    assert summary["produced"] == 400
    lags = {lane: cli.json("lag", "--lane", lane)["lag"] for lane in ("realtime", "batch")}
    assert lags == summary["lanes"]
    assert min(lags.values()) > 100


def test_simulate_keeps_its_pace(cli: Cli) -> None:
    """Event times begin now and are not sent before they are due."""
    ensure_topics(cli.settings)
    summary = cli.json("simulate", "--duration", "0.5", "--rate", "200")
    assert 50 < summary["events"] < 200
    assert summary["seconds"] >= 0.3


def test_lag_shows_commits_and_where_a_replay_begins(cli: Cli, tape: Path) -> None:
    ensure_topics(cli.settings)
    cli.json("produce", str(tape))
    lane = cli.settings.lane("realtime")
    before = cli.json("lag", "--lane", "realtime")["partitions"]
    assert {one["committed"] for one in before} == {None}
    busy = max(before, key=lambda one: one["end"])
    consumer = Consumer(
        {"bootstrap.servers": cli.settings.kafka.bootstrap_servers, "group.id": lane.group}
    )
    point = TopicPartition(lane.topic, busy["partition"], 2, "tapeline/1 replay=1")
    consumer.commit(offsets=[point], asynchronous=False)
    consumer.close()
    after = cli.json("lag", "--lane", "realtime")["partitions"][busy["partition"]]
    assert (after["committed"], after["replay_from"], after["lag"]) == (2, 1, busy["end"] - 2)
    assert "replay from" in cli.run("lag").stdout


def test_subscribe_writes_json_lines_and_a_summary(cli: Cli) -> None:
    ensure_topics(cli.settings)
    sent = publish_features(cli.settings, 3)
    options = ["--from", "earliest", "--limit", "3", "--idle-timeout", "20", "--json"]
    result = cli.run("subscribe", *options)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["source_offset"] for row in rows] == [0, 1, 2]
    for row, feature in zip(rows, sent, strict=True):
        np.testing.assert_array_equal(np.float32(row["features"]), feature.features)
    summary = json.loads(result.stderr)
    assert summary["lanes"] == {"realtime": 3}
    assert (summary["out_of_order"], summary["repeated"], summary["undecodable"]) == (0, 0, 0)
    assert summary["latency_ms"]["p50"] > 0


def test_subscribe_counts_what_comes_twice_or_late(cli: Cli) -> None:
    ensure_topics(cli.settings)
    publish_features(cli.settings, 2)
    publish_features(cli.settings, 2)
    options = ["--from", "earliest", "--limit", "4", "--idle-timeout", "20", "--json"]
    summary = json.loads(cli.run("subscribe", *options).stderr)
    assert (summary["out_of_order"], summary["repeated"]) == (1, 1)


def test_subscribe_exits_1_when_too_few_come(cli: Cli) -> None:
    ensure_topics(cli.settings)
    cli.run("subscribe", "--limit", "1", "--idle-timeout", "0.2", exit_code=1)


def test_subscribe_writes_parquet(cli: Cli) -> None:
    ensure_topics(cli.settings)
    sent = publish_features(cli.settings, 5)
    path = cli.folder / "features.parquet"
    options = ["--from", "earliest", "--limit", "5", "--idle-timeout", "20"]
    cli.run("subscribe", *options, "--output", "parquet", "--file", str(path))
    table = pq.read_table(path)
    assert str(table.schema.field("features").type) == "fixed_size_list<element: float>[4]"
    assert table["source_offset"].to_pylist() == [0, 1, 2, 3, 4]
    for values, feature in zip(table["features"].to_pylist(), sent, strict=True):
        np.testing.assert_array_equal(np.float32(values), feature.features)
    assert table["scores"].to_pylist() == [[("up", 0.5)]] * 5


def test_subscribe_shows_a_table(cli: Cli) -> None:
    ensure_topics(cli.settings)
    publish_features(cli.settings, 2)
    options = ["--from", "earliest", "--limit", "2", "--idle-timeout", "20", "--output", "table"]
    shown = cli.run("subscribe", *options)
    assert "AAA" in shown.stdout
    assert "2 features of 1 symbols (realtime 2)" in shown.stderr


def test_up_and_status_see_services_that_are_given(cli: Cli) -> None:
    statuses = {one["name"]: one for one in cli.json("status", exit_code=cli_status_code(cli))}
    assert statuses["kafka"]["state"] == "external"


def cli_status_code(cli: Cli) -> int:
    """No Redis is named in these settings: whether one runs here is not this test's affair."""
    return CliRunner().invoke(app, ["--config", str(cli._config), "status"]).exit_code
