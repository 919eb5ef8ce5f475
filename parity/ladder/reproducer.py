"""Leaves a folder that shows one faulty operation, and needs nothing of this project.

The operation is computed by the model's own module on what the oracle gives it, and compared with the same operation in
public functions in float64. As long as the fault persists, batch, places and channels are halved.
"""

import dataclasses
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from bit_jax.model.layers import NORM_EPS, STANDARDIZE_EPS
from input_pipeline.errors import RequestError, RunFailed
from parity.ladder import verdict
from parity.ladder.kept import relative_difference
from parity.ladder.ladder import ROLES, ULP, Ladder, RungResult
from parity.ladder.rungs import SCHEDULE_STEP
from parity.ladder.verdict import MULTIPLE, Line
from parity.sides.operations import LAST_SITE, NORM, Recording, operations

# axes of the arrays of a kind: batch n, height h, width w, channels in i and out o, and places of the result y and x
LAYOUTS = {
    "convolution": {"input": "nhwi", "kernel": "..io", "gradient": "nyxo"},
    "standardization": {"kernel": "..io", "gradient": "..io"},
    "norm and ReLU": {"input": "nhwi", "gamma": "i", "beta": "i", "gradient": "nhwi"},
    "head": {"input": "ni", "kernel": "..io", "bias": "o", "gradient": "no"},
    "pool": {"input": "nhwi", "gradient": "nyxi"},
    "update": {"parameter": "o", "buffer": "o", "gradient": "o"},  # the values of a parameter in a row
}
GROWTH = 10.0  # factor by which rounding may grow where arrays shrink
GROUPS = 32  # a norm's channels stay a multiple of these
SCRIPTS = {"jax": ("parity.in_jax", "jax_side.py"), "torch": ("parity.in_torch", "torch_side.py")}
Arrays = dict[str, np.ndarray]
README = """\
# {question.operation}, {question.what}, in {question.precision}

Kind: {question.kind}, of {architecture}.
In the table are the largest differences from the float64 result, relative to its root mean square. Public functions
computed that result.

| side | the model's program | public functions | arrays |
|---|---|---|---|
{seen}

| array | in the model | here |
|---|---|---|
{shapes}

Seen by

{versions}

with `{command}`. To see it again, with numpy and the framework alone:

```
{scripts}
```

- `inputs.npz`: the arrays (NHWC, HWIO), the gradient by the result, and the float64 result.
- `jax_program.mlir`, `.bin`, `.hlo`: the model's program in JAX, as StableHLO to be read, the same to be run, and what
  XLA made of it.
- `torch_program.pt2`, `.txt`: the model's program in PyTorch, as `torch.export` saved it, and to be read.
"""


@dataclasses.dataclass(frozen=True)
class Suspect:
    """The operation that is blamed, and the precision in which it errs.

    Attributes:
        operation, what: its full name, and what of it is wrong.
        site, name, kind: its site, the operation whose module computes it, and its kind in `LAYOUTS`.
        precision: precision in which it is wrong.
        stride: stride of a convolution.
        norm_eps, standardize_eps: what is added to variances: what a side sets, else BiT's.
        schedule, momentum, step: of an update, fields of a `Schedule` and the number of the step.
    """

    operation: str
    what: str
    site: str
    name: str
    kind: str
    precision: str
    stride: int = 1
    norm_eps: float = NORM_EPS
    standardize_eps: float = STANDARDIZE_EPS
    schedule: dict[str, Any] | None = None
    momentum: float = 0.0
    step: int = 0

    def content(self) -> dict[str, Any]:
        """Returns the content of operation.json."""
        operands = [name for name in LAYOUTS[self.kind] if name != "gradient"]
        results = ["value", "momentum"] if self.kind == "update" else ["value", *(f"by {name}" for name in operands)]
        return dataclasses.asdict(self) | {"operands": operands, "results": results}


def refuse_unusable(folder: Path) -> None:
    """Looks whether the folder can be left there; it is better to know at the start than in the end.

    Raises:
        RequestError: the folder exists and is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"--reproducer {folder} exists and is not an empty folder; give another path")


def leave(ladder: Ladder, result: RungResult, folder: Path, attestation: dict[str, Any]) -> None:
    """Writes the folder for what a failed rung blames, an operation or an update, and adds a sentence on it to the
    rung's result."""
    if "reference" not in ladder.roles:
        result.findings.append("no reproducer is left: the reference is not there to be asked")
        return
    if result.name in ("optimizer", "curve") and ladder.options.added:
        result.findings.append("no reproducer is left: its scripts know BiT's own update, without additions")
        return
    try:
        whole = _first_at_fault(ladder, result)
        if whole is None:
            result.findings.append("no reproducer is left: nothing that this rung blames errs outside of the model")
            return
        small = _shrunk(ladder, whole)
        _write(ladder, whole, small, folder, attestation)
    except RunFailed as error:
        result.findings.append(f"no reproducer is left: {error}")
        return
    question, sizes = whole.question, ", ".join(f"{name} {list(array.shape)}" for name, array in small.arrays.items())
    result.findings.append(f"{folder} reproduces {question.operation}, {question.what}, with {sizes}")


def _first_at_fault(ladder: Ladder, result: RungResult) -> "Seen | None":
    """Returns the operation or the update that a rung blames, if it errs by itself."""
    if result.name in ("optimizer", "curve"):
        attempts = _updates(ladder, result)
    else:
        found = result.details.get("operations", {"wrong": [], "precision": ""})
        questions = [_question(ladder, wrong, found["precision"]) for wrong in found["wrong"][:1]]
        attempts = ((question, _operands(ladder, question)) for question in questions if question is not None)
    seen = (_seen(ladder, question, arrays) for question, arrays in attempts)
    return next((attempt for attempt in seen if attempt.line.verdict == "bug"), None)


def _updates(ladder: Ladder, result: RungResult) -> Iterator[tuple[Suspect, Arrays]]:
    """Yields every update that may be at fault, of the first parameter that a failed rung names: the step of the
    optimizer rung, or each step of the curve."""
    options = ladder.options
    line = next(line for line in result.lines if line.verdict == "bug")
    named = [line.name.partition("/") for line in result.lines if line.verdict == "bug" and "/" in line.name]
    kind, _, key = named[0] if named else ("params", "", next(iter(ladder.architecture.layout)))
    gradients = ladder.ask("reference", "fp64", "gradients", mixed=ladder.mixed_pictures(), count=options.batches)
    parameter = ladder.ask("reference", "fp64", "weights").arrays[key].astype(np.float64).ravel()
    gradient = gradients.arrays[f"0/{key}"].ravel()
    arrays = {"parameter": parameter, "buffer": 0.1 * parameter, "gradient": gradient}
    what = "momentum" if kind == "momentum" else "value"
    schedule, steps = options.schedule, range(options.steps)
    if result.name == "optimizer":
        schedule, steps = schedule | {"warmup_steps": max(options.warmup_steps, SCHEDULE_STEP + 1)}, [SCHEDULE_STEP]
    for step in steps:
        settings = {"schedule": schedule, "momentum": options.momentum, "step": step}
        yield Suspect(f"update {step} of {key}", what, "", "", "update", line.precision, **settings), arrays


def _question(ladder: Ladder, wrong: str, precision: str) -> Suspect | None:
    """Returns the question of an operation that is named wrong, or None if it has no module of its own."""
    operation, _, what = wrong.partition(", ")
    name = re.sub(rf"({NORM}/.*|relu)$", NORM, operation)
    kinds = {
        r".*standardization": "standardization",
        r".*standardized_conv2d": "convolution",
        rf".*{NORM}": "norm and ReLU",
        r"head/conv2d": "head",
        r"root_block/pool": "pool",
    }
    kind = next((kind for pattern, kind in kinds.items() if re.fullmatch(pattern, name)), None)
    if kind is None:
        return None
    match = re.match(r"root_block|block\d/unit\d+", name)
    strided = re.match(r"root_block|block[234]/unit01/(b|a/proj)/", name)
    constants: dict[str, Any] = {"standardize_eps": ladder.architecture.standardize_eps} | {
        field: value
        for side in ladder.sides.values()
        for field in ("norm_eps", "standardize_eps")
        if (value := getattr(side, field)) is not None
    }
    site, stride = match[0] if match else LAST_SITE, 2 if strided else 1
    return Suspect(operation, what, site, name, kind, precision, stride, **constants)


def _operands(ladder: Ladder, question: Suspect) -> Arrays:
    """Returns the operands, and the gradient by the result, that the oracle has for the operation."""
    arguments = {"mixed": ladder.mixed_pictures(), "site": question.site}
    path = ladder.ask("reference", "fp64", "operations", **arguments).arrays.path
    recording = Recording.load(str(path), None)
    op = operations(question.site, ladder.architecture.layout)[question.name]
    read = ladder.ask("reference", "fp64", "weights").arrays
    found = {slot: recording.values[value] for slot, value in op.inputs.items()}
    found |= {slot: read[key] for slot, key in op.parameters.items()}
    result = re.sub(rf"{NORM}$", "relu", op.name)
    return {name: found[name] for name in LAYOUTS[question.kind] if name != "gradient"} | {
        "gradient": recording.gradients[result]
    }


@dataclasses.dataclass(frozen=True)
class Seen:
    """One attempt: its arrays, the answer of public functions in float64, and how the sides differ from it.

    Attributes:
        question: what was asked.
        line: the verdict on the two sides.
        apart: {role: (difference from the answer of the model's module, and of public functions)}, the largest
            difference relative to the answer's RMS.
        ran: {framework: how it ran the program}, for its script.
    """

    question: Suspect
    arrays: Arrays
    answer: np.ndarray
    line: Line
    apart: dict[str, tuple[float, float]]
    ran: dict[str, dict[str, Any]]

    @property
    def rounding(self) -> float:
        """The larger difference of public functions from the answer."""
        return max(public for _, public in self.apart.values())


def _seen(ladder: Ladder, question: Suspect, arrays: Arrays, programs: Path | None = None) -> Seen:
    """Judges both sides by the rule of the ladder, and writes their programs into a folder."""
    what, precision = question.what, question.precision
    path = ladder.folder / "operands.npz"
    _save(path, arrays)

    def asked(precision: str) -> dict[str, Any]:
        return {"question": dataclasses.replace(question, precision=precision).content(), "operands": path}

    with ladder.forgetting():
        answer = ladder.ask("reference", "fp64", "operation", **asked("fp64")).arrays[f"plain {what}"]
        written = {} if programs is None else {"programs": programs}
        answers = [ladder.ask(role, precision, "operation", **asked(precision), **written) for role in ROLES]
        sides = [side.arrays for side in answers]
        results, plain = ([side[name] for side in sides] for name in (what, f"plain {what}"))
        if precision == "fp64":
            lines = [verdict.in_float64("operation", what, answer, result) for result in results]
            line = max(lines, key=lambda line: (line.verdict == "bug", line.difference))
        else:
            disturbed = ladder.disturbed("operation", MULTIPLE * ladder.amplitude, **asked("fp64"))
            explained = [[side[f"plain {what}"]] for side in disturbed]
            look = verdict.look([answer], [results[0]], [results[1]], explained)
            line = verdict.calibrated("operation", what, precision, [look])
    apart = {
        role: (relative_difference(answer, result), relative_difference(answer, public))
        for role, result, public in zip(ladder.sides, results, plain, strict=True)
    }
    ran = {ladder.sides[role].framework: side.info for role, side in zip(ROLES, answers, strict=True)}
    return Seen(question, arrays, answer, line, apart, ran)


def _save(path: Path, arrays: Arrays) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _shrunk(ladder: Ladder, whole: Seen) -> Seen:
    """Returns the smallest attempt with the fault: every axis is halved as long as the fault persists, and rounding
    does not grow, as it does where a norm has two nearly equal values left."""
    question, seen, layout = whole.question, whole, LAYOUTS[whole.question.kind]
    most = GROWTH * max(whole.rounding, ULP[question.precision])
    sizes = {
        axis: size for name, axes in layout.items() for axis, size in zip(axes, whole.arrays[name].shape, strict=True)
    }
    pending = [axis for axis in "nhwio" if axis in sizes]
    while pending:
        axis = pending.pop(0)
        smaller = sizes | {axis: sizes[axis] // 2}
        if not smaller[axis] or (question.kind == "norm and ReLU" and smaller["i"] % GROUPS):
            continue
        try:
            attempt = _seen(ladder, question, _sliced(question, whole.arrays, smaller))
        except RunFailed:  # a module may be made for some sizes only
            continue
        if attempt.line.verdict == "bug" and attempt.rounding <= most:
            seen, sizes = attempt, smaller
            pending.append(axis)
    return seen


def _sliced(question: Suspect, arrays: Arrays, sizes: dict[str, int]) -> Arrays:
    """Returns the first rows, places and channels of the arrays."""
    stride = 2 if question.kind == "pool" else question.stride
    # padded by half of its size, a window fits at every `stride`-th place
    sizes = sizes | {y: (sizes[h] - 1) // stride + 1 for h, y in (("h", "y"), ("w", "x")) if h in sizes}
    return {
        name: np.ascontiguousarray(arrays[name][tuple(slice(sizes.get(axis)) for axis in axes)])
        for name, axes in LAYOUTS[question.kind].items()
    }


def _write(ladder: Ladder, whole: Seen, small: Seen, folder: Path, attestation: dict[str, Any]) -> None:
    """Writes the folder; nothing is there before all of it is."""
    question, made = whole.question, ladder.folder / "reproducer"
    shutil.rmtree(made, ignore_errors=True)  # of an earlier fault in the same comparison
    made.mkdir()
    _seen(ladder, question, small.arrays, made)
    content = question.content() | {f"{framework} ran with": info for framework, info in small.ran.items()}
    (made / "operation.json").write_text(json.dumps(content, indent=1) + "\n")
    _save(made / "inputs.npz", small.arrays | {"float64": small.answer})
    for framework in small.ran:
        source, name = SCRIPTS[framework]
        (made / name).write_text(resources.files(source).joinpath("script.py").read_text())
    (made / "README.md").write_text(_readme(ladder, whole, small, attestation))
    shutil.copytree(made, folder, dirs_exist_ok=True)


def _readme(ladder: Ladder, whole: Seen, small: Seen, attestation: dict[str, Any]) -> str:
    """Returns what was seen, by which versions, and how to see it again."""
    question = whole.question
    entries = attestation["sides"][question.precision]
    seen = [
        f"| {role}: {ladder.sides[role]} | {attempt.apart[role][0]:.3e} | {attempt.apart[role][1]:.3e} | {size} |"
        for size, attempt in (("as in the model", whole), ("as in this folder", small))
        for role in ROLES
    ]
    shapes = [
        f"| {name} | {list(whole.arrays[name].shape)} | {list(array.shape)} |" for name, array in small.arrays.items()
    ]
    versions = [
        f"- {role}: {entries[role]['device']}; "
        + ", ".join(f"{name} {version}" for name, version in entries[role]["versions"].items())
        for role in ROLES
    ]
    scripts = [f"python {SCRIPTS[kind][1]}" for kind in dict.fromkeys(side.framework for side in ladder.sides.values())]
    return README.format(
        question=question,
        architecture=ladder.architecture,
        seen="\n".join(seen),
        shapes="\n".join(shapes),
        versions="\n".join(versions),
        scripts="\n".join(scripts),
        command=shlex.join(["python", "-m", "parity", *sys.argv[1:]]),
    )
