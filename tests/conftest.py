"""Gives every test eight virtual CPU devices and strict dtype promotion, which must be set before JAX starts.

Tests compile more than they compute, so their flags make XLA compile in less time into programs that run more slowly.
What is compared with golden values is compiled as users' programs are: `jax.jit(..., compiler_options=AS_USERS)`.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

os.environ["JAX_PLATFORMS"] = "cpu"
# for PyTorch, which would take a GPU that is here; test_gpu.py's processes see what the user lets them see
os.environ.setdefault("TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# tests run on all cores already, and PyTorch's threads wait for each other by spinning
os.environ.setdefault("OMP_NUM_THREADS", "1")

import archives
import jax
import numpy as np
import psutil
import pytest
from cpu_times import pytest_addoption, pytest_runtest_makereport, pytest_terminal_summary  # noqa: F401 (hooks)
from object_store import bucket, store, url  # noqa: F401 (fixtures)

from bit_jax.model.architecture import Architecture
from input_pipeline import DatasetError, open_source
from input_pipeline.exits import collect_less
from parity.sides.inputs import random_arrays

COMPILES_FAST = (
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"  # parts that are compiled side by side take more in all
)
AS_USERS: dict[str, int | bool | str] = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if platform.machine() == "x86_64":  # shorter vectors take less code
    COMPILES_FAST += " --xla_cpu_max_isa=AVX2"
    AS_USERS["xla_cpu_max_isa"] = ""
# later versions do not know this flag, and end at once where it is given
if jax.__version_info__ < (0, 11):
    COMPILES_FAST += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS["xla_cpu_use_fusion_emitters"] = True
# Programs that XLA hardly optimizes take a third of the others' time to compile. Float64's convolutions then take eight
# times as long, so these flags are for programs that run a few times on few small images.
HARDLY_OPTIMIZES = COMPILES_FAST.replace("optimization_level=1", "optimization_level=0")
os.environ["XLA_FLAGS"] = f"{COMPILES_FAST} --xla_force_host_platform_device_count=8"
# nothing of the user's own cache decides what a test compiles or fetches, and tests leave nothing there
if "PYTEST_XDIST_WORKER" not in os.environ:  # which has the directory of the process that started it
    os.environ["BIT_JAX_CACHE"] = tempfile.mkdtemp(prefix="bit-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["BIT_JAX_CACHE"], ignore_errors=True)
# under nohup it is ignored, in all that is started too, and the tests of what it does would wait for it
signal.signal(signal.SIGHUP, signal.SIG_DFL)
collect_less()  # as in all that is tested
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.devices()  # XLA reads its flags now, and never again
os.environ["XLA_FLAGS"] = COMPILES_FAST  # the processes that tests start have one device, or as many as they say

ROOT = Path(__file__).parent.parent
SMALL = Architecture((1, 1, 1, 1), 0.5, 10)


# files whose tests take minutes
LONGEST_FIRST = (
    "hosts parity stall bundles supervision throughput parity_operations train kills step stored_runs".split()
)


def pytest_collection_modifyitems(items):
    """Puts the files that take longest first, so that no process is left with one of them at the end."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def benchmark(name: str) -> ModuleType:
    """Imports benchmarks/NAME.py and returns the module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module


def last_step(workdir: Path) -> int:
    """Returns the last step that a run, which may be going on, has logged; 0 before its first."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory):
    """A weight file of the smallest ordinary BiT: one unit a stage, half the width, 10 classes."""
    path = tmp_path_factory.mktemp("weights") / "small.npz"
    np.savez(path, **random_arrays(SMALL))
    return path


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """Environment variables with which processes take programs that other tests' processes have compiled."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def compiled_once(compilation_cache):
    """Gives these variables to all processes that a module's tests start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compilation_cache.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def hardly_optimized():
    """Gives all processes that a module's tests start programs that XLA hardly optimizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", HARDLY_OPTIMIZES)
        yield


@pytest.fixture
def x64():
    """Turns 64-bit mode on for one test, and off again even if the test turns it on for its whole process, as
    `precision.choose` does."""
    mode = jax.config.read("jax_enable_x64")
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_enable_x64", mode)


@pytest.fixture(scope="session")
def manual_dir(tmp_path_factory):
    return archives.write(tmp_path_factory.mktemp("archives"))


# the program waits within tfds's last action before tfds gives the dataset its name
HELD_AT_THE_LAST_MOMENT = """
import time
import tensorflow_datasets as tfds
from input_pipeline.__main__ import main
tfds.core.DatasetInfo.write_to_directory = lambda *_: (print("all is written", flush=True), time.sleep(600))
main()
"""


@pytest.fixture(scope="session")
def killed_and_prepared(manual_dir, tmp_path_factory):
    """Prepares a dataset twice by the same command: the first process is killed while tfds writes, the second finishes.

    Returns:
        (data directory, files that the first left, error of `open_source` then, standard error of the second).
    """
    data_dir = tmp_path_factory.mktemp("data")
    arguments = ["prepare", "imagenet2012", "--manual-dir", manual_dir, "--data-dir", data_dir, "--subset"]
    held = [sys.executable, "-c", HELD_AT_THE_LAST_MOMENT, *arguments]
    process = subprocess.Popen(held, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert "all is written\n" in iter(process.stdout.readline, ""), "it ended before it could be killed"
    left = list(data_dir.glob(".imagenet2012.unfinished/imagenet2012/incomplete.*/*"))
    process.kill()
    process.communicate()
    with pytest.raises(DatasetError) as unprepared:
        open_source("imagenet2012", "train", data_dir)
    again = [sys.executable, "-m", "input_pipeline", *arguments]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return data_dir, left, str(unprepared.value), done.stderr


@pytest.fixture(scope="session")
def prepared(killed_and_prepared):
    return killed_and_prepared[0]


# On few small images a run is little more than its start, which is what most tests of runs are about.
SMALL_DIGITS = "--resize-to 20 --crop 16 --eval-split test[:40]"
DIGITS = f"digits {SMALL_DIGITS} --global-batch 16 --warmup-steps 2 --decay-steps 60 --log-every 1"


class Runs:
    """Starts the same run of the smallest BiT again and again, as forks of one process that has imported everything."""

    def __init__(self, *flags: object, cache: Path):
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "tests/runs_in_forks.py", *DIGITS.split(), *map(str, flags)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self._stderr = open(cache.with_suffix(".txt"), "ab")  # noqa: SIM115 (closed by end)
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=self._stderr, **pipes)

    def start(self) -> int:
        """Starts one more run and returns its process number."""
        self._process.stdin.write("\n")
        return int(self._process.stdout.readline())

    def until_progress(self, process: int, workdir: Path, step: int) -> None:
        """Returns once the run has logged a step beyond `step`."""
        while last_step(workdir) <= step:  # a run that goes back to its checkpoint has dropped later lines first
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, 0)
                time.sleep(0.005)
                continue
            errors = Path(self._stderr.name).read_text()[-2000:]
            raise AssertionError(f"it ended by itself with exit code {self.finish()}: {errors}")

    def finish(self) -> int:
        """Returns the exit code of the last run once it has ended."""
        while not (line := self._process.stdout.readline().strip()).lstrip("-").isdigit():
            assert self._process.poll() is None  # what a run prints goes the same way
        return int(line)

    def end(self) -> None:
        """Ends the process, and a run whose test failed."""
        for run in psutil.Process(self._process.pid).children():
            run.kill()
        self._process.communicate()
        self._stderr.close()


@pytest.fixture
def runs(small_npz, tmp_path):
    """Returns a function (flags) -> `Runs` with these flags."""
    started = []

    def start(*flags):
        started.append(Runs("--model", small_npz, *flags, cache=tmp_path / "xla"))
        return started[-1]

    yield start
    for group in started:
        group.end()
