"""The commands that an installed package puts on the path: `bit-jax-train` is `python -m bit_jax.train`, and so on.

Each function runs one command and returns its exit code. It imports the command only when it is called, because
`train` may start the process again before JAX is imported.
"""

from bit_jax.process import hugepages
from input_pipeline.exits import collect_less, exit_code, leave


def train() -> int:
    """Fine-tunes a model."""
    hugepages.restart()
    collect_less()  # imports make many objects and hardly a cycle
    from bit_jax.train import main

    leave(exit_code(main))


def zoo() -> int:
    """Lists the published weight files and fetches them."""
    from bit_jax.zoo import main

    return exit_code(main)


def predict() -> int:
    """Names the likeliest classes of images."""
    from bit_jax.predict import main

    return exit_code(main)


def evaluate() -> int:
    """Measures the accuracy of a model on a dataset."""
    from bit_jax.evaluate import main

    return exit_code(main)


def convert() -> int:
    """Converts weights for another library."""
    from bit_jax.convert import main

    return exit_code(main)


def reproduce() -> int:
    """Measures published figures again."""
    from bit_jax.reproduce import main

    return exit_code(main)


def plan() -> int:
    """Compiles a training step for GPUs and says what memory and time it would take there."""
    from bit_jax.plan.__main__ import main

    return exit_code(main)


def launch() -> int:
    """Runs a command as several hosts, and again when one of them dies."""
    from bit_jax.launch import main

    return exit_code(main)


def report() -> int:
    """Shows what became of runs."""
    from bit_jax.report.__main__ import main

    return exit_code(main)


def profile() -> int:
    """Shows where the time of a run's traced steps went."""
    import tyro

    from bit_jax.compiled.profile import main

    return exit_code(lambda: tyro.cli(main))
