"""Settings of the HTTP door."""

from pydantic import Field

from schemas.lanes import Section


class HttpSettings(Section):
    """The HTTP door of ``tapeline run``, beside Kafka. Off unless enabled."""

    enabled: bool = Field(False, description="Whether `tapeline run` answers HTTP, too.")
    host: str = Field("127.0.0.1", description="Address that it listens on; `0.0.0.0`: all.")
    port: int = Field(8000, ge=0, le=65_535, description="Port that it listens on.")
    token: str | None = Field(
        None, min_length=1, description="Demanded as `Authorization: Bearer ...`; none: of nobody."
    )
    num_replicas: int = Field(1, ge=1, description="Of the door.")
    num_cpus: float = Field(0.2, ge=0, description="Ray books so many for each of them.")
    requests_per_minute: int = Field(
        6000, ge=0, description="From one address, at each replica of the door; 0: no limit."
    )
    max_body_bytes: int = Field(8 << 20, ge=1, description="A larger request is refused.")
    max_windows: int = Field(256, ge=1, description="In one request.")
    max_symbols: int = Field(
        100_000, ge=1, description="Whose latest features are kept; the longest silent leaves."
    )
    timeout_s: float = Field(10, gt=0, description="For an answer of the model.")
