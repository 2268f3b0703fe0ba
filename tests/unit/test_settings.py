"""Settings: which source wins, what is refused, and with which words."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.errors import ConfigError
from schemas.lanes import DEFAULT_LANES
from schemas.settings import (
    CONFIG_FILE_ENV,
    DEFAULT_CONFIG_FILE,
    Settings,
    as_environment,
    iter_documented_settings,
    load_settings,
)

WriteFile = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ./tapeline.toml but the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write_file(tmp_path: Path) -> WriteFile:
    def write(text: str) -> Path:
        path = tmp_path / "given.toml"
        path.write_text(text)
        return path

    return write


# Which source wins.


def test_defaults_need_no_file() -> None:
    settings = load_settings()
    assert [lane.name for lane in settings.active_lanes] == list(DEFAULT_LANES)
    assert [lane.rank for lane in settings.active_lanes] == [1, 2, 3, 4, 5]
    assert sum(lane.reserved_share for lane in settings.active_lanes) == pytest.approx(1)
    assert settings.kafka.bootstrap_servers == "127.0.0.1:9092"


def test_override_wins_over_environment_over_file_over_default(
    write_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_file('[kafka]\nbootstrap_servers = "file:1"\nnum_partitions = 7\ntimeout_s = 3\n')
    monkeypatch.setenv("TAPELINE_KAFKA__BOOTSTRAP_SERVERS", "environment:1")
    monkeypatch.setenv("TAPELINE_KAFKA__NUM_PARTITIONS", "8")
    kafka = load_settings(path, kafka={"bootstrap_servers": "override:1"}).kafka
    assert kafka.bootstrap_servers == "override:1"
    assert kafka.num_partitions == 8
    assert kafka.timeout_s == 3
    assert kafka.replication_factor == 1


def test_file_is_the_given_else_the_named_else_the_one_here(
    write_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def port() -> int:
        return load_settings().metrics.port

    assert port() == 0
    (tmp_path / DEFAULT_CONFIG_FILE).write_text("metrics.port = 1111")
    assert port() == 1111
    (tmp_path / "named.toml").write_text("metrics.port = 2222")
    monkeypatch.setenv(CONFIG_FILE_ENV, str(tmp_path / "named.toml"))
    assert port() == 2222
    assert load_settings(write_file("metrics.port = 3333")).metrics.port == 3333
    assert port() == 2222, "a given file is read once, not remembered"


def test_raw_kafka_settings_pass_through(
    write_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_file('[kafka.client]\n"security.protocol" = "SSL"\n"fetch.wait.max.ms" = 5\n')
    monkeypatch.setenv("TAPELINE_KAFKA__CLIENT", '{"socket.nagle.disable": true}')
    assert load_settings(path).kafka.client == {
        "security.protocol": "SSL",
        "fetch.wait.max.ms": 5,
        "socket.nagle.disable": True,
    }


def test_redis_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPELINE_REDIS__URL", "")
    assert not load_settings().redis.url


# Lanes.


def test_lane_is_laid_over_the_default_of_its_name(
    write_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_file("[lanes.realtime]\ndeadline_ms = 20\n[lanes.market-data]\nstride = 3\n")
    monkeypatch.setenv("TAPELINE_LANES__REALTIME__MIN_INTERVAL_MS", "5")
    settings = load_settings(path)
    realtime, market_data = settings.active_lanes[:2]
    assert (realtime.rank, realtime.deadline_ms, realtime.min_interval_ms) == (1, 20, 5)
    assert realtime.expired == "stale"
    assert realtime.topic == "market-events.realtime"
    assert (market_data.stride, market_data.deadline_ms) == (3, 100)
    assert len(settings.active_lanes) == 5


def test_new_lane_names_its_topics_after_itself() -> None:
    given = {"rank": 9, "deadline_ms": 10, "reserved_share": 0, "output_topic": "signals"}
    lane = load_settings(lanes={"fx.spot": given}).lane("fx.spot")
    assert lane.topic == "market-events.fx.spot"
    assert lane.group == "tapeline.fx.spot"
    assert lane.dlq_topic == "market-events.fx.spot.dlq"
    assert lane.output_topic == "signals"


def test_disabled_lanes_take_no_part() -> None:
    off = {name: {"enabled": False} for name in DEFAULT_LANES if name != "batch"}
    settings = load_settings(lanes=off)
    assert [lane.name for lane in settings.active_lanes] == ["batch"]
    with pytest.raises(ConfigError, match="no lane 'realtime'"):
        settings.lane("realtime")
    # What a disabled lane says contradicts nobody.
    mine = {"rank": 1, "deadline_ms": 1, "reserved_share": 0.5}
    settings = load_settings(lanes={"realtime": {"enabled": False}, "mine": mine})
    assert settings.active_lanes[0].name == "mine"


def test_unknown_lane_name_is_refused_with_a_suggestion() -> None:
    settings = load_settings()
    with pytest.raises(ConfigError, match=r"no lane 'realtme'; did you mean 'realtime'\?"):
        settings.lane("realtme")
    with pytest.raises(ConfigError, match="known are background, batch, historical"):
        settings.lane("xyz")


# What is refused.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kafak.timeout_s = 1", "unknown setting 'kafak'; did you mean 'kafka'?"),
        (
            "kafka.bootstrap_server = 'x:1'",
            "kafka: unknown setting 'bootstrap_server'; did you mean 'bootstrap_servers'?",
        ),
        ("lanes.realtime.stribe = 2", "lanes.realtime: unknown setting 'stribe'; did you mean 'st"),
        ("zzz = 1", "unknown setting 'zzz'; known are autoscale, cache"),
        ("kafka = 3", "kafka: Input should be a valid dictionary"),
        ("lanes = 3", "lanes: Input should be a valid dictionary"),
        ("lanes.realtime = 3", "lanes.realtime: Input should be"),
        ("lanes.realtime.rank = 0", "lanes.realtime.rank: Input should be greater than or equal"),
        ("lanes.new.rank = 9", "lanes.new.deadline_ms: Field required"),
        ("lanes.UPPER = {rank=9, deadline_ms=1, reserved_share=0}", "lanes.UPPER.name: String"),
        ("worker.max_batch = 'many'", "worker.max_batch: Input should be a valid integer"),
        ("metrics.port = 70000", "metrics.port: Input should be less than or equal to 65535"),
        ("kafka.bootstrap_servers = ''", "kafka.bootstrap_servers: String should have at least"),
    ],
)
def test_file_with_a_wrong_key_or_value(write_file: WriteFile, text: str, words: str) -> None:
    path = write_file(text)
    with pytest.raises(ConfigError) as refused:
        load_settings(path)
    assert words in str(refused.value)
    if "unknown" in words:
        assert str(path) in str(refused.value), "it says where"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TAPELINE_KAFAK__TIMEOUT_S", "1", "unknown setting 'kafak'; did you mean 'kafka'?"),
        ("TAPELINE_STATEDIR", "x", "unknown setting 'statedir'; did you mean 'state_dir'?"),
        ("TAPELINE_REDIS__URI", "x", "redis: unknown setting 'uri'; did you mean 'url'?"),
        (
            "TAPELINE_LANES__REALTIME__RNAK",
            "3",
            "lanes.realtime: unknown setting 'rnak'; did you mean 'rank'?",
        ),
        ("TAPELINE_KAFKA", '{"timeouts": 1}', "unknown setting 'timeouts'; did you mean 'timeout_"),
        ("TAPELINE_LANES", '{"batch": {"rnak": 1}}', "unknown setting 'rnak'; did you mean 'rank'"),
        ("TAPELINE_KAFKA", "broker:9092", "write a section as JSON"),
        ("TAPELINE_KAFKA__CLIENT", "acks=all", "write a section as JSON"),
        ("TAPELINE_KAFKA__NUM_PARTITIONS", "few", "kafka.num_partitions: Input should be a valid"),
        ("TAPELINE_", "1", "unknown setting ''"),
    ],
)
def test_environment_with_a_wrong_key_or_value(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as refused:
        load_settings()
    assert words in str(refused.value)
    if "unknown" in words:
        assert f"environment variable {variable}" in str(refused.value), "it says where"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"kafak": {}}, "unknown setting 'kafak'; did you mean 'kafka'?"),
        ({"worker": {"max_batches": 1}}, "worker: unknown setting 'max_batches'; did you mean"),
        ({"lanes": {"batch": {"rnak": 1}}}, "lanes.batch: unknown setting 'rnak'"),
        ({"lanes": [1]}, "lanes: Input should be a valid dictionary"),
    ],
)
def test_override_with_a_wrong_key_or_value(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(**overrides)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"worker": {"retry_deadline_s": 290, "drain_timeout_s": 10}},
            "retry_deadline_s + drain_timeout_s must stay below max_poll_interval_s",
        ),
        (
            {"worker": {"drain_timeout_s": 0.2, "commit_interval_ms": 200}},
            "commit_interval_ms must be shorter than drain_timeout_s",
        ),
        ({"lanes": {"batch": {"reserved_share": 0.16}}}, "reserved shares add up to 1.01"),
        ({"lanes": {"batch": {"rank": 1}}}, "two lanes have the same rank"),
        ({"lanes": {"batch": {"topic": "market-events.realtime"}}}, "the same topic"),
        ({"lanes": {"batch": {"group": "tapeline.realtime"}}}, "the same group"),
        ({"lanes": {name: {"enabled": False} for name in DEFAULT_LANES}}, "at least one lane"),
    ],
)
def test_limits_that_contradict_each_other(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(**overrides)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value), "one sentence"


def test_limits_just_within_their_relations() -> None:
    load_settings(worker={"retry_deadline_s": 289.9, "drain_timeout_s": 10})
    load_settings(worker={"drain_timeout_s": 0.21, "commit_interval_ms": 200})
    load_settings(lanes={"batch": {"reserved_share": 0.15}})


def test_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.toml: No such"):
        load_settings(missing)
    monkeypatch.setenv(CONFIG_FILE_ENV, str(missing))
    with pytest.raises(ConfigError, match="cannot read the settings file"):
        load_settings()
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_settings(tmp_path)


@pytest.mark.parametrize("content", [b"kafka = ", b"[kafka", b"\xff\xfe", b"a = 1\na = 2"])
def test_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        load_settings(path)


# How they travel.


def changed_settings(tmp_path: Path) -> Settings:
    return load_settings(
        kafka={"client": {"security.protocol": "SSL"}},
        lanes={"fx": {"rank": 6, "deadline_ms": 5, "reserved_share": 0}, "batch": {"stride": 2}},
        model={"artifact": tmp_path},
        redis={"url": None},
    )


def test_pickling_keeps_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray sends them to replicas; those must not read files and variables of their own machine."""
    settings = changed_settings(tmp_path)
    sent = pickle.dumps(settings)
    monkeypatch.setenv("TAPELINE_KAFKA__BOOTSTRAP_SERVERS", "elsewhere:1")
    assert pickle.loads(sent) == settings


def test_environment_of_a_child_gives_it_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed_settings(tmp_path)
    for variable, value in as_environment(settings).items():
        monkeypatch.setenv(variable, value)
    assert load_settings() == settings


def test_settings_cannot_be_changed() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.state_dir = Path("x")  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.kafka.num_partitions = 1  # type: ignore[misc]


def test_reference_lists_every_setting() -> None:
    documented = [key for key, _, _ in iter_documented_settings()]
    assert len(documented) == len(set(documented))
    dumped = json.loads(load_settings().model_dump_json())
    lane = dumped.pop("lanes")["realtime"]
    expected = {f"lanes.<name>.{key}" for key in lane}
    for section, values in dumped.items():
        names = {f"{section}.{key}" for key in values} if isinstance(values, dict) else {section}
        expected |= names
    assert set(documented) == expected
