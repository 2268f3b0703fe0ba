"""One frozen tree of settings: defaults, then a TOML file, then the environment.

``TAPELINE_KAFKA__BOOTSTRAP_SERVERS=host:9092`` sets ``kafka.bootstrap_servers``. Unknown keys are
refused with a suggestion, and so are values that contradict each other.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from schemas.autoscale import AutoscaleSettings
from schemas.errors import ConfigError
from schemas.guard import GuardSettings
from schemas.http import HttpSettings
from schemas.lanes import DEFAULT_LANES, Fraction, LaneSettings, Section, check_relations
from schemas.redis import RedisSettings
from schemas.sla import MetricsSettings, SlaSettings, TracingSettings

ENV_PREFIX = "TAPELINE_"
CONFIG_FILE_ENV = "TAPELINE_CONFIG"
DEFAULT_CONFIG_FILE = "tapeline.toml"

Cores = list[Annotated[int, Field(ge=0, lt=4096)]]

_toml_file: ContextVar[Path | None] = ContextVar("toml_file", default=None)


class KafkaSettings(Section):
    """Where the broker is and how topics are made."""

    bootstrap_servers: str = Field(
        "127.0.0.1:9092", min_length=1, description="`host:port` of brokers, comma-separated."
    )
    client: dict[str, str | int | float | bool] = Field(
        {}, description="Raw librdkafka settings, passed to every client (security, tuning)."
    )
    num_partitions: int = Field(4, ge=1, le=10_000, description="Of each topic that is created.")
    replication_factor: int = Field(1, ge=1, le=15, description="Of each topic that is created.")
    timeout_s: float = Field(10, gt=0, description="For metadata and other requests to the broker.")


class SchemaRegistrySettings(Section):
    """Confluent wire format with a URL; bare Avro and a fingerprint header without."""

    url: str | None = Field(
        None, description="Of the registry; none: bare Avro and a fingerprint header."
    )
    client: dict[str, str | int | float | bool] = Field(
        {}, description="Raw settings of confluent-kafka's SchemaRegistryClient."
    )


class WindowSettings(Section):
    """How much of a symbol's past the model sees, and when that past is void."""

    channel_set: str = Field("market50-v1", description="What a row holds: docs/channels.md.")
    num_steps: int = Field(60, ge=1, le=4096, description="Rows in a window; the model's length.")
    max_gap_s: float = Field(
        300, gt=0, description="A longer silence of a symbol, in event time, empties its window."
    )
    max_idle_records: int = Field(
        100_000, ge=1, description="So many records of its partition without one empty it too."
    )
    max_symbols: int = Field(10_000, ge=1, description="Per partition; the longest unseen leaves.")


class WorkerSettings(Section):
    """The loop: what is promised, how much at once, and how long to wait for an end."""

    delivery: Literal["at_least_once", "exactly_once"] = Field(
        "at_least_once",
        description="`exactly_once`: features and offsets in one Kafka transaction.",
    )
    transaction_interval_ms: float = Field(
        20, ge=0, description="Least time from one transaction of a lane to its next; 0: none."
    )
    transaction_timeout_s: float = Field(
        10, ge=1, description="A transaction left open for so long is ended by the broker."
    )
    instance_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,100}$",
        description="This worker's lasting name, as transactions and static membership need it; "
        "none: a free slot of this machine, or the replica's rank on Ray Serve.",
    )
    static_membership: bool = Field(
        False, description="A worker back within `session_timeout_s` keeps its partitions."
    )
    group_protocol: Literal["classic", "consumer"] = Field(
        "classic", description="`consumer` is KIP-848: Kafka 4.0 and newer."
    )
    session_timeout_s: float = Field(
        10, ge=1, description="A silent worker is given up; with KIP-848 the broker decides."
    )
    max_batch: int = Field(1024, ge=1, le=65_536, description="Records in a micro-batch.")
    max_service_share: Fraction = Field(
        0.2,
        gt=0,
        description="Other lanes' records may hold the model for this share of the shortest "
        "deadline among the lanes with traffic: what a new record there may have to wait for.",
    )
    max_in_flight: int = Field(2, ge=1, le=256, description="Micro-batches at the model at once.")
    batch_interval_ms: float = Field(
        5,
        ge=0,
        description="Least time from one micro-batch to the next, unless it is full; 0: none.",
    )
    max_unacknowledged: int = Field(
        64, ge=1, description="Micro-batches between their records' arrival and acknowledgement."
    )
    timing_header: bool = Field(
        False, description="Features say in a `server-timing` header where their time went."
    )
    max_message_bytes: int = Field(1_048_576, ge=1, description="A larger record is poison.")
    dlq_max_ratio: Fraction = Field(
        0.2,
        description="Dead letters among a lane's last 1,000 records; above it the worker stops.",
    )
    dlq_max_consecutive: int = Field(
        100, ge=1, description="So many dead letters of a lane in a row stop the worker."
    )
    stall_after_s: float = Field(
        20, gt=0, description="A record in flight for longer: its partition is reported as stalled."
    )
    commit_interval_ms: float = Field(200, gt=0, description="Between commits of each lane.")
    retry_deadline_s: float = Field(30, gt=0, description="For transient faults, then it stops.")
    drain_timeout_s: float = Field(
        10, gt=0, description="To finish what is in flight when partitions or the worker leave."
    )
    max_poll_interval_s: float = Field(
        300, gt=0, description="A worker stuck for so long loses its partitions."
    )
    cpu_affinity: Cores = Field(
        [], description="The cores that it runs on, numbered from 0; none: all. Linux alone."
    )


class ModelSettings(Section):
    """Which model, and where it runs."""

    artifact: Path | None = Field(None, description="A model folder; none: seeded weights.")
    store: Path | None = Field(
        None,
        description="Instead, a folder of model versions, among which `tapeline model promote` "
        "and `rollback` choose while workers run.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`cpu` or `cuda`; `auto` takes a GPU if torch sees one."
    )
    num_threads: int = Field(
        1, ge=1, description="Torch's: they compute, or copy windows to a GPU's staging memory."
    )
    gpu_memory_fraction: Fraction = Field(
        1.0, gt=0, description="Of a GPU, for each process that holds a model."
    )
    gpu_wait: Literal["spin", "sleep"] = Field(
        "spin", description="Of a thread, for a GPU; `sleep` where several processes share one."
    )
    cpu_affinity: Cores = Field(
        [],
        description="The cores that its threads run on; none: those of its process. Replicas on "
        "one machine share them.",
    )
    num_replicas: int = Field(1, ge=1, description="Of the model, on Ray Serve.")
    max_batch: int = Field(256, ge=1, description="The largest bucket that is tried.")
    max_call_ms: float = Field(
        50, gt=0, description="A bucket that takes longer when it is tried is not used."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.artifact is not None and self.store is not None:
            raise ValueError("set artifact or store, not both: a store says itself what serves")
        return self

    @model_validator(mode="after")
    def _threads_have_cores(self) -> Self:
        num_cores = len(set(self.cpu_affinity))
        if num_cores and self.num_threads > num_cores:
            raise ValueError(
                f"num_threads ({self.num_threads}) must not be above the number of cores in "
                f"cpu_affinity ({num_cores}): threads would wait for each other"
            )
        return self


class CacheSettings(Section):
    """Features of windows seen before, for lanes with ``cache = true``."""

    memory_mb: int = Field(64, ge=1, description="In each worker; the longest unused leaves.")
    in_redis: bool = Field(True, description="Kept in `redis.url`, too, for all workers.")
    ttl_s: int = Field(86_400, ge=1, description="How long a window's features are kept.")
    key_prefix: str = Field("tapeline:features:", description="In front of each key in Redis.")
    recompute_share: Fraction = Field(
        0.01, description="Of the hits, computed again and compared; a mismatch is counted."
    )


class ServeSettings(Section):
    """The Ray side of ``tapeline run``."""

    address: str | None = Field(None, description="A Ray cluster to join; none: a local one.")
    app_name: str = Field("tapeline", description="The Serve application's name.")
    num_workers: int = Field(1, ge=1, description="Worker replicas; they share the partitions.")
    worker_num_cpus: float = Field(0.5, ge=0, description="Ray books so many for each worker.")
    model_num_cpus: float = Field(0.5, ge=0, description="Ray books so many for each model.")
    model_num_gpus: float = Field(
        0, ge=0, description='The same; `model.device = "cuda"` needs more than 0.'
    )


class Settings(BaseSettings):
    """Everything that can be set. Build it with ``load_settings``."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    kafka: KafkaSettings = KafkaSettings()
    redis: RedisSettings = RedisSettings()
    schema_registry: SchemaRegistrySettings = SchemaRegistrySettings()
    lanes: dict[str, LaneSettings] = Field({}, validate_default=True)
    window: WindowSettings = WindowSettings()
    worker: WorkerSettings = WorkerSettings()
    guard: GuardSettings = GuardSettings()
    model: ModelSettings = ModelSettings()
    cache: CacheSettings = CacheSettings()
    serve: ServeSettings = ServeSettings()
    http: HttpSettings = HttpSettings()
    autoscale: AutoscaleSettings = AutoscaleSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    sla: SlaSettings = SlaSettings()
    state_dir: Path = Field(Path(".tapeline"), description="What `tapeline up` keeps.")

    @field_validator("lanes", mode="before")
    @classmethod
    def _over_the_defaults(cls, lanes: Any) -> Any:
        """A lane given is laid over the default of its name; ``enabled = false`` takes one away."""
        if not isinstance(lanes, Mapping):
            return lanes
        merged = {name: {**lane, "name": name} for name, lane in DEFAULT_LANES.items()}
        for name, lane in lanes.items():
            if not isinstance(lane, Mapping):
                return lanes
            merged[name] = {**merged.get(name, {}), **lane, "name": name}
        return merged

    @model_validator(mode="after")
    def _relations_between_limits(self) -> Self:
        check_relations(self.active_lanes)
        worker = self.worker
        for lane in self.active_lanes:
            if lane.max_batch is not None and lane.max_batch > worker.max_batch:
                raise ValueError(
                    f"lanes.{lane.name}: max_batch must not be above worker.max_batch "
                    f"({worker.max_batch})"
                )
        if worker.retry_deadline_s + worker.drain_timeout_s >= worker.max_poll_interval_s:
            raise ValueError(
                "worker: retry_deadline_s + drain_timeout_s must stay below max_poll_interval_s, "
                "or the broker takes the partitions away from a worker that still tries"
            )
        if worker.commit_interval_ms / 1000 >= worker.drain_timeout_s:
            raise ValueError("worker: commit_interval_ms must be shorter than drain_timeout_s")
        if worker.transaction_interval_ms / 1000 >= worker.transaction_timeout_s:
            raise ValueError(
                "worker: transaction_interval_ms must be shorter than transaction_timeout_s"
            )
        if worker.session_timeout_s >= worker.max_poll_interval_s:
            raise ValueError("worker: session_timeout_s must be below max_poll_interval_s")
        return self

    @property
    def active_lanes(self) -> list[LaneSettings]:
        """The enabled lanes, first rank first."""
        enabled = (lane for lane in self.lanes.values() if lane.enabled)
        return sorted(enabled, key=lambda lane: lane.rank)

    def lane(self, name: str) -> LaneSettings:
        """The enabled lane of that name. Raises ConfigError with a suggestion."""
        for lane in self.active_lanes:
            if lane.name == name:
                return lane
        known = [lane.name for lane in self.active_lanes]
        raise ConfigError(f"there is no lane {name!r}{_suggestion(name, known)}")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _toml_file.get())


def load_settings(config_file: Path | None = None, **overrides: Any) -> Settings:
    """Reads ``config_file``, else $TAPELINE_CONFIG, else ./tapeline.toml if there is one.

    Args:
        overrides: whole or partial sections that win over file and environment.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value that cannot be.
    """
    path = _config_file(config_file)
    if path is not None:
        _check_keys(Settings, _read_toml(path), where=str(path))
    _check_environment()
    _check_keys(Settings, overrides, where="settings")

    token = _toml_file.set(path)
    try:
        return Settings(**overrides)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"settings: {key}: {text}" if key else f"settings: {text}") from error
    except SettingsError as error:  # a whole section in one variable, and it is no JSON
        raise ConfigError(f"settings: {error}; write a section as JSON") from error
    finally:
        _toml_file.reset(token)


def as_environment(settings: Settings) -> dict[str, str]:
    """The variables that give a child process exactly these settings."""
    sections = settings.model_dump(mode="json")
    return {
        f"{ENV_PREFIX}{name.upper()}": json.dumps(value) if isinstance(value, dict) else str(value)
        for name, value in sections.items()
    }


def _config_file(given: Path | None) -> Path | None:
    if given is None and (named := os.environ.get(CONFIG_FILE_ENV)):
        given = Path(named)
    if given is not None:
        return given
    default = Path(DEFAULT_CONFIG_FILE)
    return default if default.is_file() else None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {path} is not valid TOML: {error}") from error


def _check_keys(section: type[BaseModel], values: Mapping[str, Any], *, where: str) -> None:
    """Refuses unknown keys, at any depth, with the nearest known one."""
    for key, value in values.items():
        if key not in section.model_fields:
            raise ConfigError(
                f"{where}: unknown setting {key!r}{_suggestion(key, section.model_fields)}"
            )
        if not isinstance(value, Mapping):
            continue
        if key == "lanes":
            for name, lane in value.items():
                if isinstance(lane, Mapping):
                    _check_keys(LaneSettings, lane, where=f"{where}: lanes.{name}")
        elif (inner := _subsection(section, key)) is not None:
            _check_keys(inner, value, where=f"{where}: {key}")


def _check_environment() -> None:
    for variable in os.environ:
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_FILE_ENV:
            continue
        path = variable.removeprefix(ENV_PREFIX).lower().split("__")
        nested = _json_or_text(os.environ[variable])
        for part in reversed(path):
            nested = {part: nested}
        _check_keys(Settings, nested, where=f"environment variable {variable}")


def _json_or_text(text: str) -> Any:
    """A variable may hold a whole section."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _subsection(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    annotation = section.model_fields[key].annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _suggestion(given: str, known: Mapping[str, Any] | list[str]) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"


def iter_documented_settings() -> Iterator[tuple[str, Any, str]]:
    """Yields (dotted key, default, description) of every setting, for the reference page.

    The default is ``...`` where one must be given.
    """
    yield from _walk(Settings, "")


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if name == "lanes":
            yield from _walk(LaneSettings, "lanes.<name>.")
        elif (inner := _subsection(section, name)) is not None:
            yield from _walk(inner, f"{key}.")
        else:
            default = ... if field.is_required() else field.default
            yield key, default, field.description or ""


def reference_tables() -> str:
    """Two Markdown tables: every setting, and the lanes that there are by default."""
    settings = [
        (f"`{key}`", _literal(default), meaning)
        for key, default, meaning in iter_documented_settings()
    ]
    lane_keys = list(dict.fromkeys(key for lane in DEFAULT_LANES.values() for key in lane))
    defaults = {name: LaneSettings(name=name, **lane) for name, lane in DEFAULT_LANES.items()}
    lanes = [
        (f"`{name}`", *(_literal(getattr(lane, key)) for key in lane_keys))
        for name, lane in defaults.items()
    ]
    return "\n".join(
        (
            *_table(("key", "default", "meaning"), settings),
            "",
            *_table(("lane", *(f"`{key}`" for key in lane_keys)), lanes),
        )
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def _literal(value: Any) -> str:
    """A default as TOML has it; a word for what TOML cannot say."""
    if value is ...:
        return "required"
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str | Path):
        return f'`"{value}"`'
    return f"`{value:.10g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    print(reference_tables())
