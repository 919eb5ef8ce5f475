"""Writes the model as a TensorFlow SavedModel, in a process of its own: no other imports TensorFlow.

`jax.experimental.jax2tf` is not used: TensorFlow 2.21, the newest, does not read the StableHLO that JAX 0.12 writes
where sizes are open.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bit_jax.export.source import Source
from input_pipeline.errors import RequestError

CONTENTS = frozenset({"assets", "fingerprint.pb", "saved_model.pb", "variables"})  # what TensorFlow writes


def require(*, checked: bool) -> None:
    """Raises RequestError where TensorFlow is not installed."""
    if importlib.util.find_spec("tensorflow") is None:
        raise RequestError("a SavedModel needs tensorflow, which is not installed; pip install 'bit-jax[prepare]'")


def write(source: Source, path: Path, dtype: np.dtype, *, beside: bool) -> None:
    """Writes the directory of images [batch, height, width, 3] in [-1, 1] -> {"logits": [batch, classes]}.

    Kernels are standardized already. TensorFlow keeps the weights in files beside the graph, whatever `beside` is.

    Raises:
        RequestError: TensorFlow fails.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        weights = Path(folder) / "weights.npz"
        np.savez(weights, allow_pickle=False, **source.folded(dtype))
        _tensorflow("write", weights, json.dumps(source.architecture.units), path)


def run(path: Path, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the logits of batches of images, as TensorFlow computes them on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        images, logits = Path(folder) / "images.npz", Path(folder) / "logits.npz"
        np.savez(images, allow_pickle=False, **{str(place): batch for place, batch in enumerate(batches)})
        _tensorflow("run", path, images, logits)
        with np.load(logits) as file:
            return [file[str(place)] for place in range(len(batches))]


def _tensorflow(*arguments: object) -> None:
    command = [sys.executable, "-m", "bit_jax.export.tensorflow_graph", *map(str, arguments)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise RequestError(f"TensorFlow ends with exit code {done.returncode}: {' '.join(last)[:300]}")
