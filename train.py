"""Fine-tunes a BiT model: `python train.py PRESET --workdir DIR` is `python -m bit_jax.train PRESET --workdir DIR`."""

import sys

from bit_jax import commands

if __name__ == "__main__":
    sys.exit(commands.train())
