"""The entry point of the installed command `bit-jax-parity`, which does what `python -m parity` does."""

from input_pipeline.exits import exit_code


def main() -> int:
    """Compares JAX with PyTorch; returns the exit code."""
    from parity.__main__ import main

    return exit_code(main)
