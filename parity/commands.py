"""The command that an installed package puts on the path: `bit-jax-parity` is `python -m parity`."""

from input_pipeline.exits import exit_code


def main() -> int:
    """Compares JAX with PyTorch; returns the exit code."""
    from parity.__main__ import main

    return exit_code(main)
