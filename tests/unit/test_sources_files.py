"""CSV, JSON lines and Parquet: the same tape in three formats, and everything that can be wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError
from schemas.messages import Bar, Book, MarketEvent, Payload, Quote, Sample, Trade
from tapeline.sources import SourceStatistics, open_source, pace, parse_speed

TIME_US = 1_723_161_254_087_891
TIME_ISO = "2024-08-08T23:54:14.087891Z"
BIDS = [[99.5, 2.0], [99.0, 1.0]]
ASKS = [[100.5, 3.0]]


def tape(venue: str = "x", symbol: str = "ABC") -> list[MarketEvent]:
    """One event of each type, a microsecond apart."""
    payloads: list[Payload] = [
        Trade(100.0, 2.5, "buy"),
        Quote(99.5, 2.0, 100.5, 3.0),
        Bar(99.0, 101.0, 98.0, 100.0, 12.5, 60_000_000),
        Book.from_levels(BIDS, ASKS),
        Sample.from_values([0.5, -1.5]),
    ]
    return [
        MarketEvent(f"id-{i}", symbol, venue, TIME_US + i, payload, sequence=i + 1)
        for i, payload in enumerate(payloads)
    ]


def read(path: Path, format: str | None = None, **words: str) -> list[MarketEvent]:
    """All events of a file of which no row may be wrong."""
    with open_source(path, format, **words) as source:
        events = list(source)
        statistics = source.statistics()
        assert not statistics.rejected, statistics.first_rejects
        assert source.bytes_read == source.total_bytes
    return events


def read_bad(path: Path) -> SourceStatistics:
    with open_source(path) as source:
        num_events = sum(1 for _ in source)
        statistics = source.statistics()
    assert statistics.events == num_events
    assert statistics.rows == num_events + statistics.num_rejected + statistics.num_skipped
    return statistics


JSON_LINES: list[dict[str, dict[str, Any]]] = [
    {"payload": {"type": "trade", "price": 100, "size": 2.5, "side": "buy"}},
    {
        "payload": {
            "type": "quote",
            "bid_price": 99.5,
            "bid_size": 2,
            "ask_price": 100.5,
            "ask_size": 3,
        }
    },
    {
        "payload": {
            "type": "bar",
            "open": 99,
            "high": 101,
            "low": 98,
            "close": 100,
            "volume": 12.5,
            "interval_us": 60_000_000,
        }
    },
    {"payload": {"type": "book", "bids": BIDS, "asks": ASKS}},
    {"payload": {"type": "sample", "values": [0.5, -1.5]}},
]


def json_lines() -> str:
    return "\n".join(
        json.dumps(
            {
                "event_id": f"id-{i}",
                "symbol": "ABC",
                "venue": "x",
                "event_time_us": TIME_US + i,
                "sequence": i + 1,
            }
            | line
        )
        for i, line in enumerate(JSON_LINES)
    )


CSV = f"""\
event_id,symbol,venue,event_time_us,sequence,type,price,size,side,bid_price,bid_size,ask_price,\
ask_size,open,high,low,close,volume,interval_us,bid_price_1,bid_size_1,ask_price_1,ask_size_1,\
bid_price_2,bid_size_2,value_1,value_2
id-0,ABC,x,{TIME_US},1,trade,100,2.5,Buy,,,,,,,,,,,,,,,,,,
id-1,ABC,x,{TIME_US + 1},2,quote,,,,99.5,2,100.5,3,,,,,,,,,,,,,,
id-2,ABC,x,{TIME_US + 2},3,bar,,,,,,,,99,101,98,100,12.5,60000000,,,,,,,,
id-3,"ABC",x,{TIME_US + 3},4,book,,,,,,,,,,,,,,99.5,2,100.5,3,99,1,,
id-4,ABC,x,{TIME_US + 4},5,sample,,,,,,,,,,,,,,,,,,,,0.5,-1.5
"""


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("tape.jsonl.gz" if packed else "tape.jsonl")
    path.write_bytes(gzip.compress(json_lines().encode()) if packed else json_lines().encode())
    assert read(path) == tape()


@pytest.mark.parametrize("packed", [False, True])
def test_csv(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("tape.csv.gz" if packed else "tape.csv")
    text = b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()
    path.write_bytes(gzip.compress(text) if packed else text)
    assert read(path) == tape()


def test_csv_without_a_type_column_is_told_by_its_cells(tmp_path: Path) -> None:
    path = tmp_path / "tape.csv"
    rows = [line.split(",") for line in CSV.splitlines()]
    path.write_text("\n".join(",".join(row[:5] + row[6:]) for row in rows))
    assert read(path) == tape()


def test_parquet_with_list_columns_and_timestamps(tmp_path: Path) -> None:
    path = tmp_path / "tape.parquet"
    names = {name: None for line in JSON_LINES for name in line["payload"] if name != "type"}
    rows = [
        names
        | {"event_id": f"id-{i}", "symbol": "ABC", "venue": "x", "sequence": i + 1}
        | {"event_time": TIME_US + i}
        | line["payload"]
        for i, line in enumerate(JSON_LINES)
    ]
    table = pa.Table.from_pylist(rows)
    column = table.schema.get_field_index("event_time")
    stamps = table["event_time"].cast(pa.timestamp("us")).cast(pa.timestamp("ns"))
    pq.write_table(table.set_column(column, "event_time", stamps), path, row_group_size=2)
    assert read(path) == tape()


def test_the_first_empty_price_ends_a_side_of_a_csv_book(tmp_path: Path) -> None:
    path = tmp_path / "tape.csv"
    sides = "bid_price_1,bid_size_1,bid_price_2,bid_size_2,bid_price_3,bid_size_3"
    path.write_text(f"event_time_us,{sides},ask_price_1,ask_size_1\n{TIME_US},9,1,,,8,1,10,2\n")
    [event] = read(path, symbol="ABC", venue="x")
    assert event.payload == Book.from_levels([(9, 1)], [(10, 2)])


@pytest.mark.parametrize("stamp", [TIME_ISO, "2024-08-09 01:54:14.087891+02:00", TIME_ISO[:-1]])
def test_iso_times_are_exact_and_utc_unless_they_say_otherwise(tmp_path: Path, stamp: str) -> None:
    path = tmp_path / "tape.csv"
    path.write_text(f"event_time,price,size\n{stamp},1,1\n")
    [event] = read(path, symbol="ABC", venue="x")
    assert event.event_time_us == TIME_US


def test_symbol_and_venue_are_given_where_rows_have_none(tmp_path: Path) -> None:
    path = tmp_path / "tape.csv"
    path.write_text(f"symbol,event_time_us,price,size\n,{TIME_US},1,1\nDEF,{TIME_US},1,1\n")
    events = read(path, symbol="ABC", venue="x")
    assert [(event.venue, event.symbol) for event in events] == [("x", "ABC"), ("x", "DEF")]


def test_missing_ids_are_unique_and_the_same_each_time(tmp_path: Path) -> None:
    path = tmp_path / "tape.csv"
    path.write_text("event_time_us,price,size\n" + f"{TIME_US},1,1\n" * 3)
    ids = [event.event_id for event in read(path, symbol="ABC", venue="x")]
    assert ids == [f"x:ABC:trade:{TIME_US}:{line}" for line in (2, 3, 4)]
    assert ids == [event.event_id for event in read(path, symbol="ABC", venue="x")]


def test_sizes_of_a_quote_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "tape.csv"
    path.write_text(f"event_time_us,bid_price,ask_price\n{TIME_US},1,2\n")
    [event] = read(path, symbol="ABC", venue="x")
    assert event.payload == Quote(1, 0, 2, 0)
    assert event.sequence is None


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ("trade,-1,1,buy", "bad_price"),
        ("trade,nan,1,buy", "not_finite"),
        ("trade,1,-1,buy", "negative_size"),
        ("trade,one,1,buy", "not_a_number"),
        ("trade,,1,buy", "missing_value"),
        ("trade,1,1,long", "bad_side"),
        ("swap,1,1,buy", "unknown_type"),
        ("quote,1,1,buy", "missing_value"),
        ("trade,1,1", "wrong_cell_count"),
        ('trade,1,1,"buy', "malformed"),
        ("trade,1,1,\udcff", "malformed"),
    ],
)
def test_a_wrong_csv_row_is_counted_and_shown(tmp_path: Path, cells: str, reason: str) -> None:
    path = tmp_path / "tape.csv"
    start = f"ABC,x,{TIME_US}"
    text = f"symbol,venue,event_time_us,type,price,size,side\n{start},trade,1,1,buy\n"
    path.write_bytes(f"{text}{start},{cells}\n\n".encode(errors="surrogateescape"))
    statistics = read_bad(path)
    assert statistics.rows == 3
    assert statistics.rejected == {reason: 1}
    assert statistics.skipped == {"blank": 1}
    [reject] = statistics.first_rejects
    assert (reject.path, reject.row) == (path, 3)
    assert str(reject).startswith(f"tape.csv:3: {reason}: ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "malformed"),
        ("\udcff", "malformed"),
        ('{"symbol":"A","venue":"x","event_time_us":1}', "malformed"),
        ('{"event_time_us":1,"payload":{"type":"swap"}}', "malformed"),
        ('{"event_time_us":1,"payload":{"type":"trade","price":NaN,"size":1}}', "malformed"),
        ('{"event_time_us":1,"payload":{"type":"trade","price":1,"size":1}}', "bad_name"),
        (
            '{"symbol":"A","venue":"x","payload":{"type":"trade","price":1,"size":1}}',
            "missing_value",
        ),
        (
            '{"symbol":"A","venue":"x","event_time_us":1,'
            '"payload":{"type":"book","bids":[[1,1],[2,1]],"asks":[]}}',
            "bad_book",
        ),
        (
            '{"symbol":"A","venue":"x","event_time_us":1,'
            '"payload":{"type":"book","bids":[[1,1,1]],"asks":[]}}',
            "malformed",
        ),
        (
            '{"symbol":"A","venue":"x","event_time_us":1,"payload":{"type":"sample","values":[]}}',
            "bad_sample",
        ),
    ],
)
def test_a_wrong_json_line_is_counted_and_shown(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "tape.jsonl"
    path.write_bytes(f"{json_lines()}\n{line}\n".encode(errors="surrogateescape"))
    statistics = read_bad(path)
    assert (statistics.events, statistics.rejected) == (5, {reason: 1})
    assert statistics.first_rejects[0].row == 6


def test_a_wrong_parquet_row_is_counted_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "tape.parquet"
    good, bad = [[1.0, 1.0]], [[1.0, 1.0, 1.0]]
    columns = {"symbol": ["A"] * 3, "venue": ["x"] * 3, "event_time_us": [1, 2, None]}
    pq.write_table(pa.table(columns | {"bids": [good, bad, good], "asks": [good] * 3}), path)
    statistics = read_bad(path)
    assert statistics.rejected == {"bad_book": 1, "missing_value": 1}
    assert [reject.row for reject in statistics.first_rejects] == [2, 3]


def test_only_the_first_rejects_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "tape.csv"
    path.write_text("symbol,venue,event_time_us,price,size\n" + "A,x,1,-1,1\n" * 1000)
    statistics = read_bad(path)
    assert statistics.rejected == {"bad_price": 1000}
    assert len(statistics.first_rejects) == 5


def test_a_sequence_that_leaves_numbers_out_is_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "tape.csv"
    numbers = ["1", "2", "5", "4", "6", "", "7"]
    rows = "".join(f"A,x,{i + 1},{number},1,1\n" for i, number in enumerate(numbers))
    path.write_text(f"symbol,venue,event_time_us,sequence,price,size\n{rows}B,x,9,7,1,1\n")
    statistics = read_bad(path)
    assert statistics.num_gaps == 1
    assert statistics.first_gaps == ("x A: sequence 5 follows 2, 2 missing",)


def test_several_files_are_merged_by_event_time(tmp_path: Path) -> None:
    paths = []
    for name, times in (("a", (1, 4, 5)), ("b", (2, 3, 6))):
        paths.append(tmp_path / f"{name}.csv")
        rows = "".join(f"{name},x,{time_us},1,1\n" for time_us in times)
        paths[-1].write_text(f"symbol,venue,event_time_us,price,size\n{rows}")
    with open_source(paths) as source:
        assert [event.event_time_us for event in source] == [1, 2, 3, 4, 5, 6]
        assert source.statistics().rows == source.statistics().events == 6
        assert source.total_bytes == sum(path.stat().st_size for path in paths)


def test_statistics_and_bytes_are_live(tmp_path: Path) -> None:
    path = tmp_path / "tape.csv"
    path.write_text("symbol,venue,event_time_us,price,size\n" + "A,x,1,1,1\n" * 200_000)
    with open_source(path) as source:
        for _ in range(100_000):
            next(source)
        assert source.statistics().events == 100_000
        assert 0.3 < source.bytes_read / source.total_bytes < 0.7
    assert list(source) == []  # closed


TRADES = "symbol,venue,event_time_us,price,size\n"


@pytest.mark.parametrize(
    ("name", "content", "mend"),
    [
        ("tape.txt", b"", "give --format, one of jsonl, csv, parquet, binance, lean"),
        ("tape.csv", b"", "starts with a row of column names"),
        ("tape.csv", b"a,b\n1,2\n", "trade: price, size"),
        ("tape.csv", b"event_time_us,price,size\n", "no column symbol; add one or give --symbol"),
        ("tape.csv", b"symbol,event_time_us,price,size\n", "give --venue"),
        ("tape.csv", b"symbol,venue,price,size\n", "add a column event_time_us"),
        ("tape.csv", b"symbol,venue,event_time_us,price,size,price\n", "twice: price"),
        ("tape.parquet", b"PAR1 no", "is no Parquet file"),
        ("20240101_trade.zip", b"PK no", "is no LEAN tape"),
        ("tape.jsonl", TRADES.encode() * 200, "name its real format with --format"),
        ("tape.csv.gz", gzip.compress(TRADES.encode() * 9, mtime=0)[:40], "is damaged"),
        ("tape.csv.gz", gzip.compress(TRADES.encode(), mtime=0)[:-8] + b"\0" * 8, "is damaged"),
    ],
)
def test_an_unfit_file_is_refused_with_the_mend(
    tmp_path: Path, name: str, content: bytes, mend: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=mend), open_source(path) as source:
        list(source)


def test_a_file_that_is_not_there_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*check the path"):
        open_source(tmp_path / "tape.csv")
    with pytest.raises(ConfigError, match="is a folder; name the files in it"):
        open_source(tmp_path, "csv")
    with pytest.raises(ConfigError, match="there is no format 'cvs'; known are jsonl, csv"):
        open_source(tmp_path, "cvs")
    with pytest.raises(ConfigError, match="name at least one"):
        open_source([])


@pytest.mark.parametrize(
    ("speed", "due_s"), [(None, [0, 0, 0, 0]), (1, [0, 1, 1, 3]), (10, [0, 0.1, 0.1, 0.3])]
)
def test_a_replay_keeps_the_recorded_pace(speed: float | None, due_s: list[float]) -> None:
    """The third event is older than the second; it is due with it."""
    events = [
        MarketEvent(str(i), "A", "x", TIME_US + offset_us, Trade(1, 1))
        for i, offset_us in enumerate([0, 1_000_000, 500_000, 3_000_000])
    ]
    paced = list(pace(events, speed))
    assert [event for event, _ in paced] == events
    assert [due for _, due in paced] == pytest.approx(due_s)


def test_speed_is_max_or_a_factor() -> None:
    assert parse_speed("max") is None
    assert parse_speed("0.5") == 0.5
    for text in ("0", "-1", "nan", "inf", "fast", ""):
        with pytest.raises(ConfigError, match="neither max nor a positive number"):
            parse_speed(text)
