"""DeepLOB: convolutions over the levels of a book and over time, an inception module, an LSTM.

Zhang, Zohren and Roberts, "DeepLOB: Deep Convolutional Neural Networks for Limit Order Books", IEEE
Transactions on Signal Processing 67 (2019), figure 3: 16 and 32 filters, LSTM of 64.
"""

import torch
from torch import Tensor, nn

from inference.model import ModelConfig, Network, Normalisation

LEVELS = 10
_FILTERS, _BRANCH, _HIDDEN = 16, 32, 64
_SLOPE = 0.01


class DeepLob(Network):
    """Reads the book alone: the first 40 channels as ``market50-v1`` has them.

    Those are ten levels of bid price, bid size, ask price, ask size; the other channels are not
    looked at. The head gives features beside the scores, from the same state of the LSTM.
    """

    order: Tensor

    def __init__(self, config: ModelConfig, normalisation: Normalisation) -> None:
        super().__init__(config, normalisation)
        if config.num_channels < 4 * LEVELS:
            raise ValueError(
                f"deeplob reads the {4 * LEVELS} channels of a book of {LEVELS} levels, "
                f"not {config.num_channels}"
            )
        sides = torch.arange(4 * LEVELS).reshape(4, LEVELS)
        # Level by level: ask price, ask size, bid price, bid size, as published.
        self.register_buffer("order", sides[[2, 3, 0, 1]].T.reshape(-1), persistent=False)
        self.blocks = nn.Sequential(
            *_block(nn.Conv2d(1, _FILTERS, (1, 2), stride=(1, 2))),
            *_block(nn.Conv2d(_FILTERS, _FILTERS, (1, 2), stride=(1, 2))),
            *_block(nn.Conv2d(_FILTERS, _FILTERS, (1, LEVELS))),
        )
        self.short = _branch(nn.Conv2d(_FILTERS, _BRANCH, (1, 1)), 3)
        self.long = _branch(nn.Conv2d(_FILTERS, _BRANCH, (1, 1)), 5)
        self.pooled = nn.Sequential(
            nn.MaxPool2d((3, 1), stride=1, padding=(1, 0)),
            nn.Conv2d(_FILTERS, _BRANCH, (1, 1)),
            nn.LeakyReLU(_SLOPE),
        )
        self.lstm = nn.LSTM(3 * _BRANCH, _HIDDEN, batch_first=True)
        self.head = nn.Linear(_HIDDEN, config.num_features + config.num_scores)

    def encode(self, normalised: Tensor) -> Tensor:
        book = normalised.index_select(1, self.order).transpose(1, 2).unsqueeze(1)  # (B, 1, T, 40)
        steps = self.blocks(book)  # (B, filters, T, 1)
        branches = torch.cat([self.short(steps), self.long(steps), self.pooled(steps)], dim=1)
        hidden, _ = self.lstm(branches.squeeze(-1).transpose(1, 2))
        outputs: Tensor = self.head(hidden[:, -1])
        return outputs


def _block(across: nn.Conv2d) -> list[nn.Module]:
    """One convolution across the book, two over time; every step is kept."""
    layers: list[nn.Module] = [across, nn.LeakyReLU(_SLOPE)]
    for _ in range(2):
        # "Same" of an even size, said in full: torch's own copies the input and warns.
        layers += [nn.ZeroPad2d((0, 0, 1, 2)), nn.Conv2d(_FILTERS, _FILTERS, (4, 1))]
        layers.append(nn.LeakyReLU(_SLOPE))
    return layers


def _branch(narrow: nn.Conv2d, size: int) -> nn.Sequential:
    return nn.Sequential(
        narrow,
        nn.LeakyReLU(_SLOPE),
        nn.Conv2d(_BRANCH, _BRANCH, (size, 1), padding="same"),
        nn.LeakyReLU(_SLOPE),
    )
