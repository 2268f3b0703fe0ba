"""What was tried to make the model faster on a CPU and is not offered: int8 and compilation.

    python -m benchmarks.variants [--rounds 30]

The default model on one thread: dynamic int8 quantisation of the LSTM and the head (torch.ao, for
want of a maintained library that quantises LSTMs), ``torch.compile``, and bf16, which is offered.
Milliseconds a call are medians, the variants in turns. ``neighbour`` is how far a window's outputs
move when another one in its batch is replaced by huge values: 0, or features depend on strangers.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from inference.artifact import Artifact, typical_windows
from inference.seeded import seeded_artifact
from tapeline.machine import this_machine

_SIZES = (1, 4, 16, 64)
Variant = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="calls of each size")
    options = parser.parse_args()
    machine = str(this_machine())
    torch.set_num_threads(1)
    artifact = seeded_artifact()
    windows = torch.tensor(
        typical_windows(artifact.config, artifact.normalisation, max(_SIZES), seed=3)
    )
    with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
        variants, compile_s = _variants(artifact, windows)
        expected = variants["fp32"](windows)
        taken_ms = _in_turns(variants, windows, options.rounds)
        print(f"{machine}, torch {torch.__version__}, compiled in {compile_s:.0f} s\n")
        sizes = " | ".join(f"{size}, ms" for size in _SIZES)
        print(f"| variant | largest error | neighbour | {sizes} |")
        print(f"| --- | ---: | ---: |{' ---: |' * len(_SIZES)}")
        for name, variant in variants.items():
            error = float((variant(windows) - expected).abs().max())
            times = " | ".join(f"{taken_ms[name][size]:.2f}" for size in _SIZES)
            print(f"| {name} | {error:.1e} | {_moved(variant, windows[:4]):.1e} | {times} |")


def _variants(artifact: Artifact, windows: Tensor) -> tuple[dict[str, Variant], float]:
    def outputs(model: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Variant:
        return lambda batch: torch.cat(model(batch), dim=1)

    quantised = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
        artifact.build_model(), {torch.nn.LSTM, torch.nn.Linear}, dtype=torch.qint8
    )
    compiled = torch.compile(artifact.build_model())
    begun_s = time.perf_counter()
    for size in _SIZES:
        compiled(windows[:size])
    compile_s = time.perf_counter() - begun_s
    variants = {
        "fp32": outputs(artifact.build_model()),
        "bf16": outputs(artifact.build_model().set_precision("bf16")),
        "int8": outputs(quantised),
        "compiled": outputs(compiled),
    }
    return variants, compile_s


def _in_turns(
    variants: dict[str, Variant], windows: Tensor, rounds: int
) -> dict[str, dict[int, float]]:
    medians: dict[str, dict[int, float]] = {name: {} for name in variants}
    for size in _SIZES:
        batch = windows[:size].contiguous()
        taken: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, variant in variants.items():
                begun_s = time.perf_counter()
                variant(batch)
                taken[name].append(time.perf_counter() - begun_s)
        for name, seconds in taken.items():
            medians[name][size] = statistics.median(seconds) * 1000
    return medians


def _moved(variant: Variant, windows: Tensor) -> float:
    beside_wild = windows.clone()
    beside_wild[3] = 1e30
    return float((variant(beside_wild)[:3] - variant(windows)[:3]).abs().max())


if __name__ == "__main__":
    main()
