"""Events at hand as the columns that windows take."""

from collections.abc import Sequence

from consumers.channels import Market50
from consumers.columns import EventColumns, EventDecoder
from schemas.codec import Codec
from schemas.messages import MarketEvent
from schemas.settings import SchemaRegistrySettings

DECODER = EventDecoder(Codec(SchemaRegistrySettings()), Market50().check)


def columns_of(events: Sequence[MarketEvent]) -> EventColumns:
    return DECODER.columns_of(events)
