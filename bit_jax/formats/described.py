"""Reads the config.json that describes weights: one that training leaves beside final.npz, Hugging Face's or timm's.

All three may say which classes the head has and at which size the model was evaluated; they differ in where.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from input_pipeline.errors import RequestError
from input_pipeline.files import DamagedFile, read_json, write_json
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
    folder = weight_file if os.path.isdir(weight_file) else weight_file.parent
    path = folder / "config.json"
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
    if {"id2label", "pretrained_cfg", "label_names"} & content.keys():
        return _of_a_hub(path, content, entry)
    return Description(
        entry(content, "class_names", "a list of names", _are_names, None),
        entry(recipe, "crop", "a number of pixels", _is_side, None),
        entry(config, "data.resize", " or ".join(get_args(Method)), lambda value: value in get_args(Method), "pillow"),
    )


def _of_a_hub(path: Path, content: dict, entry: Callable) -> Description:
    """Returns what Hugging Face's or timm's config.json says.

    Raises:
        RequestError: its model takes images in another range than [-1, 1], in which a BiT has them.
    """
    labels = entry(content, "id2label", "an object", lambda value: isinstance(value, dict), None)
    names = entry(content, "label_names", "a list of names", _are_names, None)
    if labels is not None:
        named = [labels.get(str(label)) for label in range(len(labels))]
        # transformers writes LABEL_0, LABEL_1, ... where nobody gave names
        known = _are_names(named) and named != [f"LABEL_{label}" for label in range(len(named))]
        names = named if known else None
    config = entry(content, "pretrained_cfg", "an object", lambda value: isinstance(value, dict), {})
    for key in ("mean", "std"):
        value = entry(config, key, "three numbers", lambda value: isinstance(value, list), [0.5] * 3)
        if value != [0.5] * 3:
            raise RequestError(
                f"{path} says that the weights take images with {key} {repr(value)[:60]}, and a BiT takes images in "
                f"[-1, 1], which is {key} [0.5, 0.5, 0.5]; {REMEDY}"
            )
    size = entry(config, "input_size", "[3, side, side]", _is_size, None)
    return Description(names, None if size is None else size[-1])


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_side, value))


def write_description(weight_file: Path, description: Description) -> None:
    """Writes a config.json beside a weight file from which `described` returns the description again."""
    content = {
        "class_names": description.class_names,
        "recipe": {"crop": description.crop},
        "config": {"data.resize": description.resize},
    }
    write_json(weight_file.parent / "config.json", content)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
