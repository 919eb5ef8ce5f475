"""Converts weights to every kind of target, and prints each one's difference in float64: `python benchmarks/doors.py`.

Random weights are converted to every kind of target under every naming that it may have, read back or run, and, where
timm and transformers are installed, loaded and run by the library that the target is for. What bears the original
code's names is held against this project's own PyTorch reference, because the original code's loader is in no package.
The output is the Markdown table of docs/weights.md.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from bit_jax import convert
from bit_jax.conversion.conversion import Conversion, images
from bit_jax.conversion.kinds import KINDS
from bit_jax.export.targets import PROGRAMS
from parity.sides.inputs import random_weights

ARCHITECTURES = ("R50x1",)  # timm builds models from directories in the published sizes only
CLASSES = 10


def main(architectures: tuple[str, ...] = ARCHITECTURES) -> None:
    """Prints the table.

    Args:
        architectures: Architectures whose weights are drawn and converted.
    """
    print("| source | target | what was compared | largest float64 difference |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for architecture in architectures:
            source = folder / f"{architecture}.npz"
            random_weights(source, architecture, CLASSES, 0)
            _row(f"{architecture} .npz", "none", "this project's PyTorch reference, logits", _reference(source))
            for kind in KINDS:
                for naming in kind.namings:
                    _door(architecture, source, folder, kind, naming)
            for suffix, title in PROGRAMS.items():
                _program(architecture, source, folder / f"{architecture}{suffix}", title)


def _door(architecture: str, source: Path, folder: Path, kind, naming: str) -> None:
    target = folder / f"{architecture}-{naming}{(kind.suffixes or ('',))[0]}"
    said = convert.converted(str(source), target, naming=naming)
    for entry in said["compared"]:
        _row(f"{architecture} .npz", f"{kind.title}, {naming}", entry["what"], entry["difference"])


def _program(architecture: str, source: Path, target: Path, title: str) -> None:
    """Exports the model; docs/exporting.md has what the program makes of float32."""
    entry = convert.converted(str(source), target)["compared"][0]
    _row(f"{architecture} .npz", title, f"{entry['what']}, logits", entry["difference"])


def _reference(source: Path) -> float | None:
    """Returns how far the PyTorch reference, which reads the file by itself, is from the JAX model."""
    try:
        import torch

        from parity.in_torch import resnetv2
    except ImportError:
        return None
    model = resnetv2.load(str(source)).double()
    with torch.no_grad():
        theirs = model(torch.from_numpy(images().transpose(0, 3, 1, 2).copy())).numpy()
    return float(np.abs(theirs - Conversion.of(source).logits()).max())


def _row(source: str, target: str, what: str, difference: float | None) -> None:
    print(f"| {source} | {target} | {what} | {'-' if difference is None else f'{difference:.1e}'} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
