"""A StableHLO file, as `jax.export.export(...)(...).serialize()` makes it, in JAX."""

import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bit_jax.model.precision import choose
from input_pipeline.errors import RequestError
from parity.exported.program import Images, sentence, sha256, the_logits, written

BYTECODE = b"ML\xefR"  # begins MLIR's bytecode
PLATFORMS = {"gpu": ("cuda", "rocm")}  # JAX's name of a device's platform -> the names in an exported file
WANTED = "give the bytes of jax.export.export(jax.jit(function))(images).serialize()"


class StableHloProgram:
    """A `Program` of a serialized `jax.export.Exported`.

    Args:
        path: the file.
        precision: precision that is asked for; fp64 turns on JAX's 64-bit mode.

    Raises:
        RequestError: the file is nothing that JAX can run here, or it takes no images.
    """

    def __init__(self, path: Path, precision: str):
        choose(precision)
        self.path, self.name = path, f"stablehlo:{path}"
        exported = self._exported = _deserialized(path, self.name)
        if len(exported.in_avals) != 1:
            shapes = ", ".join(written(aval.shape) for aval in exported.in_avals[:3])
            raise RequestError(
                f"{self.name} takes {len(exported.in_avals)} arrays ({shapes}, ...); export a function of the images "
                "alone, with the parameters in it"
            )
        if exported.nr_devices != 1:
            raise RequestError(f"{self.name} was exported for {exported.nr_devices} devices; export it for one")
        images, self._device = exported.in_avals[0], _device(exported.platforms, self.name)
        self.images = Images.of(_sizes(images.shape), images.dtype.name, self.name)
        leaves = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(exported.out_tree, exported.out_avals))[0]
        names = [jax.tree_util.keystr(place, simple=True, separator="/") for place, _ in leaves]
        self._which = the_logits(names, self.name)
        self.classes = (_sizes(leaves[self._which][1].shape) or [None])[-1]
        self._call = jax.jit(exported.call)

    def described(self) -> dict[str, Any]:
        exported = self._exported
        # MLIR's bytecode begins with its own version and the name of the producer
        producer = re.search(rb"StableHLO_v([\d.]+)", exported.mlir_module_serialized[:64])
        return {
            "framework": "jax",
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "jaxlib": version("jaxlib"),
                "numpy": np.__version__,
            },
            "device": f"{self._device.platform}: {self._device.device_kind}",
            "exported by": "jax.export",
            "format": {
                "StableHLO": producer[1].decode() if producer else "unknown",
                "calling convention": exported.calling_convention_version,
                "platforms": ", ".join(exported.platforms),
            },
            "file": self.path.name,
            "file sha256": sha256([self.path]),
        }

    def logits(self, images: np.ndarray) -> np.ndarray:
        exported = self._exported
        answers = []
        batches = self.images.batches(images, exported.in_avals[0].dtype)
        try:
            for batch in batches:
                arguments, named = jax.tree.unflatten(exported.in_tree, [jax.device_put(batch, self._device)])
                answers.append(jax.tree.leaves(self._call(*arguments, **named))[self._which])
        except Exception as error:  # XLA and JAX raise exceptions of many kinds
            raise RequestError(f"{self.name} fails on images {batches[0].shape}: {sentence(error)}") from None
        # NumPy's own types: an .npz cannot hold bfloat16
        wide = [answer.astype(jnp.float32) if answer.dtype == jnp.bfloat16 else answer for answer in answers]
        return np.concatenate([np.asarray(answer) for answer in wide])


def _deserialized(path: Path, name: str) -> jax.export.Exported:
    content = path.read_bytes()
    if content.startswith(BYTECODE) or re.match(rb"\s*(module|#|//|func)", content):
        kind = "MLIR's bytecode" if content.startswith(BYTECODE) else "MLIR's text"
        raise RequestError(f"{name} is {kind} of a module, which no public function of JAX runs; {WANTED}")
    try:
        return jax.export.deserialize(bytearray(content))
    except ImportError as error:
        raise RequestError(
            f"a side stablehlo:FILE needs {error.name}, which is not installed; pip install {error.name}"
        ) from None
    except Exception as error:  # the reader trusts its input
        raise RequestError(f"{name} is no exported function that JAX can read ({sentence(error)}); {WANTED}") from None


def _device(platforms: tuple[str, ...], name: str) -> Any:
    """Returns the first device that the file was exported for.

    Raises:
        RequestError: there is none.
    """
    for device in (*jax.devices(), *jax.devices("cpu")):
        if set(PLATFORMS.get(device.platform, (device.platform,))) & set(platforms):
            return device
    raise RequestError(
        f"{name} was exported for {', '.join(platforms)}, and this process has {jax.devices()[0].platform}; export it "
        'with platforms=["cpu"], too'
    )


def _sizes(shape: tuple[Any, ...]) -> list[int | None]:
    """Returns the sizes of a shape; symbolic ones are open."""
    return [size if isinstance(size, int) else None for size in shape]
