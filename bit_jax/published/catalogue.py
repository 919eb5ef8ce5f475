"""Lists every published file, with its architecture, number of classes and address."""

import dataclasses
import math
import os
from collections.abc import Iterator

from bit_jax.model.architecture import Architecture

BASE_URL = "https://storage.googleapis.com/bit_models"
ARCHITECTURES = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
VTAB_ARCHITECTURES = ("R50x1", "R101x1", "R50x3", "R101x3", "R152x4")

# The 19 VTAB-1k tasks by the names in the files, with their classes (Zhai et al., arXiv:1910.04867).
VTAB_TASKS = {
    "caltech101": 102,
    "cifar100": 100,
    "clevr-count": 8,
    "clevr-distance": 6,
    "diabetic_retinopathy": 5,
    "dmlab": 6,
    "dsprites-orientation": 16,
    "dsprites-xpos": 16,
    "dtd": 47,
    "eurosat": 10,
    "kitti-distance": 4,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "patch_camelyon": 2,
    "resisc45": 45,
    "smallnorb-azimuth": 18,
    "smallnorb-elevation": 9,
    "sun397": 397,
    "svhn": 10,
}

SLACK = 2  # no file is longer than its float32 parameters by this factor; what is longer is cut off


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """A weight file below `BASE_URL`."""

    name: str
    architecture: str
    num_classes: int
    path: str  # below the base address

    @property
    def url(self) -> str:
        """The address at the authors' bucket, or at the mirror that is set."""
        return f"{base_url()}/{self.path}"

    @property
    def promised(self) -> Architecture:
        """The architecture and number of classes that the name stands for."""
        return Architecture.parse(self.architecture, self.num_classes)

    @property
    def limit(self) -> int:
        """Bytes that no file of this architecture exceeds."""
        return SLACK * sum(4 * math.prod(shape) for shape in self.promised.layout.values())


def _published_files() -> Iterator[PublishedFile]:
    for architecture in ARCHITECTURES:
        for name, classes in (
            (f"BiT-S-{architecture}", 1000),
            (f"BiT-M-{architecture}", 21_843),
            (f"BiT-M-{architecture}-ILSVRC2012", 1000),
        ):
            yield PublishedFile(name, architecture, classes, f"{name}.npz")
    for architecture in VTAB_ARCHITECTURES:
        for run in range(3):
            for task, classes in VTAB_TASKS.items():
                name = f"BiT-M-{architecture}-run{run}-{task}"
                yield PublishedFile(name, architecture, classes, f"vtab/{name}.npz")
    for name in ("R50x1_224", "R50x1_160", "R152x2_T_224", "R152x2_T_384"):
        yield PublishedFile(name, name.split("_")[0], 1000, f"distill/{name}.npz")


CATALOGUE = {file.name: file for file in _published_files()}


def base_url() -> str:
    """Returns the address that files are fetched from: $BIT_JAX_MIRROR, or the authors' bucket."""
    return (os.environ.get("BIT_JAX_MIRROR") or BASE_URL).rstrip("/")


def lookup(model: str) -> PublishedFile | None:
    """Finds the published file of this name, of its address at the authors, or at the mirror as `list` prints it."""
    if model in CATALOGUE:
        return CATALOGUE[model]
    by_address = {f"{base}/{file.path}": file for file in CATALOGUE.values() for base in (BASE_URL, base_url())}
    return by_address.get(model)
