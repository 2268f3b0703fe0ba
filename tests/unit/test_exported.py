"""An exported program as a model: the same outputs, no code of its own, and none smuggled in."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_models import Pooled
from torch import Tensor, nn

from inference.artifact import Artifact, load_artifact, save_artifact
from inference.engine import Engine
from inference.exported import check_program, export_network, program_of
from inference.model import EXPORTED, ModelConfig, Normalisation
from inference.seeded import seeded_artifact
from schemas.errors import ConfigError

CONFIG = ModelConfig(
    architecture=EXPORTED, num_channels=3, num_steps=7, num_features=4, score_names=("up",)
)
NORMALISATION = Normalisation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(5)
    return Pooled(3, 5, 16).eval()


@pytest.fixture(scope="module")
def artifact(module: nn.Module) -> Artifact:
    network = export_network(CONFIG, NORMALISATION, module)
    return Artifact.from_model(
        network, name="mine", version="1", channels_version="test-v1", card="# mine"
    )


def windows_of(num_windows: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(num_windows, 3, 7)).astype(np.float32)


def test_it_is_served_without_the_class_that_it_was(
    artifact: Artifact, module: nn.Module, tmp_path: Path
) -> None:
    save_artifact(artifact, tmp_path / "mine")
    loaded = load_artifact(tmp_path / "mine", channels_version="test-v1", num_steps=7)
    assert loaded.model_version == artifact.model_version
    windows = windows_of(11)
    found = Engine(loaded, device="cpu", max_batch=8).infer(windows)
    mean = scale = torch.tensor([[1.0], [2.0], [3.0]])
    with torch.inference_mode():
        expected = module((torch.from_numpy(windows) - mean) / scale).numpy()
    np.testing.assert_allclose(found.features, expected[:, :4], atol=1e-6)
    np.testing.assert_allclose(found.scores[:, 0], 1 / (1 + np.exp(-expected[:, 4])), atol=1e-6)


def test_ours_exported_is_ours_and_row_invariant() -> None:
    ours = seeded_artifact(
        config=ModelConfig(conv_channels=(8,), lstm_hidden=16, lstm_layers=1, num_features=8)
    )

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = ours.build_model()

        def forward(self, windows: Tensor) -> Tensor:
            return self.network.encode(windows)

    config = ModelConfig(architecture=EXPORTED, num_features=8)
    network = export_network(config, ours.normalisation, Body())
    artifact = Artifact.from_model(
        network, name="mine", version="1", channels_version=ours.channels_version, card=""
    )
    engine = Engine(artifact, device="cpu", max_batch=16)
    assert engine.row_invariant
    windows = np.random.default_rng(0).normal(size=(9, 50, 60)).astype(np.float32)
    expected = Engine(ours, device="cpu", max_batch=16).infer(windows)
    np.testing.assert_allclose(engine.infer(windows).features, expected.features, atol=1e-6)


def test_it_moves_to_another_device_with_what_it_makes_itself() -> None:
    """An LSTM's graph makes its first state. Meta stands for a GPU: shapes, and no memory."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 5, batch_first=True)

        def forward(self, windows: Tensor) -> Tensor:
            return self.lstm(windows.transpose(1, 2))[0][:, -1]

    network = export_network(CONFIG, NORMALISATION, Recurrent()).to("meta")
    features, scores = network(torch.zeros(2, 3, 7, device="meta"))
    assert (features.device.type, features.shape, scores.shape) == ("meta", (2, 4), (2, 1))


def test_other_weights_and_other_programs_are_other_versions(artifact: Artifact) -> None:
    head = {"body.head.bias": artifact.weights["body.head.bias"] + 1}
    other = replace(artifact, weights={**artifact.weights, **head})
    assert other.expected_version != artifact.model_version
    assert artifact.program is not None
    assert replace(artifact, program=artifact.program + b"x").expected_version != (
        artifact.model_version
    )


def test_a_module_of_one_batch_size_or_another_shape_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, windows: Tensor) -> Tensor:
            return windows.reshape(4, 21)[:, :5]

    with pytest.raises(ValueError, match="cannot be exported for any batch size"):
        export_network(CONFIG, NORMALISATION, Fixed())
    network = export_network(CONFIG, NORMALISATION, Pooled(3, 6))
    with pytest.raises(ValueError, match=r"\[2, 6\].* 4 features and 1 scores ask for \(2, 5\)"):
        network(torch.zeros(2, 3, 7))


# What could run code where it is read.


def repacked(program: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def entry(files: dict[str, bytes], ending: str) -> str:
    [name] = [name for name in files if name.endswith(ending)]
    return name


def in_graph(key: str, value: Any) -> Callable[[dict[str, bytes]], None]:
    """Puts a value under the first such key of the graph."""

    def change(files: dict[str, bytes]) -> None:
        name = entry(files, "models/model.json")
        graph = json.loads(files[name])

        def replace_first(content: Any) -> bool:
            items = content.items() if isinstance(content, dict) else enumerate(content)
            for where, inner in list(items):
                if where == key:
                    content[where] = value
                    return True
                if isinstance(inner, dict | list) and replace_first(inner):
                    return True
            return False

        assert replace_first(graph), key
        files[name] = json.dumps(graph).encode()

    return change


def pickled_example(files: dict[str, bytes]) -> None:
    files[entry(files, "sample_inputs/model.pt")] = pickle.dumps(print)


def pickled_weight(files: dict[str, bytes]) -> None:
    name = entry(files, "model_weights_config.json")
    config = json.loads(files[name])
    next(iter(config["config"].values()))["use_pickle"] = True
    files[name] = json.dumps(config).encode()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (pickled_example, "is a pickle; export without examples"),
        (pickled_weight, "is a pickle; make it contiguous"),
        (lambda files: files.update({"archive/extra/x.so": b""}), "extra/x.so is unknown"),
        (in_graph("target", "torch.os.system"), "holds the target 'torch.os.system'"),
        (in_graph("expr_str", "__import__('os').system('x')"), "holds the expr_str"),
        (in_graph("guards_code", ["__import__('os')"]), "guards, which are code"),
        (in_graph("in_spec", '[1, {"type": "os.system"}]'), "holds the type 'os.system'"),
    ],
)
def test_what_could_run_code_is_refused(
    artifact: Artifact, change: Callable[[dict[str, bytes]], None], says: str
) -> None:
    assert artifact.program is not None
    check_program(repacked(artifact.program, lambda _: None))
    with pytest.raises(ValueError, match=says):
        check_program(repacked(artifact.program, change))


def test_a_folder_with_such_a_program_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    assert artifact.program is not None
    bad = replace(artifact, program=repacked(artifact.program, pickled_example))
    save_artifact(replace(bad, model_version=bad.expected_version), tmp_path / "bad")
    with pytest.raises(ConfigError, match="the exported program is refused"):
        load_artifact(tmp_path / "bad")
    save_artifact(replace(artifact, program=None), tmp_path / "none")
    with pytest.raises(ConfigError, match="there is no program"):
        load_artifact(tmp_path / "none")


def test_what_is_no_archive_is_refused() -> None:
    for content in (b"", b"PK", b"\0" * 100):
        with pytest.raises(ValueError, match=r"no archive of torch\.export"):
            check_program(content)


def test_a_program_exported_elsewhere_is_taken(module: nn.Module) -> None:
    program = torch.export.export(
        module, (torch.zeros(4, 3, 7),), dynamic_shapes=({0: torch.export.Dim("b", min=1)},)
    )
    check_program(program_of(program))
