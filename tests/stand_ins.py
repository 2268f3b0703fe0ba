"""Fakes of the model, labelled: what a test decides instead of an engine."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from inference.client import Inference, ModelDescription


class FakeModel:
    """A blocking model that answers by a function, whatever version is asked."""

    def __init__(
        self,
        infer: Callable[[NDArray[np.float32]], Inference],
        description: ModelDescription,
    ) -> None:
        self._infer = infer
        self._description = description

    def infer(self, windows: NDArray[np.float32], model_version: str | None = None) -> Inference:
        return self._infer(windows)

    def describe(self) -> ModelDescription:
        return self._description

    def prepare(self, versions: tuple[str, ...]) -> ModelDescription:
        return self._description
