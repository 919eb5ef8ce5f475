"""What fp32, tf32, bf16 and fp64 mean, in one place.

| name | products | activations between layers | parameters, statistics, loss, updates |
|---|---|---|---|
| fp32 | float32, IEEE | float32 | float32 |
| tf32 | float32 inputs rounded to TF32 where the hardware has it (JAX's default on A100) | float32 | float32 |
| bf16 | bfloat16 | bfloat16 | float32 |
| fp64 | float64; the correctness gate, on CPU | float64 | float64 |
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Precision:
    name: str
    dtype: jnp.dtype
    product: jax.lax.Precision


_EXACT, _FAST = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT

PRECISIONS = {
    "fp32": Precision("fp32", jnp.dtype(jnp.float32), _EXACT),
    "tf32": Precision("tf32", jnp.dtype(jnp.float32), _FAST),
    "bf16": Precision("bf16", jnp.dtype(jnp.bfloat16), _FAST),
    "fp64": Precision("fp64", jnp.dtype(jnp.float64), _EXACT),
}


def choose(name: str) -> Precision:
    """The named precision; fp64 turns JAX's 64-bit mode on, which has to happen before any array is made."""
    if name == "fp64":
        jax.config.update("jax_enable_x64", True)
    return PRECISIONS[name]
