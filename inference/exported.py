"""A network as an exported program: its graph travels with its weights, its code does not.

``torch.export`` writes a graph of torch's own operators. The archive may hold pickles and formulas
that run code where it is read, so it is looked through first: neither gets by.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass

from inference.model import ModelConfig, Network, Normalisation

_LARGEST_BATCH = 1 << 20
# Of each entry of the archive: what it may be called.
_PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json"
    r"|data/(?:weights|constants)/(?:(?:weight|tensor)_\d+|model_(?:weights|constants)_config\.json)"
)
# Of each string under such a key, which torch would evaluate or look up: what it may be.
_ALLOWED = {
    "expr_str": re.compile(
        r"(?:Symbol\('[su]\d+'(?:, \w+=True)*\)|Integer\(-?\d+\)|\d+|[(), ]"
        r"|Add|Mul|Max|Min|Mod|FloorDiv)*"
    ),
    "target": re.compile(
        r"torch\.ops\.aten\.\w+\.\w+|_operator\.(?:getitem|add|sub|mul|floordiv|mod)"
    ),
    "type": re.compile(r"builtins\.(?:tuple|list|dict)|cpu"),
}


class ExportedNetwork(Network):
    """The user's program: (B, C, T) normalised in, (B, F + S) out, for any B.

    Args:
        program: what ``program_of`` or ``save_artifact`` wrote.

    Raises ValueError in its constructor for an archive that could run code or is none, and when it
    gives another shape.
    """

    def __init__(self, config: ModelConfig, normalisation: Normalisation, program: bytes) -> None:
        super().__init__(config, normalisation)
        check_program(program)
        try:
            self.body = torch.export.load(io.BytesIO(program)).module()
        except Exception as error:  # whatever torch raises for a graph that it does not know
            raise ValueError(f"the exported program cannot be read: {error}") from error
        self.program: bytes = program

    def encode(self, normalised: Tensor) -> Tensor:
        outputs: Tensor = self.body(normalised)
        expected = (len(normalised), self.config.num_features + self.config.num_scores)
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != expected:
            raise ValueError(
                f"the exported program gave {getattr(outputs, 'shape', type(outputs))} for "
                f"{expected[0]} windows; {self.config.num_features} features and "
                f"{self.config.num_scores} scores ask for {expected}"
            )
        return outputs

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A graph names the device of what it makes itself, so it is built again for another."""
        super().to(*args, **kwargs)
        device = self.mean.device
        if device.type != "cpu":
            program = torch.export.load(io.BytesIO(self.program))
            weights = self.body.state_dict()
            self.body = move_to_device_pass(program, device).module()
            self.body.load_state_dict(weights)
        return self

    def train(self, mode: bool = True) -> Self:
        """A program is what it was when it was exported; torch refuses to ask it."""
        self.training = mode
        return self


def export_network(
    config: ModelConfig, normalisation: Normalisation, module: nn.Module
) -> ExportedNetwork:
    """Exports a module in eval mode, for batches of any size.

    Args:
        config: of architecture ``exported``.

    Raises ValueError: it cannot be exported so.
    """
    example = torch.zeros(4, config.num_channels, config.num_steps)
    batch = Dim("batch", min=1, max=_LARGEST_BATCH)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what torch's own LSTM does meanwhile
            program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # the many ways of not being a graph
        raise ValueError(f"the module cannot be exported for any batch size: {error}") from error
    return ExportedNetwork(config, normalisation, program_of(program))


def program_of(program: ExportedProgram) -> bytes:
    """The program as an archive without pickles. Raises ValueError if it cannot be one."""
    program._example_inputs = None  # they would be pickled, and nobody needs them
    archive = io.BytesIO()
    torch.export.save(program, archive)
    check_program(archive.getvalue())
    return archive.getvalue()


def check_program(archive: bytes) -> None:
    """Raises ValueError unless reading this archive runs none of its code."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            for entry in files.infolist():
                _, _, name = entry.filename.partition("/")
                if name.startswith("data/sample_inputs/"):
                    _demand(entry.file_size == 0, f"{name} is a pickle; export without examples")
                else:
                    _demand(bool(_PLAIN.fullmatch(name)), f"{name} is unknown")
                if name.endswith(".json"):
                    _check_json(name, json.loads(files.read(entry)))
    except (zipfile.BadZipFile, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is no archive of torch.export: {error}") from error


def _check_json(name: str, content: Any) -> None:
    for key, value in _walk(content):
        if key == "use_pickle":
            _demand(value is False, f"a tensor of {name} is a pickle; make it contiguous")
        elif key == "guards_code":
            _demand(not value, f"{name} holds guards, which are code")
        elif key in _ALLOWED and isinstance(value, str):
            _demand(bool(_ALLOWED[key].fullmatch(value)), f"{name} holds the {key} {value[:80]!r}")
        elif key.endswith("_spec") and isinstance(value, str):
            _check_json(name, json.loads(value))  # a tree, as a string of its own


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _walk(value)
    elif isinstance(content, list):
        for value in content:
            yield from _walk(value)


def _demand(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"the exported program is refused: {problem}")
