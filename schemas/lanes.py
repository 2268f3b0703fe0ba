"""The lanes: priorities as configuration. Each is a topic, a consumer group and its rights."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A table of the settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LaneSettings(Section):
    """One priority: a topic, its consumer group and its rights.

    ``topic``, ``output_topic`` and ``group`` are named after the lane unless given.
    """

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="Taken from its key in `lanes`."
    )
    rank: int = Field(ge=1, description="1 goes first.")
    deadline_ms: float = Field(gt=0, description="From append to the lane's topic.")
    reserved_share: Fraction = Field(description="Of each micro-batch, when the lane wants it.")
    expired: Literal["process", "stale", "skip"] = Field(
        "process",
        description="What becomes of work past its deadline: `process`: nothing special; `stale`: "
        "its features are flagged; `skip`: none is made, and the symbol's next one is flagged.",
    )
    enabled: bool = Field(True, description="false takes the lane away.")
    topic: str = Field("", description="none: `market-events.<name>`; dead letters: + `.dlq`.")
    output_topic: str = Field("", description="none: `features.<name>`.")
    group: str = Field("", description="The workers' consumer group; none: `tapeline.<name>`.")
    stride: int = Field(1, ge=1, description="One feature in so many events, by hash of their ids.")
    min_interval_ms: float = Field(
        0, ge=0, description="At most one feature a symbol per so much event time."
    )
    max_batch: int | None = Field(
        None, ge=1, description="Of this lane in a micro-batch; none: `worker.max_batch`."
    )
    cache: bool = Field(
        False, description="Takes features of windows seen before from the cache; for backfills."
    )
    drain_target_s: float | None = Field(
        None,
        gt=0,
        description="In which time the autoscaler wants the lane's lag worked off; none: "
        "`autoscale.drain_target_s`.",
    )
    fetch_wait_ms: int = Field(
        0,
        ge=0,
        le=60_000,
        description="How long the broker gathers records for a worker before it answers; 0: it "
        "answers with the first. Spares both a request an event, which may be so much later.",
    )
    max_queued_records: int = Field(
        4096, ge=1, description="Waiting in a worker; then the lane is paused until half are left."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_after_lane(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("name"):
            return values
        name = values["name"]
        return {
            "topic": f"market-events.{name}",
            "output_topic": f"features.{name}",
            "group": f"tapeline.{name}",
        } | values

    @property
    def dlq_topic(self) -> str:
        return f"{self.topic}.dlq"

    def is_late(self, appended_us: int, now_us: int) -> bool:
        """Whether a record appended then (Unix epoch, microseconds) is past the deadline now."""
        return now_us - appended_us > self.deadline_ms * 1000

    def are_late(self, appended_us: NDArray[np.int64], now_us: int) -> NDArray[np.bool_]:
        """``is_late`` of many."""
        late: NDArray[np.bool_] = now_us - appended_us > self.deadline_ms * 1000
        return late


DEFAULT_LANES: Mapping[str, Mapping[str, Any]] = {
    "realtime": {"rank": 1, "deadline_ms": 50, "reserved_share": 0.50, "expired": "stale"},
    "market-data": {"rank": 2, "deadline_ms": 100, "reserved_share": 0.25, "expired": "stale"},
    "batch": {"rank": 3, "deadline_ms": 1_000, "reserved_share": 0.15, "fetch_wait_ms": 20},
    "historical": {
        "rank": 4,
        "deadline_ms": 30_000,
        "reserved_share": 0.07,
        "fetch_wait_ms": 100,
    },
    "background": {
        "rank": 5,
        "deadline_ms": 300_000,
        "reserved_share": 0.03,
        "fetch_wait_ms": 100,
    },
}


def check_relations(lanes: Sequence[LaneSettings]) -> None:
    """Raises ValueError unless these lanes can work side by side."""
    if not lanes:
        raise ValueError("lanes: at least one lane must be enabled")
    total = sum(lane.reserved_share for lane in lanes)
    if total > 1 + 1e-9:
        raise ValueError(f"lanes: reserved shares add up to {total:.2f}, more than 1")
    for what in ("rank", "topic", "group"):
        if len({getattr(lane, what) for lane in lanes}) < len(lanes):
            raise ValueError(f"lanes: two lanes have the same {what}")
    inputs = {lane.topic: lane.name for lane in lanes}
    for lane in lanes:
        for topic in (lane.output_topic, lane.dlq_topic):
            if topic in inputs:
                raise ValueError(
                    f"lanes: {lane.name} writes to {topic}, which lane {inputs[topic]} reads"
                )
