"""What only a GPU can show: its numbers, its memory, and that `--deterministic` ends with the same bytes every time.

The tests' own process computes on the CPU and holds no memory of the GPU. Everything on the GPU runs in processes of
its own, all of them side by side, since each spends most of its time starting and compiling.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, last_step
from gpu_numbers import logits_and_gradients

import bit_jax
from bit_jax.process import hugepages

pytestmark = pytest.mark.slow

STEPS, KILLED_AFTER = 30, 10
RUN = f"digits --steps {STEPS} --eval-every {STEPS} --log-every 1 --deterministic"
LAYERS = 14  # of the smallest BiT, as its name R14 counts them

WHICH = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind, sep='\\n')"

# A step on a GPU takes milliseconds, so a signal from outside would come after the run's end.
ENDS_ITSELF = f"""
import os
import signal
import sys
from bit_jax import train
from bit_jax.training.log import Log
from input_pipeline.exits import exit_code
advance = Log.advance
def advance_and_end(log, step):
    advance(log, step)
    if step == {KILLED_AFTER}:
        os.kill(os.getpid(), signal.SIGTERM)
Log.advance = advance_and_end
sys.exit(exit_code(train.main))
"""


def on_the_gpu() -> dict[str, str]:
    """The environment of a user's process on this machine; several of them share the GPU's memory."""
    ours = ("JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES")
    users = {name: value for name, value in os.environ.items() if name not in ours}
    visible = {} if os.environ["TESTS_GPUS"] == "all" else {"CUDA_VISIBLE_DEVICES": os.environ["TESTS_GPUS"]}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return users | visible | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": paths}


def start(*arguments: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=on_the_gpu(), **pipes)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate()
    assert process.returncode == code, err[-3000:]
    return out


@pytest.fixture(scope="session")
def gpu() -> str:
    """The name of the GPU here."""
    if not hugepages.NVIDIA.exists():  # the CUDA plugin of JAX 0.12 crashes where it is installed without a driver
        pytest.skip("This machine has no NVIDIA GPU.")
    platform, kind = finish(start("-c", WHICH)).splitlines()[-2:]
    if platform != "gpu":
        pytest.skip("JAX finds no GPU on this machine.")
    return kind


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Images drawn with a seed at which no ReLU's input is nearer to zero than 1e-5. At another seed, float32 may round
    one to the other side of zero, and the gradients then differ by nearly 1 %."""
    return np.random.default_rng(129).uniform(-1, 1, (4, 48, 48, 3)).astype(np.float32)


@pytest.fixture(scope="session")
def done(gpu, small_npz, images, tmp_path_factory) -> SimpleNamespace:
    """What all processes on the GPU left: the same run three times, of which one was ended and continued."""
    folder = tmp_path_factory.mktemp("gpu")
    np.save(folder / "images.npy", images)
    once, again, continued = folder / "once", folder / "again", folder / "continued"
    preset = RUN.split()
    runs = [start("train.py", *preset, "--workdir", workdir) for workdir in (once, again)]
    ended = start("-c", ENDS_ITSELF, *preset, "--workdir", continued)
    numbers = start("tests/gpu_numbers.py", small_npz, folder / "images.npy", folder / "numbers.npz")
    doctor = start("train.py", "digits", "--doctor", "--workdir", folder / "doctor")
    try:
        finish(ended, code=143)
        ended_after, programs = last_step(continued), training_programs(continued)
        finish(start("train.py", *preset, "--workdir", continued))
        for run in runs:
            finish(run)
        finish(numbers)
        report = finish(doctor)
    finally:
        for process in (*runs, ended, numbers, doctor):
            process.kill()
            process.communicate()
    return SimpleNamespace(**locals())


def training_programs(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "programs").glob("jit_train_step-*-cache"))


def relative_error(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> tuple[float, float]:
    """RMS of the error in units of an array's RMS: of the logits, and over all gradients."""

    def rms(array):
        return np.sqrt(np.mean(np.square(array, dtype=np.float64)))

    errors = {key: rms(found[key] - exact[key]) / rms(exact[key]) for key in exact}
    return errors.pop("logits"), rms(list(errors.values()))


@pytest.fixture(scope="session")
def float64(small_npz, images) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(logits and gradients in float64, the errors that float32's rounding explains: of the logits, of the gradients).

    Rounding happens after every layer and not once, as in
    test_resnetv2.test_float32_errs_no_more_than_its_rounding_explains.
    """
    rng = np.random.default_rng(0)

    def perturbed(leaf):
        leaf = np.asarray(leaf, np.float64)
        return jnp.asarray(leaf * (1 + np.finfo(np.float32).eps * rng.uniform(-1, 1, leaf.shape)))

    with jax.enable_x64(True):
        model, params = bit_jax.load(small_npz, dtype=jnp.dtype(jnp.float64))
        compute = logits_and_gradients(model)
        exact = compute(params, images)
        moved = [relative_error(compute(jax.tree.map(perturbed, params), perturbed(images)), exact) for _ in range(3)]
    return exact, 2 * np.sqrt(LAYERS) * np.max(moved, axis=0)


def test_the_check_of_rounding_passes_float32_and_notices_narrow_products(small_npz, images, float64):
    """It needs no GPU: TF32 keeps 11 bits of a product's operands as float16 does, and float32 keeps 24."""
    exact, explained = float64

    def error_in(dtype):
        model, params = bit_jax.load(small_npz, dtype=jnp.dtype(dtype))
        return np.array(relative_error(logits_and_gradients(model)(params, images), exact))

    assert (error_in(jnp.float32) < explained).all()
    assert (error_in(jnp.float16) > 10 * explained).all()


def test_logits_and_gradients_are_those_of_float64_up_to_rounding(done, float64):
    found, (exact, explained) = dict(np.load(done.folder / "numbers.npz")), float64
    assert found["logits"].dtype == np.float32
    error = np.array(relative_error(found, exact))
    assert (error > 0).all()
    assert (error < explained).all()


def test_the_same_run_ends_with_the_same_bytes(done):
    assert (done.again / "final.npz").read_bytes() == (done.once / "final.npz").read_bytes()


def test_a_run_that_was_ended_and_continued_ends_with_the_same_bytes(done):
    assert KILLED_AFTER <= done.ended_after < STEPS
    assert json.loads((done.continued / "result.json").read_text())["resumed_from_step"] == done.ended_after
    assert (done.continued / "final.npz").read_bytes() == (done.once / "final.npz").read_bytes()


def test_a_continued_run_takes_its_programs_from_the_work_directory(done):
    assert len(done.programs) == 1
    assert training_programs(done.continued) == done.programs
    # under the same name in another work directory, so that the folder can be copied there
    assert training_programs(done.again) == done.programs


def test_peak_memory_is_of_the_device(done, gpu):
    result = json.loads((done.once / "result.json").read_text())
    assert (result["mem_of"], result["device_kind"]) == ("device", gpu)
    assert 0 < result["mem_gib"] < 16  # the model is small, and the process would have reserved nine tenths of the GPU


def test_the_doctor_names_the_gpu(done, gpu):
    assert f"1 x {gpu}" in " ".join(done.report.split())
