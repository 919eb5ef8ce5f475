"""The precisions fp32, tf32, bf16, fp16 and fp64, defined in one place.

| name | products | activations between layers | parameters, statistics, loss, updates |
|---|---|---|---|
| fp32 | float32, IEEE | float32 | float32 |
| tf32 | float32 inputs rounded to TF32 where the hardware has it (JAX's default on A100) | float32 | float32 |
| bf16 | bfloat16; FlagPerf's amp | bfloat16 | float32 |
| fp16 | float16, the loss scaled dynamically (see `LossScale` in steps.py) | float16 | float32 |
| fp64 | float64; for the correctness check, on CPU | float64 | float64 |
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bit_jax.model import probe


@dataclasses.dataclass(frozen=True)
class Precision:
    name: str
    dtype: jnp.dtype
    product: jax.lax.Precision

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled; without that, float16 would lose small gradients."""
        return self.dtype == jnp.float16


_EXACT, _FAST = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT

PRECISIONS = {
    "fp32": Precision("fp32", jnp.dtype(jnp.float32), _EXACT),
    "tf32": Precision("tf32", jnp.dtype(jnp.float32), _FAST),
    "bf16": Precision("bf16", jnp.dtype(jnp.bfloat16), _FAST),
    "fp16": Precision("fp16", jnp.dtype(jnp.float16), _FAST),
    "fp64": Precision("fp64", jnp.dtype(jnp.float64), _EXACT),
}


def choose(name: str) -> Precision:
    """Returns the named precision; for fp64 it turns on JAX's 64-bit mode, so call it before any array is made."""
    if name == "fp64":
        jax.config.update("jax_enable_x64", True)
    return PRECISIONS[name]


def products(precision: Precision) -> tuple[str, str]:
    """Returns the precisions in which the default device really computes a matrix product and a convolution."""
    left, right = (jnp.asarray(operand, precision.dtype) for operand in probe.operands())
    matrix = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision.product))(left, right)
    image, kernel = left[None, :, None, :], right[None, None]

    def convolve(image, kernel):
        return lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision.product
        )

    convolved = jax.jit(convolve)(image, kernel)
    return probe.multiplied_in(np.asarray(matrix)), probe.multiplied_in(np.asarray(convolved))
