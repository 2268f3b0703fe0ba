"""``tapeline produce`` and ``simulate``: events into the lanes, from files or a simulator."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tapeline.cli.terminal import JsonOption, err, print_json, print_table, settings_of

if TYPE_CHECKING:
    from schemas.messages import MarketEvent
    from schemas.settings import Settings
    from tapeline.sources import EventSource

_REFRESH_S = 0.1
_POLL_EVERY = 64  # events between two looks at the clock for the progress bar

FormatOption = Annotated[
    str | None,
    typer.Option(help="jsonl, csv, parquet, binance or lean; else by the file's name."),
]
SymbolOption = Annotated[str | None, typer.Option(help="For files that do not name theirs.")]
VenueOption = Annotated[str | None, typer.Option(help="For files that do not name theirs.")]
ShowProgress = Callable[[int], None]
Paced = Iterable[tuple["MarketEvent", float]]


def produce(
    ctx: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Tapes; several are merged by event time.")],
    format: FormatOption = None,
    lane: Annotated[str, typer.Option(help="Where the events go.")] = "realtime",
    speed: Annotated[
        str, typer.Option(help="max, or a multiple of the recorded pace: 1, 10.")
    ] = "max",
    limit: Annotated[int | None, typer.Option(min=0, help="Stop after so many events.")] = None,
    symbol: SymbolOption = None,
    venue: VenueOption = None,
    max_rejected: Annotated[
        int | None,
        typer.Option(min=0, help="Exit 1 if more rows are rejected. Default: any number may be."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check, produce nothing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Produce market events from files.

    Reads CSV, JSON lines, Parquet, Binance raw captures and LEAN zips. Rows that are no event are
    counted and the first few are shown; they never stop the rest. Exit 1 if an event that was read
    is not acknowledged, or on more rejected rows than --max-rejected.
    """
    from tapeline.clients import check_kafka
    from tapeline.sources import open_source, pace, parse_speed

    settings = settings_of(ctx)
    topic = settings.lane(lane).topic
    factor = parse_speed(speed)
    with open_source(files, format, symbol=symbol, venue=venue) as source:
        if not dry_run:
            check_kafka(settings, [topic])
        paced = pace(islice(source, limit), factor)
        run = _Run(settings, dry_run=dry_run)
        with _file_progress(source) as show:
            run.send(paced, lambda event: lane, show)
        summary = run.summary() | _source_summary(source)
    if json:
        print_json(summary)
    else:
        _show_rejects(summary)
        _show_summary(summary)
    rejected = sum(summary["rejected"].values())
    run.exit(bad=max_rejected is not None and rejected > max_rejected)


def simulate(
    ctx: typer.Context,
    events: Annotated[int | None, typer.Option(min=0, help="Stop after so many events.")] = None,
    duration: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    rate: Annotated[
        float, typer.Option(min=0, help="Events per second, all symbols together; 0: no limit.")
    ] = 1000,
    symbols: Annotated[int, typer.Option(min=1, help="Number of symbols.")] = 10,
    seed: Annotated[int, typer.Option(help="Same seed, same market.")] = 0,
    lane: Annotated[str, typer.Option(help="Where all events go.")] = "realtime",
    mix: Annotated[
        str | None, typer.Option(help="Or shares of lanes: realtime=0.5,market-data=0.3,batch=0.2")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Produce events of a simulated market, until --events, --duration or Ctrl-C.

    Event times begin now. With --mix each symbol stays in one lane, so that each lane sees whole
    symbols.
    """
    from tapeline.clients import check_kafka
    from tapeline.simulator import simulate as simulated
    from tapeline.simulator import symbol_names
    from tapeline.sources import pace

    settings = settings_of(ctx)
    names = symbol_names(symbols)
    lane_of = _spread(names, parse_mix(mix) if mix else {lane: 1.0})
    check_kafka(settings, {settings.lane(one).topic for one in lane_of.values()})
    tape = simulated(
        symbols=names,
        seed=seed,
        start_time_us=time.time_ns() // 1000,
        rate_hz=rate or 1000,
        num_events=events,
        duration_s=duration if rate else None,
    )
    paced = pace(tape, 1.0 if rate else None)
    run = _Run(settings, duration_s=None if rate else duration)
    with _count_progress(events) as show:
        run.send(paced, lambda event: lane_of[event.symbol], show)
    summary = run.summary() | {"seed": seed}
    if json:
        print_json(summary)
    else:
        _show_summary(summary)
    run.exit()


class _Run:
    """One tape on its way to Kafka: sends it when it is due, and counts.

    Attributes:
        interrupted: Ctrl-C ended it early; what was sent until then is acknowledged and counted.
    """

    def __init__(
        self, settings: "Settings", *, dry_run: bool = False, duration_s: float | None = None
    ) -> None:
        self._settings = settings
        self._dry_run = dry_run
        self._duration_s = duration_s
        self._lanes: Counter[str] = Counter()
        self._num_produced = 0
        self._elapsed_s = 0.0
        self.interrupted = False

    def send(
        self, paced: Paced, lane_of: "Callable[[MarketEvent], str]", show: ShowProgress
    ) -> None:
        """Blocks until every event is acknowledged. Raises DeliveryFailed."""
        start_s = time.monotonic()
        try:
            if self._dry_run:
                for event, _ in self._due(paced, start_s, show):
                    self._lanes[lane_of(event)] += 1
                return
            self._produce(paced, lane_of, start_s, show)
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            self._elapsed_s = time.monotonic() - start_s

    def _produce(
        self,
        paced: Paced,
        lane_of: "Callable[[MarketEvent], str]",
        start_s: float,
        show: ShowProgress,
    ) -> None:
        from tapeline.producer import MarketEventProducer

        producer = MarketEventProducer(self._settings)
        try:
            for event, _ in self._due(paced, start_s, show):
                lane = lane_of(event)
                producer.produce(event, lane=lane)
                self._lanes[lane] += 1
        finally:
            try:
                producer.close()
            finally:
                self._num_produced = producer.statistics().num_acknowledged

    def _due(
        self, paced: Paced, start_s: float, show: ShowProgress
    ) -> "Iterator[tuple[MarketEvent, float]]":
        """The events, each when it is due."""
        for number, (event, due_s) in enumerate(paced):
            if number % _POLL_EVERY == 0:
                show(number)
                if self._duration_s and time.monotonic() - start_s >= self._duration_s:
                    return
            while not self._dry_run and (early_s := start_s + due_s - time.monotonic()) > 0:
                show(number)
                time.sleep(min(early_s, _REFRESH_S))
            yield event, due_s

    def summary(self) -> dict[str, Any]:
        """What came of it, as JSON would say it."""
        num_events = self._lanes.total()
        return {
            "events": num_events,
            "produced": self._num_produced,
            "lanes": dict(self._lanes),
            "seconds": round(self._elapsed_s, 3),
            "events_per_second": round(num_events / self._elapsed_s) if self._elapsed_s else 0,
            "dry_run": self._dry_run,
            "interrupted": self.interrupted,
        }

    def exit(self, *, bad: bool = False) -> None:
        """Ends the command with the exit code that is due."""
        if self.interrupted:
            raise typer.Exit(130)
        if bad or (not self._dry_run and self._num_produced < self._lanes.total()):
            raise typer.Exit(1)


def parse_mix(text: str) -> dict[str, float]:
    """``realtime=0.5,batch=0.5`` as shares that add up to 1. Raises ConfigError."""
    from schemas.errors import ConfigError

    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1
        if not 0 < share < float("inf") or name in shares:
            raise ConfigError(
                f"--mix {text!r}: {part.strip()!r} is not lane=share with a positive number, each "
                "lane once; write realtime=0.5,batch=0.5"
            )
        shares[name] = share
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _spread(names: list[str], shares: Mapping[str, float]) -> dict[str, str]:
    """Symbol to lane: each symbol goes where the lane is furthest below its share.

    The n-th symbol of the simulator has ``n ** -0.5`` of the first one's events.
    """
    from schemas.errors import ConfigError

    if len(names) < len(shares):
        raise ConfigError(
            f"--mix names {len(shares)} lanes for {len(names)} symbols; give --symbols "
            f"{len(shares)} or more"
        )
    given = dict.fromkeys(shares, 0.0)
    lane_of = {}
    for rank, name in enumerate(names, start=1):
        empty = [lane for lane in shares if not given[lane]]
        must_fill = len(names) - rank < len(empty)
        lanes = empty if must_fill else list(shares)
        lane = min(lanes, key=lambda one: given[one] / shares[one])
        given[lane] += rank**-0.5
        lane_of[name] = lane
    return lane_of


def _source_summary(source: "EventSource") -> dict[str, Any]:
    read = source.statistics()
    return {
        "files": [str(path) for path in source.paths],
        "rows": read.rows,
        "rejected": dict(read.rejected),
        "skipped": dict(read.skipped),
        "sequence_gaps": read.num_gaps,
        "first_rejects": [str(one) for one in read.first_rejects],
        "first_gaps": list(read.first_gaps),
    }


def _show_rejects(summary: Mapping[str, Any]) -> None:
    for what in ("first_rejects", "first_gaps"):
        for text in summary[what]:
            typer.echo(f"{what.removeprefix('first_').removesuffix('s')}: {text}", err=True)


def _show_summary(summary: Mapping[str, Any]) -> None:
    rows: list[tuple[str, object]] = []
    if "rows" in summary:
        rows.append(("rows read", summary["rows"]))
    rows.append(("events", summary["events"]))
    if summary["dry_run"]:
        rows.append(("produced", "none, a dry run"))
    else:
        rows.append(("produced and acknowledged", summary["produced"]))
    if len(summary["lanes"]) > 1:
        rows += [(f"  lane {lane}", num) for lane, num in sorted(summary["lanes"].items())]
    for what in ("rejected", "skipped"):
        rows += [(f"{what}: {why}", num) for why, num in sorted(summary.get(what, {}).items())]
    if "sequence_gaps" in summary:
        rows.append(("sequence gaps", summary["sequence_gaps"]))
    rows += [("events/s", summary["events_per_second"]), ("seconds", summary["seconds"])]
    print_table(("", "count"), rows)


@contextmanager
def _file_progress(source: "EventSource") -> Iterator[ShowProgress]:
    """A bar by bytes of the files, with the rate; nothing where stderr is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    console = err()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=source.total_bytes, text="")
        start_s = time.monotonic()

        def show(number: int) -> None:
            rejected = source.statistics().num_rejected
            text = f"{_rate(number, start_s)}, {rejected:,} rejected"
            progress.update(task, completed=source.bytes_read, text=text)

        yield show


@contextmanager
def _count_progress(num_events: int | None) -> Iterator[ShowProgress]:
    """A bar by events, or a spinner while nobody knows how many there will be."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    console = err()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=num_events, text="")
        start_s = time.monotonic()

        def show(number: int) -> None:
            progress.update(task, completed=number, text=_rate(number, start_s))

        yield show


def _rate(number: int, start_s: float) -> str:
    return f"{number:,} events, {number / max(time.monotonic() - start_s, 1e-3):,.0f}/s"
