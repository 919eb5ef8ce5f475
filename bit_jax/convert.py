"""Converts weights, and proves it: `python -m bit_jax.convert SOURCE TARGET`."""

import contextlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bit_jax.conversion.check import Compared, require
from bit_jax.conversion.conversion import IMAGES, Conversion
from bit_jax.conversion.kinds import AUTO, kind_of
from bit_jax.formats.names import PEERS
from bit_jax.published import locate
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.flags import UserPath
from input_pipeline.terminal import printable


def main() -> None:
    tyro.cli(convert, description=__doc__)


def convert(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
    target: tyro.conf.Positional[UserPath],
    format: Literal["auto", "official", "original", "timm", "huggingface"] = "auto",  # noqa: A002 (the flag's name)
    num_classes: int | None = None,
    standardize_eps: float | None = None,
    check: bool = True,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Writes a model's weights for another library, and says by how much the two differ in float64.

    The target gets its name when it has been compared: read back by this project, and, where timm or transformers is
    installed, loaded and run by the library that it is for. If a comparison fails, no target is left.

    Args:
        source: Weights to convert: a file or directory in any format that --model reads, a published name, `embedded`,
            or hf:OWNER/NAME.
        target: Target to write, known by its suffix: .npz (official), .safetensors, .pth (also .pt, .bin, .tar; these
            need PyTorch), or a name without a suffix for a directory with config.json, as Hugging Face and timm load.
        format: Naming of the arrays in the target. auto: official in an .npz, timm's in .safetensors, the original
            PyTorch code's in .pth, and Hugging Face's in a directory.
        num_classes: Size of a new head of zeros, in place of the source's or where the source has none.
        standardize_eps: Number that the model adds to the variance of kernels. None: what the source says, else 1e-8
            for weights under timm's or Hugging Face's names and 1e-10 for others.
        check: Compare the target with the source before it gets its name.
        overwrite: Replace a target that exists.
        json: Print one JSON object instead of sentences.
    """
    said = converted(
        source,
        target,
        naming=format,
        num_classes=num_classes,
        standardize_eps=standardize_eps,
        checked=check,
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
    overwrite: bool = False,
) -> dict[str, Any]:
    """Does what `convert` says and returns what it prints.

    Raises:
        RequestError: the source cannot be read, or the target cannot be written.
        RunFailed: the target does not compute what the source does; it was removed.
    """
    kind = kind_of(target)
    naming = kind.naming(naming)
    if os.path.lexists(target) and not overwrite:
        raise RequestError(f"{target} exists; add --overwrite to replace it, or choose another name")
    path = locate.weight_file(source)
    if os.path.exists(target) and os.path.samefile(path, target):
        raise RequestError(f"{target} is the source itself; choose another name")
    conversion = Conversion.of(path, num_classes=num_classes, standardize_eps=standardize_eps)
    if note := conversion.architecture.note:
        print(note, file=sys.stderr)
    compared: list[Compared] = []
    with _replacing(target) as temporary:
        kind.write(conversion, temporary, naming)
        if checked:
            print(f"comparing {kind.title} with its source in float64 ...", file=sys.stderr)
            compared = kind.check(conversion, temporary, naming)
            require(compared)
    return {
        "source": str(path),
        "target": str(target),
        "kind": kind.title,
        "names": naming,
        "architecture": str(conversion.architecture),
        "standardize_eps": conversion.architecture.standardize_eps,
        "class_names_kept": conversion.class_names is not None and not kind.suffixes,
        "class_names_known": conversion.class_names is not None,
        "images": list(IMAGES),
        "compared": [{"what": entry.what, "difference": entry.difference} for entry in compared],
    }


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


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yields a path beside the target, which gets the target's name if nothing fails, and is removed otherwise."""
    # with the target's suffix, by which libraries know what a file is
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp{target.suffix}")
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    try:
        if not target.parent.is_dir():
            raise RequestError(f"{target.parent} is no directory; make it first")
        try:
            yield temporary
            _sync(temporary)
            if target.is_dir():  # a directory with something in it cannot be replaced in one step
                os.rename(target, old)
            os.replace(temporary, target)
        except OSError as error:
            raise RequestError(f"cannot write {target}: {error.strerror}; mend that and start again") from None
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        for path in (temporary, old):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Brings a file, or the files of a directory, to disk."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


if __name__ == "__main__":
    sys.exit(exit_code(main))
