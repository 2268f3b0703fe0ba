"""Tapeline turns a market tape into features: produce market events, subscribe to features.

The names below are loaded when they are first used, so that importing a part stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from schemas.errors import (
        AssignmentLost,
        ConfigError,
        PoisonRecord,
        TapelineError,
        TransientError,
    )
    from schemas.messages import (
        Bar,
        Book,
        FeatureVector,
        Flags,
        InvalidEvent,
        MarketEvent,
        Quote,
        Sample,
        Trade,
    )
    from schemas.settings import Settings, load_settings
    from tapeline.producer import (
        AsyncMarketEventProducer,
        Delivery,
        DeliveryFailed,
        MarketEventProducer,
    )
    from tapeline.subscriber import FeatureRecord, FeatureSubscriber

__all__ = [
    "AssignmentLost",
    "AsyncMarketEventProducer",
    "Bar",
    "Book",
    "ConfigError",
    "Delivery",
    "DeliveryFailed",
    "FeatureRecord",
    "FeatureSubscriber",
    "FeatureVector",
    "Flags",
    "InvalidEvent",
    "MarketEvent",
    "MarketEventProducer",
    "PoisonRecord",
    "Quote",
    "Sample",
    "Settings",
    "TapelineError",
    "Trade",
    "TransientError",
    "load_settings",
]

_MODULES = {
    "schemas.errors": (
        "AssignmentLost",
        "ConfigError",
        "PoisonRecord",
        "TapelineError",
        "TransientError",
    ),
    "schemas.messages": (
        "Bar",
        "Book",
        "FeatureVector",
        "Flags",
        "InvalidEvent",
        "MarketEvent",
        "Quote",
        "Sample",
        "Trade",
    ),
    "schemas.settings": ("Settings", "load_settings"),
    "tapeline.producer": (
        "AsyncMarketEventProducer",
        "Delivery",
        "DeliveryFailed",
        "MarketEventProducer",
    ),
    "tapeline.subscriber": ("FeatureRecord", "FeatureSubscriber"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
