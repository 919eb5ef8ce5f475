"""A linear probe: the head alone is trained, on features that the rest of the model computed before.

The features are those of `python -m bit_jax.predict --features`. The run is an ordinary one whose examples are rows of
features instead of images; what it leaves is the whole model again.
"""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import input_pipeline
from bit_jax.config import Config
from bit_jax.formats.sources import digest
from bit_jax.model.architecture import Architecture, HeadAlone
from input_pipeline.errors import RequestError
from input_pipeline.features import FEATURES, FeatureSource, open_features
from input_pipeline.resample import Method

ALIKE = ("sha256", "architecture", "size", "resize", "view", "precision")  # metadata of both splits' features


@dataclasses.dataclass(frozen=True)
class Probe:
    """The features that a head is trained on.

    Attributes:
        config: the run's flags, with the view of the images that the features are of.
        train, validation: the two splits; their labels are numbers of their own class names.
        channels: number of values of each row.
        metadata: what the features were computed with, see `input_pipeline.features.Features`.
    """

    config: Config
    train: input_pipeline.Source
    validation: input_pipeline.Source
    channels: int
    metadata: dict[str, Any]

    @classmethod
    def of(cls, cfg: Config) -> "Probe | None":
        """Opens both splits, or returns None if the dataset is none of features.

        Raises:
            RequestError: a file is missing or damaged, the two are not of the same model and view, or a flag has no
                meaning for features.
        """
        if cfg.data.dataset.partition(":")[0] != FEATURES:
            return None
        _refuse_flags(cfg)
        data = cfg.data
        train, of_train = open_features(data.dataset, data.train_split)
        validation, of_validation = open_features(data.dataset, data.eval_split)
        _require_alike(of_train, of_validation)
        metadata = of_train.metadata
        size, resize = metadata.get("size"), metadata.get("resize")
        if not isinstance(size, int) or size < 1 or resize not in get_args(Method):
            raise RequestError(
                f"{of_train.name} are of images of size {size}, resized by {resize}; final.npz's config.json can only "
                f"say {' or '.join(get_args(Method))}, so write the features again with --resize "
                f"{' or '.join(get_args(Method))}"
            )
        data = dataclasses.replace(data, resize_to=size, crop=size, resize=resize, flip=False)
        cfg = dataclasses.replace(cfg, data=data, optimizer=dataclasses.replace(cfg.optimizer, mixup=0.0))
        return cls(cfg, train, validation, of_train.channels, metadata)

    @property
    def views(self) -> input_pipeline.FeatureViews:
        return input_pipeline.FeatureViews(self.channels)

    @property
    def identity(self) -> dict[str, Any]:
        """What says of a continued run whether it goes on with these very rows, as JSON's types."""
        rows = {"train": self.train, "validation": self.validation}
        alike = {name: self.metadata.get(name) for name in ALIKE}
        return alike | {f"{name}_rows": input_pipeline.fingerprint(source) for name, source in rows.items()}

    @property
    def note(self) -> str:
        """A sentence for the log."""
        return (
            f"the head alone trains, on {self.channels:,} features of each image, whose view they decide: "
            f"{self.metadata.get('view')}; --crop, --resize-to, --resize and --flip do not matter"
        )

    def head(self, architecture: Architecture, weight_file: Path | None) -> HeadAlone:
        """Returns the head of the model that the features are of.

        Args:
            architecture, weight_file: those of --model, with a head for the classes.

        Raises:
            RequestError: the features are not those of this weight file.
        """
        assert weight_file is not None  # `of` refuses --init random
        made = f"{self.metadata.get('weights')} ({self.metadata.get('architecture')})"
        theirs, ours = self.metadata.get("sha256"), digest(weight_file)
        if (theirs, self.channels) != (ours, architecture.channels):
            raise RequestError(
                f"{self.train.name} are features of {made}, sha256 {str(theirs)[:12]}, and --model is {weight_file} "
                f"({architecture.name}), sha256 {ours[:12]}; give those weights as --model, or write the features again"
            )
        return HeadAlone(**vars(architecture))


def _refuse_flags(cfg: Config) -> None:
    if cfg.model.init == "random":
        raise RequestError(
            "--init random draws another body than the one whose features train the head; leave it out with --dataset "
            "features:"
        )
    if cfg.optimizer.mixup:
        raise RequestError(
            f"--mixup {cfg.optimizer.mixup:g} mixes images, and features of mixed images are not mixed features; "
            "give --mixup 0 with --dataset features:"
        )
    if cfg.additions.crop_style != "bit":
        raise RequestError(
            f"--crop-style {cfg.additions.crop_style} crops images, and features have none; leave it out"
        )


def _require_alike(train: FeatureSource, validation: FeatureSource) -> None:
    """Refuses features of two models, or of images that were resized in two ways."""
    differing = [
        f"{name} {train.metadata.get(name)} and {validation.metadata.get(name)}"
        for name in ALIKE
        if train.metadata.get(name) != validation.metadata.get(name)
    ]
    if train.channels != validation.channels:
        differing.append(f"{train.channels} and {validation.channels} channels")
    if differing:
        raise RequestError(
            f"{train.name} and {validation.name} were not computed alike ({'; '.join(differing)}); write both again "
            "with the same --weights, --size and --resize"
        )
