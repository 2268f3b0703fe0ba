"""``tapeline subscribe``: features as a live table, as JSON lines, or into a Parquet file."""

import json
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from tapeline.cli.terminal import err, out, settings_of, to_json

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from tapeline.subscriber import FeatureRecord, FeatureSubscriber

_ROW_GROUP = 4096
_REFRESHES_PER_S = 4
_MAX_SHOWN = 40  # rows of the live table
_FIRST_VALUES = 3


class Output(StrEnum):
    """The form of the output."""

    table = "table"
    jsonl = "jsonl"
    parquet = "parquet"


class Begin(StrEnum):
    """Where to begin."""

    latest = "latest"
    earliest = "earliest"


def subscribe(
    ctx: typer.Context,
    lane: Annotated[
        list[str] | None, typer.Option(help="Only this lane; may be given again.")
    ] = None,
    symbol: Annotated[
        list[str] | None, typer.Option(help="Only this symbol; may be given again.")
    ] = None,
    venue: Annotated[
        list[str] | None, typer.Option(help="Only this venue; may be given again.")
    ] = None,
    begin: Annotated[
        Begin, typer.Option("--from", help="With a group: where it has committed nothing.")
    ] = Begin.latest,
    group: Annotated[
        str | None, typer.Option(help="Share the work with others of this consumer group.")
    ] = None,
    output: Annotated[
        Output | None, typer.Option(help="Default: table on a terminal, else jsonl.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Write there; needed for parquet.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="End after so many features.")] = None,
    idle_timeout: Annotated[
        float | None, typer.Option(min=0, help="End when no feature came for so many seconds.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The summary on stderr as JSON.")] = False,
) -> None:
    """Show features as they come.

    Ends at --limit, --idle-timeout or Ctrl-C with a summary on stderr, which counts repeats too: a
    worker that was killed may publish some features twice. Exit 1 if a record was no feature, or if
    fewer came than --limit.
    """
    from tapeline.subscriber import FeatureSubscriber

    settings = settings_of(ctx)
    subscriber = FeatureSubscriber(
        settings,
        lanes=lane or None,
        symbols=symbol or None,
        venues=venue or None,
        group=group,
        start=begin.value,
        idle_timeout_s=idle_timeout,
        limit=limit,
        undecodable="skip",
    )
    subscriber.open()  # before a file is made for what cannot come
    tally = FeatureTally()
    sink = _open_sink(output, file, tally)
    interrupted = False
    try:
        with subscriber, sink:
            _copy(subscriber, sink, tally)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        summary = tally.summary() | {"undecodable": subscriber.statistics().num_undecodable}
        _show_summary(summary, as_json=json)
    if interrupted:
        raise typer.Exit(130)
    if summary["undecodable"] or (limit is not None and summary["features"] < limit):
        raise typer.Exit(1)


class FeatureTally:
    """What came so far: how many, in which order, how late.

    Order is that of the source records per (topic, partition, venue, symbol): their offsets rise.
    Latency is from the event's append to the feature's, in Kafka's milliseconds.
    """

    def __init__(self) -> None:
        self.lanes: Counter[str] = Counter()
        self.latencies_ms: Counter[int] = Counter()
        self.out_of_order = self.repeated = 0
        self._last_offset: dict[tuple[str, int, str, str], int] = {}

    def add(self, record: "FeatureRecord") -> None:
        feature = record.feature
        self.lanes[feature.lane] += 1
        if (latency_us := record.latency_us) is not None:
            self.latencies_ms[latency_us // 1000] += 1
        key = (feature.source_topic, feature.source_partition, feature.venue, feature.symbol)
        last = self._last_offset.get(key, -1)
        self.repeated += feature.source_offset == last
        self.out_of_order += feature.source_offset < last
        self._last_offset[key] = max(last, feature.source_offset)

    def summary(self) -> dict[str, Any]:
        return {
            "features": self.lanes.total(),
            "lanes": dict(self.lanes),
            "symbols": len({key[2:] for key in self._last_offset}),
            "out_of_order": self.out_of_order,
            "repeated": self.repeated,
            "latency_ms": percentiles(self.latencies_ms, (50, 95, 99)),
        }


def percentiles(histogram: Mapping[int, int], wanted: tuple[int, ...]) -> dict[str, int | None]:
    """Nearest-rank percentiles of counted values: the least that so many percent do not exceed."""
    total = sum(histogram.values())
    found: dict[str, int | None] = {f"p{percent}": None for percent in wanted}
    seen = 0
    for value in sorted(histogram):
        seen += histogram[value]
        for name, percent in zip(found, wanted, strict=True):
            if found[name] is None and seen * 100 >= percent * total:
                found[name] = value
    return found


def _copy(subscriber: "FeatureSubscriber", sink: "_Sink", tally: FeatureTally) -> None:
    for record in subscriber.records():
        tally.add(record)
        sink.write(record)


class _Sink(ABC):
    """Where the features go; a context manager."""

    @abstractmethod
    def write(self, record: "FeatureRecord") -> None:
        """Takes one more."""

    @abstractmethod
    def close(self) -> None:
        """Writes what is left."""

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _open_sink(output: Output | None, file: Path | None, tally: FeatureTally) -> _Sink:
    from schemas.errors import ConfigError

    if output is None:
        to_terminal = file is None and sys.stdout.isatty()
        parquet = file is not None and file.suffix in (".parquet", ".pq")
        output = Output.table if to_terminal else Output.parquet if parquet else Output.jsonl
    if output is Output.parquet and file is None:
        raise ConfigError("--output parquet needs a file to write; give --file PATH")
    if output is Output.table and file is not None:
        raise ConfigError("--output table cannot go into a file; use jsonl or parquet")
    try:
        if output is Output.parquet:
            assert file is not None
            return _ParquetFile(file)
        if output is Output.jsonl:
            return _JsonLines(file.open("w") if file else None)
    except OSError as error:
        raise ConfigError(
            f"cannot write {file}: {error.strerror or error}; choose another --file"
        ) from error
    return _LiveTable(tally)


def _row(record: "FeatureRecord") -> dict[str, Any]:
    feature = record.feature
    return {
        "event_id": feature.event_id,
        "symbol": feature.symbol,
        "venue": feature.venue,
        "event_time_us": feature.event_time_us,
        "lane": feature.lane,
        "model_version": feature.model_version,
        "channels_version": feature.channels_version,
        "source_topic": feature.source_topic,
        "source_partition": feature.source_partition,
        "source_offset": feature.source_offset,
        "source_appended_us": record.source_appended_us,
        "appended_us": record.appended_us,
        "flags": int(feature.flags),
        "scores": dict(feature.scores),
        "features": feature.features,
    }


class _JsonLines(_Sink):
    """One JSON object a line; each line is out at once."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def write(self, record: "FeatureRecord") -> None:
        row = _row(record)
        row["features"] = [float(f"{value:.9g}") for value in row["features"].tolist()]
        line = json.dumps(row, separators=(",", ":"))
        print(line, file=self._file or sys.stdout, flush=self._file is None)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _ParquetFile(_Sink):
    """A Parquet file with row groups of 4096; ``features`` is a fixed-size list of float32."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None

    def write(self, record: "FeatureRecord") -> None:
        self._rows.append(_row(record))
        if len(self._rows) >= _ROW_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        from schemas.errors import ConfigError

        num_features = self._rows[0]["features"].size if self._rows else 0
        if self._writer is None:
            self._schema = pa.schema(
                [
                    *((name, pa.string()) for name in ("event_id", "symbol", "venue")),
                    ("event_time_us", pa.int64()),
                    *(
                        (name, pa.string())
                        for name in ("lane", "model_version", "channels_version", "source_topic")
                    ),
                    ("source_partition", pa.int32()),
                    ("source_offset", pa.int64()),
                    ("source_appended_us", pa.int64()),
                    ("appended_us", pa.int64()),
                    ("flags", pa.int32()),
                    ("scores", pa.map_(pa.string(), pa.float64())),
                    ("features", pa.list_(pa.float32(), num_features)),
                ]
            )
            self._num_features = num_features
            self._writer = pq.ParquetWriter(self._file, self._schema)
        if any(row["features"].size != self._num_features for row in self._rows):
            raise ConfigError(
                "two models with different numbers of features are publishing; write them to "
                "files of their own with --lane"
            )
        columns: dict[str, Any] = {
            name: [row[name] for row in self._rows] for name in self._schema.names
        }
        values = np.array(columns["features"], np.float32).reshape(-1)
        columns["features"] = pa.FixedSizeListArray.from_arrays(
            pa.array(values, pa.float32()), type=self._schema.field("features").type
        )
        columns["scores"] = [list(scores.items()) for scores in columns["scores"]]
        if self._rows:
            self._writer.write_table(pa.table(columns, schema=self._schema))
        self._rows.clear()

    def close(self) -> None:
        try:
            if self._rows or self._writer is None:
                self._write_group()
        finally:
            if self._writer is not None:
                self._writer.close()
            self._file.close()


class _LiveTable(_Sink):
    """One row per lane, symbol and venue, refreshed four times a second."""

    def __init__(self, tally: FeatureTally) -> None:
        self._tally = tally
        self._newest: dict[tuple[str, str, str], FeatureRecord] = {}
        self._counts: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._start_s = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> "_LiveTable":
        from rich.live import Live

        self._live = Live(
            console=out(), get_renderable=self._render, refresh_per_second=_REFRESHES_PER_S
        )
        self._live.start(refresh=True)
        return self

    def write(self, record: "FeatureRecord") -> None:
        feature = record.feature
        key = (feature.lane, feature.symbol, feature.venue)
        self._newest[key] = record
        self._counts[key] += 1

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _render(self) -> "Table":
        from rich import box
        from rich.table import Table
        from rich.text import Text

        num = self._tally.lanes.total()
        elapsed_s = max(time.monotonic() - self._start_s, 1e-3)
        table = Table(box=box.SIMPLE_HEAD, title=f"{num:,} features, {num / elapsed_s:,.0f}/s")
        for name in ("lane", "symbol", "venue", "event time"):
            table.add_column(name, no_wrap=True)
        table.add_column("ms late", justify="right", no_wrap=True)
        table.add_column("count", justify="right", no_wrap=True)
        for name in ("flags", "features", "model"):  # what gives way on a narrow terminal
            table.add_column(name, overflow="ellipsis")
        newest = sorted(self._newest.copy().items())
        for key, record in newest[:_MAX_SHOWN]:
            feature, latency_us = record.feature, record.latency_us
            moment = datetime.fromtimestamp(feature.event_time_us / 1e6, UTC)
            values = " ".join(f"{value:+.2f}" for value in feature.features[:_FIRST_VALUES])
            row = (
                *key,
                f"{moment:%H:%M:%S.%f}",
                "-" if latency_us is None else f"{latency_us // 1000:,}",
                f"{self._counts[key]:,}",
                flag_names(feature.flags),
                f"{values} …",
                feature.model_version,
            )
            table.add_row(*map(Text, row))
        if len(newest) > _MAX_SHOWN:
            table.caption = f"and {len(newest) - _MAX_SHOWN:,} symbols more"
        elif not newest:
            table.caption = "waiting for features"
        return table


def flag_names(flags: Any) -> str:
    """``stale, gap``; empty for none."""
    return ", ".join(flag.name.lower() for flag in flags)


def _show_summary(summary: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(to_json(summary), err=True)
        return
    lanes = ", ".join(f"{lane} {num:,}" for lane, num in sorted(summary["lanes"].items()))
    latency = summary["latency_ms"]
    lines = [
        f"{summary['features']:,} features of {summary['symbols']:,} symbols"
        + (f" ({lanes})" if lanes else ""),
        f"out of order {summary['out_of_order']:,}, repeated {summary['repeated']:,}, "
        f"undecodable {summary['undecodable']:,}",
    ]
    if latency["p50"] is not None:
        shown = ", ".join(f"{name} {value:,} ms" for name, value in latency.items())
        lines.append(f"latency from event to feature: {shown}")
    console = err()
    for line in lines:
        console.print(line, highlight=False)
