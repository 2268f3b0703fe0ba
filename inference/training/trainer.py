"""The training loop: batches in a seeded order, early stopping, and a run that can be resumed."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from inference.model import ModelConfig, Network, Normalisation, build_network
from inference.training.checkpoint import Checkpoint, save_checkpoint
from inference.training.evaluation import macro_f1
from inference.training.labels import CLASSES, UNKNOWN
from inference.training.tape import Ints, Part
from schemas.errors import ConfigError
from schemas.resources import ResourceMeter

_CLIP_GRADIENTS = 1.0
_METERED = 20  # steps from one look at the GPU to the next
_EVALUATED = 4096  # windows in a forward pass without gradients
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: at most; ``patience`` of them without a lower validation loss end it earlier.
        batch_size: windows a step.
        learning_rate, weight_decay: AdamW's; the rate falls to 0 along a half cosine.
        precision: of the layers, where autocast has it; weights stay float32.
        stride: every so many-th window of the training part. Neighbours are nearly alike.
        balance: classes weigh by their frequency to the power of minus this in the loss. At 0
            scores are honest probabilities and a rare class is hardly ever the likeliest; at 1 all
            classes weigh alike, and a rare one is guessed too often.
    """

    epochs: int = 6
    batch_size: int = 256
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    patience: int = 2
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    stride: int = 1
    balance: float = 0.5


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one pass over the training part came to.

    Attributes:
        train_loss, validation_loss: cross-entropy, nats, mean over horizons.
        macro_f1: on the validation part, one for each horizon.
        windows_per_s: of the training part, gradients and optimizer included.
        gpu: share of the time in which the GPU was busy; None without one.
    """

    number: int
    train_loss: float
    validation_loss: float
    macro_f1: tuple[float, ...]
    windows_per_s: float
    gpu: float | None


def fit_normalisation(rows: np.ndarray, clip: float = 10.0) -> Normalisation:
    """Mean and standard deviation of each channel: float32 (R, C) of the training part's rows."""
    scale = rows.std(axis=0, dtype=np.float64)
    return Normalisation(
        rows.mean(axis=0, dtype=np.float64), np.where(scale > 1e-6, scale, 1), clip
    )


class Trainer:
    """One training run.

    The loss is the cross-entropy of the scores, and of a linear probe on the features: so features
    say, linearly, what the scores do. The probe is dropped at the end.

    Args:
        config: its scores are groups of three classes, one group for each horizon.
        checkpoint: written after every epoch; if it is there already, the run goes on from it. The
            rest of such a run is bit for bit what it would have been (on a CPU).

    Raises ConfigError if the checkpoint is of another run, or for a network that cannot be built or
    gives other shapes than its config says.
    """

    def __init__(
        self,
        config: ModelConfig,
        normalisation: Normalisation,
        train: Part,
        validation: Part,
        options: TrainingOptions,
        *,
        device: torch.device,
        checkpoint: Path | None = None,
    ) -> None:
        assert config.num_scores == train.labels.shape[1] * len(CLASSES)
        torch.manual_seed(options.seed)
        self._options = options
        self._device = device
        self._train = _OnDevice(train.every(options.stride), device)
        self._validation = _OnDevice(validation, device)
        self.network = _built(config, normalisation).to(device)
        self._probe = nn.Linear(config.num_features, config.num_scores).to(device)
        self._weights = _class_weights(self._train.labels, options.balance)
        self._parameters = [*self.network.parameters(), *self._probe.parameters()]
        self._optimizer = torch.optim.AdamW(
            self._parameters, options.learning_rate, weight_decay=options.weight_decay
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self._meter = ResourceMeter(gpu=True) if device.type == "cuda" else None
        self._best = self._snapshot()
        self.history: list[Epoch] = []
        self._checkpoint = checkpoint
        self._fingerprint = {
            "config": config.model_dump(mode="json"),
            "options": asdict(options),
            "windows": [len(train), len(validation)],
            "mean": normalisation.mean.tolist(),
        }
        if checkpoint and checkpoint.exists():
            self._resume(checkpoint)

    @property
    def is_done(self) -> bool:
        """All epochs are through, or the validation loss has not fallen for long enough."""
        num = len(self.history)
        return num >= self._options.epochs or num - self.best_epoch > self._options.patience

    @property
    def best_epoch(self) -> int:
        """The number, from 1, of the epoch with the lowest validation loss; 0 before the first."""
        if not self.history:
            return 0
        return min(self.history, key=lambda one: one.validation_loss).number

    def run(
        self,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
        on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    ) -> Network:
        """Trains until ``is_done``; gives the network as it was after the best epoch.

        Args:
            on_batch: told how many windows of how many of this epoch are through.
        """
        while not self.is_done:
            epoch = self._run_epoch(len(self.history) + 1, on_batch)
            self.history.append(epoch)
            if self.best_epoch == epoch.number:
                self._best = self._snapshot()
            if self._checkpoint:
                self._save(self._checkpoint)
            on_epoch(epoch)
        self.network.load_state_dict(self._best)
        return self.network.eval()

    def _snapshot(self) -> dict[str, Tensor]:
        return {key: one.clone() for key, one in self.network.state_dict().items()}

    def _run_epoch(self, number: int, on_batch: Callable[[int, int], None]) -> Epoch:
        self.network.train()
        num = len(self._train)
        # Of seed and epoch alone, so that a resumed run has the same order.
        order = np.random.default_rng([self._options.seed, number]).permutation(num)
        losses, busy = torch.zeros((), device=self._device), []
        begun_s = time.perf_counter()
        for step, begin in enumerate(range(0, num, self._options.batch_size)):
            chosen = order[begin : begin + self._options.batch_size]
            self._set_rate((number - 1 + begin / num) / self._options.epochs)
            losses += self._step(chosen) * len(chosen)
            on_batch(begin + len(chosen), num)
            if self._meter and step % _METERED == 0:
                busy.append(self._meter.read().gpu or 0)
        train_loss = float(losses) / num  # waits for the device
        elapsed_s = time.perf_counter() - begun_s
        loss, predicted = self._validate()
        labels = self._validation.part.labels
        return Epoch(
            number=number,
            train_loss=train_loss,
            validation_loss=loss,
            macro_f1=tuple(
                macro_f1(labels[:, column], predicted[:, column])
                for column in range(labels.shape[1])
            ),
            windows_per_s=num / elapsed_s,
            gpu=float(np.mean(busy)) if busy else None,
        )

    def _set_rate(self, progress: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.learning_rate * (1 + np.cos(np.pi * progress)) / 2

    def _step(self, chosen: Ints) -> Tensor:
        windows, labels = self._train.batch(chosen)
        self._optimizer.zero_grad(set_to_none=True)
        dtype = _AUTOCAST.get(self._options.precision)
        with torch.autocast(self._device.type, dtype) if dtype else nullcontext():
            features, logits = self.network.logits(windows)
            guesses = self._probe(features)
        loss = self._loss(logits.float(), labels)
        total = self._scaler.scale(loss + self._loss(guesses.float(), labels))
        total.backward()  # type: ignore[no-untyped-call]
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self._parameters, _CLIP_GRADIENTS)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, mean over horizons; windows without a label do not count."""
        groups = _by_class(logits)
        losses = [
            functional.cross_entropy(
                groups[:, column], labels[:, column], self._weights[column], ignore_index=UNKNOWN
            )
            for column in range(labels.shape[1])
        ]
        return torch.stack(losses).nan_to_num().mean()  # NaN: no label of a horizon in the batch

    @torch.inference_mode()
    def _validate(self) -> tuple[float, np.ndarray]:
        """Loss, and the likeliest class of every window and horizon, int64 (n, H)."""
        self.network.eval()
        total, predicted = 0.0, []
        for chosen in _chunks(len(self._validation)):
            windows, labels = self._validation.batch(chosen)
            _, logits = self.network.logits(windows)
            total += float(self._loss(logits, labels)) * len(chosen)
            predicted.append(_by_class(logits).argmax(dim=2).cpu().numpy())
        return total / len(self._validation), np.concatenate(predicted)

    def _save(self, path: Path) -> None:
        save_checkpoint(
            path,
            {"network": self.network, "probe": self._probe},
            self._optimizer,
            self._best,
            {
                "fingerprint": self._fingerprint,
                "history": [asdict(one) for one in self.history],
                "scaler": self._scaler.state_dict(),
            },
        )

    def _resume(self, path: Path) -> None:
        checkpoint = Checkpoint(path)
        if checkpoint.state.get("fingerprint") != self._fingerprint:
            raise ConfigError(
                f"{path} is of a training with other events or options; remove it to begin anew, "
                "or give what you gave before"
            )
        checkpoint.restore({"network": self.network, "probe": self._probe}, self._optimizer)
        self._scaler.load_state_dict(checkpoint.state["scaler"])
        self._best = {key: one.to(self._device) for key, one in checkpoint.tensors("extra").items()}
        self.history = [
            Epoch(**{**one, "macro_f1": tuple(one["macro_f1"])})
            for one in checkpoint.state["history"]
        ]


def _built(config: ModelConfig, normalisation: Normalisation) -> Network:
    try:
        network = build_network(config, normalisation)
        with torch.inference_mode():
            network.eval().logits(torch.zeros(2, config.num_channels, config.num_steps))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"this model cannot be trained: {error}") from error
    return network


class _OnDevice:
    """A part whose rows lie on the device once; windows are gathered there."""

    def __init__(self, part: Part, device: torch.device) -> None:
        self.part = part
        self._rows = torch.from_numpy(part.tape.rows).to(device)
        self._ends = torch.from_numpy(part.ends).to(device)
        self.labels = torch.from_numpy(part.labels).long().to(device)
        self._steps = torch.arange(1 - part.tape.num_steps, 1, device=device)

    def __len__(self) -> int:
        return len(self.part)

    def batch(self, chosen: Ints) -> tuple[Tensor, Tensor]:
        """Windows (n, C, T) and labels (n, H)."""
        places = torch.from_numpy(chosen).to(self._ends.device)
        steps = self._ends[places, None] + self._steps
        return self._rows[steps].transpose(1, 2).contiguous(), self.labels[places]


def _class_weights(labels: Tensor, balance: float) -> Tensor:
    """Of each class of each horizon, (H, 3), their mean over the windows 1."""
    counts = torch.stack([(labels == kind).sum(dim=0) for kind in range(len(CLASSES))], dim=1)
    weights = counts.clamp(min=1).float() ** -balance
    return weights * counts.sum(dim=1, keepdim=True) / (weights * counts).sum(dim=1, keepdim=True)


def _by_class(logits: Tensor) -> Tensor:
    """(n, 3 H) to (n, H, 3)."""
    return logits.reshape(len(logits), -1, len(CLASSES))


def _chunks(num: int) -> Iterator[Ints]:
    for begin in range(0, num, _EVALUATED):
        yield np.arange(begin, min(begin + _EVALUATED, num))
