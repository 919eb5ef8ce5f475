"""A dataset of somebody's own, prepared by code that nobody can import afterwards."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), number, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write(data_dir: Path, version: str, *, examples: int, shards: int, config: str = "") -> None:
    """Prepares `own_pets` as array_record: the splits train-small and test, of so many examples and shards each."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "own_pets"
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version=version)] if config else []

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            features = {"image": image, "label": tfds.features.ClassLabel(names=CLASSES)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in ("train-small", "test")}

        def _generate_examples(self):
            for number in range(examples):
                yield number, {"image": io.BytesIO(jpeg(number)), "label": number % 2}

    Builder(data_dir=data_dir, config=config or None).download_and_prepare(
        download_dir=data_dir / "downloads",
        download_config=tfds.download.DownloadConfig(num_shards=shards),
        file_format="array_record",
    )
