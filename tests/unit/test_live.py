"""Which settings may change while workers run."""

import json
from typing import Any

import pytest

from schemas.errors import ConfigError
from schemas.live import demand_only_live, fixed_version, live_part, with_live_part
from schemas.settings import Settings, load_settings

LIVE: dict[str, Any] = {
    "lanes": {
        "realtime": {"reserved_share": 0.4, "deadline_ms": 20, "expired": "skip", "max_batch": 8},
        "background": {"max_queued_records": 10},
    },
    "worker": {"max_batch": 64, "max_service_share": 0.5},
}


@pytest.fixture
def settings() -> Settings:
    return load_settings()


def test_live_part_travels_as_json_and_gives_the_same_settings(settings: Settings) -> None:
    changed = load_settings(**LIVE)
    assert changed != settings
    live = json.loads(json.dumps(live_part(changed)))
    assert with_live_part(settings, live) == changed


def test_live_changes_keep_the_version_and_pass(settings: Settings) -> None:
    changed = load_settings(**LIVE)
    demand_only_live(settings, changed)
    assert fixed_version(changed) == fixed_version(settings)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"kafka": {"bootstrap_servers": "other:9092"}}, "kafka.bootstrap_servers"),
        ({"lanes": {"realtime": {"topic": "other"}}}, "lanes.realtime.topic"),
        ({"lanes": {"realtime": {"stride": 2}}}, "lanes.realtime.stride"),
        ({"lanes": {"batch": {"enabled": False}}}, "lanes.batch.enabled"),
        ({"worker": {"delivery": "exactly_once"}}, "worker.delivery"),
        ({"lanes": {"new": {"rank": 9, "deadline_ms": 1, "reserved_share": 0}}}, "lanes.new.name"),
    ],
)
def test_everything_else_is_named_and_changes_the_version(
    settings: Settings, overrides: dict[str, Any], named: str
) -> None:
    changed = load_settings(**overrides)
    with pytest.raises(ConfigError, match=f"{named}.* cannot change while workers run"):
        demand_only_live(settings, changed)
    assert fixed_version(changed) != fixed_version(settings)


def test_live_part_is_checked_as_at_the_start(settings: Settings) -> None:
    live = live_part(settings)
    live["lanes"]["background"]["reserved_share"] = 0.9
    with pytest.raises(ConfigError, match=r"reserved shares add up to 1\.87"):
        with_live_part(settings, live)
