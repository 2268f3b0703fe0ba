"""What a processor promises, and where it says how it keeps that."""

from typing import Self

from pydantic import Field, model_validator

from schemas.lanes import Section


class MetricsSettings(Section):
    """Prometheus."""

    port: int = Field(
        0,
        ge=0,
        le=65_535,
        description="Of `tapeline worker` and `tapeline run`: `/metrics`, and `/targets` for all "
        "others; 0: no endpoint.",
    )
    prometheus: str | None = Field(
        None,
        description="Where a Prometheus answers, `http://HOST:9090`: `tapeline top` and the page "
        "show its alerts.",
    )


class TracingSettings(Section):
    """OpenTelemetry; where spans go is said by its standard variables (OTEL_EXPORTER_OTLP_...)."""

    enabled: bool = Field(False, description="Whether workers make spans.")
    sample_ratio: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Of the events without a trace; one that has a `traceparent` follows its flag.",
    )


class SlaSettings(Section):
    """Promises that `tapeline sla` checks."""

    p50_ms: float = Field(50, gt=0, description="Half of the features are faster.")
    p95_ms: float = Field(80, gt=0, description="So are 95 % of them.")
    p99_ms: float = Field(100, gt=0, description="So are 99 %.")
    max_ms: float = Field(200, gt=0, description="The slowest.")
    min_per_s: float = Field(50, gt=0, description="Features a second: less has failed.")
    target_per_s: float = Field(200, gt=0, description="So many are promised.")
    max_per_s: float = Field(500, gt=0, description="So many must be bearable at peaks.")
    availability: float = Field(0.999, gt=0, le=1, description="Of the time.")
    errors: float = Field(0.01, ge=0, le=1, description="Of what is asked for, at most.")
    cpu_percent: float = Field(80, gt=0, le=100, description="Of the processor, at most.")
    memory_percent: float = Field(85, gt=0, le=100, description="Of the memory, at most.")
    gpu_percent: float = Field(90, gt=0, le=100, description="Of a GPU's time, at most.")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        for names in (
            ("p50_ms", "p95_ms", "p99_ms", "max_ms"),
            ("min_per_s", "target_per_s", "max_per_s"),
        ):
            values = [getattr(self, name) for name in names]
            if values != sorted(values):
                raise ValueError(f"{', '.join(names)} must not fall, these are {values}")
        return self
