"""One batch shape on one device: rows are staged, the model runs, outputs come back.

``Engine`` cuts a micro-batch into passes. On a GPU a pass is a CUDA graph: copy to the device, the
network, copy back, in one launch. Two passes of a shape take turns, each on a stream of its own, so
that the rows of one are staged and copied while the other computes.
"""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.model import Network

_WARM_UP_RUNS = 3  # what cuDNN and cuBLAS set up at first must not be recorded


class Pass(Protocol):
    """A batch shape that may run again and again; ``begin`` and ``finish`` take turns."""

    def begin(self, windows: NDArray[np.float32]) -> None:
        """Starts on up to the shape's number of rows, float32 (B, C, T); padded with zeros.

        Raises torch.OutOfMemoryError.
        """

    def finish(self) -> NDArray[np.float32]:
        """Waits; gives float32 (B, F + S). Valid until the next ``begin``."""


class _Staging:
    """Rows in the host's memory, padded with zeros: nothing of an earlier call is left in them."""

    def __init__(self, model: Network, num_rows: int, *, pinned: bool = False) -> None:
        shape = (num_rows, model.config.num_channels, model.config.num_steps)
        self.tensor = torch.zeros(shape, pin_memory=pinned)
        self.num_filled = 0

    def fill(self, windows: NDArray[np.float32]) -> None:
        """Torch copies: it uses its threads, numpy one."""
        num_rows = len(windows)
        self.tensor[:num_rows].copy_(_as_tensor(windows))
        self.tensor[num_rows : self.num_filled].zero_()
        self.num_filled = num_rows


class EagerPass:
    """Runs the network when its rows come, one kernel after the other."""

    def __init__(self, model: Network, num_rows: int, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._staging = _Staging(model, num_rows)
        self._outputs: Tensor | None = None

    @torch.inference_mode()
    def begin(self, windows: NDArray[np.float32]) -> None:
        self._staging.fill(windows)
        self._outputs = torch.cat(self._model(self._staging.tensor.to(self._device)), dim=1).cpu()

    def finish(self) -> NDArray[np.float32]:
        assert self._outputs is not None
        outputs: NDArray[np.float32] = self._outputs.numpy()[: self._staging.num_filled]
        return outputs


class GraphPass:
    """Replays what was recorded once, with buffers of its own on both sides.

    Raises torch.OutOfMemoryError in its constructor; ``begin`` takes no memory.

    Args:
        sleep: ``finish`` leaves its core to others; else it spins, and is back some 50 us earlier.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Network, num_rows: int, device: torch.device, *, sleep: bool = False
    ) -> None:
        config = model.config
        self._staging = _Staging(model, num_rows, pinned=True)
        self._rows = torch.zeros(self._staging.tensor.shape, device=device)
        self._outputs = torch.zeros(
            (num_rows, config.num_features + config.num_scores), pin_memory=True
        )
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event(blocking=sleep)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                self._run(model)
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._run(model)

    @torch.inference_mode()
    def begin(self, windows: NDArray[np.float32]) -> None:
        self._staging.fill(windows)
        with torch.cuda.stream(self._stream):
            self._graph.replay()
            self._done.record()

    def finish(self) -> NDArray[np.float32]:
        self._done.synchronize()
        outputs: NDArray[np.float32] = self._outputs.numpy()[: self._staging.num_filled]
        return outputs

    def _run(self, model: Network) -> None:
        self._rows.copy_(self._staging.tensor, non_blocking=True)
        outputs = torch.cat(model(self._rows), dim=1)
        self._outputs.copy_(outputs, non_blocking=True)


class _Writeable:
    """The same memory without numpy's flag: what Serve hands over is read-only, and torch, which
    only reads it here, would warn of that at every call.
    """

    def __init__(self, array: NDArray[np.float32]) -> None:
        interface: dict[str, Any] = dict(array.__array_interface__)
        self._array = array  # owns the memory
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def _as_tensor(windows: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(windows if windows.flags.writeable else np.asarray(_Writeable(windows)))
