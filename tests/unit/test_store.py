"""The model store: what may serve, what does, and the way back."""

import threading
from pathlib import Path

import pytest

from inference.artifact import Artifact, save_artifact
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from inference.store import ModelStore
from schemas.errors import ConfigError
from schemas.rollout import ROLLOUT_FILE, Rollout, find_rollout
from schemas.settings import WindowSettings

WINDOW = WindowSettings()


def small(seed: int, **changes: object) -> Artifact:
    sizes = {"conv_channels": (4,), "lstm_hidden": 16, "lstm_layers": 1, "num_features": 8}
    return seeded_artifact(seed=seed, config=ModelConfig(**sizes | changes))


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


def added(store: ModelStore, tmp_path: Path, artifact: Artifact) -> str:
    folder = tmp_path / f"brought-{artifact.model_version}"
    save_artifact(artifact, folder)
    return store.add(folder)


def test_promote_and_the_way_back(store: ModelStore, tmp_path: Path) -> None:
    one, two, three = (added(store, tmp_path, small(seed)) for seed in (1, 2, 3))
    assert store.versions() == sorted([one, two, three])
    with pytest.raises(ConfigError, match="tapeline model promote NAME@VERSION"):
        store.rollout()
    store.promote(one, WINDOW)
    with pytest.raises(ConfigError, match="nothing is before it"):
        store.roll_back()
    store.promote(two, WINDOW)
    assert store.promote(two, WINDOW).before == (one,), "said twice is said once"
    store.promote(three, WINDOW)
    assert store.rollout() == Rollout(three, (two, one))
    assert store.rollout().versions == (three, two), "the one before is kept warm"
    assert store.roll_back() == Rollout(two, (one,))
    assert store.roll_back() == Rollout(one)


def test_a_trial_ends_by_rollback_or_promotion(store: ModelStore, tmp_path: Path) -> None:
    one, two, three = (added(store, tmp_path, small(seed)) for seed in (1, 2, 3))
    with pytest.raises(ConfigError, match="serves yet"):
        store.try_out(two, WINDOW)
    store.promote(one, WINDOW)
    store.try_out(two, WINDOW)
    rollout = store.try_out(three, WINDOW, canary_share=0.25)
    assert rollout == Rollout(one, (), shadow=two, canary=three, canary_share=0.25)
    assert rollout.versions == (one, three, two)
    assert store.roll_back() == Rollout(one)
    store.try_out(two, WINDOW, canary_share=0.5)
    assert store.promote(two, WINDOW) == Rollout(two, (one,))
    with pytest.raises(ConfigError, match="serves already"):
        store.try_out(two, WINDOW)


def test_names_are_resolved_or_told_apart(store: ModelStore, tmp_path: Path) -> None:
    one, _ = added(store, tmp_path, small(1)), added(store, tmp_path, small(2))
    name = one.rpartition("-")[0]
    assert store.resolve(one) == store.resolve(name) == one
    faster = added(store, tmp_path, small(1).as_variant(precision="bf16"))
    assert faster.rpartition("-")[0] == name
    with pytest.raises(ConfigError, match=r"may be .* or .*; say which"):
        store.resolve(name)
    with pytest.raises(ConfigError, match=rf"no model 'other@9' in .*; it holds .*{one}"):
        store.resolve("other@9")


def test_adding_twice_is_adding_once(store: ModelStore, tmp_path: Path) -> None:
    artifact = small(1)
    save_artifact(artifact, tmp_path / "brought")
    assert store.add(tmp_path / "brought") == store.add(tmp_path / "brought")
    assert store.load(artifact.model_version).card == artifact.card


def test_what_would_not_fit_is_refused(store: ModelStore, tmp_path: Path) -> None:
    one = added(store, tmp_path, small(1))
    other_outputs = added(store, tmp_path, small(2, num_features=9))
    other_steps = added(store, tmp_path, small(3, num_steps=20))
    store.promote(one, WINDOW)
    for refused in (store.promote, store.try_out):
        with pytest.raises(ConfigError, match="gives 9 features"):
            refused(other_outputs, WINDOW)
        with pytest.raises(ConfigError, match="windows of 20 steps, not 60"):
            refused(other_steps, WINDOW)
    assert store.rollout() == Rollout(one)


def test_a_damaged_rollout_is_named(store: ModelStore, tmp_path: Path) -> None:
    added(store, tmp_path, small(1))
    for content in ("", "[]", '{"serving": "x"}', '{"serving": "x", "before": [], "more": 1}'):
        (store.path / ROLLOUT_FILE).write_text(content)
        with pytest.raises(ConfigError, match=f"{ROLLOUT_FILE} is damaged"):
            store.rollout()


def test_readers_never_see_half_a_change(store: ModelStore, tmp_path: Path) -> None:
    one, two = added(store, tmp_path, small(1)), added(store, tmp_path, small(2))
    store.promote(one, WINDOW)
    done = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not done.is_set():
            rollout = find_rollout(store.path)
            assert rollout is not None
            seen.add(rollout.serving)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(50):
        store.promote(two, WINDOW)
        store.roll_back()
    done.set()
    for reader in readers:
        reader.join()
    assert seen == {one, two}
    assert store.rollout() == Rollout(one)


def test_a_canary_gets_its_share_and_a_symbol_stays_where_it_is() -> None:
    symbols = [f"S{number}" for number in range(20_000)]
    tenth = Rollout("a", canary="b", canary_share=0.1)
    third = Rollout("a", canary="b", canary_share=0.3)
    in_tenth = {one for one in symbols if tenth.version_of("SIM", one) == "b"}
    in_third = {one for one in symbols if third.version_of("SIM", one) == "b"}
    assert len(in_tenth) / len(symbols) == pytest.approx(0.1, abs=0.01)
    assert len(in_third) / len(symbols) == pytest.approx(0.3, abs=0.01)
    assert in_tenth < in_third, "a larger share takes more symbols, and gives none back"
    none, every = (Rollout("a", canary="b", canary_share=share) for share in (0.0, 1.0))
    assert {none.version_of("SIM", one) for one in symbols} == {"a"}
    assert {every.version_of("SIM", one) for one in symbols} == {"b"}
