"""A training run that can go on after it was cut off: one safetensors file, no pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from schemas.errors import ConfigError

_STATE = "state"


def save_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Writes it whole or not at all, over what was there.

    Args:
        extra: tensors beside the modules', by name.
        state: JSON values.
    """
    tensors = {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    tensors |= {f"extra.{key}": tensor for key, tensor in extra.items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": tensor for key, tensor in moments.items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        safetensors.torch.save_file(plain, draft, metadata={_STATE: json.dumps(state)})
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class Checkpoint:
    """A checkpoint as it was written. Raises ConfigError for a file that is none."""

    def __init__(self, path: Path) -> None:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self.state: dict[str, Any] = json.loads((file.metadata() or {})[_STATE])
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise ConfigError(
                f"{path} is no checkpoint of a training ({error}); remove it to begin anew"
            ) from error

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of one module, or ``extra``."""
        prefix = f"{name}."
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self._tensors.items()
            if key.startswith(prefix)
        }

    def restore(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Gives modules and optimizer back what they had."""
        for name, module in modules.items():
            module.load_state_dict(self.tensors(name))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in self.tensors("optimizer").items():
            number, _, kind = key.partition(".")
            moments.setdefault(int(number), {})[kind] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
