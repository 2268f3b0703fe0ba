"""Labels and parts: what a window should have foretold, and that no part knows of another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from market import planted_tape

from inference.training.labels import (
    DOWN,
    FLAT,
    UNKNOWN,
    UP,
    covered,
    directions,
    labelled,
    moves_bps,
    past_moves_bps,
    split,
)
from inference.training.tape import Tape
from schemas.errors import ConfigError


@st.composite
def tapes(draw: st.DrawFn) -> Tape:
    """Runs of any length, some of whose first mids are missing."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    num = sum(sizes)
    mids = np.array(draw(st.lists(st.floats(90, 110), min_size=num, max_size=num)))
    begin = 0
    for size in sizes:
        mids[begin : begin + draw(st.integers(0, size))] = np.nan
        begin += size
    return Tape(
        rows=np.arange(num, dtype=np.float32)[:, None],
        times_us=np.sort(draw(st.lists(st.integers(0, 10**6), min_size=num, max_size=num))),
        mids=mids,
        runs=np.repeat(np.arange(len(sizes)), sizes),
        symbols=tuple(map(str, range(len(sizes)))),
        num_steps=draw(st.integers(1, 5)),
    )


@given(tape=tapes(), horizon=st.integers(1, 8))
def test_moves_are_what_the_formula_says(tape: Tape, horizon: int) -> None:
    moves, past = moves_bps(tape, [horizon])[:, 0], past_moves_bps(tape, [horizon])[:, 0]
    for place, (mid, run) in enumerate(zip(tape.mids, tape.runs, strict=True)):
        of_run = np.flatnonzero(tape.runs == run)
        ahead = tape.mids[place + 1 : min(place + horizon, of_run[-1]) + 1]
        if np.isnan(mid) or len(ahead) < horizon:
            assert np.isnan(moves[place])
        else:
            assert moves[place] == pytest.approx((ahead.mean() - mid) / mid * 1e4, abs=1e-6)
        behind = tape.mids[max(place - horizon, of_run[0]) : place]
        if np.isnan(mid) or np.isnan(behind).any() or len(behind) < horizon:
            assert past[place] == 0
        else:
            assert past[place] == pytest.approx((mid - behind.mean()) / mid * 1e4, abs=1e-6)


@given(tape=tapes())
def test_windows_stay_within_runs(tape: Tape) -> None:
    ends = tape.ends()
    for end, window in zip(ends, tape.windows(ends), strict=True):
        steps = np.arange(end - tape.num_steps + 1, end + 1)
        assert len(set(tape.runs[steps])) == 1
        assert (window[0] == steps).all()
    assert len(ends) == sum(
        max(0, np.count_nonzero(tape.runs == run) - tape.num_steps + 1) for run in set(tape.runs)
    )


def test_a_move_beyond_its_threshold_has_a_direction() -> None:
    moves = np.array([[-2.0, 0.5], [1.0, -0.5], [np.nan, 3.0]])
    assert directions(moves, (1.0, 0.4)).tolist() == [[DOWN, UP], [FLAT, DOWN], [UNKNOWN, UP]]


@given(seed=st.integers(0, 50), num_runs=st.integers(1, 5))
def test_no_part_reaches_into_another(seed: int, num_runs: int) -> None:
    """Neither a window's rows nor the mids of its labels, whatever symbol they are of."""
    horizons = (3, 9)
    tape = planted_tape(700, seed=seed, num_runs=num_runs)
    shuffled = Tape(  # runs overlap in time, as symbols do
        tape.rows, np.random.default_rng(seed).permutation(tape.times_us), tape.mids, tape.runs,
        tape.symbols, tape.num_steps,
    )  # fmt: skip
    times = np.concatenate([np.sort(shuffled.times_us[tape.runs == run])
                            for run in range(num_runs)])  # fmt: skip
    tape = Tape(tape.rows, times, tape.mids, tape.runs, tape.symbols, tape.num_steps)
    parts = split(tape, horizons, (0.5, 0.2))
    begins_us, ends_us = [], []
    for part in (parts.train, parts.validation, parts.test):
        assert (part.labels != UNKNOWN).all()
        begins_us.append(tape.times_us[part.ends - tape.num_steps + 1].min())
        ends_us.append(tape.times_us[part.ends + max(horizons)].max())
    assert ends_us[0] < begins_us[1]
    assert ends_us[1] < begins_us[2]
    num = sum(map(len, (parts.train, parts.validation, parts.test)))
    assert num + parts.num_embargoed == (labelled(tape, horizons, (1, 1)).labels[:, 1] >= 0).sum()


def test_thresholds_know_the_training_part_alone() -> None:
    tape = planted_tape(800)
    parts = split(tape, (5,), (0.5, 0.2))
    later = tape.mids.copy()
    cut = parts.train.ends[-1] + 6
    later[cut:] = 1_000 + 50 * np.sin(np.arange(len(later) - cut))
    changed = Tape(tape.rows, tape.times_us, later, tape.runs, tape.symbols, tape.num_steps)
    other = split(changed, (5,), (0.5, 0.2))
    assert other.thresholds_bps == parts.thresholds_bps
    assert (other.train.labels == parts.train.labels).all()
    assert (other.test.labels != parts.test.labels).any()
    # A third of the training part is flat by their choice.
    assert np.mean(parts.train.labels == FLAT) == pytest.approx(1 / 3, abs=0.15)


def test_rows_of_windows_are_covered_and_no_others() -> None:
    tape = planted_tape(300)
    part = split(tape, (5,), (0.5, 0.2)).validation
    rows = {int(row) for end in part.ends for row in range(end - tape.num_steps + 1, end + 1)}
    assert set(np.flatnonzero(covered(part))) == rows


def test_too_short_a_tape_is_told_to_be_longer() -> None:
    with pytest.raises(ConfigError, match="longer tapes"):
        split(planted_tape(20), (50,), (0.6, 0.2))
    with pytest.raises(ConfigError, match="part of these tapes has no window"):
        split(planted_tape(40), (10,), (0.5, 0.2))
