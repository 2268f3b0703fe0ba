"""Networks as a user would bring them: plain torch, nothing of ours."""

import time

import torch
from torch import Tensor, nn


class Pooled(nn.Module):
    """Batch normalisation has an integer among its state, which must survive a folder."""

    def __init__(self, num_in: int, num_out: int, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv1d(num_in, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, num_out)

    def forward(self, windows: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.relu(self.norm(self.conv(windows))).mean(dim=2))
        return outputs


class Slow(nn.Module):
    """Takes its time, whatever it is given: a small capacity without a busy processor."""

    def __init__(self, num_in: int, num_out: int, seconds: float) -> None:
        super().__init__()
        self.head = nn.Linear(num_in, num_out)
        self.seconds = seconds

    def forward(self, windows: Tensor) -> Tensor:
        time.sleep(self.seconds)
        outputs: Tensor = self.head(windows[:, :, -1])
        return outputs


class Mixed(nn.Module):
    """A window's outputs depend, in their last bits, on those beside it."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.head = nn.Linear(num_in, num_out)

    def forward(self, windows: Tensor) -> Tensor:
        outputs: Tensor = self.head(windows[:, :, -1])
        return outputs + 1e-6 * outputs.mean()


def no_module() -> int:
    return 3
