"""Would it pay to compute only what is new in a window? An experiment, with its verdict in docs.

    python -m benchmarks.incremental [--rounds 30]

A symbol's next window is its last one, moved by a step. Convolutions of steps away from both ends,
and what the first LSTM layer makes of them before its recurrence, are those of the window before:
they could be kept (``reuse``). The recurrence could not: it begins at the oldest step, which is
another one each time. The default model, fp32, one thread; milliseconds a call, medians in turns:

- whole: the model as it is served
- convolutions, projection: the parts that could be kept, alone
- bound: whole without them, the least that reuse could take
- reuse: done, with the recurrence of the first layer as a loop, for no library starts there
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from inference.artifact import typical_windows
from inference.model import CnnLstm
from inference.seeded import seeded_artifact
from tapeline.machine import this_machine

_SIZES = (1, 4, 16, 64)
_EDGE = 2  # steps at each end whose convolutions see the padding


class Reuse:
    """Whole windows first (``begin``), then windows that are one step on (``step``)."""

    def __init__(self, model: CnnLstm) -> None:
        self._conv, self._head = model.conv, model.head
        weights = model.lstm.state_dict()
        self._input, self._hidden = weights["weight_ih_l0"], weights["weight_hh_l0"]
        self._bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
        second = {name.replace("l1", "l0"): one for name, one in weights.items() if "l1" in name}
        self._second = nn.LSTM(model.lstm.hidden_size, model.lstm.hidden_size, batch_first=True)
        self._second.load_state_dict(second)

    def projected(self, windows: Tensor) -> Tensor:
        """What the first layer adds to its gates, (B, T, 4H)."""
        return self.project(self._conv(windows).transpose(1, 2))

    def project(self, steps: Tensor) -> Tensor:
        """The same of steps after the convolutions, (B, T, conv channels)."""
        return functional.linear(steps, self._input, self._bias)

    def step(self, windows: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs, and what to keep for the next time.

        Args:
            before: of the windows one step earlier.
        """
        ends = 3 * _EDGE
        oldest = self.projected(windows[:, :, :ends])[:, :_EDGE]
        newest = self.projected(windows[:, :, -ends:])[:, -_EDGE - 1 :]
        now = torch.cat([oldest, before[:, _EDGE + 1 : -_EDGE], newest], dim=1)
        return self._outputs(now), now

    def _outputs(self, projected: Tensor) -> Tensor:
        hidden = cell = torch.zeros(len(projected), self._hidden.shape[1])
        made = []
        for gates in projected.unbind(1):
            gates = torch.addmm(gates, hidden, self._hidden.T)
            enter, forget, new, leave = gates.chunk(4, dim=1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = leave.sigmoid() * cell.tanh()
            made.append(hidden)
        outputs: Tensor = self._head(self._second(torch.stack(made, 1))[0][:, -1])
        return outputs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    machine = str(this_machine())
    torch.set_num_threads(1)
    artifact = seeded_artifact()
    model = artifact.build_model()
    assert isinstance(model, CnnLstm)
    raw = torch.tensor(typical_windows(artifact.config, artifact.normalisation, 65, seed=3))
    normal = ((raw - model.mean) / model.scale).clamp(-model.clip, model.clip)
    # Two windows that overlap in all but a step, of 64 symbols.
    earlier, later = normal[:64], torch.cat([normal[:64, :, 1:], normal[1:, :, :1]], dim=2)

    with torch.inference_mode():
        reuse = Reuse(model)
        steps = model.conv(later).transpose(1, 2)
        error = (reuse.step(later, reuse.projected(earlier))[0] - model.encode(later)).abs().max()
        print(f"{machine}, torch {torch.__version__}, largest error {float(error):.1e}\n")
        print("| windows | whole | convolutions | projection | bound | reuse | bytes a symbol |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for size in _SIZES:
            kept = reuse.projected(earlier[:size])
            batch, inner = later[:size].contiguous(), steps[:size].contiguous()
            whole, conv, projection, incremental = _in_turns(
                options.rounds,
                partial(model.encode, batch),
                partial(model.conv, batch),
                partial(reuse.project, inner),
                partial(reuse.step, batch, kept),
            )
            bound = whole - conv - projection
            print(
                f"| {size} | {whole:.2f} | {conv:.2f} | {projection:.2f} | {bound:.2f} "
                f"| {incremental:.2f} | {kept[0].nbytes:,} |"
            )


def _in_turns(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Medians, milliseconds."""
    taken_s: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, taken_s, strict=True):
            begun_s = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begun_s)
    return [statistics.median(seconds) * 1000 for seconds in taken_s]


if __name__ == "__main__":
    main()
