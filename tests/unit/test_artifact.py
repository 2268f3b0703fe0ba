"""A model folder: what goes in comes out, and nothing else is let in."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from inference.artifact import Artifact, load_artifact, save_artifact
from inference.model import CnnLstm, ModelConfig, Normalisation
from inference.seeded import seeded_artifact
from schemas.errors import ConfigError

SMALL = ModelConfig(
    num_channels=3,
    num_steps=7,
    conv_channels=(4,),
    lstm_hidden=6,
    lstm_layers=1,
    num_features=8,
    score_names=("up",),
)
FILES = {
    "README.md",
    "config.json",
    "manifest.json",
    "reference.safetensors",
    "weights.safetensors",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    seeded_artifact(config=SMALL, channels_version="test-v1", path=tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file and its checksum, as a mistaken but careful author would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    rewrite(folder, "config.json", json.dumps(config).encode())


def edit_tensors(folder: Path, name: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = safetensors.numpy.load_file(folder / name)
    edit(tensors)
    rewrite(folder, name, safetensors.numpy.save(tensors))


def test_a_saved_artifact_loads_bit_for_bit(folder: Path) -> None:
    saved = seeded_artifact(config=SMALL, channels_version="test-v1")
    loaded = load_artifact(folder, channels_version="test-v1", num_steps=7)
    assert {file.name for file in folder.iterdir()} == FILES
    assert loaded.model_version == saved.model_version
    assert loaded.config == saved.config
    assert loaded.card == saved.card
    assert loaded.tolerance == saved.tolerance
    assert loaded.normalisation.mean.tobytes() == saved.normalisation.mean.tobytes()
    assert loaded.normalisation.scale.tobytes() == saved.normalisation.scale.tobytes()
    for name, tensor in saved.weights.items():
        assert torch.equal(loaded.weights[name], tensor)
    with torch.inference_mode():
        features, scores = loaded.build_model()(torch.tensor(loaded.reference.windows))
    np.testing.assert_array_equal(features.numpy(), saved.reference.features)
    np.testing.assert_array_equal(scores.numpy(), saved.reference.scores)


def test_a_trained_model_can_be_brought_along(tmp_path: Path) -> None:
    """Odd decimals survive JSON, and the reference windows are the author's."""
    model = CnnLstm(SMALL, Normalisation([0.1, 1 / 3, -7e-9], [0.1, 2 / 3, 1e9], clip=5))
    windows = np.ones((2, 3, 7), np.float32)
    artifact = Artifact.from_model(
        model,
        name="mine",
        version="2024-08.1",
        channels_version="test-v1",
        card="# mine",
        tolerance=1e-4,
        reference_windows=windows,
    )
    save_artifact(artifact, tmp_path / "a" / "b")
    loaded = load_artifact(tmp_path / "a" / "b")
    assert loaded.model_version == artifact.model_version
    assert loaded.model_version.startswith("mine@2024-08.1-")
    assert loaded.normalisation.mean.tobytes() == artifact.normalisation.mean.tobytes()
    assert (loaded.tolerance, loaded.normalisation.clip) == (1e-4, 5)
    np.testing.assert_array_equal(loaded.reference.windows, windows)


def test_the_version_covers_all_that_decides_a_feature() -> None:
    def version(model: CnnLstm, channels_version: str = "test-v1") -> str:
        return Artifact.from_model(
            model, name="m", version="1", channels_version=channels_version, card=""
        ).model_version

    def model(scale: float = 1, clip: float = 10, config: ModelConfig = SMALL) -> CnnLstm:
        weights = seeded_artifact(config=SMALL, channels_version="test-v1").weights
        made = CnnLstm(config, Normalisation([0] * 3, [1, 1, scale], clip))
        made.load_state_dict(weights)
        return made

    nudged = model()
    with torch.no_grad():
        nudged.head.bias[0] = torch.nextafter(nudged.head.bias[0], torch.tensor(9.0))
    softmax = SMALL.model_copy(update={"score_activation": "softmax"})
    versions = [
        version(model()),
        version(model(scale=2)),
        version(model(clip=9)),
        version(model(config=softmax)),
        version(model(), "test-v2"),
        version(nudged),
    ]
    assert len(set(versions)) == len(versions)
    assert version(model()) == versions[0]


def test_a_folder_is_never_written_over(folder: Path) -> None:
    with pytest.raises(ConfigError, match="exists already; choose a new folder"):
        seeded_artifact(config=SMALL, channels_version="test-v1", path=folder)


def test_a_name_that_cannot_be_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    model = CnnLstm(SMALL, Normalisation([0] * 3, [1] * 3))
    artifact = Artifact.from_model(
        model, name="my model", version="1", channels_version="test-v1", card=""
    )
    with pytest.raises(ConfigError, match="cannot be saved: name"):
        save_artifact(artifact, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the model artifact"):
        seeded_artifact(config=SMALL, channels_version="test-v1", path=tmp_path / "file" / "model")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model artifact at .*model\.artifact"):
        load_artifact(tmp_path / "none")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"not a whole model artifact: cannot read .*{name}"):
        load_artifact(folder)


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
def test_a_flipped_bit_is_refused(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is damaged or was edited"):
        load_artifact(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"sha256": {}}', b'{"sha256": 3}', b"\xff"])
def test_a_manifest_without_checksums_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ConfigError, match="does not name the sha256"):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("format_version", 2, "format 2, this Tapeline reads 1"),
        ("format_version", None, "format None"),
        ("precision", "fp8", "precision"),
        ("tolerance", 0, "tolerance"),
        ("pickle", "x", "pickle"),
        ("name", "a/b", "name"),
        ("version", "2", "but its contents are cnn-lstm-seeded@2-"),
        ("channels_version", "test-v2", "but its contents are"),
        ("model_version", "best@1", "calls itself best@1"),
        ("normalisation", {"mean": [0], "scale": [1], "clip": 1}, "covers 1 channels"),
        ("normalisation", {"mean": [0], "scale": [0], "clip": 1}, "scale must be positive"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    folder: Path, key: str, value: object, text: str
) -> None:
    edit_config(folder, lambda config: config.update({key: value}))
    with pytest.raises(ConfigError, match=text):
        load_artifact(folder)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    rewrite(folder, "config.json", content)
    with pytest.raises(ConfigError, match="not a JSON object"):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("name", "edit", "text"),
    [
        ("weights", lambda w: w.pop("conv.0.bias"), "lacks conv.0.bias"),
        ("weights", lambda w: w.update(spare=np.zeros(1, np.float32)), "holds spare, unknown"),
        (
            "weights",
            lambda w: w.update({"conv.0.bias": np.zeros(5, np.float32)}),
            r"conv.0.bias has shape \(5,\), config.json's sizes ask for \(4,\)",
        ),
        (
            "weights",
            lambda w: w.update({"conv.0.bias": np.zeros(4)}),
            "float64, it must be torch.float32",
        ),
        ("weights", lambda w: w["conv.0.bias"].fill(np.nan), "not finite"),
        ("weights", lambda w: w["conv.0.bias"].fill(3), "but its contents are"),
        ("reference", lambda r: r.pop("windows"), "lacks windows"),
        (
            "reference",
            lambda r: r.update(windows=np.zeros((0, 3, 7), np.float32)),
            "windows has shape",
        ),
        (
            "reference",
            lambda r: r.update(features=np.zeros((8, 9), np.float32)),
            "features has shape",
        ),
        ("reference", lambda r: r.update(windows=np.array(3, np.float32)), "windows has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, name: str, edit: Callable[[dict[str, Any]], Any], text: str
) -> None:
    edit_tensors(folder, f"{name}.safetensors", edit)
    with pytest.raises(ConfigError, match=text):
        load_artifact(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "reference.safetensors"])
def test_a_file_that_is_not_safetensors_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, name, b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(ConfigError, match="not a safetensors file"):
        load_artifact(folder)


def test_a_channel_set_or_length_that_differs_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"made for channel set 'test-v1', not 'market50-v1'"):
        load_artifact(folder, channels_version="market50-v1")
    with pytest.raises(ConfigError, match=r"windows of 7 steps, not 60; set window\.num_steps = 7"):
        load_artifact(folder, num_steps=60)
