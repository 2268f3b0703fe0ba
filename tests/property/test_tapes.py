"""What training reads is what serving makes: the same windows, whatever the batches."""

from itertools import pairwise

import numpy as np
from columns import columns_of
from hypothesis import given, settings
from hypothesis import strategies as st
from market import book_events

from consumers.channels import Market50
from consumers.windows import WindowStore
from schemas.messages import Book, MarketEvent
from schemas.settings import WindowSettings
from tapeline.training.tapes import TapeRecorder, quoted_mids

PLACE = ("files", 0)


def small(num_steps: int) -> WindowSettings:
    """Every rule that empties a window fires."""
    return WindowSettings(num_steps=num_steps, max_gap_s=3, max_idle_records=9, max_symbols=3)


@st.composite
def streams(draw: st.DrawFn) -> list[MarketEvent]:
    """Events of some symbols, one of them with a silence now and then."""
    events = book_events(120, seed=draw(st.integers(0, 9)), symbols=draw(st.integers(1, 5)))
    silences = draw(st.lists(st.integers(0, 120), max_size=6))
    return [
        event
        for number, event in enumerate(events)
        if not any(begin <= number < begin + 20 and event.symbol == "S0" for begin in silences)
    ]


@given(events=streams(), num_steps=st.integers(2, 4), data=st.data())
@settings(deadline=None)
def test_a_tape_holds_the_store_s_windows_and_no_others(
    events: list[MarketEvent], num_steps: int, data: st.DataObject
) -> None:
    store = WindowStore(Market50(), small(num_steps))
    store.assign(PLACE)
    num = len(events)
    always = np.ones(num, bool), np.zeros(num, np.int64)
    appended = store.append([PLACE] * num, range(num), columns_of(events), *always)
    recorder = TapeRecorder(small(num_steps))
    recorder.assign(PLACE)
    cuts = sorted(data.draw(st.sets(st.integers(0, num), max_size=5)) | {0, num})
    for begin, end in pairwise(cuts):
        recorder.append(PLACE, range(begin, end), columns_of(events[begin:end]))
    tape = recorder.tape()
    ends = tape.ends()
    # By time and symbol, for the tape stands symbol by symbol.
    of_tape = {
        (symbol, time_us): window.tobytes()
        for symbol, time_us, window in zip(
            tape.symbols_at(ends), tape.times_us[ends], tape.windows(ends), strict=True
        )
    }
    given_events = [event for event, full in zip(events, appended.full, strict=True) if full]
    of_store = {
        (f"{event.venue}:{event.symbol}", event.event_time_us): window.tobytes()
        for event, window in zip(given_events, appended.windows, strict=True)
    }
    assert len(ends) == len(given_events)
    assert of_tape == of_store


@given(events=streams(), data=st.data())
@settings(deadline=None)
def test_no_window_knows_what_comes_after_it(
    events: list[MarketEvent], data: st.DataObject
) -> None:
    """Other events from some moment on, and the windows before it keep their bits."""
    cut = data.draw(st.integers(0, len(events)))
    last_us = events[cut - 1].event_time_us if cut else 0
    other = [one for one in book_events(120, seed=77) if one.event_time_us > last_us]
    first, second = (_windows_before(stream, cut) for stream in (events, events[:cut] + other))
    assert first == second


def _windows_before(events: list[MarketEvent], cut: int) -> list[bytes]:
    recorder = TapeRecorder(small(3))
    recorder.assign(PLACE)
    recorder.append(PLACE, range(len(events)), columns_of(events))
    tape = recorder.tape()
    ends = tape.ends()
    before = {event.event_time_us for event in events[:cut]}
    return [
        window.tobytes()
        for time_us, window in zip(tape.times_us[ends], tape.windows(ends), strict=True)
        if time_us in before
    ]


def test_mids_are_of_quotes_with_both_sides() -> None:
    events = book_events(6)
    mids = quoted_mids(columns_of(events))
    for event, mid in zip(events, mids, strict=True):
        if isinstance(event.payload, Book):
            bid, ask = event.payload.bid_levels[0, 0], event.payload.ask_levels[0, 0]
            assert mid == (bid + ask) / 2
        else:
            assert np.isnan(mid)
    assert not np.isnan(mids).all()
