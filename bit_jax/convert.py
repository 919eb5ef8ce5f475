"""Converts weights, and proves it: `python -m bit_jax.convert SOURCE TARGET`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bit_jax.conversion.check import RANDOM_HEAD, Compared, require
from bit_jax.conversion.conversion import IMAGES, Conversion
from bit_jax.conversion.kinds import AUTO, Kind, kind_of
from bit_jax.conversion.place import require_apart, require_free
from bit_jax.export.check import SHAPES
from bit_jax.export.source import Source
from bit_jax.export.targets import BESIDE, CONTENTS, FORMATS, PROGRAMS, export
from bit_jax.formats.comment import is_eps
from bit_jax.formats.names import PEERS
from bit_jax.formats.weights import with_telling_head
from bit_jax.published import locate
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.files import replacing_path
from input_pipeline.flags import UserPath
from input_pipeline.terminal import printable


def main() -> None:
    tyro.cli(convert, description=__doc__)


def convert(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[tyro.conf.Positional[UserPath], tyro.conf.arg(metavar="TARGET")],
    format: Literal["auto", "official", "original", "timm", "huggingface"] = "auto",  # noqa: A002 (the flag's name)
    num_classes: int | None = None,
    standardize_eps: float | None = None,
    check: bool = True,
    weights_beside: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Writes a model for another library, as weights or as a program, and says by how much the two differ in float64.

    The target gets its name when it has been compared: read back by this project, and, where timm or transformers is
    installed, loaded and run by the library that it is for. If a comparison fails, no target is left.

    Args:
        source: Weights to convert: a file or directory in any format that --model reads, a published name, `embedded`,
            or hf:OWNER/NAME.
        target: Target to write, known by its suffix: .npz (official), .safetensors, .pth (also .pt, .bin, .tar; these
            need PyTorch), or a name without a suffix for a directory with config.json, as Hugging Face and timm load.
            The suffixes .stablehlo, .onnx and .savedmodel (a directory, for TensorFlow) write a program that turns
            images into logits.
        format: Naming of the arrays in the target. auto: official in an .npz, timm's in .safetensors, the original
            PyTorch code's in .pth, and Hugging Face's in a directory.
        num_classes: Size of a new head of zeros, in place of the source's or where the source has none.
        standardize_eps: Number that the model adds to the variance of kernels. Default: the value that the source
            records; otherwise 1e-8 for weights under timm's or Hugging Face's names, and 1e-10 for others.
        check: Compare the target with the source before it gets its name.
        weights_beside: Keep the weights of a .stablehlo or .onnx in a file beside it, as those above 2 GiB must be.
        overwrite: Replace a target that exists: a file, or a directory with nothing in it but what this command writes.
        json: Print one JSON object instead of sentences.
    """
    said = converted(
        source,
        target,
        naming=format,
        num_classes=num_classes,
        standardize_eps=standardize_eps,
        checked=check,
        beside=weights_beside,
        overwrite=overwrite,
    )
    _show(said, as_json=json)


def converted(
    source: str,
    target: Path,
    *,
    naming: str = AUTO,
    num_classes: int | None = None,
    standardize_eps: float | None = None,
    checked: bool = True,
    beside: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Does what `convert` says and returns what it prints.

    Raises:
        RequestError: the source cannot be read, or the target cannot be written.
        RunFailed: the target does not compute what the source does; it was removed.
    """
    place = Path(os.path.realpath(target))  # a symbolic link stays, and what it leads to is replaced
    program = PROGRAMS.get(place.suffix)
    if beside and place.suffix not in BESIDE:
        raise RequestError(f"--weights-beside is for {' and '.join(BESIDE)}, and {target} is none; leave it out")
    if program is not None and naming != AUTO:
        raise RequestError(f"--format {naming} names arrays of weights, and {target} is a program; leave it out")
    if num_classes is not None and num_classes < 1:
        raise RequestError(f"--num-classes is {num_classes}, and a head has at least 1; give the size of a new head")
    if standardize_eps is not None and not is_eps(standardize_eps):
        raise RequestError(f"--standardize-eps is {standardize_eps:g}; give a positive number below 1")
    kind = kind_of(place) if program is None else None
    naming = naming if kind is None else kind.naming(naming)
    require_free(target, kind.contents if kind else CONTENTS.get(place.suffix), overwrite=overwrite)
    written = [place] if kind else [place, *_weights_beside(place, beside=beside, overwrite=overwrite)]
    if kind is None:
        FORMATS[place.suffix].require(checked=checked)
    elif kind.require is not None:
        kind.require()
    path = locate.weight_file(source)
    for file in written:
        require_apart(file, path)
    conversion = Conversion.of(path, num_classes=num_classes, standardize_eps=standardize_eps)
    if note := conversion.architecture.note:
        print(note, file=sys.stderr)
    if kind is None:
        compared = _exported(conversion, place, beside=beside, checked=checked)
    else:
        compared = _written(conversion, place, kind, naming, checked=checked)
    return {
        "source": str(path),
        "target": str(target),
        "kind": kind.title if kind else program,
        "names": naming,
        "architecture": str(conversion.architecture),
        "standardize_eps": conversion.architecture.standardize_eps,
        "class_names_kept": conversion.class_names is not None and kind is not None and not kind.suffixes,
        "class_names_known": conversion.class_names is not None,
        "images": list(IMAGES) if kind else list(map(list, SHAPES)),
        "compared": [{"what": entry.what, "difference": entry.difference} for entry in compared],
    }


def _weights_beside(program: Path, *, beside: bool, overwrite: bool) -> list[Path]:
    """Returns the file, if any, for the weights of a program.

    Raises:
        RequestError: it exists and may not be replaced, or belongs to a program that is replaced by one without it.
    """
    if program.suffix not in BESIDE:
        return []
    file = program.with_name(program.name + BESIDE[program.suffix])
    if beside:
        require_free(file, None, overwrite=overwrite)
        return [file]
    if os.path.lexists(program) and os.path.lexists(file):
        raise RequestError(f"{file} lies beside {program}; add --weights-beside to replace both, or move it away")
    return []


def _written(conversion: Conversion, target: Path, kind: Kind, naming: str, *, checked: bool) -> list[Compared]:
    """Writes weights, and compares them before they get the target's name."""
    compared: list[Compared] = []
    with replacing_path(target) as temporary:
        kind.write(conversion, temporary, naming)
        if checked:
            print(f"comparing {kind.title} with its source in float64 ...", file=sys.stderr)
            compared = kind.check(conversion, temporary, naming)
            require(compared)
    return compared


def _exported(conversion: Conversion, target: Path, *, beside: bool, checked: bool) -> list[Compared]:
    """Writes a program, and compares it before it gets the target's name."""
    if checked:
        print(f"comparing {PROGRAMS[target.suffix]} with its source in float64 ...", file=sys.stderr)
    source = Source(conversion.architecture, conversion.arrays)
    found = export(source, target, beside=beside, checked=checked)
    if found is None:
        return []
    head = "" if with_telling_head(source.arrays) is source.arrays else f", {RANDOM_HEAD}"
    in_float32 = f"in float32{head}, RMSE {found.rmse:.2g} where the Flax model's is {found.own_rmse:.2g}"
    return [Compared(f"the same program in float64{head}", found.apart), Compared(in_float32, found.largest)]


def _show(said: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(said, indent=2))
        return
    named = "" if said["names"] not in PEERS else f" in the names of {PEERS[said['names']].title}"
    print(printable(f"{said['target']}: {said['kind']}{named}, {said['architecture']}"))
    for entry in said["compared"]:
        print(f"  {Compared(**entry)}")
    if not said["compared"]:
        print("  not compared with its source (--no-check)")
    if said["class_names_known"] and not said["class_names_kept"]:
        print("  the class names stay behind: only a directory has a place for them")


if __name__ == "__main__":
    sys.exit(exit_code(main))
