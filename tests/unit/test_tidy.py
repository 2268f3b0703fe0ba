"""The house style, as far as a test can hold it: imports, sizes, docstrings."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("tapeline", "consumers", "inference", "schemas")
MAX_LINES = 500
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# Ray takes seconds to import and memory to hold: only what runs inside Ray may do it at the top.
MAY_IMPORT_RAY = {
    "consumers/deployment.py",
    "inference/deployment.py",
    "tapeline/http/deployment.py",
    "tapeline/serving.py",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_module = pytest.mark.parametrize("path", MODULES, ids=name)


def test_there_is_something_to_look_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize(
    "statement",
    [
        "import schemas.codec, schemas.settings",
        "import consumers.worker",
        "import inference.client",
        "import tapeline",
        "import tapeline.cli",
    ],
)
def test_import_loads_neither_torch_nor_ray(statement: str) -> None:
    """A producer's process and ``tapeline --help`` pay for neither."""
    heavy = "sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'ray'})"
    program = f"{statement}; import sys; print({heavy})"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"


@each_module
def test_ray_is_imported_where_it_is_needed(path: Path) -> None:
    top_level = {
        module.partition(".")[0]
        for statement in ast.parse(path.read_text()).body
        for module in _imported(statement)
    }
    if name(path) not in MAY_IMPORT_RAY:
        assert "ray" not in top_level, "import it inside the function that needs it"
    if not name(path).startswith("inference/"):
        assert "torch" not in top_level


def test_imports_point_one_way() -> None:
    """The contracts of pyproject.toml."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    found = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


@each_module
def test_file_is_no_longer_than_it_should_be(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{num_lines} lines; two rooms may be hiding in it"


@each_module
def test_module_says_what_it_is(path: Path) -> None:
    source = path.read_text()
    if path.name.startswith("_") and not source.strip():
        return  # a package's empty door
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, "the first line of a module says what it is"


def _imported(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [statement.module or ""]
    return []
