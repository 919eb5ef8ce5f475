"""The operations inside a unit, and one pass of a model in which each of them is isolated. No framework is imported.

A site is a part of the model: `root_block`, a unit such as `block1/unit01`, or `logits`, what follows the last unit. An
operation is named by its place in the checkpoint: `block1/unit01/a/group_norm`, `.../a/relu`, `.../a/proj/...`,
`.../b/standardized_conv2d`, `.../b/standardized_conv2d/standardization`, `block1/unit01/addition`, `root_block/pool`,
`pooling` (the mean over places), `head/conv2d`. A value is named by the operation that makes it; `SITE/input` is what
the site is given.

First one side records every value of a site, and the gradient of the loss by it. Then each side makes a fed pass: every
operation is given the recorded values, and the recorded gradient by its result, so that an error of one operation
reaches no other. What a fed pass returns is named `OPERATION, value`, `OPERATION, by input`, `OPERATION, by kernel` and
so on, and compared name by name.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from parity.sides import inputs
from parity.sides.tasks import Disturb

LAST_SITE = "logits"  # the site behind the last unit, under the name of its result in the forward rung
CONV, NORM, STANDARDIZATION = "standardized_conv2d", "group_norm", "standardization"
# A ReLU whose input is this near to zero, as a share of its RMS, may be on in one framework and off in another: no
# gradient is sent through it. Rounding to bfloat16 moves values by 2^-9 of their own size.
NEAR_ZERO = 2.0**-5


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a site.

    Attributes:
        name: name of the operation, and of the value that it makes.
        inputs: {what the gradient by it is called: name of the value}, as in {"input": "block1/unit01/a/relu"}.
        parameters: {what the gradient by it is called: key in the checkpoint}.
    """

    name: str
    inputs: dict[str, str]
    parameters: dict[str, str] = dataclasses.field(default_factory=dict)


def operations(site: str, keys: Iterable[str]) -> dict[str, Operation]:
    """Returns {name: operation} of a site, in the order of computation.

    Args:
        site: a site of the model.
        keys: keys of the checkpoint's arrays, which say whether the unit projects its shortcut.
    """
    ops: list[Operation] = []

    def normalize(part: str, x: str) -> str:
        norm, relu = (f"{part}/{name}".removeprefix("/") for name in (NORM, "relu"))
        ops.append(Operation(norm, {"input": x}, {name: f"resnet/{norm}/{name}" for name in ("gamma", "beta")}))
        ops.append(Operation(relu, {"input": norm}))
        return relu

    def convolve(part: str, x: str) -> str:
        conv, standard = f"{part}/{CONV}", f"{part}/{CONV}/{STANDARDIZATION}"
        ops.append(Operation(standard, {}, {"kernel": f"resnet/{conv}/kernel"}))
        ops.append(Operation(conv, {"input": x, "kernel": standard}))
        return conv

    given = f"{site}/input"
    if site == "root_block":
        ops.append(Operation(f"{site}/pool", {"input": convolve(site, given)}))
    elif site == LAST_SITE:
        ops.append(Operation("pooling", {"input": normalize("", given)}))
        head = {name: f"resnet/head/conv2d/{name}" for name in ("kernel", "bias")}
        ops.append(Operation("head/conv2d", {"input": "pooling"}, head))
    else:
        active, shortcut = normalize(f"{site}/a", given), given
        if f"resnet/{site}/a/proj/{CONV}/kernel" in keys:
            shortcut = convolve(f"{site}/a/proj", active)
        x = convolve(f"{site}/a", active)
        for part in ("b", "c"):
            x = convolve(f"{site}/{part}", normalize(f"{site}/{part}", x))
        ops.append(Operation(f"{site}/addition", {"input": x, "shortcut": shortcut}))
    return {operation.name: operation for operation in ops}


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a site's operations are fed: {name of a value: the value}, and {name: gradient of the loss by it}.

    Gradients are scaled to a largest value of 1, which keeps float16 from losing them; every result depends on one
    gradient, and linearly.
    """

    values: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: str, disturb: Disturb | None) -> "Recording":
        """Reads what `named` gave names to, and disturbs it."""
        split: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
        for name, array in inputs.disturbed_file(path, disturb).items():
            value, _, what = name.rpartition(", ")
            split[what == "gradient"][value] = array
        return cls(*split)

    @classmethod
    def of(cls, ops: dict[str, Operation], values: dict[str, np.ndarray], gradients: dict[str, Any]) -> "Recording":
        """Scales the gradients of a recording pass, and sends none through a ReLU near zero."""
        scaled = {name: array / (np.abs(array).max() or 1.0) for name, array in gradients.items()}
        for name, op in ops.items():
            if name.endswith("relu") and name in values and (before := op.inputs["input"]) in values:
                pre = values[before]
                clear = np.abs(pre) > NEAR_ZERO * np.sqrt(np.mean(np.square(pre)))
                scaled[name] = scaled[name] * clear
                scaled[before] = scaled[name] * (pre > 0)
        return cls(values, scaled)

    def named(self) -> dict[str, np.ndarray]:
        """Returns {`NAME, value` or `NAME, gradient`: array}."""
        values = {f"{name}, value": array for name, array in self.values.items()}
        return values | {f"{name}, gradient": array for name, array in self.gradients.items()}


class Pass:
    """One pass of a model: its modules report here what they are given and what they return, and go on with the answer.

    Attributes:
        values: {name: value that this side computed}.

    Args:
        site: the site to observe.
        ops: its operations.
        fed: function (name, own value) -> recorded value, or the own one if none was recorded; None while recording.
        zero: function (name, value) -> value plus zeros, by which the gradient of that name is taken.
    """

    def __init__(
        self,
        site: str,
        ops: dict[str, Operation],
        fed: Callable[[str, Any], Any] | None,
        zero: Callable[[str, Any], Any],
    ):
        self.values: dict[str, Any] = {}
        self._site, self._ops, self._fed, self._zero = site, ops, fed, zero

    def enter(self, name: str, x: Any) -> Any:
        """Returns what the module of that operation, or of the site, computes on instead of x."""
        of_site = f"{self._site}/input"
        value = of_site if name == self._site else self._ops[name].inputs["input"]
        first = value not in self.values
        if first:  # what makes it is no module
            self.values[value] = x
        if self._fed is None:
            return self._zero(f"{value}, gradient", x) if first and value != of_site else x
        given = self._fed(value, x)
        # nobody asks for the gradient by the images
        return given if value == "root_block/input" else self._zero(f"{name}, by input", given)

    def leave(self, name: str, y: Any, *, active: bool = False) -> Any:
        """Returns what goes on instead of a result y.

        Args:
            active: whether the module is a norm that includes the ReLU.
        """
        if name == self._site:
            name = next(reversed(self._ops))
        value = f"{name.removesuffix(NORM)}relu" if active else name
        self.values[value] = y
        return self._zero(f"{value}, gradient", y if self._fed is None else self._fed(value, y))


def fed_results(
    ops: dict[str, Operation],
    site: str,
    recording: Recording,
    values: dict[str, np.ndarray],
    backward: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Returns what a fed pass is compared by.

    A norm and its ReLU may be one function. Its result counts as the norm's where the recorded ReLU is on, and its
    gradients as the norm's for the recorded gradient at these places; the whole result is the ReLU's, and so is the
    gradient by the norm's input for the whole gradient.

    Args:
        ops, site: operations of the site.
        recording: what the pass was fed.
        values: values that the side computed.
        backward: function {name of a value: gradient by it} -> gradients by what `Pass` has added zeros to, and
            by parameters, under their keys.
    """
    values = {name: array for name, array in values.items() if name in recording.gradients}
    if not values:
        return {}
    results = {f"{name}, value": array for name, array in values.items()}
    incoming = {name: recording.gradients[name] for name in values}
    relus = [name for name in values if name.endswith("relu")]
    on = {name: recording.values[name] > 0 for name in relus}
    gradients = backward(incoming | {name: incoming[name] * on[name] for name in relus})
    for op in ops.values():
        results |= _gradients_of(op, site, values, gradients)
    whole = backward({name: incoming[name] for name in relus}) if relus else {}
    norms = {name: ops[name].inputs["input"] for name in relus}
    if behind := {norm: whole[f"{norm}, gradient"] for norm in norms.values() if norm in values}:
        whole |= {name: array for name, array in backward(behind).items() if name.endswith("by input")}
    for relu, norm in norms.items():
        active = np.maximum(values[norm], 0) if norm in values else values[relu]
        results[f"{norm}, value"] = active * on[relu]
        if f"{norm}, by input" in whole:
            results[f"{relu}, by input"] = whole[f"{norm}, by input"]
    return results


def _gradients_of(
    op: Operation, site: str, values: dict[str, np.ndarray], gradients: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns {`OPERATION, by WHAT`: gradient} of one operation; a ReLU's is found otherwise, see `fed_results`."""
    named = {f"{op.name}, by {slot}": gradients[key] for slot, key in op.parameters.items()}
    if op.name.endswith(STANDARDIZATION) and op.name not in values:  # seen only together with the convolution
        return {name.replace(f"/{STANDARDIZATION}", ""): array for name, array in named.items()}
    if op.name.endswith("relu"):
        return {}
    for slot, value in op.inputs.items():
        own, from_site = f"{op.name}, by {slot}", slot == "shortcut" and value == f"{site}/input"
        behind = f"{site}, by input" if from_site else f"{value}, gradient"
        if own in gradients:
            named[own] = gradients[own]
        elif op.name in values and (from_site or value in values) and behind in gradients:
            named[own] = gradients[behind]
    return named
