"""What windows of many symbols cost: memory a symbol, time an event, time to start again.

    python -m benchmarks.symbols [--symbols 10 --symbols 100000 ...] [--rounds 3] [--json]

One process for each number and round, in turns: it fills every symbol's window in a random order,
then hands out windows of symbols drawn at random, in micro-batches of 1,024 events. Processor time
an event of ``WindowStore.append`` alone, median of the micro-batches; the growth of the process's
resident memory, its names included, by symbol. A replay after a restart is the first part again.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import psutil

from consumers.channels import channel_set
from consumers.columns import EventColumns, EventDecoder
from consumers.windows import WindowStore
from schemas.codec import Codec
from schemas.settings import SchemaRegistrySettings, WindowSettings
from tapeline.machine import this_machine
from tapeline.simulator import simulate, symbol_names

_BATCH = 1024
_NUM_HANDED_OUT = 200  # micro-batches
_PLACE = ("topic", 0)
_FIELDS = ("us_to_fill", "us_with_window", "bytes_a_symbol", "seconds_to_fill")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--symbols", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_measure(options.one)))
        return
    numbers = options.symbols or [10, 1_000, 10_000, 100_000]
    machine = str(this_machine())
    found: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    for _ in range(options.rounds):
        for number in numbers:
            command = [sys.executable, "-m", "benchmarks.symbols", "--one", str(number)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[number].append(json.loads(done.stdout))
    medians = {
        number: {name: statistics.median(one[name] for one in rounds) for name in _FIELDS}
        for number, rounds in found.items()
    }
    if options.json:
        print(json.dumps({"machine": machine, "symbols": medians}, indent=2))
        return
    settings = WindowSettings()
    window_bytes = 4 * settings.num_steps * channel_set(settings.channel_set).num_channels
    print(f"{machine}; medians of {options.rounds} rounds\n")
    print("| symbols | us an event, no window | us an event with its window | kB a symbol "
          "| of its window | s to fill all |")  # fmt: skip
    print("|" + " ---: |" * 6)
    for number, one in medians.items():
        size = one["bytes_a_symbol"]
        known = f"{size / 1e3:.1f} | {size / window_bytes:.2f}" if number >= 1_000 else "- | -"
        print(f"| {number:,} | {one['us_to_fill']:.1f} | {one['us_with_window']:.1f} | {known} "
              f"| {one['seconds_to_fill']:.2f} |")  # fmt: skip


def _measure(num_symbols: int) -> dict[str, float]:
    settings = WindowSettings(max_symbols=max(10_000, num_symbols), max_idle_records=10**9)
    channels = channel_set(settings.channel_set)
    store, events = WindowStore(channels, settings), _events()
    store.assign(_PLACE)
    nobody, everyone = np.zeros(_BATCH, bool), np.ones(_BATCH, bool)
    chance, offset = np.random.default_rng(0), 0

    def append(numbers: np.ndarray, wanted: np.ndarray) -> float:
        """Processor time of one micro-batch of these symbols' events."""
        nonlocal offset
        columns = dataclasses.replace(events, symbols=[_symbol(number) for number in numbers])
        begun_s = time.process_time()
        store.append([_PLACE] * _BATCH, range(offset, offset + _BATCH), columns, wanted, always)
        offset += _BATCH
        return time.process_time() - begun_s

    always = np.zeros(_BATCH, np.int64)
    gc.collect()
    before_bytes = psutil.Process().memory_info().rss
    order = chance.permutation(num_symbols)
    num_batches = -(-num_symbols * settings.num_steps // _BATCH)
    filled_s = sum(
        append(np.take(order, range(begin, begin + _BATCH), mode="wrap"), nobody)
        for begin in range(0, num_batches * _BATCH, _BATCH)
    )
    gc.collect()
    bytes_a_symbol = (psutil.Process().memory_info().rss - before_bytes) / num_symbols
    handed_out = [
        append(chance.integers(0, num_symbols, _BATCH), everyone) for _ in range(_NUM_HANDED_OUT)
    ]
    figures = (
        1e6 * filled_s / (num_batches * _BATCH),
        1e6 * statistics.median(handed_out) / _BATCH,
        bytes_a_symbol,
        filled_s,
    )
    return dict(zip(_FIELDS, figures, strict=True))


def _events() -> EventColumns:
    tape = simulate(symbols=symbol_names(10), seed=1, start_time_us=10**15)
    decoder = EventDecoder(Codec(SchemaRegistrySettings()), lambda event: None)
    columns = decoder.columns_of(list(islice(tape, _BATCH)))
    return dataclasses.replace(columns, times_us=np.full(_BATCH, 10**15))


def _symbol(number: int) -> bytes:
    """Symbol and venue as Avro has them."""
    return b"\x0eS%06d\x02v" % number


if __name__ == "__main__":
    main()
