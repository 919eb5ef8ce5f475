"""The command that an installed package puts on the path: `bit-jax-input` is `python -m input_pipeline`."""

from input_pipeline.exits import exit_code


def main() -> int:
    """Prepares, converts, checks or measures a dataset; returns the exit code."""
    from input_pipeline.__main__ import main

    return exit_code(main)
