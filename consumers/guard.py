"""How far a worker steps back when its machine runs short. Sans-IO: it is told what is in use."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from consumers.service_times import SMALLEST_BUCKET
from schemas.guard import GuardSettings, Resource
from schemas.lanes import LaneSettings
from schemas.resources import ResourceUsage

Step = Literal["shrink", "grow", "hold", "release"]


class Restraint(NamedTuple):
    """What is taken away.

    Attributes:
        shrunk_by: how often the largest micro-batch is halved.
        held: lanes that get their reserved share and not a record more, the last rank first.
    """

    shrunk_by: int = 0
    held: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GuardStatistics:
    """What a guard saw and did since its start.

    Attributes:
        watched: the resources that count.
        num_looks: how often it was told what is in use.
        usage: as last told; None before the first look.
        steps: taken, by the resource that asked for them. What is given back is counted for the
            resource that it was taken for: in all, ``shrink`` - ``grow`` is ``shrunk_by``, and
            ``hold`` - ``release`` the number of lanes held.
    """

    watched: tuple[Resource, ...]
    num_looks: int
    usage: ResourceUsage | None
    restraint: Restraint
    steps: Mapping[tuple[Resource, Step], int]


class ResourceGuard:
    """Decides, look by look, what a lack of resources takes away.

    - Any resource above its target: the largest micro-batch is halved once more, until it is the
      smallest bucket. Any above its max: one more lane is held, too, the last rank first and the
      first rank never.
    - Every one more than ``hysteresis`` below its target: the lane held last is released; where
      none is held, the largest micro-batch doubles.
    - Else all stays as it is.

    No lane starves: a held one keeps its reserved share (``LaneScheduler.restrain``).

    Args:
        max_batch: the largest micro-batch without it.
    """

    def __init__(
        self,
        settings: GuardSettings,
        lanes: Sequence[LaneSettings],
        max_batch: int,
    ) -> None:
        by_rank = sorted(lanes, key=lambda lane: lane.rank)
        self._may_be_held = [lane.name for lane in reversed(by_rank[1:])]
        self._settings = settings
        self._watched: tuple[Resource, ...] = ()
        self._shrunk_for: list[Resource] = []  # of each halving, the resource that asked for it
        self._held_for: list[Resource] = []  # the same of each lane held
        self._num_looks = 0
        self._usage: ResourceUsage | None = None
        self._steps: Counter[tuple[Resource, Step]] = Counter()
        self.configure(max_batch)

    def watch(self, resources: Sequence[Resource]) -> None:
        """Says which resources count, from the next look on; none do at first."""
        self._watched = tuple(resources)

    def configure(self, max_batch: int) -> None:
        """Another largest micro-batch, from the next look on."""
        # After so many halvings it is the smallest bucket, or less.
        self._max_shrunk_by = (max_batch // (SMALLEST_BUCKET + 1)).bit_length()

    def look(self, usage: ResourceUsage) -> Restraint:
        """What holds from now on, at most one step from what did. Call it once a second."""
        self._num_looks += 1
        self._usage = usage
        if short := self._worst(usage, self._settings.target):
            if len(self._shrunk_for) < self._max_shrunk_by:
                self._shrunk_for.append(short)
                self._steps[short, "shrink"] += 1
            if very_short := self._worst(usage, self._settings.maximum):
                self._hold(very_short)
        elif not self._worst(usage, self._settings.target, self._settings.hysteresis):
            self._give_back()
        return self.restraint

    @property
    def restraint(self) -> Restraint:
        """What holds now."""
        return Restraint(len(self._shrunk_for), tuple(self._may_be_held[: len(self._held_for)]))

    def statistics(self) -> GuardStatistics:
        """A snapshot; callable from any thread."""
        return GuardStatistics(
            self._watched, self._num_looks, self._usage, self.restraint, dict(self._steps)
        )

    def _worst(
        self, usage: ResourceUsage, limit: Callable[[Resource], float], margin: float = 0.0
    ) -> Resource | None:
        """The watched resource that is furthest above its limit less the margin, if any is."""
        over: dict[Resource, float] = {}
        for resource in self._watched:
            used: float | None = getattr(usage, resource)
            if used is not None and used > limit(resource) - margin:
                over[resource] = used - limit(resource)
        return max(over, key=lambda one: over[one], default=None)

    def _hold(self, resource: Resource) -> None:
        if len(self._held_for) < len(self._may_be_held):
            self._held_for.append(resource)
            self._steps[resource, "hold"] += 1

    def _give_back(self) -> None:
        if self._held_for:
            self._steps[self._held_for.pop(), "release"] += 1
        elif self._shrunk_for:
            self._steps[self._shrunk_for.pop(), "grow"] += 1
