"""The latest features of every symbol, read along from the output topics."""

import asyncio
from collections import OrderedDict

import structlog

from schemas.errors import TapelineError
from schemas.messages import FeatureVector
from schemas.settings import Settings
from tapeline.subscriber import FeatureSubscriber

_PAUSE_S = 1.0
_log = structlog.get_logger(__name__)


class LatestFeatures:
    """What came since ``follow`` began, by venue and symbol.

    Args:
        max_symbols: the longest silent one leaves.
    """

    def __init__(self, max_symbols: int) -> None:
        self._max_symbols = max_symbols
        self._by_symbol: OrderedDict[tuple[str, str], dict[str, FeatureVector]] = OrderedDict()
        self.is_reading = False

    def find(self, venue: str, symbol: str, lane: str | None = None) -> FeatureVector | None:
        """The latest of that lane; None as lane: the latest by event time of all."""
        by_lane = self._by_symbol.get((venue, symbol), {})
        if lane is not None:
            return by_lane.get(lane)
        return max(by_lane.values(), key=lambda one: one.event_time_us, default=None)

    def take(self, feature: FeatureVector) -> None:
        """Keeps a feature in place of the lane's one before."""
        key = (feature.venue, feature.symbol)
        self._by_symbol.setdefault(key, {})[feature.lane] = feature
        self._by_symbol.move_to_end(key)
        if len(self._by_symbol) > self._max_symbols:
            self._by_symbol.popitem(last=False)

    async def follow(self, settings: Settings) -> None:
        """Reads all lanes' features for ever; when the broker is away, again a second later."""
        while True:
            try:
                async with FeatureSubscriber(settings, undecodable="skip") as subscriber:
                    self.is_reading = True
                    async for feature in subscriber:
                        self.take(feature)
            except TapelineError as error:
                _log.warning("latest_features_interrupted", error=str(error))
            finally:
                self.is_reading = False
            await asyncio.sleep(_PAUSE_S)
