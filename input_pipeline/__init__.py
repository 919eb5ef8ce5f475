"""Datasets as uint8 batches with a mask: `open_source` finds the examples, `Loader` orders and batches them."""

from input_pipeline.examples import DamagedImage, DatasetError, Source, few_shot, fingerprint
from input_pipeline.loader import Batch, Loader
from input_pipeline.preprocess import Views, native_area
from input_pipeline.sources import open_source

__all__ = [
    "Batch",
    "DamagedImage",
    "DatasetError",
    "Loader",
    "Source",
    "Views",
    "few_shot",
    "fingerprint",
    "native_area",
    "open_source",
]
