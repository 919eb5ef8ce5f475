"""BiT's units in a PyTorch model, and their outputs.

Modules need no particular names: a unit is the outermost module that holds its parameters and no others. A site is a
unit's name in the checkpoint: root_block, block1/unit01 and so on.
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn


def record(
    model: nn.Module, keys: dict[str, str], images: Tensor, teacher: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Returns {site: output} of the units that have a module of their own, and `logits`.

    Args:
        model: a BiT.
        keys: {parameter name: key in the checkpoint}.
        images: images, [batch, 3, height, width].
        teacher: {site: output} of another implementation, or None. Each unit then computes on what the teacher's unit
            before it returned, so that errors of earlier units do not reach it.
    """
    outputs: dict[str, Tensor] = {}
    ordered = sites(keys)
    inputs = {} if teacher is None else {after: teacher[site] for site, after in pairwise(ordered) if site in teacher}

    def replace_input(site: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            return (inputs[site],) if site in inputs else None

        return hook

    def record_output(site: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            outputs[site] = output
            # the head computes on what the teacher's last unit returned
            return teacher.get(site) if teacher is not None and site == ordered[-1] else None

        return hook

    with contextlib.ExitStack() as hooks:
        for site, module in units(model, keys).items():
            hooks.callback(module.register_forward_pre_hook(replace_input(site)).remove)
            hooks.callback(module.register_forward_hook(record_output(site)).remove)
        logits = model(images)
    return outputs | {"logits": logits}


def units(model: nn.Module, keys: dict[str, str]) -> dict[str, nn.Module]:
    """Returns {site: module} of the units for which the model has a module.

    Args:
        model: a BiT.
        keys: {parameter name: key in the checkpoint}.
    """
    parameters_of_site = defaultdict(set)
    for name, key in keys.items():
        if site := site_of(key):
            parameters_of_site[site].add(name)
    parameters_of_module = {
        module: {name for name in keys if name.startswith(f"{module}.")}
        for module, _ in model.named_modules()
        if module
    }
    modules = {}
    for site in sites(keys):
        names = parameters_of_site[site]
        module = next((module for module, held in parameters_of_module.items() if held == names), None)
        if module is not None:
            modules[site] = model.get_submodule(module)
    return modules


def sites(keys: dict[str, str]) -> list[str]:
    """Returns the sites of all units in the order of computation, from {parameter name: key in the checkpoint}."""
    return sorted({site for key in keys.values() if (site := site_of(key))}, key=order)


def site_of(key: str) -> str | None:
    """Returns the site of the unit that an array of the checkpoint belongs to; None for the last norm and the head."""
    match = re.match(r"resnet/(root_block|block\d/unit\d+)/", key)
    return match[1] if match else None


def order(site: str) -> tuple[bool, str]:
    """Returns a key that sorts sites in the order of computation."""
    return (site != "root_block", site)
