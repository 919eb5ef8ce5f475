"""What of JAX and XLA is used beyond the public interface, and that the installed versions have it."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bit_jax.launch import free_port
from bit_jax.model.precision import PRECISIONS
from bit_jax.training.target import Target

ROOT = Path(__file__).parent.parent
PRIVATE = {"bit_jax/scale/jax_internals.py": {"jax._src"}}
EXPERIMENTAL = {
    "bit_jax/scale/hosts.py": {"jax.experimental"},  # multihost_utils
    "bit_jax/scale/sharding.py": {"jax.experimental.layout"},
    "bit_jax/plan/compilation.py": {"jax.experimental"},  # topologies
    "bit_jax/training/program.py": {"jax.experimental.compilation_cache"},
    "tests/test_program.py": {"jax.experimental.layout"},
}


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports, or imports from."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def importing(*beginnings: str) -> dict[str, set[str]]:
    """{file: its imports that begin so}, of all of the repository's files."""
    folders = ("bit_jax", "input_pipeline", "parity", "benchmarks", "examples", "tests")
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert len(paths) > 100
    found = {
        path.relative_to(ROOT).as_posix(): {name for name in imports(path) if name.startswith(beginnings)}
        for path in paths
    }
    return {path: names for path, names in found.items() if names}


def test_one_file_alone_imports_what_is_private():
    assert importing("jax._src", "jax.interpreters", "jax.lib", "jax.extend", "jaxlib") == PRIVATE


def test_what_is_experimental_is_known():
    """A new JAX may move or remove it, so that each use is to be named above."""
    assert importing("jax.experimental") == EXPERIMENTAL


MEETS_ITSELF = """
import sys
import jax
from bit_jax.scale import coordinator, jax_internals

started = []

def start(*arguments, **keywords):
    started.append(coordinator.start(*arguments, **keywords))
    return started[-1]

with jax_internals.service_started_by(start):
    jax.distributed.initialize(sys.argv[1], num_processes=1, process_id=0)
assert len(started) == 1, started
assert jax_internals.coordinator_address() == sys.argv[1]
store = jax_internals.store()
store.key_value_set("bit_jax/alive/0", "1")
store.key_value_set("bit_jax/alive/0", "2", allow_overwrite=True)
assert store.blocking_key_value_get("bit_jax/alive/0", 1000) == "2"
assert store.key_value_dir_get("bit_jax/alive/") == [("bit_jax/alive/0", "2")]
jax_internals.let_gloo_announce("192.0.2.1")  # reserved for documentation: no machine has it
try:
    jax.devices()
except Exception as error:
    print("refused:", error)
jax.distributed.shutdown()
assert started[0]._process.poll() == 0
"""


def test_the_service_is_where_jax_is_told_to_have_it():
    command = [sys.executable, "-c", MEETS_ITSELF, f"127.0.0.1:{free_port()}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout, "Gloo was not given the address"


def test_xla_knows_the_options_for_gpus():
    """Most other tests give it the options for CPUs."""
    gpus = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")] * 2), size=2, shape={"fsdp": 1})
    options = Target(gpus, PRECISIONS["fp32"], deterministic=True).compiler_options
    assert len(options) > 5
    untuned = Target(gpus, PRECISIONS["fp32"], tuned=False, deterministic=True).compiler_options
    assert len(untuned) == 3
    assert untuned.items() < options.items()
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
