"""Settings of the autoscaler."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from schemas.lanes import Fraction, Section

CAPACITY_METRIC = "capacity_per_s"
"""What a replica could do, as it tells Serve (``record_autoscaling_stats``)."""


class AutoscaleSettings(Section):
    """How many workers and model replicas ``tapeline run`` keeps. Off unless enabled."""

    enabled: bool = Field(
        False, description="Else `serve.num_workers` and `model.num_replicas` hold."
    )
    min_workers: int = Field(1, ge=0, description="0: none while nothing comes.")
    max_workers: int = Field(4, ge=1, description="No more than a lane has busy partitions.")
    min_replicas: int = Field(1, ge=0, description="Of the model; 0: none while nothing comes.")
    max_replicas: int = Field(4, ge=1, description="Of the model.")
    drain_target_s: float = Field(
        10, gt=0, description="A lane's lag is to be worked off in so long, unless the lane says."
    )
    utilisation: Fraction = Field(
        0.8, gt=0, description="Of what workers and replicas can do, how much is planned with."
    )
    period_s: float = Field(2, gt=0, description="Between looks at the broker, and decisions.")
    stale_after_s: float = Field(
        15, gt=0, description="Without a good look for so long, everything stays as it is."
    )
    worker_events_per_s: float = Field(
        2000, gt=0, description="A worker's capacity until it is measured."
    )
    replica_windows_per_s: float = Field(
        1000, gt=0, description="A model replica's capacity until it is measured."
    )
    worker_start_s: float = Field(
        8, gt=0, description="What a new worker takes until it works, its rebalance included."
    )
    rebalance_s: float = Field(
        3, ge=0, description="How long a change of their number stops all workers."
    )
    replica_start_s: float = Field(15, gt=0, description="The same of a model replica.")
    idle_s: float = Field(
        120, gt=0, description="So long without events or lag before the last one goes (min 0)."
    )
    trace: Path | None = Field(
        None, description="Where decisions are recorded; none: `autoscale.jsonl` in `state_dir`."
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        for what in ("workers", "replicas"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low > high:
                raise ValueError(f"min_{what} ({low}) must not be above max_{what} ({high})")
        if self.stale_after_s <= self.period_s:
            raise ValueError("stale_after_s must be longer than period_s")
        return self
