"""Eight virtual CPU devices and strict dtype promotion for every test; both must be said before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest

from bit_jax import weights

jax.config.update("jax_numpy_dtype_promotion", "strict")

SMALL = weights.Architecture((1, 1, 1, 1), 0.5, 10)


def random_weights(architecture: weights.Architecture, seed: int = 0) -> dict[str, np.ndarray]:
    """{official key: float32 array} with plausible values."""
    rng = np.random.default_rng(seed)
    flat = {}
    for key, shape in weights.layout(architecture).items():
        scale = 0.1 if key.endswith(("beta", "bias")) else 0.02 if "head" in key else 1 / np.sqrt(np.prod(shape[:-1]))
        flat[key] = (rng.standard_normal(shape) * scale + key.endswith("gamma")).astype(np.float32)
    return flat


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory):
    """A weight file of the smallest ordinary BiT: one unit a stage, half the width, 10 classes."""
    path = tmp_path_factory.mktemp("weights") / "small.npz"
    np.savez(path, **random_weights(SMALL))
    return path


@pytest.fixture
def x64():
    """64-bit mode for one test."""
    with jax.enable_x64(True):
        yield
