"""Changing over between versions: ready first, then all at once, never half."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from columns import columns_of
from numpy.typing import NDArray

from consumers.rollout import RolloutFollower
from consumers.shadow import Shadow
from inference.artifact import save_artifact
from inference.client import Inference, ModelDescription
from inference.engine import Engine
from inference.hosted import HostedModels, host_models
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from inference.store import ModelStore
from schemas.errors import ConfigError, PoisonRecord, TransientError
from schemas.messages import MarketEvent, Trade
from schemas.settings import ModelSettings, WindowSettings

WINDOW = WindowSettings()
SMALL = ModelConfig(conv_channels=(4,), lstm_hidden=16, lstm_layers=1, num_features=8)


class Preparing:
    """A model of which the test says how long and whether it loads."""

    def __init__(self) -> None:
        self.prepared: list[tuple[str, ...]] = []
        self.answers: list[Exception | None] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def prepare(self, versions: tuple[str, ...]) -> ModelDescription:
        await self.gate.wait()
        if self.answers and (answer := self.answers.pop(0)):
            raise answer
        self.prepared.append(versions)
        return ModelDescription(versions[0], "market50-v1", 50, 60, 8, ())


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "models")
    for seed in (1, 2, 3):
        artifact = seeded_artifact(seed=seed, config=SMALL)
        save_artifact(artifact, store.path / artifact.model_version)
    return store


def follower_of(store: ModelStore, model: Preparing, told: list[str]) -> RolloutFollower:
    on_change: Any = lambda description: told.append(description.model_version)  # noqa: E731
    return RolloutFollower(store.path, model, on_change)  # type: ignore[arg-type]


SYMBOLS = [b"\x02A\x06SIM", b"\x02B\x06SIM"]


async def test_windows_go_to_a_version_only_when_it_is_ready(store: ModelStore) -> None:
    one, two, _ = store.versions()
    store.promote(one, WINDOW)
    model, told = Preparing(), list[str]()
    follower = follower_of(store, model, told)
    assert follower.group(SYMBOLS) == {None: [0, 1]}
    await follower.look()
    assert follower.group(SYMBOLS) == {one: [0, 1]}
    store.promote(two, WINDOW)
    model.gate.clear()
    looks = [asyncio.create_task(follower.look()) for _ in range(3)]
    await asyncio.sleep(0)
    assert follower.group(SYMBOLS) == {one: [0, 1]}
    model.gate.set()
    await asyncio.gather(*looks)
    assert follower.group(SYMBOLS) == {two: [0, 1]}
    assert model.prepared == [(one,), (two, one)], "once, however many look"
    assert told == [one, two]
    assert follower.statistics().num_changes == 1


async def test_what_cannot_serve_changes_nothing_and_is_not_tried_again(store: ModelStore) -> None:
    one, two, three = store.versions()
    store.promote(one, WINDOW)
    model, told = Preparing(), list[str]()
    follower = follower_of(store, model, told)
    await follower.look()
    store.promote(two, WINDOW)
    model.answers = [TransientError("a replica starts"), ConfigError("off its reference")]
    await follower.look()
    assert follower.statistics().num_refused == 0
    for _ in range(3):
        await follower.look()
    assert follower.group(SYMBOLS) == {one: [0, 1]}
    assert (follower.statistics().num_refused, follower.statistics().num_changes) == (1, 0)
    store.promote(three, WINDOW)
    await follower.look()
    assert follower.group(SYMBOLS) == {three: [0, 1]}


async def test_a_canary_splits_by_symbol(store: ModelStore) -> None:
    one, two, _ = store.versions()
    store.promote(one, WINDOW)
    store.try_out(two, WINDOW, canary_share=0.5)
    follower = follower_of(store, Preparing(), [])
    await follower.look()
    symbols = [f"S{number}" for number in range(64)]
    events = [MarketEvent("e", symbol, "SIM", 1, Trade(1.0, 1.0)) for symbol in symbols]
    groups = follower.group(columns_of(events).symbols)
    assert set(groups) == {one, two}
    assert sorted(index for rows in groups.values() for index in rows) == list(range(64))
    for version, rows in groups.items():
        assert all(store.rollout().version_of("SIM", symbols[row]) == version for row in rows)


async def test_an_unreadable_store_leaves_all_as_it_is(store: ModelStore) -> None:
    one, *_ = store.versions()
    store.promote(one, WINDOW)
    follower = follower_of(store, Preparing(), [])
    await follower.look()
    (store.path / "rollout.json").write_text("{")
    await follower.look()
    assert follower.group(SYMBOLS) == {one: [0, 1]}


# The engines of one process.


def windows(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(number).normal(0, 1, (number, 50, 60)).astype(np.float32)


def test_each_version_answers_with_its_own_bits(store: ModelStore) -> None:
    one, two, three = store.versions()
    store.promote(one, WINDOW)
    settings = ModelSettings(store=store.path, device="cpu", max_batch=8)
    models = host_models(settings, WINDOW)
    expected = {
        version: Engine(store.load(version), device="cpu", max_batch=8).infer(windows(5))
        for version in (one, two, three)
    }
    assert models.infer(windows(5)).features.tobytes() == expected[one].features.tobytes()
    assert models.prepare((two, one)).model_version == two
    for version in (one, two, three):  # the third one is loaded when it is asked for
        made = models.infer(windows(5), version)
        assert made.model_version == version
        assert made.features.tobytes() == expected[version].features.tobytes()
    assert models.infer(windows(5)).model_version == two
    assert models.statistics().model_version == two
    with pytest.raises(ConfigError, match="no model artifact"):
        models.prepare(("m@9-00000000", two))
    assert models.describe().model_version == two


def test_a_lone_model_has_no_other_version() -> None:
    engine = Engine(seeded_artifact(config=SMALL), device="cpu", max_batch=4)
    models = HostedModels(engine)
    assert models.infer(windows(1), engine.model_version).model_version == engine.model_version
    with pytest.raises(ConfigError, match=r"there is no model\.store"):
        models.infer(windows(1), "m@9-00000000")


# The shadow.


class Doubling:
    def __init__(self) -> None:
        self.asked: list[tuple[int, str | None]] = []
        self.error: Exception | None = None

    async def infer(
        self, windows: NDArray[np.float32], model_version: str | None = None
    ) -> Inference:
        self.asked.append((len(windows), model_version))
        if self.error:
            raise self.error
        return Inference(windows[:, 0, :4] * 2, windows[:, 0, :0], "shadow")


def served(batch: NDArray[np.float32]) -> list[Any]:
    inference = Inference(batch[:, 0, :4], batch[:, 0, :0], "served")
    return [(inference, row) for row in range(len(batch))]


async def test_a_shadow_is_compared_only_while_nothing_waits() -> None:
    model, is_free = Doubling(), True
    shadow = Shadow(model, lambda: is_free)  # type: ignore[arg-type]
    batch = np.ones((40, 2, 6), np.float32)
    batch[3] = 3
    rows = served(batch)
    rows[5] = PoisonRecord("infer", "planted", "no feature to compare with")
    shadow.offer("m@2", batch, rows)
    shadow.offer("m@2", batch, rows)  # one call at a time
    assert shadow._calling is not None
    await shadow._calling
    is_free = False
    shadow.offer("m@2", batch, rows)
    counts = shadow.statistics()
    assert model.asked == [(32, "m@2")]
    assert (counts.num_windows, counts.num_failed, counts.num_skipped) == (31, 1, 8 + 40 + 40)
    assert counts.max_difference == 3.0
    assert counts.sum_difference == pytest.approx(30 * 1.0 + 3.0)


async def test_a_failing_shadow_is_nobody_s_trouble_and_another_one_counts_anew() -> None:
    model = Doubling()
    shadow = Shadow(model, lambda: True)  # type: ignore[arg-type]
    batch = np.ones((3, 2, 6), np.float32)
    model.error = RuntimeError("planted")
    shadow.offer("m@2", batch, served(batch))
    await shadow.close()
    shadow.offer("m@2", batch, served(batch))
    assert shadow._calling is not None
    await shadow._calling
    assert shadow.statistics().num_failed == 3
    model.error = None
    shadow.offer("m@3", batch, served(batch))
    await shadow._calling
    counts = shadow.statistics()
    assert (counts.model_version, counts.num_windows, counts.num_failed) == ("m@3", 3, 0)
    shadow.offer(None, batch, served(batch))
    assert shadow.statistics().model_version is None
