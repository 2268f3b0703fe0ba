"""The settings that may change while workers run, and what tells them from the others."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError

from schemas.errors import ConfigError
from schemas.settings import Settings

LIVE_OF_LANE = ("deadline_ms", "expired", "max_batch", "max_queued_records", "reserved_share")
LIVE_OF_WORKER = ("max_batch", "max_service_share")


def live_part(settings: Settings) -> dict[str, Any]:
    """Shares, deadlines and limits of the active lanes; JSON, as Serve's ``user_config`` wants."""
    lanes = {
        lane.name: {key: getattr(lane, key) for key in LIVE_OF_LANE}
        for lane in settings.active_lanes
    }
    return {
        "lanes": lanes,
        "worker": {key: getattr(settings.worker, key) for key in LIVE_OF_WORKER},
    }


def with_live_part(settings: Settings, live: Mapping[str, Any]) -> Settings:
    """These settings with another live part, checked as at the start.

    Raises ConfigError.
    """
    values = settings.model_dump()
    for name, changes in live["lanes"].items():
        values["lanes"][name].update(changes)
    values["worker"].update(live["worker"])
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        text = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"settings: {text}") from error


def fixed_version(settings: Settings) -> str:
    """A name for this release and its settings, equal where only live ones differ."""
    fixed = json.dumps([version("tapeline"), _fixed(settings)], sort_keys=True)
    return hashlib.sha256(fixed.encode()).hexdigest()[:16]


def demand_only_live(old: Settings, new: Settings) -> None:
    """Raises ConfigError, naming what needs a restart, unless only live settings differ."""
    before, after = _fixed(old), _fixed(new)
    changed = sorted(key for key in before | after if before.get(key) != after.get(key))
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} cannot change while workers run; start them again. What can: "
            f"lanes.<name>.({' | '.join(LIVE_OF_LANE)}), worker.({' | '.join(LIVE_OF_WORKER)})"
        )


def _fixed(settings: Settings) -> dict[str, Any]:
    """Every other setting by its dotted key."""
    values = settings.model_dump(mode="json")
    for lane in values["lanes"].values():
        for key in LIVE_OF_LANE:
            del lane[key]
    for key in LIVE_OF_WORKER:
        del values["worker"][key]
    return dict(_flat(values, ""))


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat
