"""A user's own network: found by its import path, checked, served as ours is."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_models import Pooled

from inference.artifact import Artifact, load_artifact, save_artifact
from inference.engine import Engine
from inference.model import ModelConfig, Normalisation, OwnNetwork, build_network
from inference.optimize import optimize
from schemas.errors import ConfigError

OPTIONS = {"num_in": 3, "num_out": 5, "width": 16}
CONFIG = ModelConfig(
    architecture="own_models:Pooled",
    options=OPTIONS,
    num_channels=3,
    num_steps=7,
    num_features=4,
    score_names=("up",),
)
NORMALISATION = Normalisation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])


@pytest.fixture
def artifact() -> Artifact:
    torch.manual_seed(5)
    network = build_network(CONFIG, NORMALISATION)
    assert isinstance(network, OwnNetwork)
    with torch.no_grad():  # one step of training: running statistics that are not the default's
        network.train()(torch.randn(32, 3, 7) * 3)
    return Artifact.from_model(
        network.eval(), name="mine", version="1", channels_version="test-v1", card="# mine"
    )


def changed(**values: Any) -> ModelConfig:
    return ModelConfig.model_validate(CONFIG.model_dump() | values)


def test_it_is_served_as_it_was_trained(artifact: Artifact, tmp_path: Path) -> None:
    save_artifact(artifact, tmp_path / "mine")
    loaded = load_artifact(tmp_path / "mine", channels_version="test-v1", num_steps=7)
    assert loaded.config == CONFIG
    assert loaded.weights["body.norm.num_batches_tracked"] == 1
    engine = Engine(loaded, device="cpu", max_batch=8)
    windows = np.random.default_rng(1).normal(size=(11, 3, 7)).astype(np.float32)
    found = engine.infer(windows)

    mine = Pooled(**OPTIONS)
    mine.load_state_dict(
        {name.removeprefix("body."): value for name, value in artifact.weights.items()}
    )
    normalised = (torch.from_numpy(windows) - torch.tensor([[1.0], [2.0], [3.0]])) / torch.tensor(
        [[1.0], [2.0], [3.0]]
    )
    with torch.inference_mode():
        outputs = mine.eval()(normalised)
    np.testing.assert_allclose(found.features, outputs[:, :4], atol=1e-5)
    np.testing.assert_allclose(found.scores, torch.sigmoid(outputs[:, 4:]), atol=1e-5)


def test_it_can_be_optimised(artifact: Artifact) -> None:
    found = optimize(artifact, device="cpu", max_batch=8, prune_amount=0.5, max_error=10.0)
    assert [step.change for step in found.steps] == ["l1 pruning of convolutions, 50%", "bf16"]
    assert all(step.max_error is not None for step in found.steps), "both ran"


def test_configs_are_told_apart_by_their_options() -> None:
    assert len({CONFIG, changed(), changed(options=OPTIONS | {"width": 4})}) == 2


def test_its_options_decide_its_version(artifact: Artifact) -> None:
    other = build_network(changed(options=OPTIONS | {"width": 4}), NORMALISATION)
    version = Artifact.from_model(
        other, name="mine", version="1", channels_version="test-v1", card=""
    ).model_version
    assert version != artifact.model_version


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"architecture": "no_such_package:Net"}, "No module named 'no_such_package'; install"),
        ({"architecture": "own_models:Absent"}, "has no attribute 'Absent'"),
        ({"architecture": "own_models:no_module", "options": {}}, "is no torch.nn.Module"),
        ({"options": {"num_in": 3}}, "missing 1 required positional argument: 'num_out'"),
    ],
)
def test_a_class_that_cannot_be_built_is_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build_network(changed(**values), NORMALISATION)


def test_outputs_of_another_width_are_refused() -> None:
    network = build_network(changed(num_features=9), NORMALISATION)
    with pytest.raises(ValueError, match=r"gave outputs of shape \(2, 5\) for 2 windows; 9 feat"):
        network.eval()(torch.zeros(2, 3, 7))


def test_a_folder_whose_class_is_gone_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    save_artifact(artifact, tmp_path / "mine")
    text = (tmp_path / "mine" / "config.json").read_text()
    text = text.replace("own_models:Pooled", "gone:Pooled")
    (tmp_path / "mine" / "config.json").write_text(text)
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    manifest["sha256"]["config.json"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"sizes: architecture 'gone:Pooled' cannot be built"):
        load_artifact(tmp_path / "mine")


@pytest.mark.parametrize("path", ["os.system", "a b:C", "cnn", "x:y:z"])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="architecture"):
        changed(architecture=path)


def test_our_own_network_has_no_options() -> None:
    with pytest.raises(ValueError, match="options are another architecture's"):
        ModelConfig(options={"width": 3})
