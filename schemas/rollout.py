"""Which versions of a model store are in use: what its small file says."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import ConfigError

ROLLOUT_FILE = "rollout.json"


@dataclass(frozen=True, slots=True)
class Rollout:
    """Which versions of a store are in use, each by its ``model_version``.

    Attributes:
        serving: makes the features.
        before: what served earlier, newest first: where ``rollback`` goes.
        shadow: sees the same windows when nothing else waits; its answers are compared, not
            published.
        canary: makes the features of ``canary_share`` of all symbols.
    """

    serving: str
    before: tuple[str, ...] = ()
    shadow: str | None = None
    canary: str | None = None
    canary_share: float = 0.0

    @property
    def versions(self) -> tuple[str, ...]:
        """What has to be loaded; the one that serves is first, and the one before is kept warm."""
        named = (self.serving, self.canary, self.shadow, *self.before[:1])
        return tuple(dict.fromkeys(version for version in named if version))

    def version_of(self, venue: str, symbol: str) -> str:
        """Which version makes this symbol's features; the same in every process."""
        if self.canary is None:
            return self.serving
        digest = hashlib.blake2b(f"{venue}\n{symbol}".encode(), digest_size=8).digest()
        is_canary = int.from_bytes(digest, "big") < self.canary_share * 2**64
        return self.canary if is_canary else self.serving


def find_rollout(store: Path) -> Rollout | None:
    """What is in use of a store; None if nothing is yet.

    Raises ConfigError: the file cannot be read, or is no rollout.
    """
    file = store / ROLLOUT_FILE
    try:
        fields = json.loads(file.read_bytes())
        return Rollout(**fields | {"before": tuple(fields["before"])})
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file} is damaged; promote a model again") from error
