"""The weights that both sides load: published ones, a file of the user's, or random ones."""

from pathlib import Path

from bit_jax.published import locate
from parity.sides.inputs import random_weights

RANDOM = "random:"  # beginning of the name of random weights


def weight_file(name: str, folder: Path, *, random_classes: int, seed: int) -> Path:
    """Returns the absolute path of the weights that --weights names; random ones are drawn into the folder.

    Args:
        name: a published name, a path, `embedded`, or random:R50x1.
        folder: folder that exists.
        random_classes: number of classes of random weights.
        seed: seed of random weights.

    Raises:
        RequestError: there are no such weights.
    """
    if not name.startswith(RANDOM):
        return locate.weight_file(name).absolute()
    path = folder / "random.npz"
    random_weights(path, name.removeprefix(RANDOM), random_classes, seed)
    return path
