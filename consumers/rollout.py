"""Which model version makes a symbol's features: what the store says, once the model is ready."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from consumers.columns import name_of
from inference.client import Inferencer, ModelDescription
from schemas.errors import ConfigError, TransientError
from schemas.rollout import Rollout, find_rollout

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RolloutStatistics:
    """Attributes:
    rollout: what this worker goes by; None without a store.
    num_changes: how often it took another one.
    num_refused: how often what the store said could not be served.
    """

    rollout: Rollout | None = None
    num_changes: int = 0
    num_refused: int = 0


class RolloutFollower:
    """Has every version loaded wherever calls may arrive before the first window goes to it.

    A micro-batch asks once, at its start, so that within a partition versions change in the order
    of the offsets. A worker that takes on a partition looks first: it must not fall behind the
    worker that had it before.

    Args:
        store: where the rollout is; None: there is one version.
        on_change: told of the description of what serves, when it changes.
    """

    def __init__(
        self,
        store: Path | None,
        inferencer: Inferencer,
        on_change: Callable[[ModelDescription], None],
    ) -> None:
        self._store = store
        self._inferencer = inferencer
        self._on_change = on_change
        self._looking = asyncio.Lock()
        self._seen: Rollout | None = None
        self._statistics = RolloutStatistics()

    @property
    def shadow(self) -> str | None:
        """The version that is to see what the others see."""
        rollout = self._statistics.rollout
        return rollout.shadow if rollout else None

    def statistics(self) -> RolloutStatistics:
        return self._statistics

    def group(self, symbols: Sequence[bytes]) -> dict[str | None, list[int]]:
        """Indices by the version that makes their features; None: whichever serves.

        Args:
            symbols: as in ``EventColumns``.
        """
        rollout = self._statistics.rollout
        if rollout is None or rollout.canary is None:
            return {rollout.serving if rollout else None: list(range(len(symbols)))}
        groups: dict[str | None, list[int]] = {}
        for index, symbol in enumerate(symbols):
            groups.setdefault(rollout.version_of(*name_of(symbol)), []).append(index)
        return groups

    async def look(self) -> None:
        """Takes what the store says, if that is new and the model can serve it."""
        if self._store is None:
            return
        async with self._looking:
            try:
                rollout = find_rollout(self._store)
            except ConfigError as error:
                _log.error("rollout_unreadable", error=str(error))
                return
            if rollout is None or rollout == self._seen:
                return
            try:
                description = await self._inferencer.prepare(rollout.versions)
            except TransientError as error:
                _log.warning("rollout_waits", error=str(error))
                return
            except ConfigError as error:
                self._seen = rollout
                self._note(num_refused=1)
                _log.error("rollout_refused", error=str(error), serving=self._serving())
                return
            self._seen = rollout
            is_first = self._statistics.rollout is None
            self._statistics = replace(self._statistics, rollout=rollout)
            if not is_first:
                self._note(num_changes=1)
            self._on_change(description)
            _log.info(
                "rollout_changed",
                serving=rollout.serving,
                shadow=rollout.shadow,
                canary=rollout.canary,
                canary_share=rollout.canary_share,
            )

    def _serving(self) -> str | None:
        rollout = self._statistics.rollout
        return rollout.serving if rollout else None

    def _note(self, *, num_changes: int = 0, num_refused: int = 0) -> None:
        now = self._statistics
        self._statistics = replace(
            now,
            num_changes=now.num_changes + num_changes,
            num_refused=now.num_refused + num_refused,
        )
