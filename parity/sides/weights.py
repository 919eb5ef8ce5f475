"""The weights that both sides load: published ones, a file of the user's, or random ones."""

from pathlib import Path

from bit_jax.formats import recognize, weights
from bit_jax.formats.described import described, write_description
from bit_jax.published import locate
from parity.sides.inputs import random_weights

RANDOM = "random:"  # beginning of the name of random weights


def weight_file(name: str, folder: Path, *, random_classes: int, seed: int) -> Path:
    """Returns the absolute path of the weights that --weights names; random ones are drawn into the folder.

    Weights in another format than the official `.npz` are converted into the folder.

    Args:
        name: a published name, a path, `embedded`, or random:R50x1.
        folder: folder that exists.
        random_classes: number of classes of random weights.
        seed: seed of random weights.

    Raises:
        RequestError: there are no such weights.
    """
    if not name.startswith(RANDOM):
        return _official(locate.weight_file(name).absolute(), folder)
    path = folder / "random.npz"
    random_weights(path, name.removeprefix(RANDOM), random_classes, seed)
    return path


def _official(path: Path, folder: Path) -> Path:
    """Returns the path, or that of the same weights as an official `.npz` within the folder, with the config.json that
    describes them beside it: PyTorch's side reads nothing else."""
    if not path.exists() or recognize.container(path) == "npz":
        return path
    (folder / "weights").mkdir(exist_ok=True)
    architecture, arrays = weights.read(path)
    converted = folder / "weights" / "converted.npz"
    params = weights.unflatten(dict(arrays))
    weights.save(converted, params, standardize_eps=architecture.standardize_eps)
    write_description(converted, described(path))
    return converted
