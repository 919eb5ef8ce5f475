"""Loads a target with the library that it is for: a script, run by `check.py` in a process without this project.

    python -P -S libraries.py timm|huggingface QUESTION.json ANSWER.npy

It computes float64 logits on the CPU. Exit code 3: the library cannot be imported; its last line says why.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

MISSING = 3
VISION = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"  # the signature of torchvision's nms


def main(library: str, question: str, answer: str) -> None:
    asked = json.loads(Path(question).read_text())
    import numpy as np
    import torch

    try:
        with_torchvision(torch)
        model = {"timm": of_timm, "huggingface": of_hugging_face}[library](asked)
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(MISSING) from None
    images = torch.from_numpy(np.load(asked["images"]).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        output = model.double().eval()(images)
    np.save(answer, getattr(output, "logits", output).numpy())


def with_torchvision(torch):
    """Lets timm import a torchvision that was built for another PyTorch: BiT uses none of its operations."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", VISION)
    except ImportError:
        pass


def of_timm(asked):
    timm: Any = importlib.import_module("timm")
    target = asked["target"]
    if asked["directory"]:
        return timm.create_model(f"local-dir:{target}", pretrained=True)
    import functools

    resnetv2: Any = importlib.import_module("timm.models.resnetv2")
    root = asked["sizes"]["embedding_size"]
    model = resnetv2.ResNetV2(  # as timm builds its own BiTs, in any depth and width
        layers=tuple(asked["sizes"]["depths"]),
        channels=tuple(asked["sizes"]["hidden_sizes"]),
        num_classes=asked["num_classes"],
        stem_chs=root,
        stem_type="fixed",
        conv_layer=functools.partial(timm.layers.StdConv2d, eps=1e-8),
    )
    model.load_state_dict(timm.models.load_state_dict(target), strict=True)
    return model


def of_hugging_face(asked):
    import torch

    transformers: Any = importlib.import_module("transformers")
    target = asked["target"]
    if asked["directory"]:
        model, notes = transformers.BitForImageClassification.from_pretrained(
            target, output_loading_info=True, local_files_only=True, dtype=torch.float32
        )
        wrong = {key: value for key, value in notes.items() if value}
        if wrong:
            raise SystemExit(f"transformers loads {target} with {wrong}")
        return model
    config = transformers.BitConfig(**asked["sizes"], num_labels=asked["num_classes"])
    model = transformers.BitForImageClassification(config)
    if Path(target).read_bytes()[8:9] == b"{":
        state = importlib.import_module("safetensors.torch").load_file(target)
    else:
        state = torch.load(target, weights_only=True)
    model.load_state_dict(state, strict=True)
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
