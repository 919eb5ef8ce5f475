"""Shows where the time of a run's traced steps went: `python -m bit_jax.profile WORKDIR`."""

import sys

import tyro

from bit_jax.compiled.profile import main
from input_pipeline.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main)))
