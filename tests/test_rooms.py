"""A folder answers one question, and its `__init__.py` says what it may import; nothing else is imported there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("bit_jax", "input_pipeline", "parity")
ROOMS = sorted(path.parent for package in ("bit_jax", "parity") for path in (ROOT / package).glob("*/__init__.py"))
# these read and write another library's files, and import it in a function, when one is asked for
LAZY = {
    "torch": {"bit_jax.formats.pickles", "bit_jax.conversion.libraries"},
    "onnxruntime": {"bit_jax.export.onnx_graph"},
    "tensorflow": {"input_pipeline.tf_data"},
}
# where else each may be imported; tensorflow_graph is a process of its own
FRAMEWORKS = {
    "torch": "parity.in_torch",
    "onnxruntime": "parity.exported",
    "tensorflow": "bit_jax.export.tensorflow_graph",
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, functions included, `from package import module` with the module's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def allowed(room: Path) -> set[str]:
    """What the room's docstring names."""
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    sentence = re.search(r"It may import: (.+)\.\Z", text, re.DOTALL)
    assert sentence, f"{room}: its docstring says nothing of what it may import"
    if sentence[1] == "nothing of this project":
        return set()
    return set(re.split(r",\s+", sentence[1]))


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_a_room_imports_what_it_says(room):
    may = allowed(room) | {name_of(room)}
    for name in may:
        place = ROOT / name.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").exists(), f"{room} names {name}, which does not exist"
    for path in room.glob("*.py"):
        ours = {module for module in imported(path) if module.split(".")[0] in PACKAGES}
        assert not {module for module in ours if not within(module, may)}, path


def test_arrows_go_one_way():
    """No room imports one that imports it, through whichever others."""
    reached = {name_of(room): allowed(room) for room in ROOMS}
    while True:
        wider = {
            room: may | {far for near in may for other in reached if within(other, {near}) for far in reached[other]}
            for room, may in reached.items()
        }
        if wider == reached:
            break
        reached = wider
    assert [room for room, may in reached.items() if within(room, may)] == []


def test_the_packages_know_only_those_below():
    for package, below in (("input_pipeline", set()), ("bit_jax", {"input_pipeline"})):
        for path in (ROOT / package).rglob("*.py"):
            ours = {module for module in imported(path) if module.split(".")[0] in PACKAGES}
            assert {module.split(".")[0] for module in ours} <= below | {package}, path


def test_one_room_imports_torch():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for framework, room in FRAMEWORKS.items():
                if within(framework, {module.split(".")[0] for module in imported(path)}):
                    assert within(name_of(path), {room} | LAZY.get(framework, set())), path


@pytest.mark.parametrize("framework", LAZY)
def test_the_exceptions_import_it_only_when_asked(framework):
    for name in LAZY[framework]:
        tree = ast.parse((ROOT / name.replace(".", "/")).with_suffix(".py").read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        within_functions = {id(child) for function in functions for child in ast.walk(function)}
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import) and node.names[0].name == framework]
        assert imports
        assert all(id(node) in within_functions for node in imports)
