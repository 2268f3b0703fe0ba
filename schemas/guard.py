"""When a worker steps back: which resources count, and how full they may be."""

from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.lanes import Fraction, Section

Resource = Literal["cpu", "memory", "gpu_memory"]
RESOURCES: tuple[Resource, ...] = ("cpu", "memory", "gpu_memory")


class GuardSettings(Section):
    """How full the machine may be. Above a target micro-batches shrink; above a max lanes are held.

    ``hysteresis`` < target < max, for every resource.
    """

    cpu: bool = Field(
        False,
        description="Whether the processor counts. Small micro-batches cost more of it than large "
        "ones.",
    )
    cpu_target: Fraction = Field(
        0.70, description="In use above it, the largest micro-batch is halved once a second."
    )
    cpu_max: Fraction = Field(
        0.85, description="Above it one more lane a second is held to its reserved share, too."
    )
    memory: bool = Field(True, description="Whether memory counts.")
    memory_target: Fraction = Field(0.75, description="As `guard.cpu_target`.")
    memory_max: Fraction = Field(0.90, description="As `guard.cpu_max`.")
    gpu_memory: bool = Field(
        False,
        description="Whether GPU memory counts, where the model runs on one. An engine keeps what "
        "it took at its start, however small micro-batches are.",
    )
    gpu_memory_target: Fraction = Field(0.60, description="As `guard.cpu_target`.")
    gpu_memory_max: Fraction = Field(0.80, description="As `guard.cpu_max`.")
    hysteresis: Fraction = Field(
        0.05, description="So far below their targets all of them give back what they took."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for resource in RESOURCES:
            target, maximum = self.target(resource), self.maximum(resource)
            if target >= maximum:
                raise ValueError(
                    f"{resource}_target ({target:g}) must be below {resource}_max ({maximum:g})"
                )
            if target <= self.hysteresis:
                raise ValueError(
                    f"{resource}_target ({target:g}) must be above hysteresis "
                    f"({self.hysteresis:g}), or nothing would ever be given back"
                )
        return self

    def target(self, resource: Resource) -> float:
        value: float = getattr(self, f"{resource}_target")
        return value

    def maximum(self, resource: Resource) -> float:
        value: float = getattr(self, f"{resource}_max")
        return value

    def watched(self, device: str) -> tuple[Resource, ...]:
        """The resources that count with the model on that device, ``cpu`` or ``cuda``."""
        counts = {
            "cpu": self.cpu,
            "memory": self.memory,
            "gpu_memory": self.gpu_memory and device != "cpu",
        }
        return tuple(one for one in RESOURCES if counts[one])
