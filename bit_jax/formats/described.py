"""Reads the config.json that training leaves beside final.npz, which describes those weights."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from input_pipeline.files import DamagedFile, read_json
from input_pipeline.resample import Method

REMEDY = "move it away from the weights to go on without it"


@dataclasses.dataclass(frozen=True)
class Description:
    """The training of a weight file; an attribute is None if it is not known.

    Attributes:
        class_names: the dataset's name for each class, in label order.
        crop: side in pixels of the square that the model was evaluated at.
        resize: method by which images were resized.
    """

    class_names: list[str] | None = None
    crop: int | None = None
    resize: Method = "pillow"


def described(weight_file: Path) -> Description:
    """Returns what the config.json beside a weight file says about it; the file need not be there.

    Raises:
        RequestError: the config.json cannot be read, is damaged, or has a value that a run does not write.
    """
    path = weight_file.parent / "config.json"
    if not os.path.exists(path):
        return Description()
    content = read_json(path, dict, REMEDY)

    def entry(within: dict, key: str, wanted: str, fits: Callable[[Any], bool], default: Any) -> Any:
        value = within.get(key)
        if value is None:
            return default
        if not fits(value):
            raise DamagedFile(f"{path} is damaged (its {key!r} is {repr(value)[:60]}, not {wanted}); {REMEDY}")
        return value

    recipe = entry(content, "recipe", "an object", lambda value: isinstance(value, dict), {})
    config = entry(content, "config", "an object", lambda value: isinstance(value, dict), {})
    return Description(
        entry(content, "class_names", "a list of names", _are_names, None),
        entry(recipe, "crop", "a number of pixels", _is_side, None),
        entry(config, "data.resize", " or ".join(get_args(Method)), lambda value: value in get_args(Method), "pillow"),
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
