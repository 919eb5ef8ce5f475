"""Datasets as batches with a mask: `open_source` finds the examples, `Loader` orders and batches them.

This package imports neither `bit_jax` nor `parity`, and holds what all three share: exit codes (`errors`, `exits`),
files and paths (`files`, `flags`), ownership of directories (`claims`), the limit on open files (`limits`) and terminal
output (`terminal`). Those seven modules import no array library, so every command starts fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from input_pipeline.examples import (
        CannotRead,
        DamagedImage,
        DatasetError,
        Source,
        descriptors,
        few_shot,
        fingerprint,
        relabelled,
        require_labels,
    )
    from input_pipeline.features import FeatureViews
    from input_pipeline.image_file import read_image_file
    from input_pipeline.limits import raise_descriptor_limit, require_descriptors
    from input_pipeline.loader import Batch, Loader
    from input_pipeline.preprocess import Views, native_area, typical_area
    from input_pipeline.sources import open_source

__all__ = [
    "Batch",
    "CannotRead",
    "DamagedImage",
    "DatasetError",
    "FeatureViews",
    "Loader",
    "Source",
    "Views",
    "descriptors",
    "few_shot",
    "fingerprint",
    "native_area",
    "open_source",
    "raise_descriptor_limit",
    "read_image_file",
    "relabelled",
    "require_descriptors",
    "require_labels",
    "typical_area",
]

_MODULES = {
    "examples": (
        "CannotRead",
        "DamagedImage",
        "DatasetError",
        "Source",
        "descriptors",
        "few_shot",
        "fingerprint",
        "relabelled",
        "require_labels",
    ),
    "features": ("FeatureViews",),
    "image_file": ("read_image_file",),
    "limits": ("raise_descriptor_limit", "require_descriptors"),
    "loader": ("Batch", "Loader"),
    "preprocess": ("Views", "native_area", "typical_area"),
    "sources": ("open_source",),
}


if not TYPE_CHECKING:  # type checkers read the imports above

    def __getattr__(name: str) -> Any:
        """Imports a name's module when it is first used: `preprocess` brings Numba, which many commands do without."""
        for module, names in _MODULES.items():
            if name in names:
                return getattr(importlib.import_module(f"input_pipeline.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
