"""LEAN's zips: real ones, and ones that are not."""

import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from schemas.errors import ConfigError
from schemas.messages import Bar, Quote
from tapeline.sources import open_source

DATA = Path(__file__).parents[2] / "../shared/data"
MIDNIGHT_US = int(datetime(2018, 4, 4, tzinfo=UTC).timestamp()) * 1_000_000
MINUTE_US = 60_000_000


def write_zip(path: Path, member: str, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, text)
    return path


@pytest.mark.skipif(not DATA.is_dir(), reason="the real tapes are not in ../shared/data")
@pytest.mark.parametrize(
    ("folder", "num_rows", "venue", "symbols"),
    [
        ("lean_coinbase_minute", 28_264, "coinbase", {"BTCUSD", "ETHUSD", "LTCUSD", "BTCEUR"}),
        ("lean_fx_tick/oanda_eurusd/20140504_quote.zip", 1_164, "oanda", {"EURUSD"}),
    ],
)
def test_real_tapes_give_an_event_a_row(
    folder: str, num_rows: int, venue: str, symbols: set[str]
) -> None:
    path = DATA / folder
    paths = sorted(path.rglob("*.zip")) if path.is_dir() else [path]
    with open_source(paths) as source:
        events = list(source)
        statistics = source.statistics()
    assert statistics.rows == statistics.events == len(events) == num_rows
    assert {event.venue for event in events} == {venue}
    assert {event.symbol for event in events} == symbols
    assert len({event.event_id for event in events}) == num_rows
    times = [event.event_time_us for event in events]
    assert times == sorted(times)


def test_a_bar_has_the_time_of_its_end(tmp_path: Path) -> None:
    path = write_zip(
        tmp_path / "coinbase" / "minute" / "btcusd" / "20180404_trade.zip",
        "20180404_btcusd_minute_trade.csv",
        "0,7424.91,7424.91,7422,7422,7.14319709\n60000,7420,7422,7405,7405,13.35\n",
    )
    with open_source(path) as source:
        first, second = source
    assert first.payload == Bar(7424.91, 7424.91, 7422, 7422, 7.14319709, MINUTE_US)
    assert first.event_time_us == MIDNIGHT_US + MINUTE_US
    assert second.event_time_us == MIDNIGHT_US + 2 * MINUTE_US
    assert (first.venue, first.symbol) == ("coinbase", "BTCUSD")


def test_a_quote_bar_gives_its_close(tmp_path: Path) -> None:
    path = write_zip(
        tmp_path / "20180404_quote.zip",
        "20180404_btcusd_minute_quote.csv",
        "0,1,4,1,2,0.5,3,6,3,5,0.25\n60000,,,,,,3,6,3,5,0.25\n120000,1,2,3\n",
    )
    with open_source(path, venue="mine") as source:
        [event] = source
    assert event.payload == Quote(2, 0.5, 5, 0.25)
    assert event.event_time_us == MIDNIGHT_US + MINUTE_US
    assert event.venue == "mine"
    assert source.statistics().rejected == {"missing_value": 1, "wrong_cell_count": 1}


def test_a_forex_tick_has_no_sizes_and_its_own_time(tmp_path: Path) -> None:
    path = write_zip(
        tmp_path / "oanda_eurusd" / "20180404_quote.zip",
        "20180404_eurusd_tick_quote.csv",
        "292,1.38676,1.38686\r\n",
    )
    with open_source(path) as source:
        [event] = source
    assert event.payload == Quote(1.38676, 0, 1.38686, 0)
    assert event.event_time_us == MIDNIGHT_US + 292_000
    assert (event.venue, event.symbol) == ("oanda", "EURUSD")


@pytest.mark.parametrize(
    ("folder", "member", "mend"),
    [
        ("coinbase", "prices.csv", "LEAN's minute, second and tick tapes"),
        ("oanda", "20180404_eurusd_tick_trade.csv", "give minute or second tapes"),
        ("equity/oanda", "20180404_spy_minute_trade.csv", "of crypto or forex"),
        ("somewhere", "20180404_btcusd_minute_trade.csv", "give it with --venue"),
        ("coinbase", "20181304_btcusd_minute_trade.csv", "date does not exist"),
    ],
)
def test_other_zips_are_refused_with_the_mend(
    tmp_path: Path, folder: str, member: str, mend: str
) -> None:
    path = write_zip(tmp_path / folder / "20180404_trade.zip", member, "0,1,1,1,1,1\n")
    with pytest.raises(ConfigError, match=mend):
        open_source(path)


def test_a_damaged_zip_is_refused_with_the_mend(tmp_path: Path) -> None:
    row = "0,1,1,1,1,1\n"
    path = tmp_path / "coinbase" / "20180404_trade.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("20180404_btcusd_minute_trade.csv", row * 9)
    path.write_bytes(path.read_bytes().replace(row.encode(), row.replace("1", "2").encode(), 1))
    with open_source(path) as source, pytest.raises(ConfigError, match="is damaged after line"):
        list(source)
