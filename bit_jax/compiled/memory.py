"""The memory of a GPU that a compiled program takes without saying so."""

from bit_jax.compiled import hlo

# cuDNN's workspaces come out of the pool, unseen by the compiler: this many times the largest activation. Bounds of
# 0.7 GiB for R152x2 and 1.4 GiB for R152x4, float32, batch 16, are 1.6 times theirs.
WORKSPACE = 1.6


def workspace(module: hlo.Module) -> int:
    """Returns the bytes to allow for cuDNN's workspaces."""
    return int(WORKSPACE * max((line.bytes for line, _ in module.executed() if hlo.is_convolution(line)), default=0))
