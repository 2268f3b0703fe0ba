"""``tapeline audit``: reads what went in and what came out, and proves what was promised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from schemas.settings import Settings
from tapeline.ledger import LaneAudit, Violation

Delivery = Literal["at_least_once", "exactly_once"]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What the ledgers of some lanes say.

    Attributes:
        lanes: first rank first.
        violations: the first of each lane, by the time of their records.
        duplicates: ids of events published more than once, each once.
    """

    delivery: Delivery
    settled: bool
    lanes: tuple[LaneAudit, ...]
    violations: tuple[Violation, ...]
    duplicates: tuple[str, ...]
    num_read: int
    seconds: float

    @property
    def is_clean(self) -> bool:
        """No violation in any lane."""
        return self.first_violation is None

    @property
    def first_violation(self) -> Violation | None:
        """The one whose record was appended first."""
        return self.violations[0] if self.violations else None


def audit(
    settings: Settings,
    lanes: Sequence[str] | None = None,
    *,
    settled: bool = False,
    delivery: Delivery | None = None,
    max_violations: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> AuditReport:
    """Reads the lanes' topics to their ends and judges them.

    Args:
        lanes: names; None: all that are enabled.
        settled: everything has been worked off: every record must have its end. Else only those
            below the committed offset must.
        delivery: the promise to hold them to; None: ``settings.worker.delivery``.
        max_violations: kept of each lane; all are counted.
        progress: told now and then how many offsets of how many have been passed.

    Raises:
        ConfigError: no broker answers, or a topic or lane does not exist.
        TransientError: the broker answers, but not this.
    """
    raise NotImplementedError
