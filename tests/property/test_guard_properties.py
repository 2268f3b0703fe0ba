"""How far a worker steps back, whatever is in use: one step a look, and all of it given back."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from consumers.guard import ResourceGuard, Restraint
from schemas.guard import RESOURCES, GuardSettings, Resource
from schemas.lanes import LaneSettings
from schemas.resources import ResourceUsage

SETTINGS = GuardSettings()
CALM = ResourceUsage(0.0, 0.0, 0.0)

fractions = st.one_of(st.sampled_from([0.0, 0.55, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0]), st.floats(0, 1))
usages = st.builds(ResourceUsage, fractions, fractions, st.none() | fractions)


@st.composite
def guards(draw: st.DrawFn) -> tuple[ResourceGuard, list[str], int]:
    """A guard, the names of its lanes by rank, and the largest micro-batch."""
    num_lanes = draw(st.integers(1, 6))
    lanes = [
        LaneSettings(name=f"lane-{rank}", rank=rank, reserved_share=0, deadline_ms=1)
        for rank in range(1, num_lanes + 1)
    ]
    max_batch = draw(st.integers(1, 1000))
    guard = ResourceGuard(SETTINGS, draw(st.permutations(lanes)), max_batch)
    guard.watch(draw(st.lists(st.sampled_from(RESOURCES), unique=True)))
    return guard, [lane.name for lane in lanes], max_batch


def limits(guard: ResourceGuard, usage: ResourceUsage) -> dict[Resource, tuple[float, float]]:
    """What is used above target and above max, of the resources that count and are known."""
    return {
        one: (used - SETTINGS.target(one), used - SETTINGS.maximum(one))
        for one in guard.statistics().watched
        if (used := getattr(usage, one)) is not None
    }


@given(made=guards(), looks=st.lists(usages, max_size=40))
def test_each_look_takes_the_step_that_its_usage_asks_for(
    made: tuple[ResourceGuard, list[str], int], looks: list[ResourceUsage]
) -> None:
    guard, names, max_batch = made
    before = Restraint()
    for usage in looks:
        over = limits(guard, usage)
        now = guard.look(usage)
        grew, holds = now.shrunk_by - before.shrunk_by, len(now.held) - len(before.held)
        if any(above > 0 for above, _ in over.values()):
            at_the_end = max_batch >> before.shrunk_by <= 4
            assert grew == (0 if at_the_end else 1)
            asks = any(far_above > 0 for _, far_above in over.values())
            assert holds == (asks and len(before.held) < len(names) - 1)
        elif all(above <= -SETTINGS.hysteresis for above, _ in over.values()):
            assert holds == (-1 if before.held else 0)
            assert grew == (-1 if before.shrunk_by and not before.held else 0)
        else:
            assert now == before
        before = now


@given(made=guards(), looks=st.lists(usages, max_size=40))
def test_last_ranks_are_held_and_the_first_never(
    made: tuple[ResourceGuard, list[str], int], looks: list[ResourceUsage]
) -> None:
    guard, names, max_batch = made
    for usage in looks:
        shrunk_by, held = guard.look(usage)
        assert list(held) == names[::-1][: len(held)]
        assert names[0] not in held
        assert shrunk_by == 0 or max_batch >> (shrunk_by - 1) > 4, "a halving that halves nothing"


@given(made=guards(), looks=st.lists(usages, max_size=40))
def test_every_step_is_counted_and_calm_gives_all_of_it_back(
    made: tuple[ResourceGuard, list[str], int], looks: list[ResourceUsage]
) -> None:
    guard, _, _ = made

    def balance() -> None:
        now, by_step = guard.statistics(), Counter[str]()
        for (resource, step), num in now.steps.items():
            assert resource in now.watched
            assert num > 0
            by_step[step] += num
        assert by_step["shrink"] - by_step["grow"] == now.restraint.shrunk_by
        assert by_step["hold"] - by_step["release"] == len(now.restraint.held)

    for usage in looks:
        guard.look(usage)
        balance()
    shrunk_by, held = guard.restraint
    for _ in range(shrunk_by + len(held)):
        assert guard.restraint != Restraint()
        guard.look(CALM)
        balance()
    assert guard.restraint == Restraint()
    for resource in RESOURCES:
        steps = guard.statistics().steps
        assert steps.get((resource, "shrink")) == steps.get((resource, "grow"))
        assert steps.get((resource, "hold")) == steps.get((resource, "release"))
    assert guard.statistics().num_looks == len(looks) + shrunk_by + len(held)
