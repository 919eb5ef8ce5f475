"""The config.json of Hugging Face's and of timm's directories."""

from typing import Any

from bit_jax.conversion.conversion import Conversion
from bit_jax.model.architecture import GROUPS, Architecture
from input_pipeline.errors import RequestError

# timm's models, which it looks up by name; of other depths and widths it builds none from a directory
IN_TIMM = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
SIDE = 224  # pixels, where nobody has said at which size the model was evaluated


def hugging_face(conversion: Conversion) -> dict[str, Any]:
    """Returns the config.json from which `BitForImageClassification.from_pretrained` builds the model."""
    architecture = conversion.architecture
    names = conversion.class_names or [f"LABEL_{label}" for label in range(architecture.num_classes)]
    return {
        "architectures": ["BitForImageClassification"],
        "model_type": "bit",
        **sizes(architecture),
        "drop_path_rate": 0.0,
        "global_padding": None,
        "hidden_act": "relu",
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "layer_type": "preactivation",
        "num_channels": 3,
        "num_groups": GROUPS,
        "output_stride": 32,
        "dtype": "float32",
    }


def sizes(architecture: Architecture) -> dict[str, Any]:
    """Returns the entries of Hugging Face's config that say depth and width."""
    root = round(64 * architecture.width)
    return {
        "depths": list(architecture.units),
        "embedding_size": root,
        "hidden_sizes": [4 * root * 2**stage for stage in range(len(architecture.units))],
        "width_factor": 1,
    }


def timm(conversion: Conversion) -> dict[str, Any]:
    """Returns the config.json from which `timm.create_model("local-dir:...")` builds the model.

    Raises:
        RequestError: timm has no model of that depth and width.
    """
    architecture = conversion.architecture
    if architecture.name not in IN_TIMM:
        raise RequestError(
            f"timm has no model of the name {architecture.name}, only {', '.join(IN_TIMM)}; write the weights alone, "
            "to a .safetensors or .pth"
        )
    side = conversion.description.crop or SIDE
    named = {"label_names": conversion.class_names} if conversion.class_names else {}
    return {
        "architecture": f"resnetv2_{architecture.name.removeprefix('R')}_bit",
        "num_classes": architecture.num_classes,
        "num_features": 4 * round(64 * architecture.width) * 8,
        **named,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": architecture.num_classes,
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        },
    }
