"""The rooms of `pipeline/`: imports go one way, and only the driver knows Ray."""

import ast
from pathlib import Path

import pytest
from builders import ROOT

# From the top to the bottom: a room imports only from itself and from rooms below it.
ROOMS = (
    "driver",
    "compute",
    "results",
    "decoding",
    "plan",
    "cuts",
    "target",
    "model",
    "tree",
    "data",
    "config",
    "errors",
)


def imported_modules(source):
    """Name the modules that a source imports, anywhere in it; `from a import b` may mean the module a.b."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def faults(sources):
    """List what a module imports from a room above its own, and Ray outside the driver's."""
    found = []
    for path, source in sources.items():
        room = Path(path).parts[0].removesuffix(".py")
        for name in imported_modules(source):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            is_upward = package == "pipeline" and other in ROOMS and ROOMS.index(other) < ROOMS.index(room)
            if is_upward or (package == "ray" and room != "driver"):
                found.append(f"{path} imports {name}")
    return found


def pipeline_sources():
    root = ROOT / "pipeline"
    paths = [path for path in root.rglob("*.py") if path != root / "__init__.py"]
    return {path.relative_to(root).as_posix(): path.read_text() for path in paths}


def test_every_module_is_in_a_room():
    assert {Path(path).parts[0].removesuffix(".py") for path in pipeline_sources()} == set(ROOMS)


def test_no_room_imports_from_above_and_only_the_driver_imports_ray():
    assert faults(pipeline_sources()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("data/files.py", "from pipeline.cuts import Shard"),
        ("plan.py", "from pipeline import decoding"),
        ("results/tables.py", "def late():\n    from pipeline.compute.classifiers import sgd_linear"),
        ("compute/actor.py", "if TYPE_CHECKING:\n    import pipeline.driver.state"),
        ("errors.py", "from pipeline.config import Config"),
        ("compute/lanes.py", "import ray"),
        ("results/run.py", "from ray.util import placement_group"),
    ],
)
def test_an_import_from_above_is_a_fault(path, line):
    assert len(faults({**pipeline_sources(), path: line})) == 1
